"""The store under stress: locks that leave nothing behind, replacing, full disks, and memory flat in the facts."""

import errno
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from test_cli import call
from test_results import labels, numbers, some
from tiny import FACTS, saved, tiny
from zarr.storage import LocalStore

from workbench.attribution import attribute
from workbench.results import RunDir, open_result, open_store, unwritten
from workbench.results.files import exclusive


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch, after: int, of: str = "") -> Iterator[list[str]]:
    """Let zarr write so many files (whose path has `of` in it), then find the disk full."""
    written: list[str] = []
    original = LocalStore.set

    async def set_(self, key, value):  # type: ignore[no-untyped-def]
        if len(written) >= after:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.extend([key] if of in key else [])
        await original(self, key, value)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "set", set_)
        yield written


# Locks


def test_no_lock_file_remains_after_work_a_refusal_or_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    with open_store(path, **labels()) as growing:
        assert names(tmp_path) == ["a.zarr", "a.zarr.lock"]
        with pytest.raises(ValueError, match="being written"), open_store(path, **labels()):
            pass
        assert names(tmp_path) == ["a.zarr", "a.zarr.lock"], "a refused writer leaves the lock of the other alone"
        growing.write(*some([0]))
    assert names(tmp_path) == ["a.zarr"]
    with pytest.raises(ValueError, match="other settings"), open_store(path, **labels(n_units=9)):
        pass
    with pytest.raises(ZeroDivisionError), open_store(path, **labels()):
        _ = 1 / 0
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    with pytest.raises(ValueError, match="not a result"), open_store(tmp_path / "photos", **labels()):
        pass
    assert names(tmp_path) == ["a.zarr", "photos"]
    run = RunDir(tmp_path / "run")
    with run.lock():
        assert names(run.path) == [".lock"]
    assert names(run.path) == []


def test_a_lock_that_is_taken_over_and_over_never_has_two_holders(tmp_path: Path) -> None:
    """Threads that take and delete one lock file as fast as they can; a counter shows whoever stands beside another."""
    inside, most, taken = 0, 0, 0

    def contend() -> None:
        nonlocal inside, most, taken
        for _ in range(300):
            try:
                with exclusive(tmp_path / "x.lock", "busy"):
                    inside += 1
                    most = max(most, inside)
                    taken += 1
                    inside -= 1
            except ValueError:
                pass

    threads = [threading.Thread(target=contend) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert taken >= 300
    assert names(tmp_path) == []


# Replacing


def test_replacing_keeps_the_old_result_until_the_first_write(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    with open_store(path, **labels()) as growing:
        growing.write(*some([0, 1, 2, 3, 4]))
    with pytest.raises(KeyboardInterrupt), open_store(path, **labels(n_units=2), resume=False) as growing:
        assert growing.todo == [0, 1, 2, 3, 4]
        assert growing.dataset(partial=True).sizes == {"fact": 0, "layer": 3, "unit": 2}
        with pytest.raises(ValueError, match="not finite"):
            growing.write([0], np.full((1, 3, 2), np.nan), np.zeros((1, 3)), np.zeros(1))
        raise KeyboardInterrupt
    assert np.array_equal(open_result(path)["score"].values, numbers()[0])
    score, gap, prob = numbers(n_units=2)
    with open_store(path, **labels(n_units=2), resume=False) as growing:
        growing.write([3], score[[3]], gap[[3]], prob[[3]])
        assert open_result(path, partial=True)["fact"].values.tolist() == ["capital/länd 3"]
        rest = [0, 1, 2, 4]
        growing.write(rest, score[rest], gap[rest], prob[rest])
        assert np.array_equal(growing.dataset()["score"].values, score)
    assert np.array_equal(open_result(path)["score"].values, score)
    assert names(tmp_path) == ["a.zarr"]


def test_a_disk_that_fills_while_replacing_leaves_the_old_result(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "a.zarr"
    with open_store(path, **labels()) as growing:
        growing.write(*some([0, 1, 2, 3, 4]))
    for after in (0, 3, 12):
        with full_disk(monkeypatch, after), pytest.raises(OSError, match="The disk is full"):
            with open_store(path, **labels(), resume=False) as growing:
                growing.write(*some([0, 1]))
        assert np.array_equal(open_result(path)["score"].values, numbers()[0])
    assert names(tmp_path) == ["a.zarr"]


def test_what_is_unwritten_is_what_a_store_would_do(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    assert unwritten(path, **labels()) == unwritten(None, **labels()) == [0, 1, 2, 3, 4]
    assert names(tmp_path) == []
    with open_store(path, **labels()) as growing:
        growing.write(*some([1, 3]))
        assert unwritten(path, **labels()) == growing.todo == [0, 2, 4]
    assert unwritten(path, **labels(), resume=False) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"the units \(4 stored, now 9\)"):
        unwritten(path, **labels(n_units=9))


# A full disk, through `attribute` and the command


def test_a_full_disk_loses_nothing_and_the_same_call_goes_on(tmp_path: Path, monkeypatch) -> None:
    model, path = tiny("llama"), tmp_path / "a.zarr"
    options = {"steps": 2, "batch_size": 2, "progress": False}
    expected = attribute(model, FACTS, **options)
    with (
        full_disk(monkeypatch, after=3, of="done/c"),
        pytest.raises(OSError, match=r"^The disk is full while writing .*a\.zarr"),
    ):
        attribute(model, FACTS, out=path, **options)
    kept = open_result(path, partial=True)
    assert 0 < kept.sizes["fact"] < len(FACTS)
    np.testing.assert_array_equal(kept["score"], expected.sel(fact=kept["fact"])["score"])
    resumed = attribute(model, FACTS, out=path, **options)
    np.testing.assert_array_equal(resumed["score"], expected["score"])
    assert names(tmp_path) == ["a.zarr"]


def test_a_full_disk_is_one_line_of_the_command(tmp_path: Path, monkeypatch, capsys) -> None:
    command = ["attribute", "--model", str(saved(tmp_path / "model")), "--facts", str(FACTS.save(tmp_path / "f.jsonl")),
               "--out", str(tmp_path / "a.zarr"), "--steps", "2", "--batch-size", "2", "-q"]  # fmt: skip
    capsys.readouterr()
    with full_disk(monkeypatch, after=3, of="done/c"):
        assert call(monkeypatch, *command) == 1
    printed = capsys.readouterr().err.strip()
    assert len(printed.splitlines()) == 1
    assert "The disk is full" in printed
    assert 0 < open_result(tmp_path / "a.zarr", partial=True).sizes["fact"] < len(FACTS)
    assert call(monkeypatch, *command) == 0
    assert open_result(tmp_path / "a.zarr").sizes["fact"] == len(FACTS)


# Memory


MEASURE = """
import re, sys
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(1)
from tiny import random_model, tokenizer
from workbench.attribution import attribute, scoring
from workbench.facts import FactSet
from workbench.models import load_model

model = load_model(random_model("llama", intermediate_size=8192), tokenizer=tokenizer())
words = "one two three four five six seven eight red blue green hot cold big small gold".split()
def facts(n):
    numbers = [[words[i // 256 % 16], words[i // 16 % 16], words[i % 16]] for i in range(n)]
    return FactSet.from_records([{"id": str(i), "prompt": "the " + " ".join(three) + " in", "answer": "Paris"}
                                 for i, three in enumerate(numbers)])
def high():  # of this program alone: getrusage would count what started it
    return int(re.search("VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1))
def peak(n, out):
    attribute(model, facts(n), method="grad_x_act", unit="neuron", batch_size=25, out=out, progress=False)
    return high()
few, many = peak(50, sys.argv[1] + "/few.zarr"), peak(400, sys.argv[1] + "/many.zarr")
def stop(*args):
    raise KeyboardInterrupt
scoring.score_batch = stop  # the room for a result in memory is taken before the first fact
try:
    peak(2000, None)
except KeyboardInterrupt:
    print(few, many, high())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_four_hundred_facts_take_the_memory_of_fifty(tmp_path: Path) -> None:
    """High-water marks of one process, in that order; the negative control keeps a result of 2,000 facts in memory."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), str(Path(__file__).parent)],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    few, many, in_memory = map(int, done.stdout.split())
    assert many <= 1.1 * few
    assert in_memory > 1.1 * few

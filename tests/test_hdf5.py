"""LoKI's HDF5 files: read as its own selection reads them, written as its own scripts write them."""

import builtins
import errno
import json
import shutil
import signal
import threading
import time
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest
from test_cli import call
from test_results import attribution
from test_store import full_disk, names

from workbench.attribution import by_fact
from workbench.facts import FactSet
from workbench.results import (
    check_asked,
    export_hdf5,
    hdf5,
    import_hdf5,
    open_result,
    save_result,
    validate_attribution,
)
from workbench.selection import select

RNG = np.random.default_rng(0)
SCORES = RNG.normal(size=(7, 3, 20)).astype(np.float16)
METADATA = {
    "model_name": "some/model", "model_type": "llama", "num_layers": 3, "hidden_size": 20, "ig_steps": 7,
    "ig_method": "riemann_trapezoid", "seed": 42, "dataset": "MMLU", "config": json.dumps({"a": [1]}),
}  # fmt: skip


def theirs(path: Path, scores: np.ndarray = SCORES, **metadata: object) -> Path:
    """A file as LoKI's format description has it, grown sample by sample."""
    with h5py.File(path, "w") as file:
        shape = scores.shape[1:]
        array = file.create_dataset(
            "dataset", (0, *shape), maxshape=(None, *shape), dtype=scores.dtype, chunks=True, compression="gzip"
        )
        for row, score in enumerate(scores):
            array.resize(row + 1, axis=0)
            array[row] = score
        array.attrs.update({f"metadata_{name}": value for name, value in metadata.items()})
    return path


@pytest.mark.parametrize("on_disk", [True, False])
def test_their_file_becomes_a_result(tmp_path: Path, on_disk: bool, monkeypatch) -> None:
    monkeypatch.setattr(hdf5, "BYTES_AT_ONCE", 2 * 4 * 3 * 20)  # two samples at a time
    ds = import_hdf5(theirs(tmp_path / "kva.h5", **METADATA), tmp_path / "a.zarr" if on_disk else None)
    validate_attribution(ds)
    assert np.array_equal(ds["score"].values, SCORES.astype(np.float32))
    assert ds["score"].dtype == np.float32
    assert ds["fact"].values.tolist() == [f"sample/{i}" for i in range(7)]
    assert np.isnan(ds["gap"].values).all()
    assert np.isnan(ds["target_prob"].values).all()
    said = {name: ds.attrs[name] for name in ("unit", "method", "steps", "rule", "baseline", "scope", "objective")}
    assert said == {"unit": "node", "method": "loki-code", "steps": 7, "rule": "riemann_trapezoid", "baseline": "blank",
                    "scope": "all", "objective": "prob"}  # fmt: skip
    assert ds.attrs["notes"]["loki"]["model_name"] == "some/model"
    assert ds.attrs["notes"]["loki"]["config"] == {"a": [1]}


def test_a_file_of_the_first_version_says_nothing_of_itself(tmp_path: Path) -> None:
    ds = import_hdf5(theirs(tmp_path / "old.h5", SCORES.astype(np.float32)), unit="neuron")
    assert (ds.attrs["unit"], ds.attrs["method"], ds.attrs["steps"]) == ("neuron", "unknown", "unknown")


def test_selection_from_their_file_is_selection_from_the_numbers(tmp_path: Path) -> None:
    ds = import_hdf5(theirs(tmp_path / "kva.h5", **METADATA), tmp_path / "a.zarr")
    k = 2  # 10% of 20 nodes
    counts = np.zeros((3, 20), int)
    for sample in SCORES:
        for layer, row in enumerate(sample):
            counts[layer, np.argsort(row, kind="stable")[:k]] += 1
    for layer, rows in enumerate(select(ds, quota=10).positions()):
        least = np.sort(counts[layer])[-k]
        assert len(rows) == k
        assert all(counts[layer, row] >= least for row in rows)
    mirrored = import_hdf5(theirs(tmp_path / "minus.h5", -SCORES, **METADATA))
    assert select(mirrored, quota=10).positions() != select(ds, quota=10).positions()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_ours_goes_out_and_comes_back(tmp_path: Path, dtype: str) -> None:
    ds = attribution()
    path = export_hdf5(ds, tmp_path / "deep" / "ours.h5", dtype=dtype)
    assert names(path.parent) == ["ours.h5"]
    with h5py.File(path) as file:  # what LoKI's selection reads, and what its writers would go on with
        array = file["dataset"]
        assert array.shape == ds["score"].shape
        assert array.dtype == np.dtype(dtype)
        assert array.maxshape[0] is None
        assert array.compression == "gzip"
        assert array.attrs["metadata_hidden_size"] == ds.sizes["unit"]
        assert array.attrs["metadata_ig_method"] == "riemann_middle"
        assert np.array_equal(array[:], ds["score"].values.astype(dtype))
    back = import_hdf5(path, tmp_path / "back.zarr")
    validate_attribution(back)
    assert np.array_equal(back["score"].values, ds["score"].values.astype(dtype).astype(np.float32))
    assert np.array_equal(back["score"].values, ds["score"].values) == (dtype == "float32")
    for name in ("fact", "relation", "gap", "target_prob"):
        assert np.array_equal(back[name].values, ds[name].values)
    assert {name: value for name, value in back.attrs.items() if name != "imported"} == ds.attrs


@pytest.mark.parametrize("name", ["text", "prompt_text"])
def test_what_was_asked_goes_out_and_comes_back(tmp_path: Path, name: str) -> None:
    ds = attribution()
    texts = [f"é{i}" for i in range(ds.sizes["fact"])]
    known = ("fact", texts) if name == "text" else (("fact", "prompt"), [[text, ""] for text in texts])
    path = export_hdf5(ds.assign_coords({name: known}), tmp_path / "ours.h5")
    for out in (None, tmp_path / "a.zarr"):
        back = import_hdf5(path, out)
        assert [one for one in ("text", "prompt_text") if one in back.coords] == [name]
        assert back[name].dims == ds.assign_coords({name: known})[name].dims
        assert back[name].values.tolist() == known[1]
        asked = dict(zip(back["fact"].values, texts, strict=True))
        check_asked(back, asked)
        if name == "text":
            with pytest.raises(ValueError, match="of another prompt or answer"):
                check_asked(back, asked | {back["fact"].values[1]: "other"})
    with h5py.File(path, "a") as file:  # as it would stand in a file of theirs
        del file["dataset"].attrs["metadata_workbench"]
    assert name not in import_hdf5(path).coords


def test_the_number_of_prompts_goes_out_and_comes_back(tmp_path: Path) -> None:
    single = attribution()
    prompts = single.assign_coords(fact=["a#0", "b#0", "a#1", "b#1", "a#2"])
    ds, place = by_fact(prompts), tmp_path / "a.zarr"
    path = export_hdf5(open_result(save_result(ds, tmp_path / "means.zarr")), tmp_path / "ours.h5")
    for back in (import_hdf5(path), import_hdf5(path, place), import_hdf5(path, place)):
        assert set(back.data_vars) == set(ds.data_vars)
        assert back["n_prompts"].dtype == ds["n_prompts"].dtype == np.int64
        for name in ds.data_vars:
            assert back[name].dims == ds[name].dims
            assert np.array_equal(back[name].values, ds[name].values)
    (place / "n_prompts" / "c" / "0").unlink()
    with pytest.raises(ValueError, match=r"damaged: its labels \(n_prompts\)"):
        open_result(place)
    assert import_hdf5(path, place)["n_prompts"].values.tolist() == [3, 2]
    shutil.rmtree(place / "n_prompts")  # as imports were before it was kept
    assert "n_prompts" not in open_result(place)
    assert import_hdf5(path, place)["n_prompts"].values.tolist() == [3, 2]
    with h5py.File(path, "a") as file:
        del file["n_prompts"]
    assert "n_prompts" not in import_hdf5(path)
    with h5py.File(path, "a") as file:  # as it might stand in a file of theirs
        file["n_prompts"] = ["some", "text"]
    assert "n_prompts" not in import_hdf5(path)


def test_samples_get_the_names_of_the_facts(tmp_path: Path) -> None:
    path = theirs(tmp_path / "kva.h5")
    ds = import_hdf5(path, ids=list("abcdefg"), relations=["r"] * 7, fact_digest="d")
    assert ds["fact"].values.tolist() == list("abcdefg")
    assert ds["relation"].values.tolist() == ["r"] * 7
    assert ds.attrs["fact_digest"] == "d"
    with pytest.raises(ValueError, match="holds 7 samples, but 2 facts were given"):
        import_hdf5(path, ids=["a", "b"])


def test_an_import_that_was_cut_short_goes_on(tmp_path: Path, monkeypatch) -> None:
    path = theirs(tmp_path / "kva.h5", **METADATA)
    monkeypatch.setattr(hdf5, "BYTES_AT_ONCE", 1)
    with full_disk(monkeypatch, after=4, of="done/c"), pytest.raises(OSError, match="The disk is full"):
        import_hdf5(path, tmp_path / "a.zarr")
    assert open_result(tmp_path / "a.zarr", partial=True).sizes["fact"] == 4
    assert np.array_equal(import_hdf5(path, tmp_path / "a.zarr")["score"].values, SCORES.astype(np.float32))
    theirs(path, -SCORES, **METADATA)
    with pytest.raises(ValueError, match="differs in imported"):
        import_hdf5(path, tmp_path / "a.zarr")


def test_memory_is_flat_in_the_number_of_samples(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(hdf5, "BYTES_AT_ONCE", 2**18)

    def peak(n: int, out: Path | None) -> int:
        path = theirs(tmp_path / f"{n}.h5", np.ones((n, 4, 1024), np.float16))
        tracemalloc.start()
        export_hdf5(import_hdf5(path, out), tmp_path / "back.h5")
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    peak(16, tmp_path / "warm.zarr")
    few, many = peak(40, tmp_path / "few.zarr"), peak(200, tmp_path / "many.zarr")
    added = 160 * 4 * 1024 * 4
    assert many - few < added / 5
    assert peak(200, None) - few > added * 0.9


def test_what_does_not_fit_is_one_sentence(tmp_path: Path) -> None:
    def file(name: str, **arrays: np.ndarray) -> Path:
        with h5py.File(tmp_path / name, "w") as opened:
            for key, value in arrays.items():
                opened.create_dataset(key, data=value)
        return tmp_path / name

    (tmp_path / "text.h5").write_text("no")
    bad = SCORES.copy()
    bad[4, 0, 0] = np.inf
    for path, message in [
        (file("other.h5", scores=SCORES, x=np.zeros(2)), r"no array `dataset`.*found scores, x"),
        (file("flat.h5", dataset=SCORES[0]), r"`dataset` is float16 of shape \(3, 20\)"),
        (file("whole.h5", dataset=np.zeros((1, 2, 3), int)), "`dataset` is int64"),
        (file("none.h5", dataset=np.zeros((0, 2, 3))), "holds no scores"),
        (file("inf.h5", dataset=bad), "sample 4 has scores that are NaN or infinite"),
        (tmp_path / "text.h5", "not a readable HDF5 file"),
    ]:
        with pytest.raises(ValueError, match=message):
            import_hdf5(path)
    with pytest.raises(FileNotFoundError, match="There is no file"):
        import_hdf5(tmp_path / "nowhere.h5")
    with pytest.raises(ValueError, match="Only an attribution result"):
        export_hdf5(attribution().drop_vars("score"), tmp_path / "x.h5")
    with pytest.raises(ValueError, match="do not fit float16"):
        export_hdf5(attribution() * 1e6, tmp_path / "x.h5", dtype="float16")
    assert not (tmp_path / "x.h5").exists()


def test_what_will_not_fit_on_the_disk_is_refused_before_a_folder_is_made(tmp_path: Path, monkeypatch) -> None:
    path = export_hdf5(attribution(), tmp_path / "a.h5")
    n_facts, n_layers, n_units = attribution()["score"].shape
    need = 4 * n_facts * n_layers * (n_units + 1)
    monkeypatch.setattr("workbench.results.files.free_bytes", lambda _: need - 1)
    with pytest.raises(ValueError, match=r"The scores take .* are free where .*b\.zarr"):
        import_hdf5(path, tmp_path / "b.zarr")
    assert names(tmp_path) == ["a.h5"]
    monkeypatch.setattr("workbench.results.files.free_bytes", lambda _: need)
    assert import_hdf5(path, tmp_path / "b.zarr").sizes["fact"] == n_facts


@pytest.mark.parametrize("room", [0, 96, 500, 1000, 2000, 3000, 4000])
def test_a_full_disk_leaves_the_earlier_file(room: int, tmp_path: Path, monkeypatch) -> None:
    path = export_hdf5(attribution(), tmp_path / "a.h5")
    before = path.read_bytes()
    assert len(before) > 4000
    put, written = hdf5.UnfailingFile._put, [0]

    def full(self, data) -> int:
        written[0] += len(data)
        if written[0] > room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return put(self, data)

    monkeypatch.setattr(hdf5.UnfailingFile, "_put", full)
    with pytest.raises(OSError, match="The disk is full while writing"):
        export_hdf5(attribution(), path)
    assert path.read_bytes() == before
    assert names(tmp_path) == ["a.h5"]


def test_interrupts_while_hdf5_writes_leave_the_earlier_file(tmp_path: Path, monkeypatch) -> None:
    """An interrupt in the code that HDF5 calls would end the process: that code runs in a thread of its own.

    A second one, which ends the waiting for that thread, must not close the file under it.
    """
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("interrupts reach the main thread only")
    path = export_hdf5(attribution(), tmp_path / "a.h5")
    before, put = path.read_bytes(), hdf5.UnfailingFile._put
    raised, done = [], []

    def interrupt(*_: object) -> None:
        if len(raised) < 2:
            raised.append(True)
            raise KeyboardInterrupt

    def slow(self, data) -> int:
        for _ in range(2):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            time.sleep(0.2)
        done.append((self.closed, put(self, data)))
        return done[-1][1]

    monkeypatch.setattr(hdf5.UnfailingFile, "_put", slow)
    earlier = signal.signal(signal.SIGINT, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            export_hdf5(attribution(), path)
    finally:
        end = time.monotonic() + 10
        while not done and time.monotonic() < end:  # both interrupts have come by then
            time.sleep(0.05)
        signal.signal(signal.SIGINT, earlier)
    assert len(raised) == 2
    assert [closed for closed, _ in done] == [False]  # and nothing reaches the disk after the interrupt
    assert path.read_bytes() == before
    assert names(tmp_path) == ["a.h5"]


def test_a_file_that_names_its_facts_takes_no_others(tmp_path: Path) -> None:
    path, whole = export_hdf5(attribution(), tmp_path / "a.h5"), attribution()
    ids, relations = whole["fact"].values.tolist(), whole["relation"].values.tolist()
    own = import_hdf5(path, ids=ids, relations=relations, fact_digest=whole.attrs["fact_digest"])
    assert own["fact"].values.tolist() == ids
    with pytest.raises(ValueError, match=f"Sample 0 has the fact '{ids[0]}' in the file, and '{ids[-1]}' was given"):
        import_hdf5(path, ids=ids[::-1])
    with pytest.raises(ValueError, match=r"Sample 0 has the relation .* in the file, and 'other' was given"):
        import_hdf5(path, relations=["other"] * len(ids))
    with pytest.raises(ValueError, match=r"a\.h5 holds scores of other facts, and names them itself: leave the facts"):
        import_hdf5(path, ids=ids, fact_digest="other")


def test_made_up_names_are_no_names(tmp_path: Path) -> None:
    """What was read from LoKI's file and written again can still be named."""
    again = export_hdf5(import_hdf5(theirs(tmp_path / "a.h5", **METADATA)), tmp_path / "b.h5")
    assert import_hdf5(again)["fact"].values[0] == "sample/0"
    ids = [f"f{i}" for i in range(len(SCORES))]
    named = import_hdf5(again, ids=ids, relations=["r"] * len(ids), fact_digest="d")
    assert (named["fact"].values.tolist(), named.attrs["fact_digest"]) == (ids, "d")
    with pytest.raises(ValueError, match="'x' is given more than once"):
        import_hdf5(again, ids=["x"] * len(ids))


def test_without_h5py_one_sentence_says_what_to_install(tmp_path: Path, monkeypatch, capsys) -> None:
    real = builtins.__import__

    def without(name: str, *rest: object, **more: object) -> object:
        if name == "h5py":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    assert call(monkeypatch, "convert", str(tmp_path / "a.h5"), str(tmp_path / "a.zarr")) == 1
    assert "pip install knowledge-workbench[hdf5]" in capsys.readouterr().err


def test_the_command_converts_both_ways(tmp_path: Path, monkeypatch, capsys) -> None:
    save_result(attribution(), tmp_path / "a.zarr", kind="attribution")
    assert call(monkeypatch, "convert", str(tmp_path / "a.zarr"), str(tmp_path / "a.h5")) == 0
    assert call(monkeypatch, "convert", str(tmp_path / "a.h5"), str(tmp_path / "b.zarr")) == 0
    assert "5 facts, 3 layers, 4 nodes a layer" in capsys.readouterr().out
    assert open_result(tmp_path / "b.zarr").load().equals(attribution())
    facts = FactSet.from_records([{"id": f"f{i}", "prompt": f"p{i}", "answer": "x"} for i in range(len(SCORES))])
    listed = str(facts.save(tmp_path / "facts.jsonl"))
    loki = str(theirs(tmp_path / "loki.h5", **METADATA))
    assert call(monkeypatch, "convert", loki, str(tmp_path / "c.zarr"), "--facts", listed) == 0
    assert tuple(open_result(tmp_path / "c.zarr")["fact"].values) == facts.ids
    assert call(monkeypatch, "convert", str(tmp_path / "a.h5"), str(tmp_path / "c.h5")) == 1
    assert "must end in .h5, and only one" in capsys.readouterr().err

"""A result whose files were damaged: one sentence on reading, and the same call computes what is lost and no more."""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from command import call
from tiny import FACTS, saved, tiny

from workbench.attribution import attribute, score_batch
from workbench.facts import FactSet
from workbench.planning import plan
from workbench.results import open_result, open_store, store

OPTIONS: dict[str, Any] = {"method": "grad_x_act", "progress": False, "batch_size": 1}
HOW: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
    "altered": lambda path: path.write_bytes(path.read_bytes()[:-5] + b"\x07" + path.read_bytes()[-4:]),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole result, with one fact in a file of scores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "CHUNK_BYTES", 1)
        place = tmp_path_factory.mktemp("whole") / "a.zarr"
        attribute(tiny("llama"), FACTS, out=place, **OPTIONS)
    return place


@pytest.fixture
def path(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the whole result, to be damaged."""
    monkeypatch.setattr(store, "CHUNK_BYTES", 1)
    return shutil.copytree(whole, tmp_path / "a.zarr")


@cache
def expected() -> xr.Dataset:
    """The same attribution in memory."""
    return attribute(tiny("llama"), FACTS, **OPTIONS)


def computed_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The facts that the same call computes, after which the result is whole."""
    seen: list[str] = []

    def scored(model: Any, facts: Any, *rest: Any) -> Any:
        seen.extend(fact.fact_id for fact in facts)
        return score_batch(model, facts, *rest)

    monkeypatch.setattr("workbench.attribution.scoring.score_batch", scored)
    planned = plan(tiny("llama"), FACTS, out=path, **{k: v for k, v in OPTIONS.items() if k != "progress"})
    ds = attribute(tiny("llama"), FACTS, out=path, **OPTIONS)
    assert planned.facts == len(seen)
    for name in ("score", "gap", "target_prob"):
        np.testing.assert_array_equal(ds[name], expected()[name])
    return seen[: planned.facts]


@pytest.mark.parametrize("how", HOW)
def test_damaged_scores_are_said_and_computed_again(how: str, path: Path, monkeypatch, caplog) -> None:
    HOW[how](path / "score" / "c" / "2" / "0" / "0")
    with pytest.raises(ValueError, match="checksum" if how == "altered" else "of 1 facts, the first 'kenya', cannot"):
        open_result(path)["score"].load()
    assert computed_again(path, monkeypatch) == ["kenya"]
    assert "is damaged: 7 of its facts can be read" in caplog.text
    assert np.isfinite(open_result(path)["score"]).all()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", ["gap", "target_prob"])
def test_damaged_gaps_and_probabilities_are_said_and_computed_again(how: str, name: str, path: Path, monkeypatch):
    HOW[how](next(file for file in (path / name / "c").rglob("*") if file.is_file()))
    with pytest.raises(ValueError, match=r"a\.zarr is damaged: the numbers of 8 facts"):
        open_result(path)
    assert sorted(computed_again(path, monkeypatch)) == sorted(FACTS.ids)


@pytest.mark.parametrize("how", ["cut", "empty", "altered"])
def test_marks_that_cannot_be_read_follow_from_the_numbers(how: str, path: Path, monkeypatch) -> None:
    HOW[how](path / "done" / "c" / "0")
    with pytest.raises(ValueError, match=r"a\.zarr is damaged"):
        open_result(path)
    assert computed_again(path, monkeypatch) == []


def test_what_is_whole_is_left_as_it_is(path: Path, monkeypatch, caplog) -> None:
    """Negative control."""
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()}
    assert computed_again(path, monkeypatch) == []
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()} == before
    assert "damaged" not in caplog.text


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", ["fact", "relation", "text", "layer", "unit"])
def test_damaged_labels_are_said_and_written_anew(how: str, name: str, path: Path, monkeypatch, caplog) -> None:
    before = open_result(path).load()
    HOW[how](path / name / "c" / "0")
    with pytest.raises(
        ValueError, match=rf"a\.zarr is damaged: its labels \({name}\) are missing or cannot be read; run"
    ):
        open_result(path)
    assert computed_again(path, monkeypatch) == []
    assert f"its labels {name} are written anew" in caplog.text
    assert open_result(path).identical(before)


def test_labels_and_numbers_that_are_lost_together_come_back(path: Path, monkeypatch) -> None:
    shutil.rmtree(path / "fact")
    HOW["gone"](path / "relation" / "c" / "0")
    HOW["cut"](path / "score" / "c" / "2" / "0" / "0")
    with pytest.raises(ValueError, match=r"its labels \(fact, relation\) are missing"):
        open_result(path)
    assert computed_again(path, monkeypatch) == ["kenya"]


def test_labels_of_other_facts_are_not_written(path: Path) -> None:
    """Negative control: as many facts, but others."""
    HOW["gone"](path / "fact" / "c" / "0")
    others = FactSet(FACTS.name, FACTS.facts[::-1])
    with pytest.raises(ValueError, match="differs in fact_digest"):
        attribute(tiny("llama"), others, out=path, **OPTIONS)
    with open_store(path.with_name("b.zarr"), ids=["a"], relations=["r"], n_layers=1, n_units=1, attrs={}):
        HOW["gone"](path.with_name("b.zarr") / "fact" / "c" / "0")
    with (
        pytest.raises(ValueError, match=r"its labels \(fact\)"),
        open_store(path.with_name("b.zarr"), ids=["b"], relations=["r"], n_layers=1, n_units=1, attrs={}),
    ):
        pass


def test_a_result_without_the_layout_of_its_numbers_is_one_sentence(path: Path) -> None:
    shutil.rmtree(path / "score")
    for read in (lambda: open_result(path), lambda: attribute(tiny("llama"), FACTS, out=path, **OPTIONS)):
        with pytest.raises(ValueError, match=r"is damaged: it does not say how .* start it anew with resume=False"):
            read()
    assert attribute(tiny("llama"), FACTS, out=path, resume=False, **OPTIONS).sizes["fact"] == 8


def test_the_command_says_it_in_one_line(path: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    model, facts = saved(tmp_path / "model"), FACTS.save(tmp_path / "f.jsonl")
    shutil.rmtree(path)
    command = ["attribute", "--model", model, "--facts", facts, "--out", path, "--method", "grad_x_act", "-q"]
    assert call(monkeypatch, *command) == 0
    for how in HOW:
        capsys.readouterr()
        HOW[how](path / "score" / "c" / "1" / "0" / "0")
        assert call(monkeypatch, "select", path, "--out", tmp_path / "rows.json") == 1
        printed = capsys.readouterr().err.strip()
        assert printed.startswith("workbench: ")
        assert "is damaged" in printed
        assert len(printed.splitlines()) == 1
        assert call(monkeypatch, *command) == 0
    assert call(monkeypatch, "select", path, "--out", tmp_path / "rows.json") == 0

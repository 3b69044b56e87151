"""The benchmark of selections runs, its loop is the published rule, and its figures are what the children say."""

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scripts import script

from workbench.results import open_result
from workbench.selection import select


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return script("benchmarks", "selection")


def test_a_smoke_run_measures_every_way(bench: ModuleType, tmp_path: Path) -> None:
    written = bench.main(["--smoke", "--out", str(tmp_path), "--scratch", str(tmp_path)])
    found = json.loads(written.read_text(encoding="utf-8"))
    assert (found["n_facts"], found["n_layers"], found["n_units"]) == (40, 3, 200)
    assert found["provenance"]["packages"]["numpy"]
    ways = {way["name"]: way for way in found["ways"]}
    assert list(ways) == list(bench.WAYS)
    loop, read = (ways[name]["cpu_seconds"][0] for name in ("loop", "read"))
    for way in ways.values():
        assert (way["median_seconds"], way["median_cpu_seconds"]) == (way["seconds"][0], way["cpu_seconds"][0])
        assert way["faster_than_loop"] == pytest.approx(ways["loop"]["seconds"][0] / way["seconds"][0])
        assert way["less_cpu_than_loop"] == pytest.approx(loop / way["cpu_seconds"][0])
        beyond = max(way["cpu_seconds"][0] - read, 1e-9)
        assert way["less_cpu_without_reading"] == pytest.approx((loop - read) / beyond)
        assert 20 < way["peak_before_mib"] <= way["peak_mib"] < 2000
        assert way["agrees"] > 0.999
    assert (tmp_path / "selection.md").read_text(encoding="utf-8").count("| workbench (workbench.select) |") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["selection.json", "selection.md"]  # scores are gone


def test_both_ways_select_alike_and_other_selections_are_refused(bench: ModuleType, tmp_path: Path) -> None:
    bench.write_scores(tmp_path / "scores", 20, 2, 100, at_once=7)
    scores = open_result(tmp_path / "scores")
    assert np.isfinite(scores["score"].values).all()
    ours, loop = bench.one_call(scores), bench.sort_loop(scores)
    assert ours == loop
    assert [len(rows) for rows in loop] == [10, 10]
    other = select(scores, strategy="layer_highest", quota=10).positions()

    def ran(positions: list[list[int]]) -> list[dict]:
        return [{"cpu_seconds": 1.0, "seconds": 1.0, "peak_bytes": 1, "peak_before": 1, "positions": positions}]

    bench.summary({"read": ran([]), "loop": ran(loop), "workbench": ran(ours)}, 100)
    with pytest.raises(RuntimeError, match="agree on"):
        bench.summary({"read": ran([]), "loop": ran(loop), "workbench": ran(other)}, 100)


def test_peak_memory_grows_by_what_is_held(bench: ModuleType) -> None:
    before = bench.peak_bytes()
    held = np.ones(300 * 2**20 // 8 + before // 8)
    assert bench.peak_bytes() >= before + 250 * 2**20
    del held


def test_a_child_that_fails_is_named(bench: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="The way loop failed: FileNotFoundError"):
        bench.measured("loop", tmp_path / "absent")

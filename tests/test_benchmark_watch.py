"""The benchmark of a watched training runs, compares like with like, and says where the watch cannot stay within."""

import json
from pathlib import Path
from types import ModuleType

import pytest
from scripts import HOME, script

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(HOME / "benchmarks"))
    return script("benchmarks", "watch")


def test_a_smoke_run_trains_with_and_without(bench: ModuleType, tmp_path: Path) -> None:
    found = json.loads(bench.main(["--smoke", "--out", str(tmp_path)]).read_text(encoding="utf-8"))
    assert (found["model"], found["facts"], found["node_share"], found["batch_size"]) == ("tiny", 6, 0.1, 16)
    assert [(case["epochs"], case["steps"], case["repeats"]) for case in found["cases"]] == [(8, 8, 2), (2, 2, 2)]
    for case in found["cases"]:
        plain, watched = case["runs"]["plain"], case["runs"]["watched"]
        assert [one["losses"] for one in plain] == [one["losses"] for one in watched]
        assert [one["watch"] for one in plain] == [None, None]
        for one in watched:  # as a `DriftWatch` is by default
            told = one["watch"]
            assert (told["metric"], told["facts"], told["every"]) == ("d_soft", {"probe": 16}, "auto")
            assert sum(told["costs"]) == pytest.approx(told["seconds_watching"])
            assert told["seconds_watching"] < one["seconds"]
            inside = told["inside"] * one["seconds"] / (1 + told["inside"])  # seconds in the watch's calls
            assert told["seconds_watching"] <= inside < one["seconds"]
        assert case["readings"] >= 2
    assert "| 2 | 2 | 2 |" in (tmp_path / "watch.md").read_text(encoding="utf-8")


def test_pairs_are_compared_and_take_turns(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    order, costs = [], iter([(0.3, 0.1, 0.3), (0.5, 0.1, 0.4), (0.4, 0.3)])

    def run(self, watched: bool) -> dict:
        order.append(watched)
        number = (len(order) - 1) // 2
        seconds = (10.0 + number) * ((1.2, 1.1, 1.3)[number] if watched else 1)
        told = None
        if watched:
            spent = list(next(costs))
            told = {
                "inside": 0.05 * len(spent),
                "costs": spent,
                "cost": sum(spent) / 5,
                "seconds_training": 5.0,
                "readings": len(spent),
                "share": 0.1,
            }
        return {"seconds": seconds, "cpu_seconds": seconds * (2 if watched else 1), "losses": [2.0, 1.0], "watch": told}

    monkeypatch.setattr(bench.Training, "run", run)
    found = bench.case(bench.Training(None, None, None, 1), 3)
    assert order == [False, True, True, False, False, True]
    assert found["measured"]["mean"] == pytest.approx((1.2 * 1.1 * 1.3) ** (1 / 3))
    assert (found["measured"]["low"], found["measured"]["high"]) == pytest.approx((1.1, 1.3))
    assert found["measured_cpu"]["mean"] == pytest.approx(2 * found["measured"]["mean"])
    assert found["median_seconds"] == {"plain": 11.0, "watched": pytest.approx(12.1)}
    assert (found["steps"], found["readings"]) == (2, 3)
    assert found["stated"] == pytest.approx(0.14)
    assert found["start_and_end"] == pytest.approx(0.14)
    assert found["inside"] == pytest.approx(0.15)
    assert found["within"] == "no, by design: too short"
    assert "1.197 (1.100 to 1.300)" in bench.table({"cases": [found]})


def test_a_training_is_beyond_by_design_where_the_start_and_the_end_alone_are(bench: ModuleType) -> None:
    assert bench.verdict(0.1, 0.09, 0.1) == "yes"
    assert bench.verdict(0.16, 0.15, 0.1) == "no, by design: too short"
    assert bench.verdict(0.16, 0.05, 0.1) == "no"


def test_trainings_that_differ_or_do_not_learn_are_refused(bench: ModuleType) -> None:
    def runs(*losses):
        return {"plain": [{"losses": losses[0]}], "watched": [{"losses": one} for one in losses[1:]]}

    bench.check(runs([2.0, 1.0], [2.0, 1.0]))
    for wrong in (runs([2.0, 1.0], [2.0, 1.1]), runs([1.0, 2.0], [1.0, 2.0]), runs([2.0, 1.0], [2.0, float("nan")])):
        with pytest.raises(RuntimeError, match="mean nothing"):
            bench.check(wrong)

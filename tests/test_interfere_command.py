"""`workbench interference` says what the package says, and its figure draws what the frame holds."""

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from command import call
from scripts import script
from tiny import FACTS, saved

from workbench import figures
from workbench.attribution import attribute
from workbench.interfere import METRICS, interference, within_across
from workbench.models import load_model
from workbench.results import open_result, save_result


def test_the_command_equals_the_function_and_refuses_first(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    folder = saved(tmp_path / "model")
    asked = FACTS.save(tmp_path / "facts.jsonl")
    text = tmp_path / "text.txt"
    text.write_text("the capital of France is Paris a city big small opposite hot cold", encoding="utf-8")
    out = tmp_path / "found.zarr"
    common = ("interference", "--model", folder, "--facts", asked, "--permutations", 9, "--seed", 3, "--quiet")
    names = ("cosine", "superposition", "gradient")
    assert call(monkeypatch, *common, "--out", out, "--metrics", ",".join(names), "--text", text, "--sample", 5) == 0
    shown = capsys.readouterr().out
    model = load_model(str(folder))
    chosen = FACTS.at_most(5, 3)
    scores = attribute(model, chosen, method="grad_x_act", progress=False)
    options = {"permutations": 9, "seed": 3, "text": [text.read_text(encoding="utf-8")], "progress": False}
    expected = interference(model, chosen, scores, metrics=names, **options)
    xr.testing.assert_allclose(open_result(out), expected)
    assert "gradients conflict" in shown
    assert "kurtosis" in shown
    assert "q_value" in shown

    stored = save_result(scores, tmp_path / "scores.zarr", kind="attribution")
    table = tmp_path / "table.csv"
    assert call(monkeypatch, *common, "--out", table, "--attribution", stored) == 0
    pd.testing.assert_frame_equal(
        pd.read_csv(table),
        within_across(interference(model, chosen, scores, permutations=9, seed=3, progress=False)),
        check_dtype=False, rtol=1e-4,
    )  # fmt: skip
    judged = tmp_path / "judged.zarr"
    few = ("--metrics", "suppression", "--sample", 3, "--draws", 19)
    assert call(monkeypatch, *common, "--out", judged, "--attribution", stored, *few) == 0
    assert open_result(judged)["level"].notnull().all()
    capsys.readouterr()
    monkeypatch.setattr("workbench.models.load_model", lambda *args, **kwargs: pytest.fail("opened before the check"))
    for arguments, message in (
        (("--metrics", "cosine,nothing"), "no measure 'nothing'"),
        (("--draws", 0), "at least one draw"),
        (("--out", tmp_path / "found.txt"), "must end in .zarr, .csv or .parquet"),
        (("--out", stored.parent / "scores.zarr"), "kind 'attribution', not 'interference'"),
        (("--text", tmp_path / "none.txt"), "no text file"),
        (("--attribution", stored, "--unit", "node"), "give one of the two"),
    ):
        assert call(monkeypatch, *common, *arguments) == 1
        assert message in capsys.readouterr().err


def test_facts_that_were_not_attributed_are_refused(tmp_path: Path, monkeypatch, capsys) -> None:
    folder = saved(tmp_path / "model")
    model = load_model(str(folder))
    first = FACTS.filter(ids=["france", "japan"])
    stored = save_result(attribute(model, first, method="activation", progress=False), tmp_path / "a.zarr")
    other = FACTS.filter(ids=["kenya", "gold"]).save(tmp_path / "other.jsonl")
    assert call(monkeypatch, "interference", "--model", folder, "--facts", other, "--attribution", stored, "-q") == 1
    assert "is about 0 of the 2 facts" in capsys.readouterr().err


def frame() -> pd.DataFrame:
    rows = [(metric, layer, 0.1 * layer, 0.1 * layer - 0.05, 0.1 * layer + 0.05, 0.2 if layer < 2 else 0.01)
            for metric in METRICS for layer in (2, 0, 1)]  # fmt: skip
    made = pd.DataFrame(rows, columns=["metric", "layer", "difference", "low", "high", "q_value"])
    return made.assign(null_low=-0.1, null_high=0.1)


def test_the_figure_has_a_row_a_measure_with_interval_band_and_what_is_called() -> None:
    given = frame()
    before = given.copy(deep=True)
    fig = figures.interference_by_layer(given)
    pd.testing.assert_frame_equal(given, before)
    assert [axis.title.text for axis in fig.select_yaxes()] == list(METRICS)
    assert [axis.title.text for axis in fig.select_xaxes()][-1] == "layer"
    band, points = fig.data[:2]
    assert list(points.x) == [0, 1, 2]
    np.testing.assert_allclose(points.y, [0, 0.1, 0.2])
    np.testing.assert_allclose(points.error_y.arrayminus, 0.05)
    assert list(points.marker.symbol) == ["circle-open", "circle-open", "circle"]
    assert sorted(set(band.y)) == [-0.1, 0.1]
    assert len(fig.data) == 2 * len(METRICS)
    assert sum(trace.showlegend is not False for trace in fig.data) == 2
    assert figures.figure_json(fig) == figures.figure_json(figures.interference_by_layer(given))


def test_the_figure_leaves_out_measures_without_a_difference_and_refuses_nothing_at_all() -> None:
    given = frame()
    given.loc[given["metric"] == "cosine", "difference"] = np.nan
    assert len(figures.interference_by_layer(given).data) == 2 * (len(METRICS) - 1)
    with pytest.raises(ValueError, match="of one relation"):
        figures.interference_by_layer(given.assign(difference=np.nan))
    with pytest.raises(ValueError, match="has no column 'q_value'"):
        figures.interference_by_layer(given.drop(columns="q_value"))
    with pytest.raises(ValueError, match="has no rows"):
        figures.interference_by_layer(given.iloc[:0])


def test_behaviour_is_drawn_over_its_nulls() -> None:
    given = pd.DataFrame(
        {"layer": [1, 0, 2], "suppression": [0.5, np.nan, 0.1], "low": 0.0, "high": 0.6, "null_low": [0.2, np.nan, 0.2],
         "null_high": 0.7, "q_value": [0.5, np.nan, 0.01], "rank_change": [-1.0, 0.0, -2.0], "rank_low": -3.0,
         "rank_high": 0.0, "rank_null_low": [-0.5, np.nan, -0.5], "rank_null_high": 0.5, "rank_q": [0.01, np.nan, 0.9]}
    )  # fmt: skip
    fig = figures.behaviour_by_layer(given)
    assert [axis.title.text for axis in fig.select_yaxes()] == ["suppression", "change of rank"]
    bands, points = fig.data[::2], fig.data[1::2]
    assert [list(one.x) for one in points] == [[1, 2], [1, 2]]  # what learning left as it was is not drawn
    assert [list(one.y) for one in points] == [[0.5, 0.1], [-1.0, -2.0]]
    assert [list(one.marker.symbol) for one in points] == [["circle-open", "circle"], ["circle", "circle-open"]]
    assert [sorted(set(one.y)) for one in bands] == [[0.2, 0.7], [-0.5, 0.5]]
    with pytest.raises(ValueError, match="learning moved nothing in any layer"):
        figures.behaviour_by_layer(given.iloc[[1]])
    with pytest.raises(ValueError, match="has no column 'rank_q'"):
        figures.behaviour_by_layer(given.drop(columns="rank_q"))


def test_the_benchmark_times_every_measure(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    written = script("benchmarks", "interference").main(["--smoke", "--out", str(tmp_path), "--metrics", *METRICS])
    found = json.loads(written.read_text(encoding="utf-8"))
    assert [row["name"] for row in found["measures"]] == ["attribution", *METRICS]
    assert all(row["seconds"] > 0 for row in found["measures"])
    assert found["total_seconds"] == pytest.approx(sum(row["seconds"] for row in found["measures"][1:]))
    assert (found["facts"], found["layers"]) == (6, 2)
    assert os.environ["WORKBENCH_CACHE"] == str(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()  # the second moment was measured afresh, and is not left behind

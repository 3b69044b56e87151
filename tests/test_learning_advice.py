"""Advice on layers against `interference_aware`; the figures, the commands and the study of the room."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from command import call
from test_learning_predicts import harms, measured, planted
from test_selection import dataset, distinct
from test_selection_aware import collisions
from tiny import FACTS, saved, tiny

from workbench import figures
from workbench.interfere import conflict_rates
from workbench.intervals import standard_ranks
from workbench.learning import behaviour, harm, layer_advice, predicts, quotas, verdict
from workbench.results import open_result, open_store, save_result
from workbench.selection import select

OVERLAPS = [0.1, 0.9, 0.3, 0.2]


def clashes(seed: int = 0, units: int = 40) -> xr.Dataset:
    return collisions(OVERLAPS, np.abs(distinct(seed, 1, len(OVERLAPS), units)[0]), model_digest="m")


@pytest.mark.parametrize("quota", [5, 10, 23.4, 60])
def test_budgets_are_those_of_interference_aware_and_feed_per_layer_budget(quota: float) -> None:
    interference, scores = clashes(), dataset(distinct(3, 6, 4, 40), model_digest="m")
    advice = layer_advice(interference, quota=quota)
    aware = select(scores, strategy="interference_aware", quota=quota, interference=interference, weights={"load": 0})
    assert advice["budget"].tolist() == aware.per_layer()["n_selected"].tolist()
    assert advice["budget"].tolist() != [int(quota * 40 // 100)] * 4  # the control: not an even share
    chosen = select(scores, strategy="per_layer_budget", quota=quotas(advice, 40))
    assert chosen.per_layer()["n_selected"].tolist() == advice["budget"].tolist()
    assert chosen == aware
    assert advice["percent"].to_numpy() == pytest.approx(advice["budget"].to_numpy() / 40 * 100)


def test_what_is_advised_of_new_facts_is_what_interference_aware_gives_every_layer() -> None:
    interference, scores = clashes(), dataset(distinct(3, 6, 4, 40), model_digest="m")
    fresh = distinct(1, 5, 4, 40)
    fresh[:, 0] = interference["load"].values[0]  # new facts lean where retained ones do, in the layer with most room
    new = dataset(fresh, model_digest="m")
    advice = layer_advice(interference, new=new)
    beside = {"interference": interference, "new": new}
    by_itself = select(scores, strategy="interference_aware", quota=10, **beside)
    chosen = select(scores, strategy="interference_aware", quota=quotas(advice, 40), **beside)
    budgets = advice["budget"].tolist()
    assert chosen.per_layer()["n_selected"].tolist() == budgets != by_itself.per_layer()["n_selected"].tolist()
    assert budgets[0] < by_itself.per_layer()["n_selected"].max() / 4  # it has the most by collisions alone
    assert chosen.origin["weights"] == {"collision": 0.0, "load": 1.0, "new": 1.0}
    flat = dict.fromkeys(range(4), 10)
    units = select(scores, strategy="interference_aware", quota=10, **beside, weights={"collision": 0})
    assert select(scores, strategy="interference_aware", quota=flat, **beside) == units  # load and new still choose
    assert units != select(scores, strategy="per_layer_budget", quota=flat)
    with pytest.raises(ValueError, match="leave out the weight of collision"):
        select(scores, strategy="interference_aware", quota=flat, **beside, weights={"collision": 1})


def test_quotas_say_every_budget_of_every_width() -> None:
    for width in (7, 48, 576, 1536):
        advice = pd.DataFrame({"layer": range(width), "budget": range(width)})
        scores = dataset(distinct(0, 1, 1, width))
        shares = quotas(advice, width)
        for budget in {1, 3, width // 3, width - 1}:
            picked = select(scores, strategy="per_layer_budget", quota={0: shares[budget]})
            assert picked.n_selected == budget
    with pytest.raises(ValueError, match="All units of layer 0 are to be trained"):
        quotas(pd.DataFrame({"layer": [0], "budget": [7]}), 7)


def test_collisions_and_load_are_said_by_layer() -> None:
    interference = clashes()
    advice = layer_advice(interference).set_index("layer")
    load = interference["load"].sum("unit").values.astype(float)
    np.testing.assert_allclose(advice["load_share"], load / load.sum(), rtol=1e-6)
    pairs = np.array(OVERLAPS)
    np.testing.assert_allclose(advice["collision"], (pairs - pairs.mean()) / pairs.std(), rtol=1e-5)
    assert advice["budget"].idxmax() == 0
    assert advice.loc[1, "budget"] == 0
    assert advice.loc[1, "reason"].startswith("freeze: retained facts collide 1.7 sd above the mean of the layers")
    assert advice.loc[0, "reason"].startswith("more than an even share: retained facts collide")


def test_new_facts_that_lean_where_retained_ones_do_cost_a_layer_its_units() -> None:
    load = np.abs(distinct(0, 1, 3, 60)[0])
    interference = collisions([0.2, 0.2, 0.2], load)
    scores = distinct(1, 5, 3, 60)
    scores[:, 1] = load[1] + 0.1 * scores[:, 1]  # in layer 1 new facts lean on the same units
    advice = layer_advice(interference, new=dataset(scores), quota=10).set_index("layer")
    assert advice["overlap"].idxmax() == 1
    assert advice.loc[1, "overlap"] > advice.loc[1, "chance"] > advice.loc[0, "low"]
    assert (advice.loc[[0, 2], "overlap"].abs() < 0.3).all()
    assert (advice["low"] <= advice["overlap"]).all()
    assert (advice["overlap"] <= advice["high"]).all()
    assert advice.loc[1, "budget"] == 0
    assert advice["budget"].sum() == 18
    assert "share their units beyond chance" in advice.loc[1, "reason"]
    by_hand = [pd.Series(np.abs(row)).corr(pd.Series(load[1]), method="pearson") for row in scores[:, 1]]
    ranks = [pd.Series(np.abs(row)).rank().corr(pd.Series(load[1]).rank()) for row in scores[:, 1]]
    assert advice.loc[1, "overlap"] == pytest.approx(np.mean(ranks), rel=1e-5)
    assert advice.loc[1, "overlap"] != pytest.approx(np.mean(by_hand), rel=1e-5)
    off = layer_advice(interference, new=dataset(scores), quota=10, weights={"new": 0})
    assert off["budget"].tolist() == layer_advice(interference, quota=10)["budget"].tolist() == [6, 6, 6]
    shuffled = scores[:, :, np.random.default_rng(0).permutation(60)]
    control = layer_advice(interference, new=dataset(shuffled), quota=10)
    assert (control["overlap"] <= control["chance"]).all()


def test_new_facts_that_lean_anywhere_are_beyond_chance_in_one_result_of_twenty() -> None:
    """The level is corrected over layers; the control takes each layer's own 95th percentile."""
    results, layers, units, draw = 60, 12, 60, np.random.default_rng(1)
    called = alone = 0
    for seed in range(results):
        load, scores = np.abs(distinct(2 * seed, 1, layers, units)[0]), distinct(2 * seed + 1, 5, layers, units)
        advice = layer_advice(collisions([0.2] * layers, load), new=dataset(scores), draws=99, seed=seed)
        called += bool((advice["overlap"] > advice["chance"]).any())
        null = [standard_ranks(np.abs(scores)).mean(0) * draw.permuted(standard_ranks(load), axis=1) for _ in range(99)]
        alone += bool((advice["overlap"] > np.quantile(np.sum(null, axis=2), 0.95, axis=0)).any())
    assert called <= 8  # 3 are expected; more than 8 come in 3 of 1,000 draws of 60
    assert alone > 15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": {"lode": 1}}, "no term 'lode': its terms are collision, new"),
        ({"weights": {"new": -1}}, "weight of new is -1"),
        ({"quota": 0.1}, "less than one unit"),
        ({"new": dataset(distinct(0, 2, 4, 9))}, "new has 9 units in a layer, the interference has 40"),
        ({"new": dataset(distinct(0, 2, 3, 40))}, "layer 3 has no scores"),
        ({"new": dataset(distinct(0, 2, 4, 40), model_digest="n")}, r"of another model \(m, n\)"),
        ({"new": dataset(distinct(0, 2, 4, 40) * np.nan)}, "layer 0 that are not finite"),
        ({"new": dataset(distinct(0, 2, 4, 40)), "draws": 18}, "at least 19 draws, not 18"),
        ({"draws": 0}, "at least 19 draws, not 0"),
    ],
)
def test_advice_on_wrong_inputs_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_advice(clashes(), **options)
    with pytest.raises(ValueError, match="variables `value` and `load`"):
        layer_advice(clashes().drop_vars("load"))


# Figures


def test_the_prediction_is_drawn_with_its_control_beside_it() -> None:
    frame = predicts(*planted(n=8), permutations=9)
    fig = figures.prediction(frame)
    control, *kinds = fig.data
    assert control.name == "shuffled pairs"
    np.testing.assert_allclose(control.x, frame["control"])
    np.testing.assert_allclose(control.error_x.array, frame["control_high"] - frame["control"])
    assert [trace.name for trace in kinds] == list(dict.fromkeys(frame["kind"]))
    drawn = {(float(x), float(y)) for trace in kinds for x, y in zip(trace.x, trace.y, strict=True)}
    assert drawn == {(rho, float(place)) for place, rho in enumerate(frame["rho"])}
    assert "rank correlation" in fig.layout.xaxis.title.text
    with pytest.raises(ValueError, match="no column 'control'"):
        figures.prediction(frame.drop(columns="control"))


def test_the_advice_is_drawn_by_layer() -> None:
    advice = layer_advice(clashes())
    fig = figures.advice_by_layer(advice)
    assert [list(trace.y) for trace in fig.data] == [
        pytest.approx(list(advice["load_share"] * 100)),
        pytest.approx(list(advice["collision"])),
        list(advice["budget"]),
    ]
    new = layer_advice(clashes(), new=dataset(distinct(5, 3, 4, 40)))
    drawn = {trace.name: trace for trace in figures.advice_by_layer(new).data}
    assert list(drawn["chance, 95%"].y) == list(new["chance"])
    with pytest.raises(ValueError, match="has no rows"):
        figures.advice_by_layer(advice.iloc[:0])


# Commands


def test_commands_say_what_the_functions_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path / "tiny")
    FACTS.save(tmp_path / "facts.jsonl")
    on = ("--model", tmp_path / "tiny", "--facts", tmp_path / "facts.jsonl", "--quiet")
    how = ("--steps", 2, "--rate", 0.01, "--layers", 0, 2)
    assert call(monkeypatch, "harm", *on, *how, "--out", tmp_path / "harm") == 0
    assert "of 8 facts learnt (P > 0.5) at a rate of 0.01" in capsys.readouterr().out
    stored = open_result(tmp_path / "harm").load()
    expected = harm(tiny("llama"), FACTS, steps=2, rate=0.01, layers=[0, 2], progress=False)
    np.testing.assert_allclose(stored["harm"], expected["harm"], atol=1e-5)
    assert call(monkeypatch, "harm", *on, "--out", tmp_path / "harm") == 1
    assert "other settings, it differs in steps" in capsys.readouterr().err
    how = ("--steps", 1, "--rate", 0.01, "--permutations", 20)
    assert call(monkeypatch, "behaviour", *on, *how, "--out", tmp_path / "b.csv") == 0
    assert "suppression" in capsys.readouterr().out
    alone, by_layer = behaviour(tiny("llama"), FACTS, steps=1, rate=0.01, permutations=20, progress=False)
    np.testing.assert_allclose(pd.read_csv(tmp_path / "b.csv")["interference"], alone["interference"], atol=1e-5)
    kept = pd.read_csv(tmp_path / "b_layers.csv")
    np.testing.assert_allclose(kept[["p_value", "rank_p"]], by_layer[["p_value", "rank_p"]])
    (tmp_path / "c_layers.csv").mkdir()
    assert call(monkeypatch, "behaviour", *on, "--out", tmp_path / "c.csv") == 1  # before any work
    assert "c_layers.csv is a folder" in capsys.readouterr().err


def test_predict_and_advise_read_stored_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interference, harmed = planted(n=8)
    save_result(interference, tmp_path / "i")
    save_result(harmed, tmp_path / "h", kind="harm")
    out = tmp_path / "table.parquet"
    options = ("--splits", 2, "--permutations", 19, "--by-layer", "--out", out)
    assert call(monkeypatch, "predict", tmp_path / "i", tmp_path / "h", *options) == 0
    frame = predicts(interference, harmed, splits=2, permutations=19)
    assert verdict(frame) in capsys.readouterr().out
    pd.testing.assert_frame_equal(pd.read_parquet(out), frame, check_dtype=False)
    save_result(clashes(), tmp_path / "c")
    with open_store(
        tmp_path / "new", ids=["a"], relations=["r"], n_layers=4, n_units=40, attrs={"unit": "node"}
    ) as new:
        new.write([0], distinct(1, 1, 4, 40), None, None)
    arguments = ("--new", tmp_path / "new", "--quota", 20, "--weights.new", 0.5, "--out", tmp_path / "advice.csv")
    assert call(monkeypatch, "advise", tmp_path / "c", *arguments) == 0
    assert "even share" in capsys.readouterr().out
    told = layer_advice(clashes(), new=dataset(distinct(1, 1, 4, 40)), quota=20, weights={"new": 0.5})
    assert pd.read_csv(tmp_path / "advice.csv")["budget"].tolist() == told["budget"].tolist()
    with open_store(
        tmp_path / "old", ids=["a", "b"], relations=["r"] * 2, n_layers=4, n_units=40, attrs={"unit": "node"}
    ) as old:
        old.write([0, 1], distinct(2, 2, 4, 40), None, None)
    beside = ("--strategy", "interference_aware", "--interference", tmp_path / "c", "--new", tmp_path / "new")
    for suffix in ("csv", "parquet"):
        save = ("--new", tmp_path / "new", "--out", tmp_path / f"shares.{suffix}")
        assert call(monkeypatch, "advise", tmp_path / "c", "--quota", 15, *save) == 0
        rows = tmp_path / f"rows_{suffix}.json"
        shares = ("--advice", tmp_path / f"shares.{suffix}")
        assert call(monkeypatch, "select", tmp_path / "old", "--out", rows, *beside, *shares) == 0
        budgets = layer_advice(clashes(), new=dataset(distinct(1, 1, 4, 40)), quota=15)["budget"].tolist()
        assert [len(of) for of in json.loads(rows.read_text(encoding="utf-8"))] == budgets
    capsys.readouterr()
    for wrong, words in ((tmp_path / "table.csv", "no file"), (out, "no columns layer and percent")):
        assert call(monkeypatch, "select", tmp_path / "old", "--out", rows, *beside, "--advice", wrong) == 1
        assert words in " ".join(capsys.readouterr().err.split())
    small = measured(interference["value"].values[..., :4, :4], ["good", "idle"])
    save_result(small, tmp_path / "small")
    save_result(harms(np.eye(4)), tmp_path / "few", kind="harm")
    assert call(monkeypatch, "predict", tmp_path / "small", tmp_path / "few") == 1
    assert "at least 8 facts" in capsys.readouterr().err


# The study


def script() -> ModuleType:
    path = Path(__file__).parent.parent / "analyses" / "interference_study.py"
    spec = importlib.util.spec_from_file_location("analysis_interference_study", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["analysis_interference_study"] = module
    spec.loader.exec_module(module)
    return module


def test_the_study_publishes_and_does_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = script()
    monkeypatch.setattr("workbench.reporting.publishing.find_browser", lambda: None)
    saved(tmp_path / "tiny")
    FACTS.save(tmp_path / "facts.jsonl")
    options = ["--smoke", "--model", str(tmp_path / "tiny"), "--facts", str(tmp_path / "facts.jsonl")]
    metrics = ["cosine", "gradient", "linear_suppression", "suppression"]
    options += ["--metrics", *metrics, "--out", str(tmp_path / "runs"), "--figures", str(tmp_path / "f")]
    page = study.main(options)
    assert page == tmp_path / "f" / "interference_study.html"
    said = capsys.readouterr().out
    frame = pd.read_csv(page.with_suffix(".csv"))
    assert {"cosine", "gradient", "first-order harm", "near in meaning"} <= set(frame["measure"])
    assert verdict(frame) in said
    assert (tmp_path / "f" / "interference_study_layers.html").exists()
    rates = conflict_rates(open_result(tmp_path / "runs" / "interference_gradient.zarr"))
    told = pd.read_csv(tmp_path / "f" / "interference_study_conflicts.csv")
    pd.testing.assert_frame_equal(told, rates, check_dtype=False)
    stored = [open_result(tmp_path / "runs" / f"interference_{name}.zarr") for name in metrics[2:]]
    linear, exact = (found["value"][0] for found in stored)
    apart = ~np.eye(exact.sizes["fact"], dtype=bool)
    one, two = (pd.Series(value[1].values[apart].astype(float)) for value in (exact, linear))
    told = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))["first_order"][1]
    expected = {"layer": 1, "rho": one.rank().corr(two.rank()), "r": one.corr(two)}
    expected |= {"mean_drop": one.abs().mean(), "mean_gap": (one - two).abs().mean()}
    assert told == pytest.approx(expected)
    assert (tmp_path / "f" / "interference_study_behaviour.html").exists()
    about = page.with_suffix(".json").read_text(encoding="utf-8")
    assert "verdict" in about
    assert str(tmp_path) not in about
    for name in ("attribute", "interference", "behaviour"):
        real = getattr(study.wb, name)
        kept = real if name == "attribute" else lambda *a, **o: pytest.fail("computed again")
        monkeypatch.setattr(study.wb, name, kept)
    monkeypatch.setattr("workbench.learning.harms.learnt", lambda *a, **o: pytest.fail("learnt again"))
    again = study.Study(study.parsed(options))
    kinds = {"splits": 1, "permutations": 9}
    told = study.wb.predicts(again.interference, again.harm, **kinds)
    pd.testing.assert_frame_equal(told, frame, check_dtype=False)
    assert len(again.behaviour()[0]) == 8
    with pytest.raises(pytest.fail.Exception, match="computed again"):  # of another seed it is not kept
        study.Study(study.parsed([*options, "--seed", "1"])).behaviour()

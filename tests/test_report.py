"""The page: numbers by a second way, sentences that follow the data, text that stays text, and a real browser."""

import html
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.run_folder import NASTY, fabricate_forgetting, fabricate_run
from workbench import figures, intervals
from workbench.attribution import by_layer
from workbench.reporting import findings, publish, report, sections, tables
from workbench.reporting.artefacts import read_artefacts
from workbench.reporting.collisions import about_conflicts
from workbench.reporting.page import safe_json
from workbench.reporting.publishing import find_browser
from workbench.reporting.words import listed, number, percent, tenth
from workbench.results import open_result, save_result
from workbench.selection import Selection

STAGES = {
    "recall.parquet": "This run has no recall",
    "attribution.zarr": "This run has no attribution",
    "facts": "This run has no facts",
    "interference.zarr": "This run has no interference",
    "selection": "This run has no selection",
    "implant": "This run has no training history",
    "drift.parquet": "This run has no drift",
    "forgetting.parquet": "This run has no forgetting",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = fabricate_run(tmp_path_factory.mktemp("runs") / "first")
    report(folder)
    return folder


@pytest.fixture(scope="module")
def page(run) -> str:
    return (run / "report.html").read_text(encoding="utf-8")


# Numbers, each by a second way


def test_wilson_against_the_roots_of_its_equation():
    """The ends p of the interval solve (share - p)^2 = z^2 p (1 - p) / n."""
    for hits, total in ((8, 10), (0, 12), (30, 30), (231, 640)):
        for end in intervals.wilson(hits, total):
            assert (hits / total - end) ** 2 == pytest.approx(intervals.Z95**2 * end * (1 - end) / total, abs=1e-9)
    assert intervals.wilson(231, 640) == pytest.approx((0.3247, 0.3988), abs=2e-4)
    assert intervals.wilson(0, 0) == (0.0, 1.0)
    wald = 0.8 - 1.96 * math.sqrt(0.8 * 0.2 / 10)
    assert intervals.wilson(8, 10)[0] != pytest.approx(wald, abs=0.02)  # the control: the textbook interval differs


def test_bootstrap_against_the_normal_approximation():
    values = np.random.default_rng(1).normal(2.0, 3.0, size=(400, 2))
    low, high = intervals.interval(values)
    half = 1.96 * values.std(axis=0) / math.sqrt(400)
    np.testing.assert_allclose(low, values.mean(axis=0) - half, atol=0.05)
    np.testing.assert_allclose(high, values.mean(axis=0) + half, atol=0.05)
    again = intervals.interval(values)
    np.testing.assert_array_equal(low, again[0])
    assert not np.array_equal(low, intervals.interval(values, seed=1)[0])


def test_bootstrap_against_a_loop_over_draws():
    values, weights = np.array([[1.0], [2.0], [6.0]]), np.array([1.0, 2.0, 1.0])
    counts = np.random.default_rng(0).multinomial(3, [1 / 3] * 3, size=intervals.DRAWS)
    slow = [sum(c * w * v[0] for c, w, v in zip(row, weights, values, strict=True)) / (row @ weights) for row in counts]
    np.testing.assert_allclose(intervals.bootstrap(values, weights)[:, 0], slow)


def test_pairing_narrows_the_interval_of_a_difference():
    rng = np.random.default_rng(2)
    shared = rng.normal(size=300)
    one, two = shared + rng.normal(scale=0.1, size=300), shared + rng.normal(scale=0.1, size=300)
    low, high = intervals.interval(one - two)
    alone = intervals.interval(one)[1] - intervals.interval(one)[0]
    assert high - low < 0.3 * alone


def general(nll, weight, change):
    rows = {"method": "lora", "suite": "general", "metric": "nll", "fact": [f"t{i}" for i in range(len(nll))]}
    return pd.DataFrame({**rows, "weight": weight, "before": nll, "after": np.array(nll) + change, "change": change})


def test_perplexity_by_hand():
    summary = intervals.means(general([1.0, 2.0], [30, 10], 0.5)).set_index("metric")
    assert summary.loc["perplexity", "before"] == pytest.approx(math.exp((30 * 1 + 10 * 2) / 40))
    assert summary.loc["perplexity", "after"] == pytest.approx(math.exp(1.75))
    assert summary.loc["perplexity", "before"] != pytest.approx((math.exp(1) + math.exp(2)) / 2)  # not a mean of both
    same = intervals.means(general([1.0, 2.0], [30, 10], 0.0)).set_index("metric")
    assert tuple(same.loc["perplexity", ["change", "low", "high"]]) == (0.0, 0.0, 0.0)
    destroyed = intervals.means(general([1.0, 2.0], [1, 1], 900.0)).set_index("metric").loc[["perplexity"]]
    assert destroyed["low"].iloc[0] > 1e300
    assert "e+304" in findings.about_perplexity(destroyed.reset_index())[0]


def test_recall_counts_by_hand():
    frame = pd.DataFrame({"relation": ["a", "a", "b"], "known": [True, False, True]})
    table = tables.recall_by_relation(frame).set_index("relation")
    assert table["known"].to_dict() == {"a": 1, "b": 1, "all": 2}
    assert table.loc["all", "share"] == pytest.approx(2 / 3)
    assert (table["low"] <= table["share"]).all()
    assert (table["share"] <= table["high"]).all()


def test_a_relation_named_all_and_facts_without_one_are_told_from_the_total():
    known = [True, False, False, True, True, True]
    frame = pd.DataFrame({"relation": ["all", "all", "all (relation)", "", "(no relation)", "b"], "known": known})
    table = tables.recall_by_relation(frame)
    assert table["relation"].is_unique
    assert set(table["relation"]) > {"all", "all (relation)", "(no relation)", "b"}
    assert table[table["relation"] == "all"]["known"].tolist() == [4]
    text = findings.about_recall(table[table["relation"].isin(["all", "all (relation)", "(no relation)"])], frame[:0])
    assert text[0].startswith("The model answers 4 of 6 facts")
    assert len(text) == 1  # without a relation is no relation that could be known best

    names = ["", "", "b", "b"]
    size = np.where(np.eye(4, dtype=bool), np.nan, 0.5)[None]
    overlap = xr.DataArray(size, dims=("layer", "fact", "other"), coords={"layer": ["mean"], "fact": list("wxyz")})
    pairs = tables.closest_pairs(overlap.assign_coords(relation=("fact", names)))
    assert pairs.loc[pairs["same_relation"], ["fact", "other"]].to_numpy().tolist() == [["y", "z"]]


def test_scores_of_a_relation_named_all_are_not_the_total(run):
    stored = open_result(run / "attribution.zarr").load()
    renamed = stored["relation"].to_series().replace({"capital": "all", "language": ""}).to_numpy(str)
    table, before = by_layer(stored.assign_coords(relation=("fact", renamed)), draws=20), by_layer(stored, draws=20)
    of = dict(iter(table.groupby("relation")["mean_abs"]))
    old = dict(iter(before.groupby("relation")["mean_abs"]))
    assert {"all", "all (relation)", "(no relation)"} < set(of)
    assert of["all"].tolist() == old["all"].tolist()
    assert of["all (relation)"].tolist() == old["capital"].tolist()
    assert of["(no relation)"].tolist() == old["language"].tolist()
    assert findings.about_scores(table, None, "nats") == findings.about_scores(before, None, "nats")


def test_overlap_is_the_mean_over_layers_without_the_diagonal(run):
    stored = open_result(run / "interference.zarr")
    overlap = tables.overlap_layers(stored, "cosine", most_layers=3)
    assert list(overlap["layer"].values) == ["mean", "0", "4", "7"]
    cosine = stored["value"].sel(metric="cosine")
    first, second = str(overlap["fact"].values[3]), str(overlap["fact"].values[9])
    slow = np.mean([float(cosine.sel(layer=layer, fact=first, other=second)) for layer in cosine["layer"].values])
    assert float(overlap.sel(layer="mean", fact=first, other=second)) == pytest.approx(slow, rel=1e-6)
    assert np.isnan(np.diagonal(overlap.sel(layer="mean").values)).all()
    assert list(overlap["relation"].values) == sorted(overlap["relation"].values)
    pairs = tables.closest_pairs(overlap, top=5)
    assert pairs["overlap"].iloc[0] == np.nanmax(overlap.sel(layer="mean").values)
    assert not (pairs["fact"] == pairs["other"]).any()
    assert tables.overlap_layers(stored, "cosine", most_facts=10).sizes["fact"] == 10


def test_load_of_the_selected_units_by_a_loop(run):
    load = open_result(run / "interference.zarr")["load"]
    chosen = Selection.load(run / "selection" / "loki.json")
    table = tables.load_and_selection(load, {"loki": chosen}).set_index(["method", "layer"])
    for layer in (0, 5):
        slow = np.mean([float(load.sel(layer=layer, unit=unit)) for unit in chosen.rows(layer)])
        assert table.loc[("loki", layer), "load"] == pytest.approx(slow)
        assert table.loc[("loki", layer), "selected"] == len(chosen.rows(layer))
    assert (table.loc["loki", "load"] < table.loc["all", "load"]).all()
    with pytest.raises(ValueError, match="loki has shape"):
        tables.load_and_selection(load.isel(unit=slice(5)), {"loki": chosen})


def test_drift_means_by_groupby_and_zeros_for_a_model_against_itself(run):
    drift = pd.read_parquet(run / "drift.parquet")
    summary = tables.drift_summary(drift)
    slow = drift[drift["metric"] == "off"].groupby(["method", "group", "layer"])["change"].mean()
    for row in summary[summary["metric"] == "off"].to_dict("records"):
        assert row["change"] == pytest.approx(slow[(row["method"], row["group"], row["layer"])])
        assert row["low"] <= row["change"] <= row["high"]
    still = tables.drift_summary(drift.assign(after=drift["before"], change=0.0))
    assert (still[["change", "low", "high"]].to_numpy() == 0).all()


def accuracy(suite, **after):
    """Retained facts that the base model all knew, and which of them each method still answers."""
    frames = []
    for method, right in after.items():
        ids = [f"f{i}" for i in range(len(right))]
        rows = {"method": method, "suite": suite, "metric": "accuracy", "fact": ids, "weight": 1, "before": 1.0}
        frames.append(pd.DataFrame({**rows, "after": np.array(right, dtype=float)}))
    return pd.concat(frames).assign(change=lambda rows: rows["after"] - rows["before"])


def test_kept_leaves_out_what_was_not_known_before():
    rows = accuracy("retained", loki=[1, 0, 1, 1])
    rows.loc[rows["fact"] == "f3", "before"] = 0.0
    (found,) = tables.kept(rows).to_dict("records")
    assert (found["hits"], found["total"]) == (2, 3)
    assert tables.kept(accuracy("efficacy", loki=[1, 1])).empty


def test_a_difference_needs_shared_facts():
    both = accuracy("retained", loki=[1, 1, 1, 0], lora=[0, 1, 0, 0])
    found = tables.paired_difference(both, "retained", "loki", "lora")
    assert (found["n"], found["difference"]) == (4, 0.5)
    assert tables.paired_difference(both, "retained", "loki", "other") is None
    apart = both.assign(fact=both["fact"].where(both["method"] == "loki", "x" + both["fact"]))
    assert tables.paired_difference(apart, "retained", "loki", "lora") is None


# Sentences that follow the data


def test_numbers_as_prose_writes_them():
    assert [number(value) for value in (0, 231, 17280, 0.012345, 1e-9, -3.0, math.inf, math.nan)] == [
        *("0", "231", "17,280", "0.0123", "1.00e−09", "−3", "infinite", "not a number")
    ]
    assert [percent(value) for value in (0.0, 0.004, 0.5, 0.998, 1.0)] == ["0%", "0.4%", "50%", "99.8%", "100%"]
    assert (tenth(-0.04), listed(["a"]), listed([])) == ("0", "a", "")


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ([0] * 30, "LoKI answers more than LoRA (+80.0 points"),
        ([1] * 30, "LoKI answers fewer than LoRA (−20.0 points"),
        ([1] * 24 + [0] * 6, "LoKI cannot be told apart from LoRA (0 points, 0 to 0)"),
        ([1] * 23 + [0] * 7, "LoKI cannot be told apart from LoRA (+3.3 points"),
    ],
)
def test_methods_are_called_better_worse_or_alike_as_the_interval_says(lora, words):
    (sentence,) = findings.versus(accuracy("retained", loki=[1] * 24 + [0] * 6, lora=lora), "retained")
    assert words in sentence
    assert "over 30 facts" in sentence
    assert findings.versus(accuracy("retained", loki=[1, 0]), "retained") == []


def test_unequal_efficacy_is_said_and_equal_efficacy_is_not():
    def told(second):
        rows = pd.concat(
            [
                accuracy("retained", loki=[1] * 10, lora=[1] * 10),
                accuracy("efficacy", loki=[1] * 10, lora=second).assign(before=0.0),
            ]
        )
        return " ".join(findings.about_keeping(intervals.means(rows), rows))

    assert "does not compare at equal efficacy" in told([1] * 6 + [0] * 4)
    assert "does not compare" not in told([1] * 10)


def test_a_few_facts_tell_no_method_from_another_and_no_distance_from_still():
    (sentence,) = findings.versus(accuracy("retained", loki=[1] * 9, lora=[0] * 9), "retained")
    assert "LoKI lies +100.0 points from LoRA, too few facts to judge by; paired bootstrap over 9 facts" in sentence
    (sentence,) = findings.versus(accuracy("retained", loki=[1] * 10, lora=[0] * 10), "retained")
    assert "answers more than LoRA" in sentence
    row = {"group": "new", "method": "loki", "before": 1.0, "after": 0.5, "low": -0.6, "high": -0.4}
    (few,), (enough,) = (findings.about_distance(pd.DataFrame([{**row, "n": n}])) for n in (9, 10))
    assert "(too few to judge by: " in few
    assert "(closer: " in enough


def test_sentences_fit_results_that_are_all_alike():
    table = pd.DataFrame({"relation": ["a", "b", "all"], "known": [5, 5, 10], "unknown": 2, "share": [0.7, 0.7, 0.7]})
    assert len(findings.about_recall(table, pd.DataFrame())) == 1  # no relation is known best
    differing = table.assign(share=[0.5, 0.7, 0.6])
    assert "“b” best (70%) and “a” least (50%)" in " ".join(findings.about_recall(differing, pd.DataFrame()))
    ranks = pd.DataFrame({"fact": ["f", "g"], "rank": 1, "layer": 3, "unit": 7})
    assert findings.about_strongest(ranks, "node") == ["Layer 3 node 7 is the strongest node of each of 2 facts."]
    assert findings.about_strongest(ranks[:1], "node") == ["Layer 3 node 7 is the strongest node of 1 fact."]
    assert "differs between facts: 2 nodes" in findings.about_strongest(ranks.assign(unit=[7, 8]), "node")[0]
    pair = pd.DataFrame({"fact": ["f"], "other": ["g"], "overlap": [0.5], "same_relation": [True]})
    assert len(findings.about_pairs(pair)) == 1
    assert "over 1 fact," in findings.versus(accuracy("retained", loki=[1], lora=[0]), "retained")[0]


@pytest.mark.parametrize(("method", "says"), [("activation", False), ("random", False), ("ig", True)])
def test_scores_that_are_no_share_of_an_effect_are_not_called_one(run, method, says):
    found = read_artefacts(run)
    changed = replace(found, attribution=found.attribution.assign_attrs(method=method))
    text = " ".join(
        " ".join([section.about, *(line for panel in section.panels for line in panel.findings)])
        for section in (sections._scores(changed), sections._units(changed))
    )
    for words in ("contributes to the answer", "leave unexplained", "support the answer", "nats per unit"):
        assert (words in text) == says or (words == "leave unexplained" and says)


def test_training_that_fell_short_is_said():
    record = {"efficacy": 0.58, "target_efficacy": 0.95, "steps": 80, "trainable_parameters": 49152}
    (short,) = findings.about_training({"lora": {**record, "reached": False}}, pd.DataFrame())
    assert "LoRA did not reach the 95% asked for: it ended at 58% after 80 steps" in short
    (fine,) = findings.about_training({"lora": {**record, "efficacy": 0.96, "reached": True}}, pd.DataFrame())
    assert fine.startswith("LoRA answers 96% of the new facts (asked for: 95%)")
    assert "49,152 parameters" in fine
    by_loss = {**record, "target_loss": 0.5, "efficacy": 0.12}
    (loss,) = findings.about_training({"lora": {**by_loss, "reached": True}}, pd.DataFrame())
    assert loss.startswith("LoRA answers 12% of the new facts (asked for: loss of 0.5")
    (lost,) = findings.about_training({"lora": {**by_loss, "reached": False}}, pd.DataFrame())
    assert "did not reach the loss of 0.5" in lost
    (epochs,) = findings.about_training({"lora": {**by_loss, "target_loss": 0, "reached": False}}, pd.DataFrame())
    assert "(asked for: number of epochs)" in epochs
    (unknown,) = findings.about_training({"mine": {}}, pd.DataFrame())
    assert unknown.startswith("Mine: the efficacy was not measured")


def test_relations_beyond_and_within_the_null_band():
    table = pd.DataFrame({"layer": [0, 1], "within": 0.5, "across": 0.4, "null_low": -0.05, "null_high": 0.05})
    beyond = findings.about_relations(table.assign(difference=[0.1, -0.2]))
    assert "more in 1 and less in 1 of 2 layers" in beyond[0]
    assert "layer 1: −0.2" in beyond[1]
    (inside,) = findings.about_relations(table.assign(difference=[0.01, 0.02]))
    assert inside.startswith("In none of 2 layers")
    corrected = findings.about_relations(table.assign(difference=[0.1, -0.2], q_value=[0.04, 0.06]), 31)
    assert "share units more in 1 of 2 layers" in corrected[0]
    assert "false discovery rate of 5%" in corrected[0]
    assert corrected[-1] == "This rests on 31 pairs of facts of one relation."
    related = xr.Dataset(coords={"relation": ("fact", ["a", "a", "a", "b", "b", "", ""])})
    assert tables.related_pairs(related) == 4
    recall = pd.DataFrame({"known": [True, True, False]}, index=["a", "b", "c"])
    assert findings.about_attributed(["b", "c"], recall) == ["1 of 2 known facts were attributed."]
    (few,) = findings.about_relations(table.assign(difference=np.nan))
    assert few == "No two attributed facts, or all, are of one relation, so that there is nothing to compare."


def test_measures_are_told_by_their_corrected_layers():
    table = pd.DataFrame(
        {"metric": ["gradient"] * 3, "layer": [0, 1, 2], "difference": [0.1, -0.4, 0.9], "low": [0.0, -0.5, -0.1],
         "high": [0.2, -0.3, 1.9], "q_value": [0.04, 0.01, 0.2]}
    )  # fmt: skip
    expected = "Gradient differs within and across relations in 2 of 3 layers, most in layer 1: −0.4 (−0.5 to −0.3)."
    assert findings.about_measures(table) == [expected]
    none = findings.about_measures(table.assign(q_value=0.2))
    assert none == ["Gradient differs within and across relations in 0 of 3 layers."]


def test_advice_and_prediction_are_told_and_a_prediction_of_before_is_not(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    reasons = ["freeze: much load", "an even share: little", "more than an even share: none"]
    columns = {"layer": [0, 1, 2], "load_share": [0.5, 0.3, 0.2], "collision": [1.0, 0.0, -1.0], "budget": [0, 4, 8]}
    pd.DataFrame({**columns, "reason": reasons}).to_parquet(folder / "advice.parquet")
    row = {"measure": "gradient", "kind": "best layer", "rho": 0.4, "low": 0.2, "high": 0.6, "q_value": 0.01}
    row |= {"control": 0.0, "control_low": -0.1, "control_high": 0.1}
    pd.DataFrame([row]).to_parquet(folder / "prediction.parquet")
    told = {"verdict": "Trust gradient at layer 3.", "n_facts": 20, "learnt": 0.9, "rate": 0.1}
    (folder / "prediction.json").write_text(json.dumps(told))
    text = report(folder).read_text(encoding="utf-8")
    assert {"advice", "prediction"} <= set(embedded(text))
    for words in (
        "Layers to freeze: 0.",
        "Layer 2: 8 units, more than",
        told["verdict"],
        "20 facts; after being learnt, 90%",
        "Nothing in this run follows",
    ):
        assert words in text
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "interference": {"harm": False}}))
    path = folder / "selection" / "loki.json"
    chosen = Selection.load(path)
    replace(chosen, origin={"strategy": "interference_aware", "quota": {"0": 5.0}}).save(path)
    text = report(folder).read_text(encoding="utf-8")
    assert told["verdict"] not in text
    assert "LoKI of this run trained what is advised" in text


def test_measures_that_are_no_overlap_and_what_runs_of_before_left(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    found = open_result(folder / "interference.zarr").load()
    shape = (("metric", "layer"), found["within"].values)
    found = found.assign(dict.fromkeys(("low", "high", "q_value", "chance", "level"), shape))
    found["level"] = found["level"].copy(data=np.where([[False], [True]], np.nan, found["level"]))
    advised = {"layer": [0], "load_share": [1.0], "collision": [1.0], "budget": [1], "reason": ["alone"]}
    pd.DataFrame(advised).to_parquet(folder / "advice.parquet")
    (folder / "config.json").write_text(
        json.dumps({"methods": ["loki"], "interference": {"metrics": ["gradient", "suppression"]}})
    )
    save_result(
        found.assign_coords(metric=["gradient", "suppression"]), folder / "interference.zarr", kind="interference"
    )
    text = html.unescape(report(folder).read_text(encoding="utf-8"))
    assert text.count("cosine or jaccard, and this run measured gradient and suppression alone.") == 2
    assert not {"overlap", "relations"} & set(embedded(text))
    assert {"measures", "conflicts", "advice"} <= set(embedded(text))
    assert "Of gradient, low values are the harmful ones: a pair collides below the level" in text
    assert "The pairs of suppression are not judged" in text
    artefacts = read_artefacts(folder)
    assert set(artefacts.drift["method"]) == set(artefacts.forgetting["method"]) == {"loki"}
    (folder / "config.json").write_text(json.dumps({"methods": [], "interference": {"metrics": ["superposition"]}}))
    save_result(
        found.isel(metric=[0]).assign_coords(metric=["superposition"]),
        folder / "interference.zarr",
        kind="interference",
    )
    text = html.unescape(report(folder).read_text(encoding="utf-8"))
    for absent in ("drift", "forgetting", "advice on layers (which takes one of cosine, jaccard, gradient)"):
        assert f"This run has no {absent}, so" in text
    assert "low values are the harmful ones" not in text
    assert "are not judged" not in text
    assert "conflicts" not in embedded(text)
    assert "This run did not measure gradients (interference.metrics)." in text


def test_conflicts_are_told_against_both_nulls_and_by_relation():
    rates = pd.DataFrame(
        {"layer": [0, 1, 2], "conflict_rate": [0.6, 0.2, 0.4], "low": 0.1, "high": 0.7, "chance": [0.5, 0.5, 0.4],
         "q_value": [0.01, 0.05, 0.9], "matched_chance": [0.5, 0.3, 0.4], "matched_q": [0.04, 0.06, 0.9],
         "difference": [-0.2, 0.1, 0.3], "relation_q": [0.01, 0.02, 0.9]}
    )  # fmt: skip
    assert about_conflicts(rates) == [
        "Against shuffled neurons, more pairs conflict in 1 of 3 layers and fewer in 1, at a false discovery rate of "
        "5% over layers.",
        "Against neurons shuffled among those of similar size, more pairs conflict in 1 of 3 layers and fewer in 0, at "
        "a false discovery rate of 5% over layers.",
        "Pairs of one relation conflict more often than pairs of two in 1 of 3 layers, and less often in 1.",
        "Most conflict in layer 0: 60% of the pairs (10% to 70%).",
    ]
    bare = about_conflicts(rates.assign(q_value=np.nan, matched_q=np.nan, relation_q=np.nan, low=np.nan))
    assert bare == ["Most conflict in layer 0: 60% of the pairs."]
    fig = figures.conflicts_by_layer(rates)
    assert list(fig.data[2].y) == [0.6, 0.2, 0.4]
    assert list(fig.data[2].marker.symbol) == ["circle", "circle", "circle-open"]
    assert [list(trace.y) for trace in fig.data[:2]] == [[0.5, 0.5, 0.4], [0.5, 0.3, 0.4]]
    with pytest.raises(ValueError, match="has no column 'chance'"):
        figures.conflicts_by_layer(rates.drop(columns="chance"))


def test_facts_of_one_relation_are_not_drawn_within_and_across(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    found = open_result(folder / "interference.zarr").load()
    nothing = dict.fromkeys(("across", "difference", "null_low", "null_high"), xr.full_like(found["across"], np.nan))
    found = found.assign(nothing).assign_coords(relation=("fact", ["capital"] * found.sizes["fact"]))
    save_result(found, folder / "interference.zarr", kind="interference")
    text = report(folder).read_text(encoding="utf-8")
    assert "All attributed facts are of one relation, so that there is nothing to compare." in text
    assert "relations" not in embedded(text)
    assert "relations" in embedded(report(run).read_text(encoding="utf-8"))


def test_perplexity_and_distance_follow_the_sign_of_the_interval():
    row = {"suite": "general", "metric": "perplexity", "method": "lora", "n": 10, "before": 15.0, "after": 16.0}
    ends = {"worse": (0.5, 1.5), "better": (-1.5, -0.5), "not distinguishable": (-0.5, 1.5)}
    for word, (low, high) in ends.items():
        (sentence,) = findings.about_perplexity(pd.DataFrame([{**row, "low": low, "high": high}]))
        assert word in sentence
        assert sentence.startswith("Perplexity on 10 pieces of general text went from 15 to 16")
        (few,) = findings.about_perplexity(pd.DataFrame([{**row, "n": 9, "low": low, "high": high}]))
        assert few.endswith("fewer than 10 pieces do not tell worse from better.")
        assert f": {word}" not in few
        (moved,) = findings.about_distance(pd.DataFrame([{**row, "group": "retained", "low": low, "high": high}]))
        assert {"worse": "further away", "better": "closer"}.get(word, "no distinguishable change") in moved
    assert findings.about_perplexity(pd.DataFrame(columns=["metric"])) == []


def test_recall_sentences_count(run):
    recall = pd.read_parquet(run / "recall.parquet")
    text = findings.about_recall(tables.recall_by_relation(recall), recall.assign(known=False))
    assert text[0].startswith(f"The model answers {recall['known'].sum()} of {len(recall)} facts (")
    assert text[-1].startswith(f"Of the new facts it answers 0 of {len(recall)} facts (0%")


# The page


def embedded(page: str) -> dict:
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, flags=re.S)
    return json.loads(found.group(1))


def test_the_page_has_every_figure_and_needs_nothing_else(page):
    figures = embedded(page)
    assert len(figures) >= 9
    assert set(re.findall(r'data-panel="([^"]+)"', page)) == set(figures)
    shell = re.sub(r"<script>.*?</script>", "", page, flags=re.S)
    assert not re.search(r"(src|href)=[\"']?(https?:|//)", shell)
    assert page.count("<script>") == 2  # plotly, once, and the page's own
    assert "Main findings" in page
    assert 4 <= len(re.findall(r"<li>", re.search(r'id="summary".*?</section>', page, flags=re.S).group(0))) <= 6


def test_every_choice_fits_its_figure(page):
    for figure in embedded(page).values():
        choice = figure["choice"]
        if choice is None:
            continue
        assert len(choice["patches"]) > 1
        assert all(len(patch["data"]) == len(figure["data"]) for patch in choice["patches"])
        shown = [json.dumps(patch) for patch in choice["patches"]]
        assert len(set(shown)) == len(shown)


def test_text_of_facts_stays_text(page):
    body = re.sub(r"<script>.*?</script>", "", page, flags=re.S)
    assert "<img" not in body
    assert "window.hacked=1</script>" not in body
    assert str(html.escape(NASTY)).replace("&#x27;", "&#39;").replace("&quot;", "&#34;") in body
    rows = embedded(page)["units"]["choice"]["rows"]
    assert ["prompt", NASTY] in rows[0]
    labels = json.dumps(embedded(page)["recall"]["data"])
    assert "&lt;b&gt;odd&lt;/b&gt;" in labels
    assert "<b>" not in labels


@given(
    st.recursive(st.text() | st.floats() | st.none(), lambda part: st.lists(part) | st.dictionaries(st.text(), part))
)
@settings(max_examples=60, deadline=None)
def test_json_in_the_page_cannot_close_its_script(value):
    text = str(safe_json(value))
    assert not set("<>&\u2028\u2029") & set(text)
    assert safe_json(json.loads(text)) == text


def test_the_same_run_gives_the_same_bytes(run, page, tmp_path):
    assert report(shutil.copytree(run, tmp_path / "copy")).read_text(encoding="utf-8") == page


@pytest.mark.parametrize(
    "gone",
    [
        ("recall.parquet", "drift.parquet"),
        ("attribution.zarr", "implant"),
        ("facts", "selection", "forgetting.parquet"),
        ("interference.zarr",),
    ],
)
def test_a_missing_stage_is_said_and_the_rest_stays(run, tmp_path, gone):
    folder = shutil.copytree(run, tmp_path / "run")
    for name in gone:
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    text = report(folder).read_text(encoding="utf-8")
    said = [sentence for name, sentence in STAGES.items() if sentence in text]
    assert said == [STAGES[name] for name in STAGES if name in gone]
    assert 6 <= len(embedded(text)) < 15


def test_bare_and_broken_folders(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no run folder"):
        report(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no results"):
        report(tmp_path)
    shutil.copy(run / "recall.parquet", tmp_path)
    text = report(tmp_path).read_text(encoding="utf-8")
    assert list(embedded(text)) == ["recall"]
    assert "What the model knows</h1>" in text
    (tmp_path / "drift.parquet").write_bytes(b"PAR1 half")
    with pytest.raises(ValueError, match=r"drift\.parquet is not a readable"):
        report(tmp_path)


def test_training_that_fell_short_is_a_main_finding(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    file = folder / "implant" / "lora" / "training.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "reached": False, "efficacy": 0.4}))
    text = report(folder).read_text(encoding="utf-8")
    summary = re.search(r'id="summary".*?</section>', text, flags=re.S).group(0)
    assert "LoRA did not reach the 95% asked for" in summary
    assert len(re.findall("<li>", summary)) <= 6
    for method in ("loki", "loki_random"):
        other = folder / "implant" / method / "training.json"
        other.write_text(json.dumps({**json.loads(other.read_text()), "reached": False, "efficacy": 0.4}))
    summary = re.search(r'id="summary".*?</section>', report(folder).read_text(encoding="utf-8"), flags=re.S).group(0)
    assert "LoKI, random rows and LoRA did not reach what was asked for" in summary


def test_forgetting_that_is_worse_is_not_told_as_better(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    new, old = [f"n{i}" for i in range(40)], [f"o{i}" for i in range(120)]
    worse = fabricate_forgetting(np.random.default_rng(3), new, old, keep=(0.4, 0.9, 0.95))
    worse.to_parquet(folder / "forgetting.parquet")
    text = html.unescape(report(folder).read_text(encoding="utf-8"))
    assert "LoKI answers fewer than random rows" in text
    assert "LoKI answers more than" not in text


# One figure, published


FIGURE = go.Figure(go.Scatter(x=[1, 2], y=[3.0, 4.0], name="a"), layout={"height": 300, "template": "none"})
FRAME = pd.DataFrame({"x": [1, 2], "y": [3.0, 4.0]})


def test_publish_without_a_browser(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    written = publish(FIGURE, FRAME, "quota_sweep", tmp_path, {"seed": 0})
    assert [path.name for path in written] == ["quota_sweep.html", "quota_sweep.csv", "quota_sweep.json"]
    pd.testing.assert_frame_equal(pd.read_csv(written[1]), FRAME)
    assert json.loads(written[2].read_text()) == {"seed": 0}
    first = written[0].read_bytes()
    assert publish(FIGURE, FRAME, "quota_sweep", tmp_path, {"seed": 0})[0].read_bytes() == first
    assert publish(FIGURE.update_layout(height=301), FRAME, "other", tmp_path, {})[0].read_bytes() != first
    with pytest.raises(ValueError, match="cannot be published as"):
        publish(FIGURE, FRAME, "../up", tmp_path, {})


# A real browser


@pytest.fixture(scope="module")
def browser():
    path = find_browser()
    if path is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=path, args=flags)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def loaded(browser, run):
    """The page, opened once without a network, and everything that went wrong in it."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True)
    opened, wrong = context.new_page(), []
    opened.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("request", lambda request: wrong.append(request.url) if request.url.startswith("http") else None)
    opened.goto((run / "report.html").as_uri())
    opened.wait_for_function("document.querySelectorAll('.js-plotly-plot .main-svg').length >= 8")
    yield opened, wrong
    context.close()


@pytest.fixture
def tab(loaded):
    opened, wrong = loaded
    yield opened
    assert wrong == []


@pytest.mark.browser
def test_the_page_draws_every_figure_and_runs_nothing_of_the_facts(tab, page):
    drawn = tab.evaluate("document.querySelectorAll('.js-plotly-plot:has(.main-svg)').length")
    assert drawn == len(embedded(page)) >= 8
    assert tab.evaluate("window.hacked === undefined")
    assert tab.evaluate("document.images.length") == 0
    for width in (1280, 400):
        tab.set_viewport_size({"width": width, "height": 900})
        tab.wait_for_function(  # a resized figure is drawn again a little later; a slow machine takes longer
            "width => [...document.querySelectorAll('.plot .main-svg')].every(svg => svg.clientWidth <= width)",
            arg=width,
        )
        assert tab.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.browser
def test_the_fact_picker_changes_figure_and_table(tab):
    plot, table = "#plot-units", "[data-panel=units] .detail"
    state = f"JSON.stringify([...document.querySelector('{plot}').data[0].x])"
    before, rows, bars = tab.evaluate(state), tab.inner_text(table), tab.inner_html(f"{plot} .barlayer")
    select = tab.locator("[data-panel=units] select")
    assert NASTY.split()[0] in rows
    select.select_option(index=5)
    assert tab.evaluate(state) != before
    assert tab.inner_text(table) != rows
    assert tab.inner_html(f"{plot} .barlayer") != bars
    select.select_option(index=0)  # and back again
    assert tab.evaluate(state) == before
    assert tab.inner_text(table) == rows
    assert tab.evaluate("window.hacked === undefined")


@pytest.mark.browser
def test_the_search_narrows_the_facts(tab):
    box, select = tab.locator("[data-panel=units] input"), tab.locator("[data-panel=units] select")
    everything = select.locator("option").count()
    box.fill("CURRENCY of")
    assert 0 < select.locator("option").count() < everything
    assert "currency" in tab.inner_text("[data-panel=units] .detail")
    box.fill("no such fact")
    assert select.is_disabled()
    box.fill("")
    assert select.locator("option").count() == everything


@pytest.mark.browser
def test_relation_layer_and_method_pickers_change_their_figures(tab):
    for panel, key in (("scores", "y"), ("overlap", "z"), ("facts", "y")):
        state = f"JSON.stringify(document.querySelector('#plot-{panel}').data.map((t) => t.{key}))"
        before = tab.evaluate(state)
        tab.locator(f"[data-panel={panel}] select").select_option(index=1)
        assert tab.evaluate(state) != before


@pytest.mark.browser
def test_a_published_picture_is_drawn_and_repeats(browser, tmp_path):
    first = publish(FIGURE, FRAME, "one", tmp_path / "a", {})[-1]
    second = publish(FIGURE, FRAME, "one", tmp_path / "b", {})[-1]
    assert first.suffix == ".svg"
    assert first.read_text(encoding="utf-8").startswith("<svg")
    assert first.read_bytes() == second.read_bytes()

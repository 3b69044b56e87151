"""Figures: the traces and axes behind them, the frames they ask for, and labels that cannot become mark-up."""

import json

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench import figures

RECALL = pd.DataFrame(
    {
        "relation": ["capital", "<b>x</b> & y", "all"],
        "known": [3, 1, 4],
        "unknown": [1, 3, 4],
        "share": [0.75, 0.25, 0.5],
        "low": [0.3, 0.05, 0.2],
        "high": [0.95, 0.7, 0.8],
    }
)
LAYERS = pd.DataFrame(
    {"layer": [1, 0], "relation": "all", "mean_abs": [0.2, 0.1], "low": [0.1, 0.05], "high": [0.3, 0.2]}
)
STRONG = pd.DataFrame({"fact": "f", "rank": [2, 1], "layer": [3, 4], "unit": [7, 8], "score": [-0.5, 0.9]})
WITHIN = pd.DataFrame({"layer": [0, 1], "within": [0.5, 0.6], "across": [0.4, 0.3]}).assign(
    difference=[0.1, 0.3], null_low=-0.05, null_high=0.05
)
LOAD = pd.DataFrame({"layer": [0, 0], "method": ["all", "loki"], "selected": [10, 2], "load": [0.5, 0.1]})
HISTORY = pd.DataFrame({"method": "lora", "step": [1, 2], "loss": [2.0, 1.0], "efficacy": [np.nan, 0.5]})
DRIFT = pd.DataFrame(
    {"method": ["loki", "lora"] * 2, "group": "retained", "metric": ["toward"] * 2 + ["off"] * 2}
).assign(layer=0, change=0.5, low=0.4, high=0.7, before=0.0, after=0.5)
CHANGE = pd.DataFrame({"method": ["loki", "lora"], "suite": "retained", "change": [-0.1, -0.4]}).assign(
    low=-0.5, high=0.0, before=-1.0, after=-2.0, fact=["a", "b"]
)

SUPPRESSION = pd.DataFrame({"group": ["lowest", "random", "random"] * 2, "quota": [5.0] * 3 + [1.0] * 3}).assign(
    strategy="global", score="signed", seed=pd.array([None, None, 0] * 2, "Int64"), metric="accuracy", change=-0.2
)
SUPPRESSION = SUPPRESSION.assign(low=-0.3, high=-0.15)
EFFECTS = pd.DataFrame(
    {"group": ["fact", "others"] * 3, "units": ["chosen"] * 2 + ["matched"] * 2 + ["difference"] * 2}
)
EFFECTS = EFFECTS.assign(change=[-6.0, -0.5, -0.25, 0.0, -5.75, -0.5], low=-7.0, high=1.0)

DRAWN = {
    "recall_by_relation": (figures.recall_by_relation, RECALL, ()),
    "score_by_layer": (figures.score_by_layer, LAYERS, ()),
    "strongest_units": (figures.strongest_units, STRONG, ("f",)),
    "within_across": (figures.within_across, WITHIN, ()),
    "load_and_selection": (figures.load_and_selection, LOAD, ()),
    "training_curves": (figures.training_curves, HISTORY, ()),
    "drift_geometry": (figures.drift_geometry, DRIFT, ("retained",)),
    "drift_distance": (figures.drift_distance, DRIFT[DRIFT["metric"] == "toward"], ()),
    "forgetting_compared": (figures.forgetting_compared, CHANGE, ()),
    "text_damage": (figures.text_damage, CHANGE, ("change in perplexity",)),
    "suppression_curves": (figures.suppression_curves, SUPPRESSION, ()),
    "neuron_effects": (figures.neuron_effects, EFFECTS, ()),
    "before_after": (figures.before_after, CHANGE, ("lora",)),
}


@pytest.mark.parametrize("name", DRAWN)
def test_every_figure_leaves_its_frame_alone_and_names_its_axes(name):
    draw, frame, rest = DRAWN[name]
    before = frame.copy(deep=True)
    fig = draw(frame, *rest)
    pd.testing.assert_frame_equal(frame, before)
    titles = [axis.title.text for axis in (*fig.select_xaxes(), *fig.select_yaxes())]
    assert any(titles)
    assert fig.layout.height >= 120
    assert figures.figure_json(fig) == figures.figure_json(draw(frame, *rest))


@pytest.mark.parametrize("name", DRAWN)
def test_a_missing_column_is_named_and_an_empty_frame_refused(name):
    draw, frame, rest = DRAWN[name]
    with pytest.raises(ValueError, match="has no rows"):
        draw(frame.iloc[:0], *rest)
    column = "score" if name == "strongest_units" else "step" if name == "training_curves" else None
    column = column or ("known" if name == "recall_by_relation" else "layer" if "layer" in frame else "after")
    column = {
        "drift_distance": "before",
        "forgetting_compared": "suite",
        "text_damage": "low",
        "suppression_curves": "quota",
        "neuron_effects": "units",
    }.get(name, column)
    with pytest.raises(ValueError, match=rf"has no column '{column}'"):
        draw(frame.drop(columns=column), *rest)


def test_relations_that_begin_alike_keep_rows_of_their_own():
    names = [f"the capital city of a country in {place}" for place in ("Europe", "Asia")]
    fig = figures.recall_by_relation(RECALL.iloc[[0, 1]].assign(relation=names))
    assert set(fig.data[0].y) == set(fig.data[1].y) == set(names)
    assert list(fig.layout.yaxis.tickvals) == list(fig.data[0].y)
    assert all(len(shown) <= 28 for shown in fig.layout.yaxis.ticktext)


def test_recall_puts_shares_and_counts_where_they_belong():
    fig = figures.recall_by_relation(RECALL)
    points, known, unknown = fig.data
    assert list(points.y) == ["&lt;b&gt;x&lt;/b&gt; &amp; y", "capital", "all"]
    assert list(points.x) == [25.0, 75.0, 50.0]
    np.testing.assert_allclose(points.error_x.array, [45, 20, 30])
    np.testing.assert_allclose(points.error_x.arrayminus, [20, 45, 30])
    assert list(known.x)[:2] == [1, 3]
    assert list(unknown.x)[:2] == [3, 1]
    assert np.isnan(known.x[2])  # the total would dwarf the relations
    assert fig.layout.xaxis.title.text == "known (%)"


def test_layers_are_drawn_in_order_with_their_band_and_unit():
    fig = figures.score_by_layer(LAYERS, unit="nats")
    band, line = fig.data
    assert list(line.x) == [0, 1]
    assert list(line.y) == [0.1, 0.2]
    assert list(band.y) == [0.05, 0.1, 0.3, 0.2]
    assert "nats" in fig.layout.yaxis.title.text
    with pytest.raises(ValueError, match="no relation 'capital'"):
        figures.score_by_layer(LAYERS, "capital")


def test_the_strongest_unit_comes_first_and_signs_have_colours():
    fig = figures.strongest_units(STRONG, "f", "neuron")
    (bars,) = fig.data
    assert list(bars.y) == ["layer 4 · neuron 8", "layer 3 · neuron 7"]
    assert list(bars.x) == [0.9, -0.5]
    assert bars.marker.color[0] != bars.marker.color[1]
    assert fig.layout.yaxis.autorange == "reversed"
    assert figures.strongest_bars(STRONG, "f", "neuron")["x"] == list(bars.x)
    with pytest.raises(ValueError, match="no fact 'g'"):
        figures.strongest_units(STRONG, "g")


def overlap(relations=("r", "r", "<i>s</i>")):
    values = np.array([[[np.nan, 0.5, 0.1], [0.5, np.nan, 0.2], [0.1, 0.2, np.nan]]], dtype=np.float32)
    coords = {"layer": ["mean"], "fact": ["a", "b", "<c>"], "relation": ("fact", list(relations))}
    return xr.DataArray(values, dims=("layer", "fact", "other"), coords=coords)


def test_the_overlap_map_groups_facts_by_relation():
    fig = figures.overlap_map(overlap(), "mean")
    (heat,) = fig.data
    assert list(heat.x) == ["a", "b", "&lt;c&gt;"]
    assert (heat.zmin, heat.zmax) == pytest.approx((0.1, 0.5))
    assert list(fig.layout.xaxis.tickvals) == [0.5, 2.0]
    assert list(fig.layout.xaxis.ticktext) == ["r", "&lt;i&gt;s&lt;/i&gt;"]
    assert [shape.x0 for shape in fig.layout.shapes if shape.yref == "paper"] == [1.5]
    assert not figures.overlap_map(overlap(("r", "r", "r")), "mean").layout.shapes
    with pytest.raises(ValueError, match="no layer '3'"):
        figures.overlap_map(overlap(), "3")
    with pytest.raises(ValueError, match="'relation'"):
        figures.overlap_map(overlap().drop_vars("relation"), "mean")
    with pytest.raises(ValueError, match="no facts"):
        figures.overlap_map(overlap().isel(fact=[], other=[]), "mean")


def test_a_method_has_one_colour_and_one_name_in_every_figure():
    drift = figures.drift_geometry(DRIFT, "retained")
    kept = figures.forgetting_compared(CHANGE)
    line = {trace.name: trace.line.color for trace in drift.data if trace.mode == "lines+markers"}
    mark = {trace.name: trace.marker.color for trace in kept.data}
    assert line == mark
    assert set(line) == {"LoKI", "LoRA"}
    assert figures.method_colour("mine", ["loki", "mine"]) not in line.values()


def test_training_skips_what_was_not_measured_and_draws_the_target():
    fig = figures.training_curves(HISTORY, target=0.9)
    loss, efficacy = fig.data
    assert list(loss.y) == [2.0, 1.0]
    assert list(efficacy.x) == [2]
    assert list(efficacy.y) == [50.0]
    assert [shape.y0 for shape in fig.layout.shapes] == [90.0]
    assert not figures.training_curves(HISTORY).layout.shapes


def test_distances_run_from_before_to_after_with_the_interval_of_the_change():
    first = figures.drift_distance(DRIFT[DRIFT["metric"] == "toward"]).data[0]
    assert list(first.x) == [0.0, 0.5]
    np.testing.assert_allclose(first.error_x.array, [0, 0.2])
    np.testing.assert_allclose(first.error_x.arrayminus, [0, 0.1])


def test_damage_is_in_points_and_facts_lie_on_the_diagonal_when_nothing_changed():
    assert [list(trace.x) for trace in figures.forgetting_compared(CHANGE).data] == [[-10.0], [-40.0]]
    same = CHANGE.assign(after=CHANGE["before"])
    diagonal, facts = figures.before_after(same, "lora").data
    assert list(facts.x) == list(facts.y)
    assert list(diagonal.x) == list(diagonal.y)
    _, moved = figures.before_after(CHANGE, "lora").data
    assert list(moved.x) != list(moved.y)


def test_suppression_is_drawn_over_quotas_without_the_single_seeds():
    fig = figures.suppression_curves(pd.concat([SUPPRESSION, SUPPRESSION.assign(score="magnitude")]))
    assert [trace.name for trace in fig.data] == ["lowest", "random"] * 2
    assert [list(trace.x) for trace in fig.data] == [[1.0, 5.0]] * 4
    assert list(fig.data[1].y) == [-20.0, -20.0]
    np.testing.assert_allclose(fig.data[0].error_y.array, [5, 5])
    np.testing.assert_allclose(fig.data[0].error_y.arrayminus, [10, 10])
    assert fig.data[0].line.color == fig.data[2].line.color != fig.data[1].line.color
    assert [note.text for note in fig.layout.annotations] == ["signed, global", "magnitude, global"]
    assert fig.layout.yaxis.title.text == "change of facts answered (points)"
    assert fig.layout.xaxis.title.text == "silenced (%)"
    assert list(figures.suppression_curves(SUPPRESSION.assign(metric="kl"), "kl").data[0].y) == [-0.2, -0.2]
    with pytest.raises(ValueError, match="no metric 'kl'"):
        figures.suppression_curves(SUPPRESSION, "kl")


def test_neurons_stand_beside_the_random_units_of_the_same_group():
    fig = figures.neuron_effects(EFFECTS)
    chosen, matched = fig.data
    assert (list(chosen.x), list(matched.x)) == ([-6.0, -0.5], [-0.25, 0.0])
    assert [round(y) for y in chosen.y] == [round(y) for y in matched.y] == [0, 1]
    assert chosen.y[0] < matched.y[0]
    np.testing.assert_allclose(chosen.error_x.arrayminus, [1.0, 6.5])
    assert chosen.name != matched.name
    assert fig.layout.yaxis.ticktext == ("the fact<br>itself", "other relations")
    assert fig.layout.xaxis.title.text == "change of the answer's log-probability (nats)"


@given(st.text(max_size=200))
@settings(max_examples=60, deadline=None)
def test_no_text_becomes_mark_up(text):
    made = figures.plain(text)
    assert "<" not in made
    assert ">" not in made
    fig = go.Figure(go.Bar(x=[1.0], y=[made]))
    assert json.dumps(figures.figure_json(fig))


def test_without_plain_the_mark_up_would_have_survived():
    assert "<b>" in go.Figure(go.Bar(x=[1.0], y=["<b>x</b>"])).data[0].y[0]

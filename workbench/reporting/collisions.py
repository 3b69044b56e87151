"""The sections on collisions: interference by measure, which measure predicts harm, and which layers to train."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from workbench import figures
from workbench.interfere import METRICS, conflict_rates, within_across
from workbench.reporting import findings
from workbench.reporting.artefacts import Artefacts
from workbench.reporting.parts import Panel, Section
from workbench.reporting.words import listed, number, percent


def measures(run: Artefacts) -> Section:
    """Every measure of interference within relations against across them, with nulls and intervals."""
    table = within_across(run.interference)
    if not set(table.columns) >= {"low", "high", "q_value"} or table["difference"].isna().all():
        told = "The facts are of one relation, or no two are, so that there is nothing to compare by measure."
        return Section("", "", "", absent=told)
    drawn = figures.figure_json(figures.interference_by_layer(table))
    panel = Panel("measures", "Within minus across relations, by measure", drawn, findings.about_measures(table))
    about = (
        "Every measure of interference in its own units: bars are 95% bootstrap intervals over facts, the band is what "
        "shuffled relations give, and filled orange layers differ at a false discovery rate of 5% over layers. In the "
        "table, chance is what the largest value of two facts reaches when each fact's units are shuffled, and level "
        "what a pair has to exceed to collide, corrected over layers."
    )
    about += "".join(f" {sentence}" for sentence in _levels(table))
    return Section("", "", about, [panel], table, "interference.zarr")


def conflicts(run: Artefacts) -> Section:
    """How many pairs of facts have gradients that conflict, against chance and by relation."""
    if "gradient" not in {str(name) for name in np.atleast_1d(run.interference["metric"].values)}:
        return Section("", "", "", absent="This run did not measure gradients (interference.metrics).")
    rates = conflict_rates(run.interference)
    drawn = figures.figure_json(figures.conflicts_by_layer(rates))
    panel = Panel("conflicts", "Pairs of facts whose gradients conflict", drawn, about_conflicts(rates))
    about = (
        "Two facts conflict in a layer where a step that teaches the one unteaches the other. Bars are 95% intervals "
        "over facts, and filled orange layers have more or fewer conflicts than shuffled neurons leave, at a false "
        "discovery rate of 5% over layers. Shuffling changes no sign that all neurons share: after a ReLU, it shows "
        "next to nothing."
    )
    return Section("", "", about, [panel], rates, "interference.zarr")


def prediction(run: Artefacts) -> Section:
    """Which measure predicts harm, with the verdict."""
    text = about_prediction(run.predicted)
    caption = "How well each measure predicts harm, on facts it was not chosen by"
    panel = Panel("prediction", caption, figures.figure_json(figures.prediction(run.prediction)), text)
    about = (
        "Every attributed fact, known or new, was learnt alone, and what that took from every other was set against "
        "what was measured before. The layer and the sign of each measure are chosen on half of the facts, and it is "
        "judged on the others. Bars are 95% intervals over facts; crosses are the same with the harms shuffled over "
        "pairs."
    )
    return Section("", "", about, [panel], run.prediction, "prediction.parquet", headline=text[:1])


def advice(run: Artefacts) -> Section:
    """How many units of every layer to train, and why."""
    caption, drawn = "Load, collisions and recommended units, per layer", figures.advice_by_layer(run.advice)
    panel = Panel("advice", caption, figures.figure_json(drawn), about_advice(run.advice))
    about = (
        "Where the known facts lean and collide, where the new facts share their units, and how many units of every "
        f"layer to train by that. {_followed(run)}"
    )
    return Section("", "", about, [panel], run.advice, "advice.parquet")


def _levels(table: pd.DataFrame) -> list[str]:
    """What has to be said of the levels of some measures: where harm lies below, and where no pair is judged."""
    names = [str(name) for name in table["metric"].unique() if name in METRICS]
    below = [name for name in names if METRICS[name].harmful < 0]
    unjudged = [name for name in names if "level" in table and table.loc[table["metric"] == name, "level"].isna().all()]
    told = (
        f"Of {listed(below)}, low values are the harmful ones: a pair collides below the level, and chance, of the "
        "largest value, is the harmless end.",
        f"The pairs of {listed(unjudged)} are not judged, for that takes 19 draws (interference.draws).",
    )
    return [sentence for sentence, said in zip(told, (below, unjudged), strict=True) if said]


def _followed(run: Artefacts) -> str:
    """Say which methods train what is advised, or how to have it trained."""
    names = [method for method, chosen in run.selections.items() if isinstance(chosen.origin.get("quota"), dict)]
    if names:
        return f"{listed([figures.method_name(name) for name in names])} of this run trained what is advised."
    return (
        "Nothing in this run follows the advice: for LoKI to follow it, give the strategy interference_aware "
        "(selection.strategy, or `workbench select --strategy interference_aware --advice advice.parquet`)."
    )


def about_conflicts(rates: pd.DataFrame) -> list[str]:
    """Say in how many layers more or fewer gradients conflict than by chance, and in how many relations differ."""
    sentences, n = [], len(rates)
    for chance, q, null in (
        ("chance", "q_value", "shuffled neurons"),
        ("matched_chance", "matched_q", "neurons shuffled among those of similar size"),
    ):
        if rates[q].isna().all():
            continue
        called = rates[rates[q] <= findings.RATE]
        more = int((called["conflict_rate"] > called[chance]).sum())
        sentences.append(
            f"Against {null}, more pairs conflict in {more} of {n} layers and fewer in {len(called) - more}, at a "
            "false discovery rate of 5% over layers."
        )
    if rates["relation_q"].notna().any():
        called = rates[rates["relation_q"] <= findings.RATE]
        more = int((called["difference"] > 0).sum())
        sentences.append(
            f"Pairs of one relation conflict more often than pairs of two in {more} of {n} layers, and less often in "
            f"{len(called) - more}."
        )
    peak = rates.loc[rates["conflict_rate"].idxmax()]
    ends = f" ({percent(peak['low'])} to {percent(peak['high'])})" if np.isfinite(peak["low"]) else ""
    sentences.append(
        f"Most conflict in layer {peak['layer']:.0f}: {percent(peak['conflict_rate'])} of the pairs{ends}."
    )
    return sentences


def about_prediction(predicted: Mapping[str, Any]) -> list[str]:
    """Say which measure to trust, over how many facts, and how many of them the learning left probable."""
    if not predicted:
        return []
    facts, share = number(predicted["n_facts"]), percent(predicted["learnt"])
    rests = f"This rests on {facts} facts; after being learnt, {share} of them were more than half probable."
    return [str(predicted["verdict"]), rests]


def about_advice(advice: pd.DataFrame) -> list[str]:
    """Say which layers to freeze, and why those with the most units get them."""
    frozen = [str(layer) for layer in advice.loc[advice["budget"] == 0, "layer"]]
    sentences = [f"Layers to freeze: {listed(frozen)}." if frozen else "No layer is to be frozen."]
    top = advice.sort_values(["budget", "layer"], ascending=[False, True]).head(3)
    return sentences + [
        f"Layer {row['layer']}: {row['budget']} units, {row['reason']}." for row in top.to_dict("records")
    ]

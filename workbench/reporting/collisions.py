"""The sections on collisions: interference by measure, which measure predicts harm, and which layers to train."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from workbench import figures
from workbench.interfere import within_across
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
    panel = Panel("measures", "Within less across relations, by measure", drawn, findings.about_measures(table))
    about = (
        "Every measure of interference in its own units: bars are 95% bootstrap intervals over facts, the band is what "
        "shuffled relations give, and filled orange layers differ at a false discovery rate of 5% over layers. In the "
        "table, chance is what the largest pair reaches when each fact's units are shuffled, and level what it has to "
        "exceed, corrected over layers."
    )
    return Section("", "", about, [panel], table, "interference.zarr")


def prediction(run: Artefacts) -> Section:
    """Which measure predicts harm, with the verdict."""
    text = about_prediction(run.predicted)
    caption = "How well each measure predicts harm, on facts it was not chosen by"
    panel = Panel("prediction", caption, figures.figure_json(figures.prediction(run.prediction)), text)
    about = (
        "Every attributed fact, known or new, was learnt alone, and what that took from every other was set against "
        "what was measured before. Each measure is chosen on half of the facts and judged on the others. Bars are 95% "
        "intervals over facts; crosses are the same with the harms shuffled over pairs."
    )
    return Section("", "", about, [panel], run.prediction, "prediction.parquet", headline=text[:1])


def advice(run: Artefacts) -> Section:
    """How many units of every layer to train, and why."""
    caption, drawn = "Load, collisions and recommended units, per layer", figures.advice_by_layer(run.advice)
    panel = Panel("advice", caption, figures.figure_json(drawn), about_advice(run.advice))
    about = (
        "Where the known facts lean and collide, where the new facts share their units, and how many units of every "
        "layer to train by that. The methods above train what the settings say: to follow the advice, give "
        "the strategy interference_aware, or advice.parquet to `workbench select --advice`."
    )
    return Section("", "", about, [panel], run.advice, "advice.parquet")


def about_prediction(predicted: Mapping[str, Any]) -> list[str]:
    """Say which measure to trust, over how many facts, and how many of them were learnt."""
    if not predicted:
        return []
    rests = f"This rests on {number(predicted['n_facts'])} facts, of which {percent(predicted['learnt'])} were learnt."
    return [str(predicted["verdict"]), rests]


def about_advice(advice: pd.DataFrame) -> list[str]:
    """Say which layers to freeze, and why those with the most units get them."""
    frozen = [str(layer) for layer in advice.loc[advice["budget"] == 0, "layer"]]
    sentences = [f"Layers to freeze: {listed(frozen)}." if frozen else "No layer is to be frozen."]
    top = advice.sort_values(["budget", "layer"], ascending=[False, True]).head(3)
    return sentences + [
        f"Layer {row['layer']}: {row['budget']} units, {row['reason']}." for row in top.to_dict("records")
    ]

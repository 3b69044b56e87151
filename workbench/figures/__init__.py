"""Figures: a tidy frame in, a `plotly.graph_objects.Figure` out; no files and no computing. The only door to plotly."""

import json
from typing import Any

import plotly.graph_objects as go
import plotly.offline

from workbench.figures.attribution import agreement_map, gap_by_steps
from workbench.figures.change import (
    before_after,
    drift_distance,
    drift_geometry,
    forgetting_compared,
    quota_curves,
    text_damage,
    training_curves,
)
from workbench.figures.interference import behaviour_by_layer, conflicts_by_layer, interference_by_layer
from workbench.figures.interventions import neuron_effects, suppression_curves
from workbench.figures.knowledge import (
    load_and_selection,
    overlap_map,
    recall_by_relation,
    score_by_layer,
    strongest_bars,
    strongest_units,
    within_across,
)
from workbench.figures.learning import advice_by_layer, prediction
from workbench.figures.semantics import blame_by_layer, drift_by_layer, similarity_by_layer
from workbench.figures.style import SUITE_NAMES, method_colour, method_name, plain
from workbench.figures.tracing import agreement_by_role, agreement_profiles, direct_bars, lens_trajectories, trace_map
from workbench.figures.watching import watched_training

__all__ = [
    "SUITE_NAMES",
    "Figure",
    "advice_by_layer",
    "agreement_by_role",
    "agreement_map",
    "agreement_profiles",
    "before_after",
    "behaviour_by_layer",
    "blame_by_layer",
    "conflicts_by_layer",
    "direct_bars",
    "drift_by_layer",
    "drift_distance",
    "drift_geometry",
    "figure_json",
    "forgetting_compared",
    "gap_by_steps",
    "interference_by_layer",
    "lens_trajectories",
    "load_and_selection",
    "method_colour",
    "method_name",
    "neuron_effects",
    "overlap_map",
    "plain",
    "plotly_source",
    "prediction",
    "quota_curves",
    "recall_by_relation",
    "score_by_layer",
    "similarity_by_layer",
    "strongest_bars",
    "strongest_units",
    "suppression_curves",
    "text_damage",
    "trace_map",
    "training_curves",
    "watched_training",
    "within_across",
]


#: What every figure function gives.
Figure = go.Figure


def figure_json(fig: go.Figure) -> dict[str, Any]:
    """Return a figure as plain JSON data (`data`, `layout`; arrays as base64); the same figure gives the same data."""
    return json.loads(fig.to_json())


def plotly_source() -> str:
    """Return the plotly JavaScript library (about 4.8 MB) for pages that work offline."""
    return plotly.offline.get_plotlyjs()

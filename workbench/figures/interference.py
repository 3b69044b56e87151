"""Figures of interference, layer by layer: measures within relations against across them, gradients in conflict."""

from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.figures.style import BLUE, GREY, ORANGE, PURPLE, band, check, error_bars, plain, styled

COLUMNS = ("metric", "layer", "difference", "low", "high", "null_low", "null_high", "q_value")
#: What is drawn of behaviour, a row each: the columns that stand for a difference with its interval, null and q-value.
BEHAVIOUR = {
    "suppression": ("suppression", "low", "high", "null_low", "null_high", "q_value"),
    "change of rank": ("rank_change", "rank_low", "rank_high", "rank_null_low", "rank_null_high", "rank_q"),
}
CONFLICTS = ("layer", "conflict_rate", "low", "high", "chance", "matched_chance", "q_value")


def interference_by_layer(frame: pd.DataFrame, level: float = 0.05) -> go.Figure:
    """Draw within minus across relations per layer, one row a measure: interval over facts, band of shuffled relations.

    Columns: metric, layer, difference, low, high, null_low, null_high (in the units of the measure), q_value. Layers
    with a q-value of at most `level` are filled and orange. Measures without any difference, as with a single
    relation, are left out.
    """
    check(frame, "interference by layer", COLUMNS)
    known = frame[frame["difference"].notna()]
    if known.empty:
        raise ValueError("There is nothing to draw for interference by layer: the facts are of one relation.")
    return _against_nulls(known, level, "within minus across, 95% interval", "shuffled relations, 95%")


def behaviour_by_layer(per_layer: pd.DataFrame, level: float = 0.05) -> go.Figure:
    """Draw what learning together does to a layer: how much is suppressed, and how the effective rank changes.

    Columns: those of the second frame of `behaviour`. Bars are 95% intervals over facts, the bands what its nulls give;
    layers with a q-value of at most `level` are filled and orange. Layers that learning left as they were are left out.
    """
    check(per_layer, "behaviour by layer", ("layer", *(name for names in BEHAVIOUR.values() for name in names)))
    drawn = ["layer", *COLUMNS[2:]]
    parts = [
        per_layer[["layer", *names]].set_axis(drawn, axis=1).assign(metric=row) for row, names in BEHAVIOUR.items()
    ]
    moved = pd.concat(parts, ignore_index=True).dropna(subset=["null_low"])
    if moved.empty:
        raise ValueError("There is nothing to draw for behaviour by layer: learning moved nothing in any layer.")
    return _against_nulls(moved, level, "together against alone, 95% interval", "null, 95%")


def _against_nulls(frame: pd.DataFrame, level: float, name: str, null_name: str) -> go.Figure:
    """A row a metric: a value per layer with its interval, over the band of its null."""
    metrics = list(frame["metric"].unique())
    fig = make_subplots(len(metrics), 1, shared_xaxes=True, vertical_spacing=0.08 / len(metrics))
    for row, metric in enumerate(metrics, start=1):
        rows = frame[frame["metric"] == metric].sort_values("layer")
        label = plain(metric, 28)
        fig.add_trace(band(rows["layer"], rows["null_low"], rows["null_high"], GREY, null_name, row == 1), row, 1)
        fig.add_scatter(
            x=rows["layer"],
            y=rows["difference"],
            mode="lines+markers",
            name=name,
            legendgroup="difference",
            showlegend=row == 1,
            line={"color": BLUE, "width": 1},
            marker=_marks(rows["q_value"] <= level),
            error_y={**error_bars(rows, "difference"), "color": BLUE},
            customdata=rows["q_value"],
            hovertemplate=f"layer %{{x}}, {label}: %{{y:.3g}} (q = %{{customdata:.2g}})<extra></extra>",
            row=row,
            col=1,
        )
        fig.update_yaxes(title=label, zeroline=True, row=row, col=1)
    fig.update_xaxes(title="layer", row=len(metrics), col=1)
    return styled(fig, height=120 + 190 * len(metrics))


def conflicts_by_layer(frame: pd.DataFrame, level: float = 0.05) -> go.Figure:
    """Draw the share of pairs of facts whose gradients conflict, per layer, beside what shuffled neurons give.

    Columns: layer, conflict_rate with its interval low, high, chance, matched_chance (shares, 0 to 1), q_value. Layers
    whose rate is not by chance, with a q-value of at most `level`, are filled and orange.
    """
    check(frame, "conflicts by layer", CONFLICTS)
    rows = frame.sort_values("layer")
    fig = go.Figure()
    for column, colour, name in (
        ("chance", GREY, "shuffled neurons"),
        ("matched_chance", PURPLE, "shuffled among neurons of similar size"),
    ):
        line = {"color": colour, "dash": "dot", "width": 2}
        fig.add_scatter(x=rows["layer"], y=rows[column], mode="lines", name=name, line=line)
    fig.add_scatter(
        x=rows["layer"],
        y=rows["conflict_rate"],
        mode="lines+markers",
        name="pairs in conflict, 95% interval",
        line={"color": BLUE, "width": 1},
        marker=_marks(rows["q_value"] <= level),
        error_y={**error_bars(rows, "conflict_rate"), "color": BLUE},
        customdata=rows["q_value"],
        hovertemplate="layer %{x}: %{y:.1%} (q = %{customdata:.2g})<extra></extra>",
    )
    fig.update_xaxes(title="layer")
    fig.update_yaxes(title="pairs in conflict", tickformat=".0%", rangemode="tozero")
    return styled(fig, height=360)


def _marks(called: pd.Series) -> dict[str, Any]:
    """Filled and orange where a layer is called, open otherwise."""
    return {
        "size": 8,
        "color": [ORANGE if one else BLUE for one in called],
        "symbol": ["circle" if one else "circle-open" for one in called],
    }

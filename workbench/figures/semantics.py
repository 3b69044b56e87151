"""Figures of drift per layer: distances, how alike two models are, and which layers' trained units did it."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.figures.style import (
    BLUE,
    GREY,
    ORANGE,
    PURPLE,
    SYMBOLS,
    band,
    check,
    method_colour,
    method_name,
    plain,
    styled,
)

MEASURE_NAMES = {"cka": "linear CKA", "rsa": "RSA"}
UNIT_NAMES = {
    "trained": "all trained units of the layer",
    "leaned": "those that the fact leans on",
    "paired": "of these, those that have partners",
    "matched": "their partners: as many others, changed as much",
}
UNIT_COLOURS = {"trained": GREY, "leaned": BLUE, "paired": PURPLE, "matched": ORANGE}
DRIFT_NAMES = {"logprob": "of the answer's log-probability", "state": "of the last hidden state"}


def similarity_by_layer(frame: pd.DataFrame) -> go.Figure:
    """Draw how alike two models arrange the same facts, per layer: CKA above, RSA below, with intervals over facts.

    Columns: layer, metric ("cka" or "rsa"), value, low, high; and method, where there are several models.
    """
    check(frame, "similarity by layer", ("layer", "metric", "value", "low", "high"))
    frame = frame if "method" in frame else frame.assign(method="after")
    metrics, methods = list(frame["metric"].unique()), list(frame["method"].unique())
    fig = make_subplots(len(metrics), 1, shared_xaxes=True, vertical_spacing=0.08)
    for (metric, method), rows in frame.groupby(["metric", "method"], sort=False):
        row, name = metrics.index(metric) + 1, plain(method_name(str(method)))
        _line(fig, rows, "value", name, method_colour(str(method), methods), methods.index(method), row)
        fig.update_yaxes(title=MEASURE_NAMES.get(str(metric), plain(metric)), row=row, col=1)
    fig.update_xaxes(title="layer", row=len(metrics), col=1)
    return styled(fig, height=110 + 180 * len(metrics), showlegend=len(methods) > 1)


def drift_by_layer(frame: pd.DataFrame, metric: str = "d_layer") -> go.Figure:
    """Draw the mean change of one metric per layer and method, with intervals over facts; above 0 is further away.

    Columns: method, metric, layer, change, low, high.
    """
    check(frame, "drift by layer", ("method", "metric", "layer", "change", "low", "high"))
    chosen = frame[frame["metric"] == metric]
    if chosen.empty:
        raise ValueError(f"The frame for drift by layer has no metric {metric!r}: choose one of its metrics.")
    fig, methods = make_subplots(1, 1), list(frame["method"].unique())
    for method, rows in chosen.groupby("method", sort=False):
        name = plain(method_name(str(method)))
        _line(fig, rows, "change", name, method_colour(str(method), methods), methods.index(method), 1)
    fig.add_hline(y=0, line={"color": GREY, "width": 1})
    fig.update_yaxes(title=f"change of {plain(metric)}")
    fig.update_xaxes(title="layer")
    return styled(fig, height=330, showlegend=len(methods) > 1)


def blame_by_layer(frame: pd.DataFrame) -> go.Figure:
    """Draw which share of the drift comes back when trained units of one layer are reverted, with intervals over facts.

    Columns: layer (rows without one are left out), units ("trained", "leaned", "paired", "matched"; others are left
    out), metric, share, low, high (drawn in percent).
    """
    check(frame, "blame by layer", ("layer", "units", "metric", "share", "low", "high"))
    chosen = frame[frame["layer"].notna() & frame["units"].isin(list(UNIT_NAMES))]
    if chosen.empty:
        raise ValueError("There is nothing to draw for blame by layer: the frame has no rows of single layers.")
    metrics = list(chosen["metric"].unique())
    fig = make_subplots(len(metrics), 1, shared_xaxes=True, vertical_spacing=0.08)
    for (metric, units), rows in chosen.groupby(["metric", "units"], sort=False):
        percent = rows.assign(**{name: rows[name] * 100 for name in ("share", "low", "high")})
        place, row = list(UNIT_NAMES).index(str(units)), metrics.index(metric) + 1
        _line(fig, percent, "share", UNIT_NAMES[str(units)], UNIT_COLOURS[str(units)], place, row)
        title = f"share that comes back (%),<br>{DRIFT_NAMES.get(str(metric), plain(metric))}"
        fig.update_yaxes(title=title, zeroline=True, row=row, col=1)
    fig.update_xaxes(title="layer", row=len(metrics), col=1)
    return styled(fig, height=110 + 220 * len(metrics))


def _line(fig: go.Figure, rows: pd.DataFrame, column: str, name: str, colour: str, place: int, row: int) -> None:
    """One line by layer with its band, in one panel; the legend names it once."""
    rows = rows.sort_values("layer")
    layers = rows["layer"].astype(int)
    fig.add_trace(band(layers, rows["low"], rows["high"], colour, name, shown=False), row, 1)
    fig.add_scatter(
        x=layers,
        y=rows[column],
        mode="lines+markers",
        name=name,
        legendgroup=name,
        line={"color": colour},
        marker={"symbol": SYMBOLS[place % 6]},
        showlegend=row == 1,
        hovertemplate=f"{name}, layer %{{x}}: %{{y:.3g}}<extra></extra>",
        row=row,
        col=1,
    )

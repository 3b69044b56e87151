"""Figures of what the base model knows, which units carry it, and how facts share them."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from workbench.figures.style import (
    ALL,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    SYMBOLS,
    band,
    check,
    error_bars,
    method_colour,
    method_name,
    plain,
    styled,
)


def recall_by_relation(frame: pd.DataFrame) -> go.Figure:
    """Draw the share of facts that the model answers, per relation with its interval, and how many they are.

    Columns: relation, known, unknown (counts), share, low, high (0 to 1); the relation "all" is drawn last.
    """
    check(frame, "recall by relation", ("relation", "known", "unknown", "share", "low", "high"))
    rows = _all_last(frame.sort_values(["share", "relation"], kind="stable"))
    names = [plain(name) for name in rows["relation"]]  # in full: two may begin alike
    fig = make_subplots(1, 2, shared_yaxes=True, column_widths=[0.62, 0.38], horizontal_spacing=0.04)
    colours = [GREY if name == ALL else BLUE for name in rows["relation"]]
    fig.add_scatter(
        x=rows["share"] * 100,
        y=names,
        mode="markers",
        marker={"size": 9, "color": colours},
        showlegend=False,
        error_x={**error_bars(rows, "share", 100.0), "color": GREY},
        hovertemplate="%{y}: %{x:.0f}% known<extra></extra>",
        row=1,
        col=1,
    )
    single = rows["relation"] != ALL
    for column, colour in (("known", BLUE), ("unknown", "rgba(138,143,152,0.45)")):
        fig.add_bar(
            x=rows[column].where(single),
            y=names,
            orientation="h",
            name=column,
            marker={"color": colour},
            hovertemplate=f"%{{y}}: %{{x}} {column}<extra></extra>",
            row=1,
            col=2,
        )
    fig.update_xaxes(title="known (%)", range=[-3, 103], row=1, col=1)
    fig.update_xaxes(title="facts", row=1, col=2)
    short = [plain(name, 28) for name in rows["relation"]]
    fig.update_yaxes(type="category", tickmode="array", tickvals=names, ticktext=short, tickfont={"size": 12})
    return styled(fig, height=150 + 21 * len(rows), barmode="stack")


def score_by_layer(frame: pd.DataFrame, relation: str = ALL, unit: str = "nats") -> go.Figure:
    """Draw the mean absolute score of a unit per layer with its interval, for one relation or for all facts.

    Columns: layer, relation, mean_abs, low, high (in `unit`).
    """
    check(frame, "score by layer", ("layer", "relation", "mean_abs", "low", "high"))
    rows = frame[frame["relation"] == relation].sort_values("layer")
    if rows.empty:
        raise ValueError(f"The frame for score by layer has no relation {relation!r}: choose one of its relations.")
    fig = go.Figure()
    fig.add_trace(band(rows["layer"], rows["low"], rows["high"], BLUE, "95% interval"))
    fig.add_scatter(
        x=rows["layer"],
        y=rows["mean_abs"],
        mode="lines+markers",
        name="mean over facts",
        line={"color": BLUE},
        hovertemplate="layer %{x}: %{y:.4g}<extra></extra>",
    )
    fig.update_xaxes(title="layer")
    fig.update_yaxes(title=f"mean |score| of a unit ({plain(unit)})", rangemode="tozero")
    return styled(fig, height=360)


def strongest_units(frame: pd.DataFrame, fact: str, kind: str = "node", unit: str = "nats") -> go.Figure:
    """Draw the units with the largest absolute scores of one fact; left of zero they speak against the answer.

    Columns: fact, rank, layer, unit, score (in `unit`).
    """
    check(frame, "strongest units", ("fact", "rank", "layer", "unit", "score"))
    bars = strongest_bars(frame, fact, kind)
    fig = go.Figure()
    fig.add_bar(**bars, orientation="h", hovertemplate="%{y}: %{x:.4g}<extra></extra>", showlegend=False)
    fig.update_xaxes(title=f"score ({plain(unit)})", zeroline=True)
    fig.update_yaxes(type="category", autorange="reversed")
    return styled(fig, height=120 + 25 * len(bars["x"]))


def strongest_bars(frame: pd.DataFrame, fact: str, kind: str = "node") -> dict[str, Any]:
    """Return what `strongest_units` draws for one fact (x, y and marker), so that a page can switch facts cheaply."""
    rows = frame[frame["fact"] == fact].sort_values("rank")
    if rows.empty:
        raise ValueError(f"The frame for strongest units has no fact {fact!r}: choose one of its facts.")
    names = [f"layer {layer} · {kind} {index}" for layer, index in zip(rows["layer"], rows["unit"], strict=True)]
    colours = [BLUE if score >= 0 else ORANGE for score in rows["score"]]
    return {"x": rows["score"].tolist(), "y": names, "marker": {"color": colours}}


def overlap_map(values: xr.DataArray, layer: str) -> go.Figure:
    """Draw how much each pair of facts overlaps in one layer, facts in their given order, grouped by relation.

    The colours span the values of the layer that is drawn.

    `values` has dims (layer, fact, other), text coordinates `layer` and `fact`, and `relation` on `fact`.
    """
    missing = {"layer", "fact", "other"} - set(values.dims) or {"relation"} - set(values.coords)
    if missing:
        raise ValueError(f"The overlap map needs {sorted(missing)[0]!r} among the dims and coords of its values.")
    if not values.size:
        raise ValueError("There is nothing to draw for the overlap map: it has no facts.")
    if layer not in values["layer"].values:
        raise ValueError(f"The overlap map has no layer {layer!r}: choose one of {list(values['layer'].values)}.")
    ids = [plain(fact, 200) for fact in values["fact"].values]
    relations = [str(name) for name in values["relation"].values]
    starts = [i for i, name in enumerate(relations) if i == 0 or name != relations[i - 1]]
    centres = [(a + b - 1) / 2 for a, b in zip(starts, [*starts[1:], len(relations)], strict=True)]
    names = [plain(relations[start], 24) for start in starts]
    z = values.sel(layer=layer).values.astype(np.float32)
    seen = z[np.isfinite(z)]
    low, high = (float(seen.min()), float(seen.max())) if seen.size else (0.0, 1.0)
    fig = go.Figure(
        go.Heatmap(
            z=z,
            x=ids,
            y=ids,
            zmin=low,
            zmax=high,
            colorscale="Cividis",
            hoverongaps=False,
            colorbar={"title": {"text": "overlap", "side": "right"}, "thickness": 12, "outlinewidth": 0},
            hovertemplate="%{y}<br>%{x}<br>overlap %{z:.3f}<extra></extra>",
        )
    )
    ticks = {"type": "category", "tickmode": "array", "tickvals": centres, "ticktext": names, "showgrid": False}
    fig.update_xaxes(title="facts, by relation", tickangle=-60, tickfont={"size": 11}, **ticks)
    fig.update_yaxes(title=None, autorange="reversed", tickfont={"size": 11}, **ticks)
    borders = [place - 0.5 for place in starts[1:]]
    return styled(fig, height=640, shapes=[_border(axis, place) for place in borders for axis in ("x", "y")])


def within_across(frame: pd.DataFrame) -> go.Figure:
    """Draw the overlap of facts of one relation against facts of different relations, and their difference.

    Columns: layer, within, across, difference, null_low, null_high (the band under shuffled relations).
    """
    check(frame, "within against across", ("layer", "within", "across", "difference", "null_low", "null_high"))
    rows = frame.sort_values("layer")
    fig = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.08)
    for column, name, colour, symbol in (
        ("within", "same relation", BLUE, "circle"),
        ("across", "different relations", ORANGE, "square"),
    ):
        fig.add_scatter(
            x=rows["layer"],
            y=rows[column],
            mode="lines+markers",
            name=name,
            line={"color": colour},
            marker={"symbol": symbol},
            hovertemplate=f"layer %{{x}}, {name}: %{{y:.3f}}<extra></extra>",
            row=1,
            col=1,
        )
    fig.add_trace(band(rows["layer"], rows["null_low"], rows["null_high"], GREY, "shuffled relations, 95%"), 2, 1)
    fig.add_scatter(
        x=rows["layer"],
        y=rows["difference"],
        mode="lines+markers",
        name="difference",
        line={"color": GREEN},
        marker={"symbol": "diamond"},
        hovertemplate="layer %{x}, difference: %{y:.3f}<extra></extra>",
        row=2,
        col=1,
    )
    fig.update_yaxes(title="mean overlap", row=1, col=1)
    fig.update_yaxes(title="same − different", zeroline=True, row=2, col=1)
    fig.update_xaxes(title="layer", row=2, col=1)
    return styled(fig, height=500)


def load_and_selection(frame: pd.DataFrame) -> go.Figure:
    """Draw what the retained facts lean on, over all units and over those selected, and how many are selected.

    Columns: layer, method ("all" for every unit), selected (number of units), load (mean per unit).
    """
    check(frame, "load and selection", ("layer", "method", "selected", "load"))
    fig = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.08)
    methods = [name for name in frame["method"].unique() if name != ALL]
    for place, method in enumerate([ALL, *methods]):
        rows = frame[frame["method"] == method].sort_values("layer")
        colour = GREY if method == ALL else method_colour(method, methods)
        name = "all units" if method == ALL else plain(method_name(method))
        fig.add_scatter(
            x=rows["layer"],
            y=rows["load"],
            mode="lines+markers",
            name=name,
            legendgroup=name,
            line={"color": colour},
            marker={"symbol": SYMBOLS[place % 6]},
            hovertemplate=f"layer %{{x}}, {name}: %{{y:.4g}}<extra></extra>",
            row=1,
            col=1,
        )
        if method != ALL:
            fig.add_bar(
                x=rows["layer"],
                y=rows["selected"],
                marker={"color": colour},
                showlegend=False,
                legendgroup=name,
                hovertemplate=f"layer %{{x}}, {name}: %{{y}} units<extra></extra>",
                row=2,
                col=1,
            )
    fig.update_yaxes(title="mean load of a unit", rangemode="tozero", row=1, col=1)
    fig.update_yaxes(title="units selected", rangemode="tozero", row=2, col=1)
    fig.update_xaxes(title="layer", row=2, col=1)
    return styled(fig, height=500, barmode="group")


def _all_last(frame: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([frame[frame["relation"] != ALL], frame[frame["relation"] == ALL]])


def _border(axis: str, place: float) -> dict[str, Any]:
    """A thin line across a map, at `place` of the given axis."""
    other = "y" if axis == "x" else "x"
    ends = {f"{axis}0": place, f"{axis}1": place, f"{other}0": 0, f"{other}1": 1, f"{other}ref": "paper"}
    return {"type": "line", **ends, "line": {"color": "rgba(255,255,255,.4)", "width": 1}}

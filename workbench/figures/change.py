"""Figures of what training changed: learning, drift, forgetting."""

import math

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.figures.style import (
    GREY,
    SUITE_NAMES,
    SYMBOLS,
    band,
    check,
    error_bars,
    method_colour,
    method_name,
    plain,
    styled,
    two_lines,
)


def training_curves(history: pd.DataFrame, target: float | None = None) -> go.Figure:
    """Draw the loss (nats per token) and the efficacy (share of new facts answered) of each method by step.

    Columns: method, step, loss, efficacy (NaN where it was not measured). `target` is the efficacy that ends training.
    """
    check(history, "training curves", ("method", "step", "loss", "efficacy"))
    fig = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.08)
    methods = list(history["method"].unique())
    for place, method in enumerate(methods):
        rows = history[history["method"] == method].sort_values("step")
        name, line = plain(method_name(method)), {"color": method_colour(method, methods)}
        seen = rows[rows["loss"].notna()]
        fig.add_scatter(
            x=seen["step"],
            y=seen["loss"],
            mode="lines",
            name=name,
            legendgroup=name,
            line=line,
            showlegend=False,
            hovertemplate=f"{name}, step %{{x}}: %{{y:.3f}}<extra></extra>",
            row=1,
            col=1,
        )
        seen = rows[rows["efficacy"].notna()]
        fig.add_scatter(
            x=seen["step"],
            y=seen["efficacy"] * 100,
            mode="lines+markers",
            name=name,
            legendgroup=name,
            line=line,
            marker={"symbol": SYMBOLS[place % 6]},
            hovertemplate=f"{name}, step %{{x}}: %{{y:.0f}}%<extra></extra>",
            row=2,
            col=1,
        )
    if target is not None:
        fig.add_hline(y=target * 100, line={"color": GREY, "dash": "dot"}, row=2, col=1)
    fig.update_yaxes(title="loss (nats per token)", rangemode="tozero", row=1, col=1)
    fig.update_yaxes(title="new facts answered (%)", range=[-4, 104], row=2, col=1)
    fig.update_xaxes(title="optimiser step", row=2, col=1)
    return styled(fig, height=500)


def drift_geometry(frame: pd.DataFrame, group: str) -> go.Figure:
    """Draw how far the facts of one group moved toward their answer and beside it, per layer and method.

    Columns: method, group, metric ("toward" or "off"), layer, change, low, high (shares of the first distance).
    """
    check(frame, "drift geometry", ("method", "group", "metric", "layer", "change", "low", "high"))
    chosen = frame[(frame["group"] == group) & frame["metric"].isin(["toward", "off"])]
    if chosen.empty:
        raise ValueError(f"The frame for drift geometry has no group {group!r}: choose one of its groups.")
    fig = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.08)
    methods = list(frame["method"].unique())
    for (method, metric), rows in chosen.groupby(["method", "metric"], sort=False):
        rows, row = rows.sort_values("layer"), 1 if metric == "toward" else 2
        place, name, colour = methods.index(method), plain(method_name(method)), method_colour(method, methods)
        fig.add_trace(band(rows["layer"], rows["low"], rows["high"], colour, name, shown=False), row, 1)
        fig.add_scatter(
            x=rows["layer"],
            y=rows["change"],
            mode="lines+markers",
            name=name,
            legendgroup=name,
            line={"color": colour},
            marker={"symbol": SYMBOLS[place % 6]},
            showlegend=row == 1,
            hovertemplate=f"{name}, layer %{{x}}: %{{y:.3f}}<extra></extra>",
            row=row,
            col=1,
        )
    fig.update_yaxes(title="toward the anchor", zeroline=True, row=1, col=1)
    fig.update_yaxes(title="beside it", rangemode="tozero", row=2, col=1)
    fig.update_xaxes(title="layer", row=2, col=1)
    return styled(fig, height=470)


def drift_distance(frame: pd.DataFrame) -> go.Figure:
    """Draw the semantic distance of the answers before (open) and after (filled), with the interval of the change.

    Columns: method, group, before, after, change, low, high (cosine distances in embedding space, 0 to 2).
    """
    check(frame, "drift distance", ("method", "group", "before", "after", "change", "low", "high"))
    methods, groups = list(frame["method"].unique()), list(frame["group"].unique())
    fig = make_subplots(len(groups), 1, shared_xaxes=True, subplot_titles=[f"{plain(g)} facts" for g in groups])
    for row, group in enumerate(groups, start=1):
        for method, rows in frame[frame["group"] == group].groupby("method", sort=False):
            name, colour = plain(method_name(str(method))), method_colour(str(method), methods)
            fig.add_scatter(
                x=[*rows["before"], *rows["after"]],
                y=[name] * (2 * len(rows)),
                mode="lines+markers",
                name=name,
                line={"color": colour, "width": 1, "dash": "dot"},
                showlegend=False,
                marker={"size": 10, "symbol": ["circle-open", "circle"], "color": colour},
                error_x={
                    "type": "data",
                    "array": [0, *(rows["high"] - rows["change"])],
                    "arrayminus": [0, *(rows["change"] - rows["low"])],
                    "thickness": 3,
                    "width": 0,
                },
                hovertemplate=f"{name}: %{{x:.3f}}<extra></extra>",
                row=row,
                col=1,
            )
    fig.update_annotations(font_size=13)
    fig.update_yaxes(type="category", autorange="reversed")
    fig.update_xaxes(title="cosine distance of the answer", row=len(groups), col=1)
    return styled(fig, height=110 + len(groups) * (60 + 32 * len(methods)), top=46)


def forgetting_compared(frame: pd.DataFrame) -> go.Figure:
    """Draw how the share of right answers changed per suite and method, with 95% intervals.

    Columns: method, suite, change, low, high (shares, -1 to 1; drawn as points of a percentage).
    """
    check(frame, "forgetting compared", ("method", "suite", "change", "low", "high"))
    methods, suites = list(frame["method"].unique()), list(frame["suite"].unique())
    fig = go.Figure()
    for place, method in enumerate(methods):
        rows = frame[frame["method"] == method]
        offset = (place - (len(methods) - 1) / 2) * 0.2
        name, colour = plain(method_name(method)), method_colour(method, methods)
        fig.add_scatter(
            x=rows["change"] * 100,
            y=[suites.index(suite) + offset for suite in rows["suite"]],
            mode="markers",
            name=name,
            marker={"size": 9, "color": colour, "symbol": SYMBOLS[place % 6]},
            error_x=error_bars(rows, "change", 100.0),
            hovertemplate=f"{name}: %{{x:+.1f}} points<extra></extra>",
        )
    fig.add_vline(x=0, line={"color": GREY, "width": 1})
    ticks = [two_lines(SUITE_NAMES.get(suite, suite)) for suite in suites]
    fig.update_yaxes(
        tickvals=list(range(len(suites))), ticktext=ticks, range=[len(suites) - 0.5, -0.5], showgrid=False, title=None
    )
    fig.update_xaxes(title="change (percentage points)")
    return styled(fig, height=130 + 26 * len(suites) * max(2, len(methods)))


def text_damage(frame: pd.DataFrame, title: str) -> go.Figure:
    """Draw one number of damage to general text per method with its interval; `title` names it and its unit.

    Columns: method, change, low, high.
    """
    check(frame, "damage to general text", ("method", "change", "low", "high"))
    methods = list(frame["method"].unique())
    fig = go.Figure()
    for place, (method, rows) in enumerate(frame.groupby("method", sort=False)):
        name, colour = plain(method_name(str(method))), method_colour(str(method), methods)
        fig.add_scatter(
            x=rows["change"],
            y=[name] * len(rows),
            mode="markers",
            showlegend=False,
            error_x=error_bars(rows, "change"),
            marker={"size": 10, "color": colour, "symbol": SYMBOLS[place % 6]},
            hovertemplate=f"{name}: %{{x:.4g}}<extra></extra>",
        )
    fig.add_vline(x=0, line={"color": GREY, "width": 1})
    fig.update_xaxes(title=plain(title))
    fig.update_yaxes(type="category", autorange="reversed")
    return styled(fig, height=130 + 34 * len(methods))


def before_after(frame: pd.DataFrame, method: str) -> go.Figure:
    """Draw every fact's log-probability before and after; below the line the model has become less sure.

    Columns: method, fact, before, after (nats).
    """
    check(frame, "before against after", ("method", "fact", "before", "after"))
    rows = frame[frame["method"] == method]
    if rows.empty:
        raise ValueError(f"The frame for before against after has no method {method!r}: choose one of its methods.")
    low = math.floor(min(frame["before"].min(), frame["after"].min(), -1.0))
    fig = go.Figure()
    fig.add_scatter(x=[low, 0], y=[low, 0], mode="lines", line={"color": GREY, "dash": "dot"}, hoverinfo="skip")
    fig.add_scatter(
        x=rows["before"],
        y=rows["after"],
        mode="markers",
        text=[plain(fact) for fact in rows["fact"]],
        marker={"size": 7, "opacity": 0.6, "color": method_colour(method, list(frame["method"].unique()))},
        hovertemplate="%{text}<br>before %{x:.2f}, after %{y:.2f}<extra></extra>",
    )
    fig.update_xaxes(title="log-probability of the answer before (nats)", range=[low * 1.03, 0.3])
    fig.update_yaxes(title="after (nats)", range=[low * 1.03, 0.3])
    return styled(fig, height=420, showlegend=False)


def quota_curves(frame: pd.DataFrame) -> go.Figure:
    """Draw numbers against the trained share of units, a panel each: the mean over seeds, and their range as bars.

    Columns: panel (title with unit), method, quota (percent), mean, low, high.
    """
    check(frame, "quotas compared", ("panel", "method", "quota", "mean", "low", "high"))
    panels, methods = list(frame["panel"].unique()), list(frame["method"].unique())
    fig = make_subplots(rows=1, cols=len(panels), horizontal_spacing=0.09)
    for column, panel in enumerate(panels, start=1):
        for place, method in enumerate(methods):
            rows = frame[(frame["panel"] == panel) & (frame["method"] == method)].sort_values("quota")
            fig.add_scatter(
                x=rows["quota"],
                y=rows["mean"],
                mode="lines+markers",
                name=plain(method_name(str(method))),
                legendgroup=str(method),
                showlegend=column == 1,
                line={"color": method_colour(str(method), methods)},
                marker={"size": 8, "symbol": SYMBOLS[place % 6]},
                error_y=error_bars(rows, "mean"),
                row=1,
                col=column,
            )
        fig.update_yaxes(title=plain(panel), row=1, col=column)
    fig.update_xaxes(title="trained units (%)")
    return styled(fig, height=380)

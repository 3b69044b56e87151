"""Figures that compare attribution methods: how complete they are, and how far they agree with a reference."""

import pandas as pd
import plotly.graph_objects as go

from workbench.figures.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    SYMBOLS,
    check,
    error_bars,
    plain,
    styled,
)

COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED, SKY, GREY)


def gap_by_steps(frame: pd.DataFrame) -> go.Figure:
    """Draw what of a layer's effect the scores of its units leave unexplained, by the number of steps.

    Columns: series (a name for each line), steps (0 where their number adapts, drawn as a dashed line), gap, low, high
    (shares of the effect).
    """
    check(frame, "gap by steps", ("series", "steps", "gap", "low", "high"))
    fig = go.Figure()
    fixed = frame.loc[frame["steps"] > 0, "steps"]
    span = [int(fixed.min()), int(fixed.max())] if len(fixed) else [1, 64]
    for place, (series, rows) in enumerate(frame.groupby("series", sort=False)):
        colour, name = COLOURS[place % len(COLOURS)], plain(series, 60)
        drawn = rows[rows["steps"] > 0].sort_values("steps")
        fig.add_scatter(
            x=drawn["steps"],
            y=drawn["gap"] * 100,
            error_y=error_bars(drawn, "gap", 100.0),
            mode="lines+markers",
            name=name,
            legendgroup=name,
            line={"color": colour},
            marker={"symbol": SYMBOLS[place % len(SYMBOLS)]},
            showlegend=not drawn.empty,
            hovertemplate=f"{name}, %{{x}} steps: %{{y:.3g}}%<extra></extra>",
        )
        for gap in rows.loc[rows["steps"] == 0, "gap"] * 100:
            fig.add_scatter(
                x=span,
                y=[gap, gap],
                mode="lines",
                name=f"{name}, adaptive",
                line={"color": colour, "dash": "dash"},
                hovertemplate=f"{name}, adaptive: %{{y:.3g}}%<extra></extra>",
            )
    ticks = sorted(set(map(int, fixed))) or span
    fig.update_xaxes(title="steps", type="log", tickmode="array", tickvals=ticks, ticktext=[str(t) for t in ticks])
    fig.update_yaxes(title="completeness gap (% of the effect)", rangemode="tozero")
    return styled(fig, height=420)


def agreement_map(frame: pd.DataFrame, reference: str, measure: str = "Spearman") -> go.Figure:
    """Draw how far the scores of each method agree with those of the reference, layer by layer.

    Columns: series (one row of the map each, in the order in which they appear), layer, agreement (at most 1).
    """
    check(frame, "agreement map", ("series", "layer", "agreement"))
    table = frame.pivot_table(index="series", columns="layer", values="agreement", sort=False).sort_index(axis=1)
    names = [plain(name, 40) for name in table.index]
    fig = go.Figure(
        go.Heatmap(
            z=table.to_numpy(),
            x=[str(layer) for layer in table.columns],
            y=names,
            zmin=min(0.0, float(table.min().min())),
            zmax=1.0,
            colorscale="Cividis",
            hoverongaps=False,
            colorbar={"title": {"text": plain(measure), "side": "right"}, "thickness": 12, "outlinewidth": 0},
            hovertemplate="%{y}, layer %{x}: %{z:.3f}<extra></extra>",
        )
    )
    fig.update_xaxes(title=f"layer (agreement with {plain(reference, 40)})", type="category", showgrid=False)
    fig.update_yaxes(type="category", autorange="reversed", showgrid=False)
    return styled(fig, height=150 + 26 * len(names))

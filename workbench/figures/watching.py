"""Figures of a training that was watched: how far the facts moved, step by step."""

from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.figures.style import BLUE, GREEN, ORANGE, RED, SYMBOLS, check, plain, styled

#: Titles of what is watched.
WATCHED = {
    "d_soft": "d_soft",
    "d_emb": "d_emb",
    "logprob": "log-probability (nats)",
    "forgetting": "forgotten (%)",
}
GROUP_COLOURS = {"probe": BLUE, "retained": ORANGE}


def watched_training(trajectory: pd.DataFrame, bounds: Mapping[str, float] | None = None) -> go.Figure:
    """Draw what a watch read over optimiser steps, one panel a metric; a bound is a dashed line.

    Columns: step, group, metric, value, change. `bounds` maps a metric to the most that its change since the start may
    be; of `logprob` to the least (a negative number). The line stands at the start of the
    retained facts (of the probe where there are none) plus the bound.
    """
    check(trajectory, "watched training", ("step", "group", "metric", "value", "change"))
    metrics = list(trajectory["metric"].unique())
    unknown = [name for name in bounds or {} if name not in metrics]
    if unknown:
        raise ValueError(f"There is a bound on {unknown[0]!r}, which was not watched: choose among {metrics}.")
    groups = list(trajectory["group"].unique())
    fig = make_subplots(len(metrics), 1, shared_xaxes=True, vertical_spacing=0.08)
    for place, metric in enumerate(metrics, start=1):
        scale = 100 if metric == "forgetting" else 1
        for number, group in enumerate(groups):
            rows = trajectory[(trajectory["metric"] == metric) & (trajectory["group"] == group)].sort_values("step")
            rows = rows[rows["value"].notna()]
            fig.add_scatter(
                x=rows["step"],
                y=rows["value"] * scale,
                mode="lines+markers",
                name=plain(group),
                legendgroup=str(group),
                showlegend=place == 1,
                line={"color": GROUP_COLOURS.get(str(group), GREEN)},
                marker={"symbol": SYMBOLS[number % 6]},
                customdata=rows["change"] * scale,
                hovertemplate=f"{plain(group)}, step %{{x}}: %{{y:.3g}}, %{{customdata:+.3g}} since the start"
                "<extra></extra>",
                row=place,
                col=1,
            )
        if bounds and metric in bounds:
            group = "retained" if "retained" in groups else groups[0]
            rows = trajectory[(trajectory["metric"] == metric) & (trajectory["group"] == group)]
            start = 0.0 if metric == "forgetting" else float((rows["value"] - rows["change"]).iloc[0])
            fig.add_hline(y=(start + bounds[metric]) * scale, line={"color": RED, "dash": "dash"}, row=place, col=1)
        fig.update_yaxes(title=WATCHED.get(metric, plain(metric)), row=place, col=1)
    fig.update_xaxes(title="optimiser step", row=len(metrics), col=1)
    return styled(fig, height=110 + 150 * len(metrics), top=40)

"""Figures of what happens when units are silenced or enhanced."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.figures.style import BLUE, GREY, RED, SYMBOLS, check, error_bars, plain, styled, two_lines

GROUP_COLOURS = {"lowest": BLUE, "random": GREY, "highest": RED}
UNITS_COLOURS = {"chosen": BLUE, "matched": GREY, "difference": RED}
UNITS_NAMES = {"chosen": "knowledge neurons", "matched": "random, same activation", "difference": "difference"}
EFFECT_NAMES = {"fact": "the fact itself", "relation": "others of its relation", "others": "other relations"}
METRIC_TITLES = {
    "accuracy": "change of facts answered (points)",
    "logprob": "change of log-probability (nats)",
    "nll": "change of loss on text (nats per token)",
    "perplexity": "change of perplexity on text",
    "kl": "divergence on text (nats per token)",
}


def suppression_curves(frame: pd.DataFrame, metric: str = "accuracy") -> go.Figure:
    """Draw what silencing the lowest, random and highest units costs, against how many; a panel a way of choosing.

    Columns: strategy, score, group, quota (percent), seed (missing for what is drawn), metric, change, low, high.
    """
    check(frame, "suppression", ("strategy", "score", "group", "quota", "seed", "metric", "change", "low", "high"))
    drawn = frame["seed"].isna() & frame["group"].isin(list(GROUP_COLOURS))  # not single seeds, not comparisons
    chosen = frame[(frame["metric"] == metric) & drawn]
    if chosen.empty:
        raise ValueError(f"The frame for suppression has no metric {metric!r}: it has {sorted(set(frame['metric']))}.")
    scale = 100.0 if metric == "accuracy" else 1.0
    panels = list(dict.fromkeys(zip(chosen["strategy"], chosen["score"], strict=True)))
    titles = [plain(f"{score}, {strategy.replace('_', ' ')}") for strategy, score in panels]
    fig = make_subplots(1, len(panels), shared_yaxes=True, horizontal_spacing=0.03, subplot_titles=titles)
    groups = list(chosen["group"].unique())
    for column, (strategy, score) in enumerate(panels, start=1):
        panel = chosen[(chosen["strategy"] == strategy) & (chosen["score"] == score)]
        for group, rows in panel.groupby("group", sort=False):
            rows, name = rows.sort_values("quota"), plain(group)
            fig.add_scatter(
                x=rows["quota"],
                y=rows["change"] * scale,
                mode="lines+markers",
                name=name,
                legendgroup=name,
                showlegend=column == 1,
                line={"color": GROUP_COLOURS.get(str(group), GREY)},
                marker={"size": 8, "symbol": SYMBOLS[groups.index(group) % 6]},
                error_y=error_bars(rows, "change", scale),
                hovertemplate=f"{name}, %{{x}}%: %{{y:+.3g}}<extra></extra>",
                row=1,
                col=column,
            )
    fig.add_hline(y=0, line={"color": GREY, "width": 1, "dash": "dot"})
    fig.update_annotations(font_size=13)
    fig.update_yaxes(title=METRIC_TITLES.get(metric, plain(metric)), row=1, col=1)
    fig.update_xaxes(title="silenced (%)")
    # the titles of the panels stand where the legend would
    return styled(fig, height=400, top=64, legend={"y": 1.12})


def neuron_effects(frame: pd.DataFrame) -> go.Figure:
    """Draw what a fact's neurons do to it, to its relation and to others, beside random units, with 95% intervals.

    Columns: group, units, change, low, high (nats, means over facts).
    """
    check(frame, "effects of neurons", ("group", "units", "change", "low", "high"))
    groups = list(frame["group"].unique())
    kinds = [name for name in frame["units"].unique() if name != "difference"]
    fig = go.Figure()
    for place, units in enumerate(kinds):
        rows = frame[frame["units"] == units]
        offset = (place - (len(kinds) - 1) / 2) * 0.24
        name = plain(UNITS_NAMES.get(units, units))
        fig.add_scatter(
            x=rows["change"],
            y=[groups.index(group) + offset for group in rows["group"]],
            mode="markers",
            name=name,
            marker={"size": 10, "color": UNITS_COLOURS.get(units, GREY), "symbol": SYMBOLS[place % 6]},
            error_x=error_bars(rows, "change"),
            hovertemplate=f"{name}: %{{x:+.3g}} nats<extra></extra>",
        )
    fig.add_vline(x=0, line={"color": GREY, "width": 1})
    ticks = [two_lines(EFFECT_NAMES.get(group, group)) for group in groups]
    fig.update_yaxes(
        tickvals=list(range(len(groups))), ticktext=ticks, range=[len(groups) - 0.5, -0.5], showgrid=False, title=None
    )
    fig.update_xaxes(title="change of the answer's log-probability (nats)")
    return styled(fig, height=130 + 56 * len(groups))

"""Figures of causal traces, logit lenses and direct logit attribution, and of how tracing and attribution agree."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.figures.style import BLUE, GREEN, GREY, ORANGE, SYMBOLS, band, check, error_bars, plain, styled

ROLE_NAMES = {
    "before_subject": "before the subject",
    "first_subject": "first subject token",
    "middle_subject": "middle subject tokens",
    "last_subject": "last subject token",
    "first_subsequent": "first token after",
    "further": "further tokens",
    "last": "last token",
}
SITE_NAMES = {"resid": "the residual stream", "mlp": "the FFN's output", "attn": "the attention's output"}
DIVERGING = [[0.0, ORANGE], [0.5, "#f4f4f2"], [1.0, BLUE]]


def trace_map(frame: pd.DataFrame, site: str = "resid", unit: str = "probability") -> go.Figure:
    """Draw the mean indirect effect of restoring one layer at the tokens of one role; orange where it harms.

    Columns: layer, role, effect, low, high (in `unit`), n (facts). Roles are drawn in their given order.
    """
    check(frame, "the trace", ("layer", "role", "effect", "low", "high", "n"))
    roles = list(frame["role"].unique())
    tables = {
        name: frame.pivot(index="role", columns="layer", values=name).loc[roles]
        for name in ("effect", "low", "high", "n")
    }
    largest = float(np.nanmax(np.abs(tables["effect"].to_numpy()))) or 1.0
    fig = go.Figure(
        go.Heatmap(
            z=tables["effect"].to_numpy(),
            x=list(tables["effect"].columns),
            y=[plain(ROLE_NAMES.get(role, role), 28) for role in roles],
            customdata=np.stack([tables[name].to_numpy(dtype=float) for name in ("low", "high", "n")], -1),
            zmin=-largest,
            zmax=largest,
            colorscale=DIVERGING,
            hoverongaps=False,
            colorbar={
                "title": {"text": f"indirect effect ({plain(unit)})", "side": "right"},
                "thickness": 12,
                "outlinewidth": 0,
            },
            hovertemplate="%{y}, layer %{x}<br>%{z:.3g} (%{customdata[0]:.3g} to %{customdata[1]:.3g})"
            "<br>%{customdata[2]:.0f} facts<extra></extra>",
        )
    )
    fig.update_xaxes(title=f"layer at which {SITE_NAMES.get(site, plain(site))} is restored", showgrid=False)
    fig.update_yaxes(type="category", autorange="reversed", showgrid=False)
    return styled(fig, height=140 + 34 * len(roles))


def lens_trajectories(frame: pd.DataFrame) -> go.Figure:
    """Draw what the residual stream says of the answer after each block: log-probability, and how often it is on top.

    Columns: layer, logprob, low, high (nats), top1 (0 to 1).
    """
    check(frame, "the logit lens", ("layer", "logprob", "low", "high", "top1"))
    rows = frame.sort_values("layer")
    fig = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.08)
    fig.add_trace(band(rows["layer"], rows["low"], rows["high"], BLUE, "95% interval"), 1, 1)
    fig.add_scatter(
        x=rows["layer"],
        y=rows["logprob"],
        mode="lines+markers",
        name="mean over facts",
        line={"color": BLUE},
        hovertemplate="layer %{x}: %{y:.3g} nats<extra></extra>",
        row=1,
        col=1,
    )
    fig.add_scatter(
        x=rows["layer"],
        y=rows["top1"] * 100,
        mode="lines+markers",
        name="the answer is on top",
        line={"color": GREEN},
        marker={"symbol": SYMBOLS[1]},
        hovertemplate="layer %{x}: %{y:.0f}% of the facts<extra></extra>",
        row=2,
        col=1,
    )
    fig.update_yaxes(title="log-probability (nats)", row=1, col=1)
    fig.update_yaxes(title="on top (% of facts)", range=[-4, 104], row=2, col=1)
    fig.update_xaxes(title="after layer", row=2, col=1)
    return styled(fig, height=480)


def direct_bars(frame: pd.DataFrame) -> go.Figure:
    """Draw what attention and FFN of each layer add to the answer's logit on the straight way out.

    Columns: component ("attention", "mlp"; others are left out), layer, logit, low, high.
    """
    check(frame, "direct logit attribution", ("component", "layer", "logit", "low", "high"))
    fig = go.Figure()
    for component, name, colour in (("attention", "attention", ORANGE), ("mlp", "FFN", BLUE)):
        rows = frame[frame["component"] == component].sort_values("layer")
        fig.add_bar(
            x=rows["layer"].astype(int),
            y=rows["logit"],
            name=name,
            marker={"color": colour},
            error_y={**error_bars(rows, "logit"), "color": GREY},
            hovertemplate=f"layer %{{x}}, {name}: %{{y:.3g}}<extra></extra>",
        )
    fig.update_xaxes(title="layer")
    fig.update_yaxes(title="added to the answer's logit", zeroline=True)
    return styled(fig, height=380, barmode="group")


def agreement_profiles(frame: pd.DataFrame) -> go.Figure:
    """Draw where tracing and attribution put a fact along depth, each divided by its largest absolute value.

    Columns: layer, measure, value (-1 to 1).
    """
    check(frame, "the profiles", ("layer", "measure", "value"))
    fig = go.Figure()
    for place, (measure, rows) in enumerate(frame.groupby("measure", sort=False)):
        rows = rows.sort_values("layer")
        name = plain(measure)
        fig.add_scatter(
            x=rows["layer"],
            y=rows["value"],
            mode="lines+markers",
            name=name,
            line={"color": (BLUE, ORANGE, GREEN)[place % 3]},
            marker={"symbol": SYMBOLS[place % 6]},
            hovertemplate=f"layer %{{x}}, {name}: %{{y:.2f}}<extra></extra>",
        )
    fig.update_xaxes(title="layer")
    fig.update_yaxes(title="share of the largest layer", zeroline=True)
    return styled(fig, height=360)


def agreement_by_role(frame: pd.DataFrame) -> go.Figure:
    """Draw the rank correlation of tracing and attribution over layers, per role, beside what shuffled layers give.

    Columns: role, fact (only "all" is drawn), rho, low, high, null_low, null_high (-1 to 1).
    """
    check(frame, "the agreement", ("role", "fact", "rho", "low", "high", "null_low", "null_high"))
    rows = frame[frame["fact"] == "all"]
    if rows.empty:
        raise ValueError("There is nothing to draw for the agreement: the frame has no rows for all facts.")
    names = [plain(ROLE_NAMES.get(role, role), 28) for role in rows["role"]]
    fig = go.Figure()
    fig.add_bar(
        y=names,
        x=rows["null_high"] - rows["null_low"],
        base=rows["null_low"],
        orientation="h",
        name="shuffled layers, 95%",
        marker={"color": "rgba(138,143,152,0.35)"},
        hovertemplate="%{y}: %{base:.2f} to %{x:.2f} by chance<extra></extra>",
    )
    fig.add_scatter(
        y=names,
        x=rows["rho"],
        mode="markers",
        name="mean over facts, 95% interval",
        marker={"size": 9, "color": BLUE},
        error_x={**error_bars(rows, "rho"), "color": BLUE},
        hovertemplate="%{y}: %{x:.2f}<extra></extra>",
    )
    fig.update_xaxes(title="Spearman correlation over layers", range=[-1.05, 1.05], zeroline=True)
    fig.update_yaxes(type="category", autorange="reversed")
    return styled(fig, height=150 + 34 * len(rows))

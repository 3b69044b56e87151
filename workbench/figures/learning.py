"""Figures of learning: which measure predicts harm, and which layers to train."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.figures.style import BLUE, GREEN, GREY, ORANGE, RED, check, error_bars, plain, styled

KIND_COLOURS = {"best layer": BLUE, "mean over layers": GREEN, "sum over layers": ORANGE, "baseline": GREY}


def prediction(frame: pd.DataFrame) -> go.Figure:
    """Draw how well each measure predicts harm on facts it was not chosen by, its control beside it, with intervals.

    Columns: measure, kind, rho, low, high (held-out rank correlation), control, control_low, control_high, q_value.
    """
    names = ("measure", "kind", "rho", "low", "high", "control", "control_low", "control_high", "q_value")
    check(frame, "prediction", names)
    labels = [
        plain(measure if kind == "baseline" else f"{measure}, {kind}")
        for measure, kind in zip(frame["measure"], frame["kind"], strict=True)
    ]
    frame = frame.assign(place=range(len(frame)))
    fig = go.Figure()
    shuffled = frame.assign(low=frame["control_low"], high=frame["control_high"])
    fig.add_scatter(
        x=frame["control"],
        y=frame["place"] + 0.22,
        mode="markers",
        name="shuffled pairs",
        marker={"size": 7, "color": GREY, "symbol": "x"},
        error_x={**error_bars(shuffled, "control"), "color": GREY},
        hovertemplate="shuffled pairs: %{x:.2f}<extra></extra>",
    )
    for kind, rows in frame.groupby("kind", sort=False):
        fig.add_scatter(
            x=rows["rho"],
            y=rows["place"],
            mode="markers",
            name=plain(kind),
            marker={"size": 10, "color": KIND_COLOURS.get(str(kind), GREY)},
            error_x=error_bars(rows, "rho"),
            customdata=rows["q_value"],
            hovertemplate=f"{plain(kind)}: %{{x:.2f}}, p = %{{customdata:.2g}} corrected<extra></extra>",
        )
    fig.add_vline(x=0, line={"color": GREY, "width": 1})
    fig.update_yaxes(
        tickvals=list(range(len(frame))), ticktext=labels, range=[len(frame) - 0.5, -0.5], showgrid=False, title=None
    )
    fig.update_xaxes(title="rank correlation with harm, held-out facts")
    return styled(fig, height=130 + 34 * len(frame), top=40)


def advice_by_layer(frame: pd.DataFrame) -> go.Figure:
    """Draw per layer where retained facts lean, where they (and new facts) collide, and the recommended budget.

    Columns: layer, load_share (0 to 1), collision (standard deviations), budget (units), reason; where there are new
    facts also overlap, low, high (rank correlation with the load) and chance.
    """
    check(frame, "layer advice", ("layer", "load_share", "collision", "budget", "reason"))
    rows = frame.sort_values("layer")
    drawn = ["load_share", "collision", *(["overlap"] if "overlap" in rows else []), "budget"]
    titles = {"load_share": "load (%)", "collision": "collision (sd)", "overlap": "new facts", "budget": "units"}
    colours = {"load_share": BLUE, "collision": RED, "overlap": ORANGE, "budget": GREEN}
    fig = make_subplots(len(drawn), 1, shared_xaxes=True, vertical_spacing=0.05)
    for place, name in enumerate(drawn, start=1):
        if name == "overlap":
            fig.add_scatter(
                x=rows["layer"],
                y=rows["overlap"],
                mode="markers",
                name="new facts' overlap with the load",
                marker={"color": colours[name]},
                error_y=error_bars(rows, "overlap"),
                row=place,
                col=1,
            )
            fig.add_scatter(
                x=rows["layer"],
                y=rows["chance"],
                mode="lines",
                name="chance, 95%",
                line={"color": GREY, "dash": "dot"},
                row=place,
                col=1,
            )
        else:
            fig.add_bar(
                x=rows["layer"],
                y=rows[name] * (100 if name == "load_share" else 1),
                name=titles[name],
                marker={"color": colours[name]},
                customdata=[plain(reason, 200) for reason in rows["reason"]],
                hovertemplate="layer %{x}: %{y:.3g}<br>%{customdata}<extra></extra>",
                showlegend=False,
                row=place,
                col=1,
            )
        fig.update_yaxes(title=titles[name], zeroline=True, row=place, col=1)
    fig.update_xaxes(title="layer", row=len(drawn), col=1)
    return styled(fig, height=110 + 130 * len(drawn), top=40)

"""Figures of interference: every measure within relations against across them, layer by layer, beside its null."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.figures.style import BLUE, GREY, ORANGE, band, check, error_bars, plain, styled

COLUMNS = ("metric", "layer", "difference", "low", "high", "null_low", "null_high", "q_value")


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
    metrics = list(known["metric"].unique())
    fig = make_subplots(len(metrics), 1, shared_xaxes=True, vertical_spacing=0.08 / len(metrics))
    for row, metric in enumerate(metrics, start=1):
        rows = known[known["metric"] == metric].sort_values("layer")
        called = rows["q_value"] <= level
        name = plain(metric, 28)
        null = band(rows["layer"], rows["null_low"], rows["null_high"], GREY, "shuffled relations, 95%", row == 1)
        fig.add_trace(null, row, 1)
        fig.add_scatter(
            x=rows["layer"],
            y=rows["difference"],
            mode="lines+markers",
            name="within minus across, 95% interval",
            legendgroup="difference",
            showlegend=row == 1,
            line={"color": BLUE, "width": 1},
            marker={
                "size": 8,
                "color": [ORANGE if one else BLUE for one in called],
                "symbol": ["circle" if one else "circle-open" for one in called],
            },
            error_y={**error_bars(rows, "difference"), "color": BLUE},
            customdata=rows["q_value"],
            hovertemplate=f"layer %{{x}}, {name}: %{{y:.3g}} (q = %{{customdata:.2g}})<extra></extra>",
            row=row,
            col=1,
        )
        fig.update_yaxes(title=name, zeroline=True, row=row, col=1)
    fig.update_xaxes(title="layer", row=len(metrics), col=1)
    return styled(fig, height=120 + 190 * len(metrics))

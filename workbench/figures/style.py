"""The house style of figures: one colour and one name per method, safe labels, intervals, checks."""

import html
import unicodedata
from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

# Okabe and Ito's palette, which colour-blind readers can tell apart; every figure gives a method the same colour.
BLUE, ORANGE, PURPLE = "#0072B2", "#E69F00", "#CC79A7"
GREEN, RED, SKY, GREY = "#009E73", "#D55E00", "#56B4E9", "#8A8F98"
METHOD_NAMES = {"base": "base model", "loki": "LoKI", "loki_random": "random rows", "lora": "LoRA"}
METHOD_COLOURS = {"base": GREY, "loki": BLUE, "loki_random": ORANGE, "lora": PURPLE}
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star")
SUITE_NAMES = {
    "efficacy": "new facts, trained prompts",
    "paraphrase": "new facts, other templates",
    "neighbourhood": "neighbours of the new facts",
    "retained": "other facts it knew",
    "general": "general text",
}
GRID = "rgba(128,134,145,0.28)"
ALL = "all"


def method_name(method: str) -> str:
    """Return how a method is written in figures and sentences.

    >>> method_name("loki_random"), method_name("my_adapter")
    ('random rows', 'my_adapter')
    """
    return METHOD_NAMES.get(method, method)


def method_colour(method: str, methods: Iterable[str]) -> str:
    """Return the colour of `method`: its own if it has one, else a free one by its place among `methods`."""
    if method in METHOD_COLOURS:
        return METHOD_COLOURS[method]
    free = (GREEN, RED, SKY)
    return free[[name for name in methods if name not in METHOD_COLOURS].index(method) % len(free)]


def plain(text: object, width: int = 80) -> str:
    """Make any text safe as a plotly label: plotly reads pseudo-HTML, so `<`, `>` and `&` become entities.

    >>> plain("<b>R&D</b>\\n2")
    '&lt;b&gt;R&amp;D&lt;/b&gt; 2'
    """
    line = "".join(" " if unicodedata.category(char) in ("Cc", "Cs") else char for char in str(text))
    return html.escape(line if len(line) <= width else line[: width - 1] + "…", quote=False)


def check(frame: pd.DataFrame, figure: str, columns: tuple[str, ...]) -> None:
    """Raise one sentence that names the first column a figure misses, or that says that there are no rows."""
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise ValueError(f"The frame for {figure} has no column {missing[0]!r}; it has {list(frame.columns)}.")
    if frame.empty:
        raise ValueError(f"There is nothing to draw for {figure}: the frame has no rows.")


AXIS = {
    "gridcolor": GRID,
    "linecolor": GRID,
    "showline": False,
    "ticks": "",
    "zeroline": False,
    "zerolinecolor": GREY,
    "automargin": True,
    "title": {"font": {"size": 13}, "standoff": 10},
}
LOOK = {
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "hovermode": "closest",
    "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 13, "color": "#2b3038"},
    "legend": {"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom", "traceorder": "normal"},
    "xaxis": AXIS,
    "yaxis": AXIS,
}


def styled(fig: go.Figure, *, height: int, top: int = 16, **layout: Any) -> go.Figure:
    """Give a figure the house style: no background, so that it sits on a light or a dark page."""
    margin = {"l": 8, "r": 12, "t": top, "b": 8}
    return fig.update_layout(template=_template(), height=height, margin=margin, **layout)


@cache
def _template() -> go.layout.Template:
    return go.layout.Template(layout=LOOK, data={"bar": [go.Bar(marker={"line": {"width": 0}})]})


def error_bars(rows: pd.DataFrame, column: str, scale: float = 1.0) -> dict[str, Any]:
    """Error bars from the ends of an interval."""
    above, below = (rows["high"] - rows[column]) * scale, (rows[column] - rows["low"]) * scale
    return {"type": "data", "array": above, "arrayminus": below, "thickness": 1.5, "width": 3}


def band(x: pd.Series, low: pd.Series, high: pd.Series, colour: str, name: str, shown: bool = True) -> go.Scatter:
    """An interval along the x axis as one closed shape."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return go.Scatter(
        x=np.concatenate([x, x[::-1]]),
        y=np.concatenate([low, high[::-1]]),
        fill="toself",
        mode="lines",
        line={"width": 0},
        fillcolor=f"rgba({red},{green},{blue},0.18)",
        hoverinfo="skip",
        name=name,
        legendgroup=name,
        showlegend=shown,
    )


def two_lines(text: str) -> str:
    """Break a long tick label at its comma or middle, so that narrow pages keep room for the plot."""
    words = plain(text, 60).split(" ")
    half = (len(words) + 1) // 2
    return " ".join(words) if len(words) < 3 else "<br>".join([" ".join(words[:half]), " ".join(words[half:])])

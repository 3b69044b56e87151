"""What the page is made of: sections, their panels, and the choices that change a panel."""

from dataclasses import dataclass, field
from typing import Any

import pandas as pd


@dataclass(frozen=True)
class Picker:
    """A choice that changes a figure: option names, what each replaces in the figure, and rows to show beside it."""

    label: str
    options: list[str]
    patches: list[dict[str, Any]]
    rows: list[list[tuple[str, str]]] = field(default_factory=list)
    search: bool = False


@dataclass(frozen=True)
class Panel:
    """One figure as plain data, with a caption that also describes it to a screen reader."""

    name: str
    caption: str
    figure: dict[str, Any]
    findings: list[str] = field(default_factory=list)
    picker: Picker | None = None
    half: bool = False


@dataclass(frozen=True)
class Section:
    """One part of the page; without panels it says in `absent` why it is empty."""

    name: str
    title: str
    about: str
    panels: list[Panel] = field(default_factory=list)
    table: pd.DataFrame | None = None
    source: str = ""
    absent: str = ""
    headline: list[str] = field(default_factory=list)

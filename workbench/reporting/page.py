"""Write the page: one HTML file with everything in it, which opens offline and runs nothing that a fact contains."""

import base64
import json
import logging
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup

from workbench.figures import plotly_source
from workbench.reporting.artefacts import Artefacts, has, read_artefacts
from workbench.reporting.sections import Panel, Section, sections
from workbench.reporting.words import number
from workbench.results.files import finite, write_atomically

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
TABLE_ROWS = 60
CSV_ROWS = 8000
HEADLINES = 6
SHOWN = ("model", "versions", "packages", "stages", "command")  # of the provenance, in places of their own


def report(run_dir: str | os.PathLike[str]) -> Path:
    """Write `report.html` into a run folder and return its path; stages that have not run are left out with a sentence.

    Raises `FileNotFoundError` for a folder without results and `ValueError` for an unreadable artefact.
    """
    folder = Path(run_dir)
    run = read_artefacts(folder)
    parts = sections(run)
    page = _environment().get_template("page.html").render(_context(run, parts))
    target = write_atomically(folder / "report.html", lambda partial: partial.write_text(page, encoding="utf-8"))
    logger.info("wrote %s (%.1f MB)", target, len(page) / 1e6)
    return target


def safe_json(value: Any) -> Markup:
    r"""Write JSON that can stand inside a `<script>`: no text in it can close the element or open another.

    >>> str(safe_json("</script>&"))
    '"\\u003c/script\\u003e\\u0026"'
    """
    text = json.dumps(finite(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(text)


def csv_text(frame: pd.DataFrame) -> str:
    """Return a frame as CSV; its index too, if it has a name."""
    return frame.to_csv(index=frame.index.name is not None, lineterminator="\n")


def csv_link(frame: pd.DataFrame) -> str:
    """Return a frame as a `data:` link to a CSV file."""
    return "data:text/csv;base64," + base64.b64encode(csv_text(frame).encode("utf-8")).decode("ascii")


def _context(run: Artefacts, parts: list[Section]) -> dict[str, Any]:
    """Everything that the template shows."""
    model = _mapping(run.provenance.get("model"))
    panels = [panel for part in parts for panel in part.panels]
    name = str(model.get("name", "the model")).rstrip("/").split("/")[-1]
    changed = has(run.drift) or has(run.forgetting)
    return {
        "title": f"What {name} knows" + (", and what training changed" if changed else ""),
        "model": model,
        "headlines": _headlines(parts),
        "sections": [{"part": part, "table": _table(part)} for part in parts],
        "figures": {panel.name: _drawn(panel) for panel in panels},
        "config": _flat(run.config),
        "versions": _flat(_mapping(run.provenance.get("versions") or run.provenance.get("packages"))),
        "stages": [(name, _duration(value)) for name, value in _mapping(run.provenance.get("stages")).items()],
        "model_rows": _flat(model),
        "training": [(method, _flat(record)) for method, record in run.training.items()],
        "others": _flat({k: v for k, v in run.provenance.items() if k not in SHOWN}),
        "command": _command(run.provenance.get("command")),
        "plotly": Markup(plotly_source()),
        "style": Markup((HERE / "page.css").read_text(encoding="utf-8")),
        "script": Markup((HERE / "page.js").read_text(encoding="utf-8")),
    }


def _headlines(parts: list[Section]) -> list[str]:
    """The main findings; where they are too many, those on scores and selection give way first."""
    lines = [(part.name, line) for part in parts for line in part.headline]
    for spare in ("scores", "selection", "relations"):
        if len(lines) > HEADLINES:
            lines = [line for line in lines if line[0] != spare]
    return [line for _, line in lines][:HEADLINES]


def _drawn(panel: Panel) -> dict[str, Any]:
    picker = panel.picker
    choice = None if picker is None else {"patches": picker.patches, "rows": picker.rows}
    return {**panel.figure, "choice": choice}


def _table(part: Section) -> dict[str, Any] | None:
    """The rows of a table that the page shows, and the whole as a link while it is small."""
    if part.table is None:
        return None
    frame = part.table.dropna(axis="columns", how="all")
    rows = [[_cell(value) for value in row] for row in frame.head(TABLE_ROWS).itertuples(index=False, name=None)]
    numeric = [pd.api.types.is_numeric_dtype(frame[column]) for column in frame]
    link = csv_link(frame) if len(frame) <= CSV_ROWS else None
    return {"columns": list(frame.columns), "numeric": numeric, "rows": rows, "total": len(frame), "link": link}


def _cell(value: Any) -> str:
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, float | np.floating):
        return "" if np.isnan(value) else number(float(value))
    return "" if value is None or value is pd.NA else str(value)


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted name, text) rows.

    >>> _flat({"a": {"b": 1}, "c": [1, 2]})
    [('a.b', '1'), ('c', '1, 2')]
    """
    if isinstance(value, Mapping) and value:
        rows = [_flat(inner, f"{prefix}.{name}" if prefix else str(name)) for name, inner in value.items()]
        return [row for part in rows for row in part]
    if isinstance(value, list) and not any(isinstance(item, list | Mapping) for item in value):
        return [(prefix, ", ".join(map(str, value)) if value else "none")]
    if isinstance(value, list):
        return [(prefix, json.dumps(value, ensure_ascii=False))]
    return [(prefix, "none" if value is None else str(value))] if prefix else []


def _duration(value: Any) -> str:
    seconds = value.get("seconds") if isinstance(value, Mapping) else value
    return f"{number(float(seconds))} s" if isinstance(seconds, int | float) else str(seconds)


def _command(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value or "")


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


@cache
def _environment() -> jinja2.Environment:
    """Jinja with autoescape on and undefined names as errors."""
    loader = jinja2.FileSystemLoader(HERE)
    made = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    made.filters["safe_json"] = safe_json
    return made

"""Publish one figure: a page of its own, its numbers, where they came from, and a picture if a browser is at hand."""

import base64
import html
import json
import logging
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from workbench.figures import Figure, figure_json, plotly_source
from workbench.reporting.page import csv_text, safe_json
from workbench.results import save_json
from workbench.results.files import write_atomically

logger = logging.getLogger(__name__)

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDTH = 900
SECONDS = 60

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>body {{ margin: 16px; background: #fff; }}</style></head>
<body><div id="{name}"></div>
<script type="application/json" id="figure-data">{data}</script>
<script>{plotly}</script>
<script>{script}</script>
</body></html>
"""
SHOW = """
const figure = JSON.parse(document.getElementById("figure-data").textContent);
Plotly.newPlot(document.getElementById({name}), figure.data, figure.layout, {{ responsive: true, displaylogo: false }});
"""
# The picture is handed over as text in the page; plotly's random ids are made the same in every run.
DRAW = """
const figure = JSON.parse(document.getElementById("figure-data").textContent);
const size = {{ format: "svg", width: {width}, height: figure.layout.height || 450 }};
figure.layout.paper_bgcolor = "#ffffff";
Plotly.toImage(figure, size).then((uri) => {{
  const svg = decodeURIComponent(uri.slice(uri.indexOf(",") + 1));
  const bytes = new TextEncoder().encode(svg);
  document.title = "done";
  document.body.innerHTML = "<pre id=svg>" + btoa(Array.from(bytes, (b) => String.fromCharCode(b)).join("")) + "</pre>";
}});
"""
SEED = "let state = 1; Math.random = () => (state = (state * 48271) % 2147483647) / 2147483647;"


def places(home: Path, name: str, out: Path | None, figures: Path | None, smoke: bool) -> tuple[Path, Path]:
    """Where an analysis keeps its work and publishes: as asked, else `runs/<name>` and `figures`.

    A smoke run has `runs/<name>_smoke` for both, so that what it makes is not taken for the real thing.
    """
    out = out or home / "runs" / (f"{name}_smoke" if smoke else name)
    return out, figures or (out if smoke else home / "figures")


def publish(
    figure: Figure, frame: pd.DataFrame, name: str, folder: str | Path, provenance: Mapping[str, Any]
) -> list[Path]:
    """Write `<name>.html`, `.csv` and `.json` into `folder`, and `<name>.svg` where a Chromium is found.

    The page holds the plotly library and works offline; the same figure gives the same bytes. Returns what was written.
    Raises `ValueError` for a name that is not plain letters, digits, `-`, `_` and `.`.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"A figure cannot be published as {name!r}: use letters, digits, '-', '_' and '.'.")
    target, data = Path(folder), figure_json(figure)
    page = _page(name, data, SHOW.format(name=json.dumps(name)))
    written = [
        write_atomically(target / f"{name}.html", lambda partial: partial.write_text(page, encoding="utf-8")),
        write_atomically(target / f"{name}.csv", lambda partial: partial.write_text(csv_text(frame), encoding="utf-8")),
        save_json(dict(provenance), target / f"{name}.json"),
    ]
    svg = _svg(name, data)
    if svg is not None:
        content = svg
        written.append(write_atomically(target / f"{name}.svg", lambda partial: partial.write_bytes(content)))
    return written


def find_browser() -> str | None:
    """Return the path of a Chromium on this machine, or None."""
    return next((path for browser in BROWSERS if (path := shutil.which(browser))), None)


def _page(name: str, data: dict[str, Any], script: str, before: str = "") -> str:
    parts = {"title": html.escape(name), "name": html.escape(name), "data": safe_json(data), "script": script}
    return PAGE.format(plotly=before + plotly_source(), **parts)


def _svg(name: str, data: dict[str, Any]) -> bytes | None:
    """Let a headless Chromium draw the figure; without one, or if it fails, say so in the log and go on."""
    browser = find_browser()
    if browser is None:
        logger.info("no Chromium found: %s is published without a picture", name)
        return None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        page = Path(scratch) / "figure.html"
        page.write_text(_page(name, data, DRAW.format(width=WIDTH), before=SEED), encoding="utf-8")
        flags = ["--headless", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
        flags += ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        flags += [f"--user-data-dir={scratch}/profile", "--virtual-time-budget=20000", "--dump-dom", page.as_uri()]
        try:
            done = subprocess.run([browser, *flags], capture_output=True, timeout=SECONDS, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            logger.info("%s could not draw %s (%s): published without a picture", browser, name, type(error).__name__)
            return None
    found = re.search(rb'<pre id="svg">([A-Za-z0-9+/=]+)</pre>', done.stdout)
    if found is None:
        logger.info("%s drew nothing for %s: published without a picture", browser, name)
        return None
    return base64.b64decode(found.group(1))

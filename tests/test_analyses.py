"""Analyses: thin scripts that run, publish what they found, and have an entry in the log."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

HOME = Path(__file__).parent.parent
SCRIPTS = sorted((HOME / "analyses").glob("*.py"))
LOG = HOME / "analyses" / "LOG.md"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"analysis_{name}", HOME / "analyses" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def entries(text: str) -> dict[str, str]:
    """Name of the script -> the text under its first heading `## <date> <name>`."""
    parts = re.split(r"^## (\d{4}-\d{2}-\d{2}) (\w+).*$", text, flags=re.MULTILINE)
    return dict(zip(reversed(parts[2::3]), reversed(parts[3::3]), strict=True))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_analysis_has_an_entry_with_question_command_seed_numbers_and_verdict(path: Path) -> None:
    found = entries(LOG.read_text(encoding="utf-8"))
    assert path.stem in found
    for word in ("Question", "Command", "Seeds", "Numbers", "Verdict"):
        assert f"**{word}" in found[path.stem], word
    assert f"analyses/{path.name}" in found[path.stem]


def test_an_analysis_without_an_entry_is_noticed() -> None:
    assert entries("# Log\n\n## 2026-01-02 one: a title\n\ntext\n") == {"one": "\n\ntext\n"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_analysis_publishes_under_its_name(path: Path) -> None:
    published = {one.suffix for one in (HOME / "figures").glob(f"{path.stem}.*")}
    assert {".html", ".csv", ".json"} <= published


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_analysis_says_what_it_does(path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HOME), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "--smoke" in done.stdout


def test_panels_are_means_and_ranges_over_seeds() -> None:
    rows = [
        (suite, metric, "loki", 5.0, seed, value + seed)
        for suite, metric, value in [
            ("efficacy", "accuracy", 0.5),
            ("retained", "accuracy", 0.25),
            ("general", "perplexity", 15.0),
            ("general", "kl", 99.0),
        ]
        for seed in (0, 1)
    ]
    frame = pd.DataFrame(rows, columns=["suite", "metric", "method", "quota", "seed", "after"])
    drawn = script("quota_sweep").panels(frame).set_index("panel")
    assert drawn["mean"].tolist() == [1.0, 0.75, 15.5]
    assert drawn["low"].tolist() == [0.5, 0.25, 15.0]
    assert drawn["high"].tolist() == [1.5, 1.25, 16.0]
    assert drawn.index[0] == "taught facts answered (share)"


@pytest.mark.real
def test_quota_sweep_runs_shares_what_it_can_and_publishes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = script("quota_sweep")
    options = ["--smoke", "--out", str(tmp_path / "runs"), "--figures", str(tmp_path / "figures")]
    page = sweep.main(options)
    assert page == tmp_path / "figures" / "quota_sweep.html"
    assert "plotly" in page.read_text(encoding="utf-8")
    assert "known facts still answered" in capsys.readouterr().out
    frame = pd.read_csv(page.with_suffix(".csv"))
    assert set(frame["method"]) == {"loki", "loki_random"}
    assert set(frame["quota"]) == {5, 20}
    assert set(frame["seed"]) == {0}
    assert {"efficacy", "retained", "general"} <= set(frame["suite"])
    assert frame[["before", "after", "change", "low", "high", "epochs"]].notna().all().all()
    nodes = {quota: int(30 * (576 * quota // 100)) for quota in (5, 20)}  # floor(q D / 100) in each of 30 layers
    sizes = frame.groupby(["method", "quota"])["trainable_parameters"].unique()
    for (_, quota), size in sizes.items():
        assert size.tolist() == [nodes[quota] * 1536]
    about = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    assert about["quotas"] == [5, 20]
    assert about["smoke"] is True
    assert about["packages"]["torch"]
    assert str(tmp_path) not in page.with_suffix(".json").read_text(encoding="utf-8")
    runs = sorted(path.name for path in (tmp_path / "runs").glob("quota*"))
    assert runs == ["quota20-seed0", "quota5-seed0"]
    logs = [(tmp_path / "runs" / name / "log.txt").read_text(encoding="utf-8") for name in runs]
    assert "attribution: done before" in logs[0]  # shared with the first run
    assert "attribution: started" in logs[1]
    assert "selection-loki: started" in logs[0]

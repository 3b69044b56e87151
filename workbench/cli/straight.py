"""The straight way: `run`, its settings, its page, and the models at hand."""

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from workbench.cli.app import Quiet, app, show
from workbench.config import Config


@app.command(name="run")
def run_command(
    *,
    config: Annotated[Path | None, Parameter(name=["--config", "-c"], help="TOML or JSON file of settings")] = None,
    set_: Annotated[
        list[str] | None, Parameter(name=["--set", "-s"], negative="", help="one setting, as in training.seed=1")
    ] = None,
    out: Annotated[Path | None, Parameter(help="folder of the run (default runs/default)")] = None,
    model: Annotated[str | None, Parameter(help="default's name, folder, .gguf file or hub id")] = None,
    retained: Annotated[str | None, Parameter(help="facts that the model may know")] = None,
    implanted: Annotated[str | None, Parameter(help="facts to be taught")] = None,
    methods: Annotated[
        str | None, Parameter(help="what is compared, separated by commas; none measures and trains nothing")
    ] = None,
    quota: Annotated[float | None, Parameter(help="share of the units that is trained, in percent")] = None,
    seed: Annotated[int | None, Parameter(help="seed of everything that is drawn")] = None,
    quiet: Quiet = False,
) -> None:
    """Go the whole way, from facts to a report page; a second start does only what is missing.

    Every setting can be given in a file (--config) or by name (--set attribution.steps=8); see `workbench settings`.
    For a page on interference alone, with the measure that predicts harm: --methods none --set interference.harm=true
    Killed at any stage, the same command goes on where it was.
    """
    changes: dict[str, Any] = dict(map(_setting, set_ or []))
    named: dict[str, Any] = {"out": out, "model": model, "retained": retained, "implanted": implanted,
             "selection.quota": quota, "seed": seed, "training.seed": seed}  # fmt: skip
    if methods is not None:
        named["methods"] = [] if methods == "none" else [name.strip() for name in methods.split(",")]
    flags = {name: value for name, value in named.items() if value is not None}
    if twice := sorted(flags.keys() & changes.keys()):
        raise ValueError(f"The setting {twice[0]!r} is given by --set and by a flag of its own: give it once.")
    settings = Config.read(config, changes | flags)
    from workbench.pipeline import run

    folder = run(settings, progress=not quiet)
    print(folder.file("report.html").resolve())


@app.command(name="settings")
def settings_command(config: Path | None = None) -> None:
    """Print every setting of a run with its value, as JSON that `workbench run --config` reads."""
    print(Config.read(config).model_dump_json(indent=2))


@app.command(name="report")
def report_command(run: Path) -> None:
    """Write the page of a run folder again and print where it is."""
    from workbench.reporting import report

    print(report(run).resolve())


@app.command(name="models")
def models_command() -> None:
    """List the models that are at hand without a download."""
    from workbench.models import list_models

    show(list_models())


def _setting(text: str) -> tuple[str, Any]:
    """`name=value`, the value as JSON where it is JSON, else as text."""
    import json

    name, sign, value = text.partition("=")
    if not sign or not name:
        raise ValueError(f"--set takes name=value, as in training.seed=1, not {text!r}.")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value

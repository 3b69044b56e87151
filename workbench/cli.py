"""The `workbench` command: the same verbs as the package, and nothing that computes.

Rooms that need torch are imported inside the commands, so that `--help` is quick.
"""

import logging
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter

from workbench.config import Config

app = App(
    name="workbench",
    help="Where does a language model keep what it knows, and how do you teach it something new "
    "without breaking the rest?",
    help_format="plaintext",
    result_action="return_value",
)

Model = Annotated[str, Parameter(help="default's name, folder of safetensors, .gguf file or hub id")]
Facts = Annotated[str, Parameter(help="world, fictional, fictional:N:SEED, or a file or folder of facts")]
Out = Annotated[Path | None, Parameter(help="where to write the result")]
Quiet = Annotated[bool, Parameter(name=["--quiet", "-q"], negative="", help="no progress bars")]
FORMATS = ("auto", "native", "csv", "lre", "pararel", "counterfact", "counterfact-new", "mmlu")


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
    methods: Annotated[str | None, Parameter(help="what is compared, separated by commas")] = None,
    quota: Annotated[float | None, Parameter(help="share of the units that is trained, in percent")] = None,
    seed: Annotated[int | None, Parameter(help="seed of everything that is drawn")] = None,
    quiet: Quiet = False,
) -> None:
    """Go the whole way, from facts to a report page; a second start does only what is missing.

    Every setting can be given in a file (--config) or by name (--set attribution.steps=8); see `workbench settings`.
    Killed at any stage, the same command goes on where it was.
    """
    changes: dict[str, Any] = dict(map(_setting, set_ or []))
    named = {"out": out, "model": model, "retained": retained, "implanted": implanted,
             "selection.quota": quota, "seed": seed, "training.seed": seed}  # fmt: skip
    changes |= {name: value for name, value in named.items() if value is not None}
    if methods is not None:
        changes["methods"] = [name.strip() for name in methods.split(",")]
    settings = Config.read(config, changes)
    from workbench.pipeline import run

    folder = run(settings, progress=not quiet)
    print(folder.file("report.html").resolve())


@app.command(name="settings")
def settings_command(config: Path | None = None) -> None:
    """Print every setting of a run with its value, as JSON that `workbench run --config` reads."""
    print(Config.read(config).model_dump_json(indent=2))


@app.command(name="recall")
def recall_command(
    *,
    facts: Facts = "world",
    model: Model = "smollm2-135m",
    format: Literal[FORMATS] = "auto",  # type: ignore[valid-type]
    out: Out = None,
    device: str = "auto",
    dtype: str = "auto",
    quiet: Quiet = False,
) -> None:
    """Ask the model every fact and say which it knows, by relation; --out keeps the table (.csv or .parquet)."""
    from workbench.facts import load_facts

    chosen = load_facts(facts, format=format)
    from workbench.models import load_model
    from workbench.recollection import by_relation, recall

    _check_table(out)
    frame = recall(load_model(model, device=device, dtype=dtype), chosen, progress=not quiet)
    _show(by_relation(frame))
    known = int(frame["known"].sum())
    print(f"{known} of {len(frame)} facts known ({known / len(frame):.0%})")
    _write_table(frame.reset_index(), out)


@app.command(name="attribute")
def attribute_command(
    *,
    out: Annotated[Path, Parameter(help="zarr folder to stream to; a second start goes on where the first stopped")],
    facts: Facts = "world",
    model: Model = "smollm2-135m",
    format: Literal[FORMATS] = "auto",  # type: ignore[valid-type]
    method: str = "ig",
    unit: Literal["node", "neuron"] = "node",
    steps: int | None = None,
    rule: str = "midpoint",
    baseline: str = "zero",
    scope: str = "last",
    objective: str = "logprob",
    target: str = "gold",
    batch_size: int | None = None,
    resume: bool = True,
    known_only: Annotated[bool, Parameter(help="only the facts that the model answers")] = False,
    device: str = "auto",
    dtype: str = "auto",
    quiet: Quiet = False,
) -> None:
    """Score how much every FFN unit of every layer contributes to every fact."""
    from workbench.facts import load_facts

    chosen = load_facts(facts, format=format)
    from workbench.attribution import attribute, checked_settings
    from workbench.models import load_model
    from workbench.recollection import recall

    checked_settings(method, unit, steps, rule, baseline, scope, objective, target)
    opened = load_model(model, device=device, dtype=dtype)
    if known_only:
        frame = recall(opened, chosen, progress=not quiet)
        known = [str(i) for i in frame.index[frame["known"]]]
        if not known:
            raise ValueError(f"The model knows none of the {len(chosen)} facts of {facts}; leave --known-only out.")
        chosen = chosen.filter(ids=known)
    ds = attribute(
        opened,
        chosen,
        method=method,
        unit=unit,
        steps=steps,
        rule=rule,
        baseline=baseline,
        scope=scope,
        objective=objective,
        target=target,
        batch_size="auto" if batch_size is None else batch_size,
        out=out,
        resume=resume,
        progress=not quiet,
    )
    print(f"{ds.sizes['fact']} facts, {ds.sizes['layer']} layers, {ds.sizes['unit']} {unit}s a layer: {out}")


@app.command(name="select")
def select_command(
    attribution: Annotated[Path, Parameter(help="a result of `workbench attribute`")],
    *,
    out: Annotated[Path, Parameter(help="position file to write: JSON, layer -> rows, as LoKI's")],
    strategy: str = "layer_balanced",
    quota: float = 10.0,
    score: Literal["signed", "magnitude"] = "signed",
    seed: int = 0,
) -> None:
    """Choose the units to be trained from an attribution."""
    from workbench.results import open_result
    from workbench.selection import select

    chosen = select(open_result(attribution), strategy=strategy, quota=quota, score=score, seed=seed)
    print(f"{chosen.n_selected} {chosen.unit}s in {chosen.n_layers} layers: {chosen.to_positions(out)}")


@app.command(name="drift")
def drift_command(before: str, after: str, *, facts: Facts = "world", out: Out = None, quiet: Quiet = False) -> None:
    """Score how far every fact moved from its semantic target between two models (names, folders or adapters)."""
    from workbench.facts import load_facts

    chosen = load_facts(facts)
    from workbench.semantics import measure_drift

    _check_table(out)
    frame = measure_drift(before, after, chosen, progress=not quiet)
    grouped = frame.groupby(["metric", "layer"], dropna=False)[["before", "after", "change"]].mean()
    _show(grouped.reset_index())
    _write_table(frame, out)


@app.command(name="forgetting")
def forgetting_command(
    before: str,
    after: str,
    *,
    facts: Facts = "world",
    max_tokens: Annotated[int, Parameter(help="tokens of the shipped general text")] = 3000,
    out: Out = None,
    quiet: Quiet = False,
) -> None:
    """Compare what two models answer (facts) and how well they predict plain prose (perplexity, KL)."""
    from workbench.facts import general_text, load_facts

    suites: dict[str, Any] = {"facts": load_facts(facts), "general": general_text()}
    from workbench.forgetting import measure_forgetting, summary

    _check_table(out)
    frame = measure_forgetting(before, after, suites, max_tokens=max_tokens, progress=not quiet)
    _show(summary(frame))
    _write_table(frame, out)


@app.command(name="report")
def report_command(run: Path) -> None:
    """Write the page of a run folder again and print where it is."""
    from workbench.reporting import report

    print(report(run).resolve())


@app.command(name="models")
def models_command() -> None:
    """List the models that are at hand without a download."""
    from workbench.models import list_models

    _show(list_models())


def _setting(text: str) -> tuple[str, Any]:
    """`name=value`, the value as JSON where it is JSON, else as text."""
    import json

    name, sign, value = text.partition("=")
    if not sign or not name:
        raise ValueError(f"--set takes name=value, as in training.seed=1, not {text!r}.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _show(frame: Any) -> None:
    """Print a whole table."""
    print(frame.to_string(index=False, float_format=lambda x: f"{x:.4g}"))


def _check_table(out: Path | None) -> None:
    """Raise before long work if a table could not be written."""
    if out is not None and out.suffix not in (".csv", ".parquet"):
        raise ValueError(f"--out must end in .csv or .parquet, not {out.name!r}.")


def _write_table(frame: Any, out: Path | None) -> None:
    """Write a table where the user asked for it."""
    if out is None:
        return
    from workbench.results import save_frame

    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".csv":
        frame.to_csv(out, index=False)
    else:
        save_frame(frame, out)
    print(out)


def main() -> None:
    """Run the command: bad input gives one sentence and exit code 1, Ctrl-C gives 130."""
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    logging.basicConfig(handlers=[handler], format="%(message)s")
    try:
        app(sys.argv[1:], exit_on_error=False, print_error=True)
    except CycloptsError:
        sys.exit(2)
    except KeyboardInterrupt:
        print("Stopped; what was computed is kept, the same command goes on.", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"workbench: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()

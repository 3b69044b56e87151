"""What a model knows, and where: `recall`, `attribute`, `select`."""

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from workbench.cli.app import (
    FORMATS,
    Chat,
    Count,
    Facts,
    Model,
    Out,
    Quiet,
    Seed,
    app,
    check_table,
    known_among,
    show,
    write_table,
)


@app.command(name="recall")
def recall_command(
    *,
    facts: Facts = "world",
    model: Model = "smollm2-135m",
    format: Literal[FORMATS] = "auto",  # type: ignore[valid-type]
    chat: Chat = False,
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

    check_table(out)
    opened = load_model(model, device=device, dtype=dtype)
    frame = recall(opened, chosen.as_chat(opened.tokenizer) if chat else chosen, progress=not quiet)
    show(by_relation(frame))
    known = int(frame["known"].sum())
    print(f"{known} of {len(frame)} facts known ({known / len(frame):.0%})")
    write_table(frame.reset_index(), out)


@app.command(name="attribute")
def attribute_command(
    *,
    out: Annotated[
        Path | None, Parameter(help="zarr folder to stream to; a second start goes on where the first stopped")
    ] = None,
    plan: Annotated[
        bool, Parameter(negative="", help="only say what it will take, from a short measurement; --out may be left out")
    ] = False,
    facts: Facts = "world",
    model: Model = "smollm2-135m",
    format: Literal[FORMATS] = "auto",  # type: ignore[valid-type]
    chat: Chat = False,
    method: str = "ig",
    unit: Literal["node", "neuron"] = "node",
    steps: int | None = None,
    rule: str = "midpoint",
    baseline: str = "zero",
    scope: str = "last",
    objective: str = "logprob",
    target: str = "gold",
    tolerance: Annotated[float, Parameter(help="of adaptive steps: the gap, as a share of a layer's effect")] = 0.05,
    seed: Seed = 0,
    memory: Annotated[float | None, Parameter(help="GiB that a pass may take; half of what is free")] = None,
    batch_size: Count = None,
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

    checked_settings(method, unit, steps, rule, baseline, scope, objective, target, tolerance, seed)
    if out is None and not plan:
        raise ValueError("Give --out, the folder to write to, or --plan to see what it would take.")
    opened = load_model(model, device=device, dtype=dtype)
    chosen = chosen.as_chat(opened.tokenizer) if chat else chosen
    if known_only:
        chosen = known_among(opened, chosen, quiet)
    options: dict[str, Any] = {
        "method": method,
        "unit": unit,
        "steps": steps,
        "rule": rule,
        "baseline": baseline,
        "scope": scope,
        "objective": objective,
        "target": target,
        "tolerance": tolerance,
        "seed": seed,
        "memory": memory,
        "batch_size": "auto" if batch_size is None else batch_size,
        "out": out,
        "resume": resume,
    }
    if plan:
        from workbench.planning import plan as planned

        print(planned(opened, chosen, **options))
        return
    ds = attribute(opened, chosen, **options, progress=not quiet)
    print(f"{ds.sizes['fact']} facts, {ds.sizes['layer']} layers, {ds.sizes['unit']} {unit}s a layer: {out}")


@app.command(name="select")
def select_command(
    attribution: Annotated[Path, Parameter(help="a result of `workbench attribute`")],
    *,
    out: Annotated[Path, Parameter(help="position file to write: JSON, layer -> rows, as LoKI's")],
    strategy: str = "layer_balanced",
    quota: float = 10.0,
    score: Literal["signed", "magnitude"] = "signed",
    seed: Seed = 0,
) -> None:
    """Choose the units to be trained from an attribution."""
    from workbench.results import open_result
    from workbench.selection import select

    chosen = select(open_result(attribution), strategy=strategy, quota=quota, score=score, seed=seed)
    print(f"{chosen.n_selected} {chosen.unit}s in {chosen.n_layers} layers: {chosen.to_positions(out)}")

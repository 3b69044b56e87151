"""What a model knows, and where: `recall`, `attribute`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from workbench.cli.app import (
    Asked,
    Count,
    Facts,
    Model,
    Out,
    app,
    check_table,
    model_and_facts,
    show,
    write_table,
)

OR_OWN = "where neither this nor --method says otherwise"


@app.command(name="recall")
def recall_command(
    *,
    facts: Facts = "world",
    model: Model = "smollm2-135m",
    out: Out = None,
    asked: Asked = Asked(),
) -> None:
    """Ask the model every fact and say which it knows, by relation; --out keeps the table (.csv or .parquet)."""
    check_table(out, facts)
    opened, chosen = model_and_facts(model, facts, asked)
    from workbench.recollection import by_relation, recall

    frame = recall(opened, chosen, progress=not asked.quiet)
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
    method: str = "ig",
    unit: Annotated[Literal["node", "neuron"] | None, Parameter(help=f"node {OR_OWN}")] = None,
    steps: int | None = None,
    rule: Annotated[str | None, Parameter(help=f"midpoint {OR_OWN}")] = None,
    baseline: Annotated[str | None, Parameter(help=f"zero {OR_OWN}")] = None,
    scope: Annotated[str | None, Parameter(help=f"last {OR_OWN}")] = None,
    objective: Annotated[str | None, Parameter(help=f"logprob {OR_OWN}")] = None,
    target: Annotated[str | None, Parameter(help=f"gold {OR_OWN}")] = None,
    tolerance: Annotated[float, Parameter(help="of adaptive steps: the gap, as a share of a layer's effect")] = 0.05,
    memory: Annotated[float | None, Parameter(help="GiB that a pass may take; half of what is free")] = None,
    batch_size: Count = None,
    paraphrases: Annotated[
        bool,
        Parameter(negative="", help="the mean of a fact's prompts to --out, each prompt's scores to *.prompts.zarr"),
    ] = False,
    resume: bool = True,
    asked: Asked = Asked(),
) -> None:
    """Score how much every FFN unit of every layer contributes to every fact."""
    if out is None and not plan:
        raise ValueError("Give --out, the folder to write to, or --plan to see what it would take.")
    from workbench.attribution import attribute, checked_settings, fact_means
    from workbench.results import open_result, save_parts

    checked_settings(method, unit, steps, rule, baseline, scope, objective, target, tolerance, asked.seed)
    each = _place_of_prompts(out, resume) if paraphrases and out is not None else out
    opened, chosen = model_and_facts(model, facts, asked)
    n_facts, chosen = len(chosen), chosen.per_prompt() if paraphrases else chosen
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
        "seed": asked.seed,
        "memory": memory,
        "batch_size": "auto" if batch_size is None else batch_size,
        "out": each,
        "resume": resume,
    }
    if plan:
        from workbench.planning import plan as planned

        ready = planned(opened, chosen, **options)
        means = ready.result_bytes * n_facts // len(chosen) if paraphrases else 0
        print(replace(ready, result_bytes=ready.result_bytes + means, disk_bytes=ready.disk_bytes + means))
        return
    ds = attribute(opened, chosen, **options, beside=n_facts if paraphrases else 0, progress=not asked.quiet)
    if paraphrases and out is not None:
        ds = open_result(save_parts(fact_means(ds), out, along="fact", kind="attribution"))
    units = f"{ds.sizes['unit']} {ds.attrs['unit']}s a layer"  # a method may fix the unit
    print(f"{ds.sizes['fact']} facts, {ds.sizes['layer']} layers, {units}: {out}")


def _place_of_prompts(out: Path, resume: bool) -> Path:
    """Where the scores of single prompts go whose means go to `out`; what `out` holds must be such means."""
    from workbench.results.labelled import attrs_of, check_replaceable, kind_of

    each = out.with_name(f"{out.name.removesuffix('.zarr')}.prompts.zarr")
    check_replaceable(out, kind="attribution")
    if resume and kind_of(out) and not ("aggregate" in attrs_of(out) and kind_of(each)):
        raise ValueError(f"{out} holds no means of {each}: choose another --out, or start anew with --no-resume.")
    return each

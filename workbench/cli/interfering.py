"""How facts collide, layer by layer: `interference`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from workbench.cli.app import (
    Asked,
    Facts,
    Model,
    app,
    check_out,
    model_and_facts,
    narrowed,
    show,
    unfinished,
    write_table,
)

#: What the table on the screen has; the files have every number.
SHOWN = ["metric", "layer", "within", "across", "difference", "low", "high", "p_value", "q_value", "chance",
         "matched_chance", "level", "meaning_rho", "meaning_low", "meaning_high", "meaning_q"]  # fmt: skip


@app.command(name="interference")
def interference_command(
    *,
    out: Annotated[Path | None, Parameter(help="result (.zarr), or the table by layer (.csv, .parquet)")] = None,
    facts: Facts = "world",
    model: Model = "smollm2-135m",
    metrics: Annotated[
        tuple[str, ...],
        Parameter(
            consume_multiple=True,
            negative="",
            help="cosine, jaccard, superposition, gradient, linear_suppression, suppression",
        ),
    ] = ("cosine", "jaccard"),
    attribution: Annotated[
        Path | None, Parameter(help="a result of `workbench attribute`; without one, grad_x_act is computed")
    ] = None,
    unit: Annotated[
        Literal["node", "neuron"] | None, Parameter(help="what is attributed without --attribution (default node)")
    ] = None,
    top: Annotated[
        float, Parameter(help="top sets of jaccard and the suppressions, in percent of a layer's units")
    ] = 1.0,
    permutations: Annotated[
        int, Parameter(help="draws of the nulls that shuffle facts", validator=Number(gte=1))
    ] = 999,
    draws: Annotated[
        int, Parameter(help="of random units for suppression; 19 judge its pairs, at 7 times the cost")
    ] = 1,
    text: Annotated[str, Parameter(help="general, or a text file of passages, for superposition")] = "general",
    memory: Annotated[float | None, Parameter(help="GiB beside the model; half of what is free")] = None,
    asked: Asked = Asked(),
) -> None:
    """Measure how much every two facts interfere in every layer: within a relation against across, and by meaning.

    Each number stands beside what shuffled facts and shuffled units give; pairs beyond the level of their layer collide
    (corrected over layers; suppression with --draws 19). suppression takes facts^2 x layers passes of a token: give it
    few facts (--sample), and many to linear_suppression, which is the same to first order.
    """
    check_out(out, "interference", facts, attribution)
    names = [name.strip() for given in metrics for name in given.split(",")]
    if attribution is not None and unit is not None:
        raise ValueError("--unit is that of --attribution; give one of the two.")
    from workbench.facts import general_text
    from workbench.results import check_made_with, open_result, save_result

    scores = None if attribution is None else open_result(attribution, kind="attribution")
    passages = general_text(text)
    from workbench.interfere import checked_metrics, conflict_rates, interference, key_statistics, within_across

    checked_metrics(names, top, permutations, memory, draws)
    opened, chosen = model_and_facts(model, facts, replace(asked, known_only=False, sample=None))
    if scores is not None:
        check_made_with(scores, opened.digest, opened.name)
        chosen = _attributed(chosen, scores)
    chosen = narrowed(opened, chosen, replace(asked, chat=False))
    if len(chosen) < 2:
        raise ValueError(f"Interference needs at least 2 facts, and there is {len(chosen)}: choose more facts.")
    if scores is None:
        from workbench.attribution import attribute

        scores = attribute(
            opened, chosen, method="grad_x_act", unit=unit or "node", memory=memory, progress=not asked.quiet
        )  # fmt: skip
    else:
        scores = scores.sel(fact=list(chosen.ids))
    options: dict[str, Any] = {
        "metrics": names,
        "top": top,
        "permutations": permutations,
        "text": passages,
        "draws": draws,
    }
    options |= {"seed": asked.seed, "memory": memory, "progress": not asked.quiet}
    with unfinished(out if "suppression" in names else None) as parts:
        result = interference(opened, chosen, scores, **options, parts=parts)
        table = within_across(result)
        if out is not None and out.suffix == ".zarr":
            print(save_result(result, out, kind="interference"))
        else:
            write_table(table, out)
    show(table[[name for name in SHOWN if name in table]])
    for name, summarise, title in (
        ("superposition", key_statistics, "keys of different facts"),
        ("gradient", conflict_rates, "pairs of facts whose gradients conflict"),
    ):
        if name in names:
            print(f"\n{title}:")
            show(summarise(result))


def _attributed(facts: Any, scores: Any) -> Any:
    """The facts that a stored attribution is about; fewer than two is a `ValueError`."""
    there = {str(i) for i in scores["fact"].values}
    shared = [one for one in facts.ids if one in there]
    if len(shared) < 2:
        raise ValueError(
            f"The attribution is about {len(shared)} of the {len(facts)} facts of {facts.name}; give --facts as it was "
            "made with."
        )
    return facts.filter(ids=shared)

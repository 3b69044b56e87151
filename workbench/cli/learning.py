"""What learning one fact does to others: `harm`, `behaviour`, `predict`, `advise`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

from workbench.cli.app import (
    Asked,
    Draws,
    Facts,
    Model,
    Out,
    Seed,
    app,
    check_table,
    model_and_facts,
    narrowed,
    show,
    write_table,
)

Steps = Annotated[int, Parameter(help="gradient steps on every fact", validator=Number(gte=1))]
Rate = Annotated[float | None, Parameter(help="learning rate; by default one at which most facts are learnt")]
Layers = Annotated[
    tuple[int, ...] | None, Parameter(consume_multiple=True, negative="", help="only these layers learn")
]


@app.command(name="harm")
def harm_command(
    *,
    out: Annotated[Path, Parameter(help="zarr folder to write to; a second start goes on where the first stopped")],
    facts: Facts = "fictional",
    others: Annotated[str | None, Parameter(help="facts that are learnt, if others than those that are read")] = None,
    model: Model = "smollm2-135m",
    steps: Steps = 5,
    rate: Rate = None,
    layers: Layers = None,
    resume: bool = True,
    asked: Asked = Asked(),
) -> None:
    """Learn every fact alone, by plain gradient descent, and measure what that takes from every fact."""
    if out.suffix not in ("", ".zarr"):
        raise ValueError(f"--out is a folder: it must end in .zarr, unlike {out.name!r}.")
    from workbench.facts import load_facts

    taught = None if others is None else load_facts(others, format=asked.format)
    opened, chosen = model_and_facts(model, facts, asked)
    if taught is not None:
        taught = narrowed(opened, taught, replace(asked, known_only=False))
    from workbench.learning import harm

    how: dict[str, Any] = {"others": taught, "steps": steps, "rate": rate, "layers": layers}
    found = harm(opened, chosen, **how, out=out, resume=resume, progress=not asked.quiet)
    reached = int((found["reached"] > 0.5).sum())
    apart = found["harm"].where(found["fact"] != found["other"])
    print(f"{reached} of {found.sizes['other']} facts learnt (P > 0.5) at a rate of {found.attrs['rate_used']:.3g}")
    if apart.count():
        harmed = float((apart > 0).sum() / apart.count())
        print(f"learning one takes {float(apart.mean()):+.3f} nats from another; {harmed:.0%} of the pairs are harmed")
    print(out)


@app.command(name="behaviour")
def behaviour_command(
    *,
    facts: Facts = "fictional",
    model: Model = "smollm2-135m",
    steps: Steps = 5,
    rate: Rate = None,
    layers: Layers = None,
    permutations: Annotated[int, Parameter(help="draws of the nulls", validator=Number(gte=1))] = 999,
    out: Out = None,
    asked: Asked = Asked(),
) -> None:
    """Compare what facts become when learnt alone and when learnt together.

    --out keeps the table of every fact, and beside it, as <name>_layers, that of every layer.
    """
    check_table(out, facts)
    by_layer = None if out is None else out.with_stem(f"{out.stem}_layers")
    check_table(by_layer, facts)
    opened, chosen = model_and_facts(model, facts, asked)
    from workbench.learning import averages, behaviour

    options: dict[str, Any] = {"permutations": permutations, "seed": asked.seed, "progress": not asked.quiet}
    per_fact, per_layer = behaviour(opened, chosen, steps=steps, rate=rate, layers=layers, **options)
    show(per_layer)
    show(averages(per_fact))
    write_table(per_fact, out)
    write_table(per_layer, by_layer)


@app.command(name="predict")
def predict_command(
    interference: Annotated[Path, Parameter(help="a stored result of interference")],
    harm: Annotated[Path, Parameter(help="a result of `workbench harm`")],
    *,
    splits: Draws = 5,
    permutations: Draws = 999,
    by_layer: Annotated[bool, Parameter(negative="", help="also every measure at every layer, on all facts")] = False,
    seed: Seed = 0,
    out: Out = None,
) -> None:
    """Say which measure of interference predicts harm on facts it was not chosen by; --out keeps the table."""
    check_table(out, interference, harm)
    from workbench.learning import by_layer as each_layer
    from workbench.learning import predicts, verdict
    from workbench.results import open_result

    measured, harmed = open_result(interference, kind="interference"), open_result(harm, kind="harm")
    frame = predicts(measured, harmed, splits=splits, permutations=permutations, seed=seed)
    if by_layer:
        show(each_layer(measured, harmed, permutations=permutations, seed=seed))
    show(frame.drop(columns=["n_facts", "splits", "seed"]))
    print(verdict(frame))
    write_table(frame, out)


@app.command(name="advise")
def advise_command(
    interference: Annotated[Path, Parameter(help="a stored result of interference, of the facts to be retained")],
    *,
    new: Annotated[Path | None, Parameter(help="a result of `workbench attribute` for the facts to be taught")] = None,
    quota: Annotated[float, Parameter(help="share of the units that is trained, in percent")] = 10.0,
    weights: Annotated[dict[str, float] | None, Parameter(help="of the terms collision and new")] = None,
    seed: Seed = 0,
    out: Out = None,
) -> None:
    """Recommend how many units of every layer to train, and say why; --out keeps the table, for select --advice."""
    check_table(out, interference, new)
    from workbench.learning import layer_advice
    from workbench.results import open_result

    scores = None if new is None else open_result(new, kind="attribution")
    found = open_result(interference, kind="interference")
    frame = layer_advice(found, new=scores, quota=quota, weights=weights, seed=seed)
    show(frame)
    write_table(frame, out)

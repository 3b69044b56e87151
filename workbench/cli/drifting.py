"""Where facts stand and how they moved: `distance`, `drift`, `blame`."""

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from workbench.cli.app import (
    Asked,
    Facts,
    Model,
    Out,
    app,
    check_table,
    model_and_facts,
    show,
    two_models_and_facts,
    write_table,
)
from workbench.cli.selecting import saved_units

Anchor = Annotated[
    Literal["unembedding", "stated", "centroid"],
    Parameter(help="target of the metrics per layer: the answer's unembedding, the state when the fact is stated, or "
    "the mean state of the answer over the fact's wordings"),
]  # fmt: skip
Several = Parameter(consume_multiple=True, negative="")


@app.command(name="distance")
def distance_command(
    model: Model = "smollm2-135m",
    *,
    facts: Facts = "world",
    metrics: Annotated[list[Literal["d_emb", "d_soft", "d_layer"]] | None, Several] = None,
    anchor: Anchor = "unembedding",
    base: Annotated[str | None, Parameter(help="the model whose embedding and anchors count; default: itself")] = None,
    out: Out = None,
    asked: Asked = Asked(),
) -> None:
    """Score how far every fact is from its semantic target in one model: its answers, and its states per layer."""
    check_table(out, facts)
    opened, chosen = model_and_facts(model, facts, asked)
    from workbench.semantics import DISTANCES, distance_summary, semantic_distance

    options: dict[str, Any] = {"metrics": metrics or DISTANCES, "anchor": anchor, "base": base}
    frame = semantic_distance(opened, chosen, **options, progress=not asked.quiet)
    if dropped := frame.attrs["dropped"]:
        print(f"d_layer leaves out {dropped} of {len(chosen)} facts: the model does not confirm their anchor.")
    if frame["valid"].any():
        show(distance_summary(frame))
    else:
        print("No fact has a distance: choose another --anchor, or d_emb or d_soft as --metrics, which need none.")
    write_table(frame, out)


@app.command(name="drift")
def drift_command(
    before: str,
    after: str,
    *,
    facts: Facts = "world",
    metrics: Annotated[list[Literal["d_emb", "d_soft", "toward", "off", "d_layer"]] | None, Several] = None,
    anchor: Anchor = "unembedding",
    floor: Annotated[bool, Parameter(help="share of facts pushed away by more than wording does")] = True,
    similar: Annotated[bool, Parameter(help="CKA and RSA of the two models per layer")] = True,
    out: Out = None,
    asked: Asked = Asked(),
) -> None:
    """Score how far every fact moved from its semantic target between two models (names, folders or adapters)."""
    check_table(out, facts)
    first, second, chosen = two_models_and_facts(before, after, facts, asked)
    from workbench.reporting import tables
    from workbench.semantics import DISTANCES, METRICS, measure_drift, noise_floor, pushed_away, similarity

    wanted = metrics or METRICS
    frame = measure_drift(first, second, chosen, metrics=wanted, anchor=anchor, progress=not asked.quiet)
    write_table(frame, out)
    if dropped := frame.attrs["dropped"].get(anchor):
        print(f"Metrics per layer leave out {dropped} of {len(chosen)} facts: the model does not confirm their anchor.")
    if frame["change"].isna().all():
        print("No fact has a drift: choose another --anchor, or d_emb or d_soft as --metrics, which need none.")
    else:
        summary = tables.drift_summary(frame.assign(method="after", group="facts"))
        layer = summary["layer"].astype("Int64").mask(summary["layer"] < 0)
        show(summary.assign(layer=layer).drop(columns=["method", "group"]))
    floored = [metric for metric in DISTANCES if metric in wanted]
    if floor and floored and any(fact.paraphrases for fact in chosen):
        noise = noise_floor(first, chosen, metrics=floored, anchor=anchor, progress=not asked.quiet)
        print(
            "\nPushed away: facts whose distance grew by more than the 95th percentile of what other words do "
            f"({noise['n_pairs'].max()} pairs of wordings)"
        )
        show(pushed_away(frame, noise))
    if similar and len({fact.prompt for fact in chosen}) > 2:
        print("\nHow alike the two models hold these facts (1: up to a rotation and a scale)")
        show(similarity(first, second, chosen, seed=asked.seed, progress=not asked.quiet))


@app.command(name="blame")
def blame_command(
    before: str,
    after: str,
    *,
    facts: Facts = "world",
    attribution: Annotated[
        Path | None, Parameter(help="a result of `workbench attribute` of these facts: which units they lean on")
    ] = None,
    selection: Annotated[
        Path | None, Parameter(help="a saved selection of the trained units; default: those that differ")
    ] = None,
    share: Annotated[float, Parameter(help="of a layer's trained units that a fact leans on")] = 0.25,
    draws: Annotated[int, Parameter(help="draws of matched units", validator=Number(gte=1))] = 5,
    out: Out = None,
    asked: Asked = Asked(),
) -> None:
    """Revert the trained units of each layer and measure how much of the facts' drift comes back."""
    check_table(out, facts, attribution, selection)
    from workbench.results import open_result

    scores = None if attribution is None else open_result(attribution, kind="attribution")
    units = None if selection is None else saved_units(selection, scores)
    first, second, chosen = two_models_and_facts(before, after, facts, asked)
    if scores is not None:
        there = {str(i) for i in scores["fact"].values}
        shared = [one for one in chosen.ids if one in there]
        if not shared:
            raise ValueError(f"The attribution has none of the {len(chosen)} facts; give --facts as it was made with.")
        if len(shared) < len(chosen):
            print(f"{len(shared)} of the {len(chosen)} facts are in the attribution, and only those are read.")
        chosen = chosen.filter(ids=shared)
    from workbench.semantics import attribute_drift, drift_shares

    options: dict[str, Any] = {"share": share, "draws": draws, "seed": asked.seed, "progress": not asked.quiet}
    frame = attribute_drift(first, second, chosen, scores, units, **options)
    write_table(frame, out)
    show(drift_shares(frame, seed=asked.seed))

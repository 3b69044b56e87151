"""Where along depth and text a fact is recovered: `trace`, `lens`."""

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

from workbench.cli.app import (
    Asked,
    Count,
    Facts,
    Model,
    Out,
    app,
    check_out,
    check_table,
    model_and_facts,
    show,
    unfinished,
    write_table,
)


@app.command(name="trace")
def trace_command(
    *,
    out: Annotated[Path | None, Parameter(help="result (.zarr), or effects by layer and role (.csv, .parquet)")] = None,
    facts: Facts = "world",
    model: Model = "smollm2-135m",
    site: Annotated[str, Parameter(help="what is restored: resid, mlp or attn")] = "resid",
    noise: Annotated[float, Parameter(help="in standard deviations of the subjects' embeddings")] = 3.0,
    draws: Annotated[int, Parameter(help="draws of the noise for every fact", validator=Number(gte=1))] = 10,
    window: Annotated[int | None, Parameter(help="layers restored at once; the default depends on the site")] = None,
    missing: Annotated[str, Parameter(help="facts without their subject in the prompt: error or skip")] = "error",
    attribution: Annotated[
        Path | None, Parameter(help="a result of `workbench attribute`, to say how far the two agree")
    ] = None,
    batch_size: Count = None,
    asked: Asked = Asked(),
) -> None:
    """Corrupt every fact's subject and restore one layer and token at a time: where does the answer come back?"""
    from workbench.results import check_asked, check_made_with, open_result, save_result

    check_out(out, "trace", facts, attribution)
    scores = None if attribution is None else open_result(attribution, kind="attribution")
    from workbench.tracing import agreement, by_role, checked_settings, trace

    size = "auto" if batch_size is None else batch_size
    checked_settings(1, site, noise, draws, window, asked.seed, size, missing)
    opened, chosen = model_and_facts(model, facts, asked)
    if scores is not None:
        check_made_with(scores, opened.digest, opened.name)
        check_asked(scores, chosen.texts)
        if not set(chosen.ids) & {str(name) for name in scores["fact"].values}:
            raise ValueError(f"The attribution has none of the {len(chosen)} facts; give --facts as it was made with.")
        if scores["layer"].values.tolist() != list(range(opened.n_layers)):
            raise ValueError(f"The attribution is not of all {opened.n_layers} layers; give one that is.")
    options: dict[str, Any] = {"site": site, "noise": noise, "draws": draws, "window": window, "batch_size": size}
    with unfinished(out) as parts:
        result = trace(
            opened, chosen, **options, seed=asked.seed, missing=missing, parts=parts, progress=not asked.quiet
        )
        table = by_role(result)
        show(table.pivot(index="layer", columns="role", values="effect")[list(table["role"].unique())].reset_index())
        clean, corrupt = (float(result[name].mean()) for name in ("p_clean", "p_corrupt"))
        left_out = f", {result.attrs['skipped']} left out" if result.attrs["skipped"] else ""
        print(f"{result.sizes['fact']} facts{left_out}: P(answer) is {clean:.3f} clean and {corrupt:.3f} corrupted")
        if out is not None and out.suffix == ".zarr":
            print(save_result(result, out, kind="trace"))
        else:
            write_table(table, out)
    if scores is not None:
        agreed = agreement(result, scores)
        show(agreed[agreed["fact"] == "all"].drop(columns="fact"))


@app.command(name="lens")
def lens_command(
    *,
    facts: Facts = "world",
    model: Model = "smollm2-135m",
    direct: Annotated[bool, Parameter(help="what each module adds to the answer's logit, instead of the lens")] = False,
    out: Out = None,
    asked: Asked = Asked(),
) -> None:
    """Read the answer off the residual stream after every layer; --out keeps the table of every fact."""
    check_table(out, facts)
    from workbench.tracing import direct_by_layer, direct_logit_attribution, lens_by_layer, logit_lens

    opened, chosen = model_and_facts(model, facts, asked)
    read, summarise = (direct_logit_attribution, direct_by_layer) if direct else (logit_lens, lens_by_layer)
    frame = read(opened, chosen, progress=not asked.quiet)
    show(summarise(frame))
    write_table(frame, out)

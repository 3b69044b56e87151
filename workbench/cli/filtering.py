"""Which facts to teach: `filter`."""

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from workbench.cli.app import Asked, Facts, Model, app, check_place, model_and_facts, show


@app.command(name="filter")
def filter_command(
    *,
    out: Annotated[Path, Parameter(help="file of facts to write: JSON lines, as --implanted and --data read them")],
    facts: Facts,
    rule: Annotated[str, Parameter(help="spread, band, near_diverse, random, loss or all")] = "spread",
    keep: Annotated[str, Parameter(help="a share, as 0.7, or a number of facts, as 80")] = "0.7",
    model: Model = "smollm2-135m",
    metric: Annotated[Literal["d_soft", "d_emb", "d_layer"], Parameter(help="the distance")] = "d_soft",
    weight: Annotated[
        float | None,
        Parameter(help="of being spread against being near; 4 for spread and 1 for near_diverse when not given"),
    ] = None,
    low: Annotated[
        float | None, Parameter(help="band: the quantile where it starts; the middle when not given")
    ] = None,
    asked: Asked = Asked(),
) -> None:
    """Keep the facts that a rule chooses by how far the model is from their meaning before training.

    spread keeps near and far ones (mean distance against variance), band those
    between two quantiles, near_diverse near ones whose answers differ; random and
    loss (drops what the model finds hardest) are the controls to compare with.
    Beside --out a table (.filter.csv) says what became of every fact.

    Example: workbench filter --facts fictional:120 --rule spread --keep 0.7 --out kept.jsonl
    """
    if out.suffix != ".jsonl":
        raise ValueError(f"--out must end in .jsonl, not {out.name!r}.")
    share, table_file = share_or_number(keep), out.with_suffix(".filter.csv")
    for written in (out, table_file):
        if Path(facts).exists() and written.resolve() == Path(facts).resolve():
            raise ValueError(f"{written} is the file of the facts themselves; give another --out.")
    from workbench.filtering import check_options, filtered, kept_of

    check_options(rule, share, weight, low)
    for written in (out, table_file):
        check_place(written)
    opened, chosen = model_and_facts(model, facts, asked)
    if isinstance(share, int) and share > len(chosen):
        raise ValueError(f"--keep {share} is more than the {len(chosen)} facts there are; give fewer, or a share.")
    from workbench.semantics import filter_inputs

    distance, needed = filter_inputs(opened, chosen, rule, metric=metric, progress=not asked.quiet)
    options: dict[str, Any] = {**needed, "weight": weight, "low": low, "seed": asked.seed}
    table = filtered(distance, rule=rule, keep=share, **options)
    show(
        table.groupby("why", sort=False)["distance"].agg(facts="size", mean="mean", low="min", high="max").reset_index()
    )
    print(kept_of(chosen, table, rule).save(out))
    table.to_csv(table_file, index=False)
    print(table_file)


def share_or_number(text: str) -> float | int:
    """A share or a number of facts, or one sentence."""
    try:
        return int(text) if text.strip().isdigit() else float(text)
    except ValueError:
        raise ValueError(f"--keep takes a share, as 0.7, or a number of facts, as 80, not {text!r}.") from None

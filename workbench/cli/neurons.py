"""Test what was found by taking it away: `neurons` and `suppress`."""

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from workbench.cli.app import FORMATS, Facts, Model, Out, Quiet, Seed, app, check_table, known_among, show, write_table

KnownOnly = Annotated[bool, Parameter(help="only the facts that the model answers")]
Sample = Annotated[int | None, Parameter(help="only so many of the facts, drawn by --seed")]


@app.command(name="neurons")
def neurons_command(
    *,
    facts: Facts = "world",
    model: Model = "smollm2-135m",
    format: Literal[FORMATS] = "auto",  # type: ignore[valid-type]
    known_only: KnownOnly = False,
    sample: Sample = None,
    method: Annotated[str | None, Parameter(help="attribution method (default kn, the paper's, else ig)")] = None,
    unit: Literal["node", "neuron"] = "neuron",
    threshold: Annotated[float, Parameter(help="share of a prompt's largest score that a unit exceeds")] = 0.2,
    share: Annotated[float, Parameter(help="share of a fact's prompts that must agree on a unit")] = 0.7,
    adaptive: Annotated[bool, Parameter(help="adapt --share until a fact has 2 to 5 units on average")] = True,
    effect: Annotated[
        Literal["none", "suppress", "enhance"], Parameter(help="also silence or double the units of each fact and read")
    ] = "none",
    controls: Annotated[int, Parameter(help="sets of random units, matched on activation, beside each fact's")] = 3,
    selection: Annotated[Path | None, Parameter(help="JSON file of all units, for `workbench suppress`")] = None,
    effects_out: Annotated[Path | None, Parameter(help="table of the effects, fact by fact (.csv or .parquet)")] = None,
    out: Out = None,
    seed: Seed = 0,
    device: str = "auto",
    dtype: str = "auto",
    quiet: Quiet = False,
) -> None:
    """Find the neurons on which the prompts of each fact agree (Knowledge Neurons), and what they do.

    --out keeps the table of neurons (.csv or .parquet), --effects-out what happens to a fact, its relation and other
    facts when its neurons are silenced (--effect suppress) or doubled (--effect enhance).
    """
    check_table(out)
    check_table(effects_out)
    if effects_out is not None and effect == "none":
        raise ValueError("--effects-out needs --effect suppress or --effect enhance.")
    opened, chosen = _opened(facts, format, model, device, dtype, known_only, sample, seed, quiet)
    from workbench.neurons import effect_means, effects, knowledge_neurons, selection_of

    settings: dict[str, Any] = {"threshold": threshold, "share": share, "adaptive": adaptive, "method": method}
    found = knowledge_neurons(opened, chosen, unit=unit, progress=not quiet, **settings)
    counted = found.groupby("relation").agg(facts_with_units=("fact", "nunique"), units=("unit", "size"))
    show(counted.assign(needed=found.groupby("relation")["needed"].first()).reset_index())
    print(f"{len(found)} {unit}s in {found['fact'].nunique()} of {len(chosen)} facts")
    write_table(found, out)
    if found.empty:
        if selection is not None:
            raise ValueError(f"No fact has {unit}s on which its prompts agree, so {selection} is not written.")
        return
    if selection is not None:
        print(selection_of(opened, found).save(selection))
    if effect != "none":
        frame = effects(opened, chosen, found, action=effect, controls=controls, seed=seed, progress=not quiet)
        show(effect_means(frame))
        write_table(frame, effects_out)


@app.command(name="suppress")
def suppress_command(
    source: Annotated[Path, Parameter(help="selection or position file (JSON), or a result of `workbench attribute`")],
    *,
    facts: Facts = "world",
    model: Model = "smollm2-135m",
    format: Literal[FORMATS] = "auto",  # type: ignore[valid-type]
    known_only: KnownOnly = False,
    sample: Sample = None,
    unit: Annotated[Literal["node", "neuron"] | None, Parameter(help="what a bare position file lists")] = None,
    factor: Annotated[float, Parameter(help="what activations are multiplied by: 0 silences, 2 doubles")] = 0.0,
    scope: Annotated[Literal["all", "last"], Parameter(help="positions: all, or the last prompt token")] = "all",
    quota: Annotated[
        list[float] | None, Parameter(negative="", help="of an attribution: percent of the units (default 0.5 1 5)")
    ] = None,
    draws: Annotated[int, Parameter(help="of an attribution: how often random units are drawn")] = 3,
    overlap: Annotated[
        Literal["refuse", "drop", "read"], Parameter(help="of an attribution: what to do with facts that it has seen")
    ] = "refuse",
    max_tokens: Annotated[int, Parameter(help="tokens of the shipped general text; 0 reads none")] = 3000,
    out: Out = None,
    seed: Seed = 0,
    device: str = "auto",
    dtype: str = "auto",
    quiet: Quiet = False,
) -> None:
    """Silence units (or multiply them by --factor) and say what the model still answers; weights are not touched.

    With a selection or a position file (--unit says of what), those units. With an attribution, the test of its
    scores: the lowest, the highest and random units, by signed scores and magnitudes, per layer and over all layers, on
    facts that the attribution has not seen (--overlap drop leaves out those that it has).
    """
    check_table(out)
    read = _source(source, unit)
    if not isinstance(read, list | dict) and scope == "last":
        raise ValueError("--scope last works with a selection; an attribution is tested on all positions.")
    opened, chosen = _opened(facts, format, model, device, dtype, known_only, sample, seed, quiet)
    from workbench.facts import general_text

    general = general_text() if max_tokens and scope == "all" else None
    options: dict[str, Any] = {"factor": factor, "general": general, "max_tokens": max_tokens, "progress": not quiet}
    if isinstance(read, list | dict):
        from workbench.suppression import means, suppress

        picked = _selection(read, source, unit, opened)
        frame = suppress(opened, picked, chosen, scope=scope, **options)
        print(f"{picked.n_selected} {picked.unit}s in {picked.n_layers} layers times {factor:g}")
        show(means(frame, seed=seed))
    else:
        from workbench.suppression import suppression_curve

        frame = suppression_curve(
            opened,
            read,
            chosen,
            quotas=quota or (0.5, 1.0, 5.0),
            seeds=range(seed, seed + draws),
            overlap=overlap,
            seed=seed,
            **options,
        )
        show(_in_short(frame))
    write_table(frame, out)


def _in_short(frame: Any) -> Any:
    """One line a choice of units: facts answered and what they lost (95% interval), log-probability, text."""
    whole = frame[frame["seed"].isna()]
    keys = ["strategy", "score", "group", "quota", "n_units"]
    by_metric = {metric: rows.set_index(keys) for metric, rows in whole.groupby("metric")}
    short = by_metric["accuracy"][["after", "change", "low", "high"]].rename(columns={"after": "answered"})
    for metric in ("logprob", "perplexity", "kl"):
        if metric in by_metric:
            short[metric] = by_metric[metric]["after"]
    return short.reset_index()


def _opened(
    facts: str,
    format: str,
    model: str,
    device: str,
    dtype: str,
    known_only: bool,
    sample: int | None,
    seed: int,
    quiet: bool,
) -> tuple[Any, Any]:
    """The model, and the facts that are asked: drawn by seed, of those that the model knows if so wished."""
    from workbench.facts import load_facts

    chosen = load_facts(facts, format=format)
    if sample is not None and not known_only:
        chosen = chosen.sample(sample, seed)
    from workbench.models import load_model

    opened = load_model(model, device=device, dtype=dtype)
    if known_only:
        chosen = known_among(opened, chosen, quiet)
        chosen = chosen if sample is None else chosen.sample(min(sample, len(chosen)), seed)
    return opened, chosen


def _source(source: Path, unit: str | None) -> Any:
    """What a path holds: an attribution (a dataset), a saved selection (a dictionary) or positions (a list)."""
    from workbench.results import load_json, open_result, validate_attribution

    if source.is_dir():
        attribution = open_result(source)
        validate_attribution(attribution)
        return attribution
    found = load_json(source)
    if isinstance(found, list) and unit is None:
        raise ValueError(f"{source} lists positions without saying of what: add --unit node or --unit neuron.")
    if not isinstance(found, list | dict):
        raise ValueError(f"{source} holds neither a selection nor positions.")
    return found


def _selection(read: Any, source: Path, unit: str | None, model: Any) -> Any:
    """The selection that a JSON file holds."""
    from workbench.selection import Selection

    if isinstance(read, dict):
        return Selection.load(source)
    assert unit is not None
    return Selection.from_positions(source, unit=unit, n_units=model.width(unit), n_layers=model.n_layers)

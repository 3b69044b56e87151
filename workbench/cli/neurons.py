"""Test what was found by taking it away: `neurons` and `suppress`."""

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from workbench.cli.app import (
    Asked,
    Draws,
    Facts,
    Model,
    Out,
    app,
    check_table,
    model_and_facts,
    show,
    unfinished,
    write_table,
)


@app.command(name="neurons")
def neurons_command(
    *,
    facts: Facts = "world",
    model: Model = "smollm2-135m",
    method: Annotated[str | None, Parameter(help="attribution method (default kn, the paper's, else ig)")] = None,
    unit: Literal["node", "neuron"] = "neuron",
    threshold: Annotated[float, Parameter(help="share of a prompt's largest score that a unit exceeds")] = 0.2,
    share: Annotated[float, Parameter(help="share of a fact's prompts that must agree on a unit")] = 0.7,
    adaptive: Annotated[bool, Parameter(help="adapt --share until a fact has 2 to 5 units on average")] = True,
    effect: Annotated[
        Literal["none", "suppress", "enhance", "erase"],
        Parameter(help="also silence or double the units of each fact, or erase their value vectors, and read"),
    ] = "none",
    edit: Annotated[
        str | None, Parameter(help="id of a fact: make its neurons write the answer --to, and read")
    ] = None,
    to: Annotated[str | None, Parameter(help="the new answer of --edit")] = None,
    controls: Annotated[
        int, Parameter(help="sets of random units, matched on activation, beside each fact's", validator=Number(gte=1))
    ] = 3,
    selection: Annotated[Path | None, Parameter(help="JSON file of all units, for `workbench suppress`")] = None,
    effects_out: Annotated[Path | None, Parameter(help="table of the effects, fact by fact (.csv or .parquet)")] = None,
    out: Out = None,
    asked: Asked = Asked(),
) -> None:
    """Find the neurons on which the prompts of each fact agree (Knowledge Neurons), and what they do.

    --out keeps the table of neurons (.csv or .parquet), --effects-out what happens to a fact, its relation and other
    facts when its neurons are silenced (--effect suppress) or doubled (--effect enhance), or their value vectors set
    to zero (--effect erase), beside as many random units, matched on activation. `--edit ID --to ANSWER` makes the
    neurons of one fact write another answer; efficacy is how often it is then given, and matched units beside them say
    what any would do. Afterwards the model is as it was.
    """
    check_table(out, facts)
    check_table(effects_out, facts)
    if effects_out is not None and effect == "none" and edit is None:
        raise ValueError("--effects-out needs --effect or --edit.")
    if (edit is None) != (to is None):
        raise ValueError("--edit, the id of a fact, and --to, its new answer, belong together.")
    if to is not None and not to.strip():
        raise ValueError("--to, the new answer of --edit, is empty.")
    if unit == "node" and (effect == "erase" or edit is not None):
        raise ValueError("A node has no value vector to erase or edit; use --unit neuron, or --effect suppress.")
    if effect != "none" and edit is not None:
        raise ValueError("--effect and --edit are two tests; start one after the other.")
    from workbench.neurons import answer_tokens, check_finding, knowledge_neurons, selection_of

    check_finding(threshold, share, method=method, unit=unit)
    opened, chosen = model_and_facts(model, facts, asked)
    if edit is not None and edit not in chosen.ids:
        raise ValueError(f"There is no fact {edit!r} among the {len(chosen)} of {chosen.name}; --edit takes an id.")
    if edit is not None:
        answer_tokens(opened, chosen[edit], str(to))  # refuses an answer that would change nothing
    if effect != "none" and 2 * (controls + 1) > opened.width(unit):
        raise ValueError(f"--controls {controls} is more than the {opened.width(unit)} {unit}s of a layer give.")
    settings: dict[str, Any] = {"threshold": threshold, "share": share, "adaptive": adaptive, "method": method}
    found = knowledge_neurons(opened, chosen, unit=unit, progress=not asked.quiet, **settings)
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
    if effect == "none" and edit is None:
        return
    if edit is not None:
        table, frame = _edited(opened, chosen, found, edit, str(to), controls, asked)
    else:
        table, frame = _effect(opened, chosen, found, effect, controls, asked)
    show(table)
    write_table(frame, effects_out)


def _effect(model: Any, facts: Any, found: Any, effect: str, controls: int, asked: Asked) -> tuple[Any, Any]:
    """What happens without the neurons that were found: a table to show, and fact by fact."""
    from workbench.neurons import effect_means, effects

    frame = effects(model, facts, found, action=effect, controls=controls, seed=asked.seed, progress=not asked.quiet)
    return effect_means(frame), frame


def _edited(model: Any, facts: Any, found: Any, fact: str, answer: str, controls: int, asked: Asked) -> tuple[Any, Any]:
    """What happens when the neurons of one fact write another answer: a table to show, and prompt by prompt."""
    from workbench.intervals import means
    from workbench.neurons import effect_means, effects, measure_edit

    own = found[found["fact"] == fact]
    if own.empty:
        raise ValueError(f"The prompts of fact {fact!r} agree on no neuron, so there is none to edit; lower --share.")
    (edited,) = facts.filter(ids=[fact])
    others = facts.filter(where=lambda one: one.id != fact) if len(facts) > 1 else None
    beside: dict[str, Any] = {"answers": {fact: answer}, "controls": controls, "seed": asked.seed}
    show(effect_means(effects(model, facts, own, action="edit", **beside, progress=not asked.quiet)))
    frame = measure_edit(model, edited, own, answer, others=others)
    return means(frame, seed=asked.seed), frame


@app.command(name="suppress")
def suppress_command(
    source: Annotated[Path, Parameter(help="selection or position file (JSON), or a result of `workbench attribute`")],
    *,
    facts: Facts = "world",
    model: Model = "smollm2-135m",
    unit: Annotated[Literal["node", "neuron"] | None, Parameter(help="what a bare position file lists")] = None,
    factor: Annotated[float, Parameter(help="what activations are multiplied by: 0 silences, 2 doubles")] = 0.0,
    scope: Annotated[Literal["all", "last"], Parameter(help="positions: all, or the last prompt token")] = "all",
    quota: Annotated[
        list[float] | None, Parameter(negative="", help="of an attribution: percent of the units (default 0.5 1 5)")
    ] = None,
    draws: Annotated[Draws, Parameter(help="of an attribution: how often random units are drawn")] = 3,
    overlap: Annotated[
        Literal["refuse", "drop", "read"], Parameter(help="of an attribution: what to do with facts that it has seen")
    ] = "refuse",
    max_tokens: Annotated[int, Parameter(help="tokens of the shipped general text; 0 reads none")] = 3000,
    out: Out = None,
    asked: Asked = Asked(),
) -> None:
    """Silence units (or multiply them by --factor) and say what the model still answers; weights are not touched.

    With a selection or a position file (--unit says of what), those units. With an attribution, the test of its
    scores: the lowest, the highest and random units, by signed scores and magnitudes, per layer and over all layers, on
    facts that the attribution has not seen (--overlap drop leaves out those that it has).
    """
    check_table(out, facts, source)
    read = _source(source, unit)
    if not isinstance(read, list | dict) and scope == "last":
        raise ValueError("--scope last works with a selection; an attribution is tested on all positions.")
    opened, chosen = model_and_facts(model, facts, asked)
    from workbench.facts import general_text

    general = general_text() if max_tokens and scope == "all" else None
    options: dict[str, Any] = {
        "factor": factor,
        "general": general,
        "max_tokens": max_tokens,
        "progress": not asked.quiet,
    }
    if isinstance(read, list | dict):
        from workbench.intervals import means
        from workbench.suppression import suppress

        picked = _selection(read, source, unit, opened)
        frame = suppress(opened, picked, chosen, scope=scope, **options)
        print(f"{picked.n_selected} {picked.unit}s in {picked.n_layers} layers times {factor:g}")
        show(means(frame, seed=asked.seed))
    else:
        from workbench.suppression import suppression_curve

        options |= {
            "quotas": quota or (0.5, 1.0, 5.0),
            "seeds": range(asked.seed, asked.seed + draws),
            "overlap": overlap,
        }
        with unfinished(out) as parts:
            frame = suppression_curve(opened, read, chosen, **options, seed=asked.seed, parts=parts)
            show(_in_short(frame))
            write_table(frame, out)
        return
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

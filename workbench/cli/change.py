"""What changed between two models: `drift`, `forgetting`."""

from typing import Annotated, Any

from cyclopts import Parameter

from workbench.cli.app import Facts, Out, Quiet, app, check_table, show, write_table


@app.command(name="drift")
def drift_command(before: str, after: str, *, facts: Facts = "world", out: Out = None, quiet: Quiet = False) -> None:
    """Score how far every fact moved from its semantic target between two models (names, folders or adapters)."""
    from workbench.facts import load_facts

    chosen = load_facts(facts)
    from workbench.semantics import measure_drift

    check_table(out)
    frame = measure_drift(before, after, chosen, progress=not quiet)
    grouped = frame.groupby(["metric", "layer"], dropna=False)[["before", "after", "change"]].mean()
    show(grouped.reset_index())
    write_table(frame, out)


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
    from workbench.forgetting import measure_forgetting
    from workbench.intervals import means

    check_table(out)
    frame = measure_forgetting(before, after, suites, max_tokens=max_tokens, progress=not quiet)
    show(means(frame))
    write_table(frame, out)

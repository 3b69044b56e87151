"""What a model scores (`benchmark`), and what changed between two models (`forgetting`)."""

import sys
from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

from workbench.cli.app import (
    Asked,
    Count,
    Facts,
    Model,
    Out,
    Quiet,
    Seed,
    app,
    check_table,
    show,
    two_models_and_facts,
    write_table,
)

Tasks = Annotated[
    str, Parameter(help="tasks of lm-eval, separated by commas; shipped: the four that need no network; none")
]


@app.command(name="forgetting")
def forgetting_command(
    before: str,
    after: str,
    *,
    facts: Facts = "world",
    tasks: Tasks = "auto",
    max_tokens: Annotated[int, Parameter(help="tokens of the shipped general text", validator=Number(gte=8))] = 3000,
    out: Out = None,
    asked: Asked = Asked(),
) -> None:
    """Compare what two models answer (facts, tasks) and how well they predict plain prose (perplexity, KL).

    Where the facts have them, their paraphrases are read too, and their neighbourhood: prompts of the same relation
    about other subjects, with what the first model says as their answer. Prints the means with 95% intervals, answers
    lost and gained with McNemar's exact p (q: corrected for their number), and LoKI's average loss over the tasks.
    Without --tasks the shipped tasks are read where lm-eval is installed. --limit goes for the items of each task too.
    --out keeps the score of every single fact, text and item.
    """
    check_table(out, facts)
    from workbench.facts import general_text
    from workbench.forgetting import find_tasks, measure_forgetting, neighbourhood_as_before, paired
    from workbench.training import held_out_prompts

    options: dict[str, Any] = {"tasks": _tasks(tasks), "limit": asked.sample, "max_tokens": max_tokens}
    if options["tasks"]:
        find_tasks(options["tasks"])
    first, second, chosen = two_models_and_facts(before, after, facts, asked)
    suites: dict[str, Any] = {
        "facts": chosen,
        "paraphrase": held_out_prompts(chosen, 0),
        "neighbourhood": neighbourhood_as_before(first, chosen),
        "general": general_text(),
    }
    suites = {name: suite for name, suite in suites.items() if len(suite)}
    frame = measure_forgetting(first, second, suites, **options, progress=not asked.quiet)
    table = paired(frame, seed=asked.seed)
    show(table.drop(columns=["before_low", "before_high", "after_low", "after_high", "draws", "seed"]))
    _show_average(table[~table["suite"].isin(suites)])
    write_table(frame, out)


@app.command(name="benchmark")
def benchmark_command(
    model: Model = "smollm2-135m",
    *,
    tasks: Tasks = "shipped",
    limit: Annotated[Count, Parameter(help="only the first so many items of each task")] = None,
    shots: Annotated[Count, Parameter(help="worked examples before each question")] = None,
    seed: Seed = 0,
    out: Out = None,
    quiet: Quiet = False,
) -> None:
    """Score a model on benchmarks of lm-eval: the four that ship, or any by name whose data can be had."""
    from workbench.forgetting import benchmark

    check_table(out)
    frame = benchmark(model, _tasks(tasks), limit=limit, shots=shots, seed=seed, progress=not quiet)
    show(frame)
    write_table(frame, out)


def _tasks(wanted: str) -> list[str]:
    """The names of the tasks; with auto the shipped ones, or none and a word why where lm-eval is not installed."""
    from workbench.forgetting import TASKS, lm_eval_installed

    if wanted == "auto" and not lm_eval_installed():
        print('No tasks were read: pip install "knowledge-workbench[eval]" brings lm-eval.', file=sys.stderr)
        return []
    if wanted == "none":
        return []
    return list(TASKS) if wanted in ("auto", "shipped") else [name.strip() for name in wanted.split(",")]


def _show_average(table: Any) -> None:
    """Print LoKI's average over the tasks; those without answers right or wrong, or a score before, are named."""
    from workbench.forgetting import ANSWERED, loki_average

    answered = table[table["metric"].str.split(":").str[0].isin(ANSWERED)]  # lm-eval's filter follows the colon
    order = (answered["before"] <= 0).argsort(kind="stable")  # of a task's metrics the first that had something to lose
    scores = answered.iloc[order].drop_duplicates("suite").set_index("suite")[["metric", "before", "after"]]
    counted = scores[scores["before"] > 0]
    if len(counted):
        average = loki_average(counted["before"].to_dict(), counted["after"].to_dict())
        of = ", ".join(f"{task} {metric}" for task, metric in sorted(counted["metric"].items()))
        print(f"Average loss over {len(counted)} tasks (LoKI's Avg): {average:.4g}% ({of})")
    if zero := sorted(set(scores.index) - set(counted.index)):
        print(f"Left out of the average, because the score before is 0: {', '.join(zero)}.")
    if others := sorted(set(table["suite"]) - set(scores.index)):
        print(f"Left out of the average, because nothing is right or wrong there: {', '.join(others)}.")

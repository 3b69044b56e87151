"""The four tasks that ship: their names, and their items as lm-eval reads them."""

import json
from importlib.resources import files
from typing import Any

#: The shipped tasks in lm-eval's format, scored by the likelihood of four choices; used by default.
TASKS = ("fact_choice", "sentence_completion", "paraphrase_choice", "arithmetic_choice")


def items(name: str) -> list[dict[str, Any]]:
    """Read the items of a shipped task: id, question, choices, and answer (the index of the right choice).

    >>> len(items("fact_choice")[0]["choices"])
    4

    Raises:
        ValueError: no such task.
    """
    if name not in TASKS:
        raise ValueError(f"No task {name!r} ships; there are {', '.join(TASKS)}.")
    text = files("workbench").joinpath("data", "tasks", f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def documents(name: str, **about: Any) -> dict[str, Any]:
    """Give the items of a shipped task as the data set that lm-eval asks for; the task's YAML names this function."""
    from datasets import Dataset

    return {"test": Dataset.from_list(items(name))}

"""Benchmarks by lm-eval: the only door to it, for the shipped tasks and for any task by name."""

import copy
import difflib
import io
import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from importlib.resources import as_file, files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from workbench.forgetting.shipped import TASKS
from workbench.models import HookedModel
from workbench.opening import open_model

BATCH = 16  # requests in one forward pass
#: How lm-eval's kinds of tasks read a model.
MODES = {
    "multiple_choice": "likelihood of choices",
    "loglikelihood": "teacher-forced",
    "loglikelihood_rolling": "teacher-forced",
    "generate_until": "greedy",
}


def benchmark(
    model: Any,
    tasks: Sequence[str] | None = None,
    *,
    limit: int | None = None,
    shots: int | None = None,
    seed: int = 0,
    batch_size: int = BATCH,
    folder: str | Path | None = None,
    tokenizer: Any = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Score a model on benchmarks of lm-eval: the four that ship, or any by name whose data can be had.

    Args:
        model: a model, name, folder or adapter (see `open_model`).
        tasks: names of tasks or groups of lm-eval; by default `TASKS`, which need no network.
        limit: take only the first so many items of each task.
        shots: worked examples before each question; by default what the task says, or none.
        seed: of the worked examples, and of whatever else a task draws.
        batch_size: requests in one forward pass.
        folder: of the user's own tasks in lm-eval's YAML format, beside lm-eval's.
        tokenizer: of a loaded model.
        progress: show lm-eval's progress bars.

    Returns:
        Frame with task, metric, value, stderr (NaN where lm-eval gives none), n (items), mode (likelihood of choices,
        teacher-forced, greedy, sampled) and seed; `metric` is lm-eval's name, followed by its filter where it has one.

    Raises:
        ValueError: lm-eval is not installed, a task is unknown, or its data could not be had.
    """
    names = TASKS if tasks is None else tasks
    manager = find_tasks(names, folder)
    opened = open_model(model, tokenizer=tokenizer)
    found, modes = _evaluate(
        opened, manager, names, limit=limit, shots=shots, seed=seed, batch_size=batch_size, progress=progress
    )
    rows = []
    for task, scores in found["results"].items():
        for key, value in scores.items():
            metric, _, way = key.partition(",")
            if way and not metric.endswith("_stderr"):
                error = scores.get(f"{metric}_stderr,{way}")
                rows.append(
                    {
                        "task": task,
                        "metric": _named(metric, way),
                        "value": float(value),
                        "stderr": float(error) if isinstance(error, int | float) else float("nan"),
                        "n": scores.get("sample_len"),
                        "mode": modes.get(task, "that of its tasks"),
                        "seed": seed,
                    }
                )
    return pd.DataFrame(rows, columns=["task", "metric", "value", "stderr", "n", "mode", "seed"])


def read_items(
    model: HookedModel,
    manager: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """Every item's score by lm-eval: suite (the task), metric, mode, fact (the item's id, else its number), value.

    lm-eval's `acc` is called `accuracy`. Metrics that are not one number an item (perplexity over words) are left
    out; a task that has no other is a `ValueError`.
    """
    found, modes = _evaluate(model, manager, tasks, limit=limit, seed=seed, progress=progress)
    rows: list[dict[str, Any]] = []
    for task, samples in found["samples"].items():
        ids = [str(sample["doc"].get("id", "")) if isinstance(sample["doc"], dict) else "" for sample in samples]
        of = {sample["doc_id"]: name for sample, name in zip(samples, ids, strict=True)}
        named = all(of.values()) and len(set(of.values())) == len(of)
        before = len(rows)
        for sample in samples:
            fact = of[sample["doc_id"]] if named else f"{task}-{sample['doc_id']:05d}"
            for metric in sample["metrics"]:
                if isinstance(sample[metric], int | float):
                    label = {"suite": task, "metric": "accuracy" if metric == "acc" else metric, "mode": modes[task]}
                    label["metric"] = _named(label["metric"], sample["filter"])
                    rows.append(label | {"fact": fact, "value": float(sample[metric])})
        if len(rows) == before:
            raise ValueError(f"The task {task} has no score of single items to compare; read it with benchmark().")
    return pd.DataFrame(rows, columns=["suite", "metric", "mode", "fact", "value"])


def lm_eval_installed() -> bool:
    """Say whether lm-eval is there."""
    return find_spec("lm_eval") is not None


def find_tasks(tasks: Sequence[str], folder: str | Path | None = None) -> Any:
    """Give lm-eval's index of tasks, where it holds these names and their data can be had, as long work needs to know.

    lm-eval's own index, which takes seconds to read, is read only for tasks that are neither shipped nor in `folder`.

    Raises:
        ValueError: lm-eval is not installed, no task is named, a name is unknown or twice there, or its data are not
            to be had.
        FileNotFoundError: there is no such folder.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(
            'Benchmarks need lm-eval, which is not installed: pip install "knowledge-workbench[eval]".'
        ) from error
    if isinstance(tasks, str) or not tasks:
        raise ValueError(f"Give a list of tasks, such as {list(TASKS)}, not {tasks!r}.")
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"A task stands twice among {', '.join(tasks)}; name each once.")
    if folder is not None and not Path(folder).is_dir():
        raise FileNotFoundError(f"There is no folder of tasks {folder}.")
    with ExitStack() as stack:
        stack.enter_context(_silent())
        shipped = stack.enter_context(as_file(files("workbench").joinpath("data", "tasks")))
        paths = [str(shipped), *([str(folder)] if folder is not None else [])]
        manager = TaskManager(include_path=paths, include_defaults=False)
        if not set(tasks) <= set(manager.all_tasks):
            manager = TaskManager(include_path=paths)
    for name in tasks:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"these ship: {', '.join(TASKS)}."
            raise ValueError(f"lm-eval knows no task {name!r}; {hint}")
    with _silent():
        _load(manager, tasks)
    return manager


def _load(manager: Any, names: Sequence[str]) -> dict[str, Any]:
    """Tasks with their data, as lm-eval's `evaluate` takes them."""
    try:
        return manager.load(list(names))
    except Exception as error:  # whatever the reader of a data set raises where it finds none
        said = [*str(error).splitlines(), repr(error)][0]
        raise ValueError(
            f"The data of {', '.join(names)} could not be had ({said}); "
            f"fetch them with a network first, or use the tasks that ship: {', '.join(TASKS)}."
        ) from error


def _evaluate(
    model: HookedModel,
    manager: Any,
    names: Sequence[str],
    *,
    limit: int | None = None,
    shots: int | None = None,
    seed: int = 0,
    batch_size: int = BATCH,
    progress: bool = False,
) -> tuple[dict[str, Any], dict[str, str]]:
    """lm-eval's results with every sample, as its `simple_evaluate` gives them, and the mode of every task."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    if limit is not None and limit < 1:
        raise ValueError(f"A limit takes at least 1 item of each task, not {limit}.")
    with _silent(bars=progress), _seeded(seed):
        loaded = _load(manager, names)
        for task in loaded["tasks"].values():
            own = task.get_config("num_fewshot")
            if own is None or (shots is not None and own != 0):
                task.set_config(key="num_fewshot", value=shots or 0)
            task.set_fewshot_seed(seed=seed)
        # lm-eval may give a tokenizer a padding token: it gets a copy
        lm = HFLM(pretrained=model.hf, tokenizer=copy.deepcopy(model.tokenizer), batch_size=batch_size)
        results = evaluate(lm=lm, task_dict=loaded, limit=limit)
    return results, {name: _mode(task) for name, task in loaded["tasks"].items()}


def _mode(task: Any) -> str:
    """How a task reads a model, in words."""
    settings = task.get_config("generation_kwargs") or {}
    return "sampled" if settings.get("do_sample") else MODES.get(task.OUTPUT_TYPE, str(task.OUTPUT_TYPE))


def _named(metric: str, way: str) -> str:
    """A metric's name, with the filter it was read through where there is one."""
    return metric if way == "none" else f"{metric}:{way}"


@contextmanager
def _silent(bars: bool = False) -> Iterator[None]:
    """No messages of lm-eval below errors; without `bars` nothing on the error stream at all."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with ExitStack() as stack:
            if not bars:
                stack.enter_context(redirect_stderr(io.StringIO()))
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The generators that a task may draw from, seeded inside the `with` and as before after it."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)

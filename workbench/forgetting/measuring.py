"""What a model lost: answers, texts and benchmark items read before and after, fact by fact and paired."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from workbench.facts import FactSet
from workbench.forgetting.harness import find_tasks, read_items
from workbench.metrics import kl, logprob
from workbench.models import HookedModel
from workbench.opening import check_several, hooked_among, open_model, opened_beside
from workbench.recollection import read_facts, text_chunks, text_logits

Suite = FactSet | Sequence[str]
KEYS = ["suite", "metric", "mode", "fact", "weight"]
#: Logits of general text before are kept for the next model while they take no more than this.
KEPT_BYTES = 2**30


def measure_forgetting(
    before: Any,
    after: Any,
    suites: Mapping[str, Suite],
    *,
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
    max_tokens: int = 3000,
    tokenizer: Any = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Read the same facts, texts and benchmark items from two models, and compare.

    Args:
        before: a model, name, folder or adapter (see `open_model`).
        after: the same, or a dictionary of several by name, which adds the column `method`.
        suites: by name, fact sets (efficacy, paraphrase, neighbourhood, retained, ...) or lists of passages (general).
        tasks: benchmarks of lm-eval by name, such as `workbench.forgetting.TASKS`; each becomes a suite.
        limit: read only the first so many items of each task.
        max_tokens: read at most this many tokens of a list of passages.
        tokenizer: of loaded models, where neither side and no folder has one.
        progress: show a progress bar.

    Returns:
        Frame with suite, metric, mode, fact, weight, before, after, change = after - before. For facts: `accuracy` (1
        where greedy decoding gives the answer, else 0) and `logprob` (nats, of the whole answer, teacher-forced). For
        texts, one row a piece, `weight` its tokens: `nll` (nats per token; perplexity is
        `exp(sum(weight * nll) / sum(weight))`) and `kl` (nats per token, of after from before). For tasks, one row an
        item, `fact` its id: `accuracy`, and what else lm-eval scores. A model against itself gives zeros in `change`.

    Raises:
        ValueError: the two models differ in width, depth or vocabulary, a suite is empty, fewer than 8 tokens of
            text are asked for, a task is unknown or has the name of a suite, or lm-eval is not installed; all before
            anything is read, but for later ones of several models that have to be opened.
    """
    _check(suites, tasks)
    check_several(after)
    manager = find_tasks(tasks) if tasks else None
    first = open_model(before, beside=hooked_among(after), tokenizer=tokenizer)
    several = opened_beside(first, after, tokenizer)
    texts = {name: text_chunks(first, suite, max_tokens=max_tokens) for name, suite in suites.items()
             if not isinstance(suite, FactSet)}  # fmt: skip

    def read(model: HookedModel) -> pd.DataFrame:
        frames = [_read_facts(model, suite).assign(suite=name) for name, suite in suites.items()
                  if isinstance(suite, FactSet)]  # fmt: skip
        if tasks:
            frames.append(read_items(model, manager, tasks, limit=limit, progress=progress).assign(weight=1.0))
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=[*KEYS, "value"])

    base = read(first)
    total = len(after) if isinstance(after, Mapping) else 1
    room = 4 * first.d_vocab * sum(len(chunk) for chunks in texts.values() for chunk in chunks) <= KEPT_BYTES
    of_first = lru_cache(maxsize=None if room and total > 1 else 0)(partial(text_logits, first))
    frames = []
    for name, second in tqdm(several, total=total, unit="model", desc="forgetting", disable=not progress):
        own = base.merge(read(second), on=KEYS, suffixes=("", "_after"), validate="one_to_one")
        frames.append(own.rename(columns={"value": "before", "value_after": "after"}).assign(method=name))
        frames += [
            _read_text(of_first, second, chunks).assign(method=name, suite=suite_name)
            for suite_name, chunks in texts.items()
        ]
    result = pd.concat([frame for frame in frames if len(frame)], ignore_index=True)
    result = result.assign(change=lambda f: f["after"] - f["before"])
    columns = ["method", *KEYS, "before", "after", "change"]
    return result[columns if isinstance(after, Mapping) else columns[1:]]


def _check(suites: Mapping[str, Suite], tasks: Sequence[str] | None) -> None:
    """Raise where there is nothing to read, or one name for two things."""
    if not isinstance(suites, Mapping):
        raise ValueError('suites is a dictionary of fact sets and lists of passages by name, as in {"facts": facts}.')
    empty = [name for name, suite in suites.items() if not len(suite)]
    if empty or not (suites or tasks):
        raise ValueError(f"Every suite needs facts or texts; empty: {', '.join(empty) or 'all'}.")
    for name, suite in suites.items():
        if isinstance(suite, str):
            raise ValueError(f"The suite {name!r} is one text; give a list of passages.")
        if name in (tasks or ()):
            raise ValueError(f"{name!r} is both a suite and a task; give the suite another name.")


def _read_facts(model: HookedModel, facts: FactSet) -> pd.DataFrame:
    """Accuracy and log-probability of every fact: metric, mode, fact, weight, value."""
    tokens = model.tokenise(facts)
    readings = read_facts(model, tokens, greedy=False)
    known = pd.DataFrame({"metric": "accuracy", "fact": facts.ids, "value": [float(r.known) for r in readings]})
    score = pd.DataFrame({"metric": "logprob", "fact": facts.ids, "value": [sum(r.logprobs) for r in readings]})
    return pd.concat([known.assign(mode="greedy"), score.assign(mode="teacher-forced")]).assign(weight=1.0)


@torch.no_grad()
def _read_text(before: Callable[..., Any], after: HookedModel, chunks: Sequence[list[int]]) -> pd.DataFrame:
    """Negative log-likelihood before and after, and the divergence between them, of every piece of text.

    `before` gives the logits of a piece, and the tokens that follow, of the model before.
    """
    rows: list[dict[str, Any]] = []
    for number, chunk in enumerate(chunks):
        old, target = before(tuple(chunk))
        new, _ = text_logits(after, chunk)
        label = {"mode": "teacher-forced", "fact": f"text-{number:04d}", "weight": float(len(target))}
        nll = [-float(logprob(logits, target).mean()) for logits in (old, new)]
        rows.append({"metric": "nll", **label, "before": nll[0], "after": nll[1]})
        rows.append({"metric": "kl", **label, "before": 0.0, "after": float(kl(old, new).mean())})
    return pd.DataFrame(rows)

"""What a model lost: answers and texts read before and after, fact by fact and paired."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from workbench.facts import FactSet
from workbench.metrics import kl, logprob
from workbench.models import HookedModel
from workbench.opening import check_comparable, hooked_among, open_model
from workbench.recollection import read_facts, text_chunks, text_logits

Suite = FactSet | Sequence[str]


def measure_forgetting(
    before: Any,
    after: Any,
    suites: Mapping[str, Suite],
    *,
    max_tokens: int = 3000,
    tokenizer: Any = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Read the same facts and texts from two models, and compare.

    Args:
        before: a model, name, folder or adapter (see `open_model`).
        after: the same, or a dictionary of several by name, which adds the column `method`.
        suites: by name, fact sets (efficacy, paraphrase, neighbourhood, retained, ...) or lists of passages (general).
        max_tokens: read at most this many tokens of a list of passages.
        tokenizer: of loaded models, where neither side and no folder has one.
        progress: show a progress bar.

    Returns:
        Frame with suite, metric, fact, weight, before, after, change = after - before. For facts: `accuracy` (1 where
        greedy decoding gives the answer, else 0; teacher-forced reading) and `logprob` (nats, of the whole answer,
        teacher-forced). For texts, one row a piece, `weight` its tokens: `nll` (nats per token; perplexity is
        `exp(sum(weight * nll) / sum(weight))`) and `kl` (nats per token, of after from before). A model against
        itself gives zeros in `change`.

    Raises:
        ValueError: the two models differ in width, depth or vocabulary, or a suite is empty.
    """
    if not suites or not all(len(suite) for suite in suites.values()):
        empty = [name for name, suite in suites.items() if not len(suite)]
        raise ValueError(f"Every suite needs facts or texts; empty: {', '.join(empty) or 'all'}.")
    for name, suite in suites.items():
        if isinstance(suite, str):
            raise ValueError(f"The suite {name!r} is one text; give a list of passages.")
    first = open_model(before, beside=hooked_among(after), tokenizer=tokenizer)
    base = {name: _read_facts(first, suite) for name, suite in suites.items() if isinstance(suite, FactSet)}
    several = after if isinstance(after, Mapping) else {"after": after}
    frames = []
    for name, model in tqdm(several.items(), unit="model", desc="forgetting", disable=not progress):
        second = open_model(model, beside=first, tokenizer=tokenizer)
        check_comparable(first, second)
        for suite_name, suite in suites.items():
            if isinstance(suite, FactSet):
                frame = base[suite_name].merge(
                    _read_facts(second, suite), on=["metric", "fact", "weight"], suffixes=("", "_after")
                )
                frame = frame.rename(columns={"value": "before", "value_after": "after"})
            else:
                frame = _read_text(first, second, suite, max_tokens)
            frames.append(frame.assign(method=name, suite=suite_name))
    result = pd.concat(frames, ignore_index=True).assign(change=lambda f: f["after"] - f["before"])
    columns = ["method", "suite", "metric", "fact", "weight", "before", "after", "change"]
    return result[columns if isinstance(after, Mapping) else columns[1:]]


def _read_facts(model: HookedModel, facts: FactSet) -> pd.DataFrame:
    """Accuracy and log-probability of every fact: metric, fact, weight, value."""
    tokens = model.tokenise(facts)
    readings = read_facts(model, tokens, greedy=False)
    known = pd.DataFrame({"metric": "accuracy", "fact": facts.ids, "value": [float(r.known) for r in readings]})
    score = pd.DataFrame({"metric": "logprob", "fact": facts.ids, "value": [sum(r.logprobs) for r in readings]})
    return pd.concat([known, score], ignore_index=True).assign(weight=1.0)


@torch.no_grad()
def _read_text(before: HookedModel, after: HookedModel, passages: Sequence[str], max_tokens: int) -> pd.DataFrame:
    """Negative log-likelihood before and after, and the divergence between them, of every piece of text."""
    rows: list[dict[str, Any]] = []
    for number, chunk in enumerate(text_chunks(before, passages, max_tokens=max_tokens)):
        old, target = text_logits(before, chunk)
        new, _ = text_logits(after, chunk)
        label = {"fact": f"text-{number:04d}", "weight": float(len(target))}
        nll = [-float(logprob(logits, target).mean()) for logits in (old, new)]
        rows.append({"metric": "nll", **label, "before": nll[0], "after": nll[1]})
        rows.append({"metric": "kl", **label, "before": 0.0, "after": float(kl(old, new).mean())})
    return pd.DataFrame(rows)

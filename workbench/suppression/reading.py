"""Multiply the activations of chosen units, and read what the model then says: before against after, fact by fact.

Weights are never touched: the activations are multiplied by hooks that are gone after the `with`, also after an error.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from math import isfinite
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from workbench.facts import FactSet, TokenisedFact
from workbench.metrics import kl, logprob
from workbench.models import HookedModel
from workbench.recollection import read_facts, text_chunks, text_logits
from workbench.results import Parts
from workbench.selection import Selection

#: How a model is changed inside a `with`, while facts whose answers have so many tokens are read (0: running text).
Intervention = Callable[[int], AbstractContextManager[None]]

COLUMNS = ["suite", "metric", "fact", "weight", "before", "after", "change"]


def suppress(
    model: HookedModel,
    selection: Selection,
    facts: FactSet,
    *,
    factor: float | int = 0.0,
    scope: str = "all",
    general: Sequence[str] | None = None,
    max_tokens: int = 3000,
    progress: bool = False,
) -> pd.DataFrame:
    """Multiply the activations of the selected units by `factor`, and read facts and texts before and with it.

    With `factor=0` a node is as if its row of the down-projection (and its bias entry) were zero, a neuron as if its
    column were: the intervention of Knowledge Neurons (arXiv 2104.08696) and of LoKI's suppression test.

    Args:
        model: a model from `load_model`; its weights are not touched.
        selection: the units, nodes or neurons, of this model.
        facts: what is asked.
        factor: what the activations are multiplied by; 0 silences the units, 1 changes nothing.
        scope: `"all"` changes every position, `"last"` only the last prompt token of each fact (as Knowledge Neurons
            does), which running text does not have.
        general: passages of plain text; None reads none.
        max_tokens: read at most this many tokens of them.
        progress: show a progress bar.

    Returns:
        Frame with suite ("facts" or "general"), metric, fact, weight, before, after, change = after - before. For
        facts: `accuracy` (1 where greedy decoding gives the whole answer, else 0, seen from a teacher-forced reading)
        and `logprob` (nats, of the whole answer, teacher-forced). For texts, a row a piece, `weight` its tokens: `nll`
        and `kl` (of the changed model from the untouched one), both in nats per token. `means` summarises it.

    Raises:
        ValueError: a selection of another shape, a factor that is not finite, facts that do not fit the model.
    """
    if isinstance(general, str):
        raise ValueError("general is one text; give a list of passages.")
    if general is not None and scope == "last":
        raise ValueError('scope="last" means the last prompt token, which running text does not have: leave it out.')
    change = scaled(model, selection, factor, scope)
    suites = {"facts": model.tokenise(facts)}
    return compare(model, [change], suites, general=general, max_tokens=max_tokens, progress=progress)[0]


def enhance(
    model: HookedModel,
    selection: Selection,
    facts: FactSet,
    *,
    factor: float | int = 2.0,
    scope: str = "all",
    general: Sequence[str] | None = None,
    max_tokens: int = 3000,
    progress: bool = False,
) -> pd.DataFrame:
    """`suppress` the other way: multiply the activations of the selected units by 2, or another factor."""
    return suppress(
        model,
        selection,
        facts,
        factor=factor,
        scope=scope,
        general=general,
        max_tokens=max_tokens,
        progress=progress,
    )


def scaled(model: HookedModel, selection: Selection, factor: float | int, scope: str = "all") -> Intervention:
    """The intervention that multiplies the selected units' activations by `factor`; checked here, not when it runs."""
    if not isinstance(selection, Selection):
        raise ValueError(f"What is silenced is a Selection, as `select` makes, not a {type(selection).__name__}.")
    if not selection.matches(model.n_layers, model.width(selection.unit)):
        raise ValueError(
            f"The selection has {selection.n_layers} layers of {selection.n_units} {selection.unit}s, but {model.name} "
            f"has {model.n_layers} of {model.width(selection.unit)}: select from an attribution of this model."
        )
    if not isfinite(factor):
        raise ValueError(f"The factor {factor} is not a finite number; 0 silences the units, 2 doubles them.")
    if scope not in ("all", "last"):
        raise ValueError(f'scope must be "all" (every position) or "last" (the last prompt token), not {scope!r}.')
    scales: dict[int, Tensor] = {}
    for layer in range(model.n_layers):
        if rows := selection.rows(layer):
            scales[layer] = torch.ones(selection.n_units, device=model.device, dtype=model.dtype)
            scales[layer][rows] = factor

    def enter(answer_tokens: int) -> AbstractContextManager[None]:
        if scope == "last" and not answer_tokens:
            raise ValueError("Running text has no last prompt token.")
        # facts are read without their last token and padded on the left: the prompt ends so many tokens before the end
        position = -answer_tokens if scope == "last" else None
        return model.patched(
            selection.unit, {layer: partial(_multiply, scale, position) for layer, scale in scales.items()}
        )

    return enter


def _multiply(
    scale: Float[Tensor, " unit"], position: int | None, activation: Float[Tensor, "batch pos unit"]
) -> Float[Tensor, "batch pos unit"]:
    if position is None:
        return activation * scale
    changed = activation.clone()
    changed[:, position] *= scale
    return changed


def compare(
    model: HookedModel,
    interventions: Sequence[Intervention],
    suites: Mapping[str, Sequence[TokenisedFact]],
    *,
    general: Sequence[str] | None = None,
    max_tokens: int = 3000,
    parts: Parts | None = None,
    progress: bool = False,
) -> list[pd.DataFrame]:
    """Read facts and texts from a model as it is and under each intervention; one frame each, as `suppress` gives.

    The untouched model is read once, and texts piece by piece, so memory does not grow with the interventions. What is
    read goes to `parts`, by the numbers of the interventions.
    """
    kept = parts or Parts(None, {})
    chunks = [] if general is None else text_chunks(model, general, max_tokens=max_tokens)
    rows: list[list[dict[str, Any]]] = [[] for _ in interventions]
    total = (len(interventions) + 1) * (len(suites) + len(chunks))
    with tqdm(total=total, unit="reading", desc="intervene", disable=not progress) as bar:
        for suite, facts in suites.items():
            (before,) = kept.rows(f"{suite} before", partial(_read, model, facts, None))
            bar.update()
            for place, (found, intervention) in enumerate(zip(rows, interventions, strict=True)):
                (after,) = kept.rows(f"{suite} after {place}", partial(_read, model, facts, intervention))
                for metric in before:
                    for fact, old, new in zip(facts, before[metric], after[metric], strict=True):
                        label = {"suite": suite, "metric": metric, "fact": fact.fact_id, "weight": 1.0}
                        found.append({**label, "before": old, "after": new})
                bar.update()
        for number, chunk in enumerate(chunks):
            read = kept.rows(f"text {number}", partial(_read_text, model, chunk, interventions, bar))
            for row in read:
                found = rows[row.pop("intervention")]
                found.append({"suite": "general", "fact": f"text-{number:04d}", **row})
            bar.update((len(suites) + number + 1) * (len(interventions) + 1) - bar.n)
    frames = [pd.DataFrame(found, columns=COLUMNS[:-1]) for found in rows]
    return [frame.assign(change=frame["after"] - frame["before"])[COLUMNS] for frame in frames]


def _read(
    model: HookedModel, facts: Sequence[TokenisedFact], intervention: Intervention | None
) -> list[dict[str, list[float]]]:
    """Accuracy and log-probability of every fact, one record; facts with answers of one length are read together."""
    found: dict[str, list[float]] = {"accuracy": [0.0] * len(facts), "logprob": [0.0] * len(facts)}
    for length in sorted({len(fact.answer_ids) for fact in facts}):
        same = [i for i, fact in enumerate(facts) if len(fact.answer_ids) == length]
        some = [facts[i] for i in same]
        if intervention is None:
            readings = read_facts(model, some, greedy=False)
        else:
            with intervention(length):
                readings = read_facts(model, some, greedy=False)
        for i, reading in zip(same, readings, strict=True):
            found["accuracy"][i] = float(reading.known)
            found["logprob"][i] = float(sum(reading.logprobs))
    return [found]


def _read_text(
    model: HookedModel, chunk: Sequence[int], interventions: Sequence[Intervention], bar: tqdm
) -> list[dict[str, Any]]:
    """Two rows of one piece of text for each intervention."""
    old, target = text_logits(model, chunk)
    before, weight = -float(logprob(old, target).mean()), float(len(target))
    rows: list[dict[str, Any]] = []
    for number, intervention in enumerate(interventions):
        with intervention(0):
            new, _ = text_logits(model, chunk)
        place = {"intervention": number, "weight": weight}
        rows.append({**place, "metric": "nll", "before": before, "after": -float(logprob(new, target).mean())})
        rows.append({**place, "metric": "kl", "before": 0.0, "after": float(kl(old, new).mean())})
        bar.update()
    return rows

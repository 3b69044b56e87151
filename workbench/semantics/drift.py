"""`measure_drift`: how far every fact moved between two models, and which movements are more than wording."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from workbench.distances import toward_and_off
from workbench.facts import FactSet
from workbench.intervals import wilson
from workbench.models import HookedModel
from workbench.opening import check_several, hooked_among, open_model, opened_beside
from workbench.semantics.anchors import Target, check_anchor, target_of
from workbench.semantics.distance import DISTANCES, Said, check_metrics, distances, layer_distance, read

#: All that `measure_drift` knows, and what it gives unless it is asked for more.
METRICS = ("d_emb", "d_soft", "toward", "off", "d_layer")
USUAL = ("d_emb", "toward", "off")
_LAYERED = ("toward", "off", "d_layer")


def measure_drift(
    before: Any,
    after: Any,
    facts: FactSet,
    *,
    metrics: Sequence[str] = USUAL,
    anchor: str | Sequence[str] = "unembedding",
    tokenizer: Any = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Score how far every fact moved from its semantic target between two models.

    Rows without a layer: `d_emb` and `d_soft`, the distances of the answer (see `semantic_distance`), with the
    embedding of `before`. Rows per layer: with h the residual stream after the block at the last prompt token, c the
    target anchor in `before`, r = c - h(before) and Dh = h(after) - h(before), `toward = <Dh, r>/|r|^2` and
    `off = |Dh - toward r|/|r|`, so that `|h(after) - c|^2/|r|^2 = (1 - toward)^2 + off^2`; both are 0 before by
    definition. `d_layer` is the distance in angle of h to c. With the anchor `unembedding` c is short beside h (2.6
    against 665 in the last layer of the default model), so that `toward` hardly sees which answer it is: it says how
    the state shrinks or grows. `stated` and `centroid` are states like h, and do see it; `d_layer` does with any.

    Args:
        before: a model, name, folder or adapter (see `open_model`).
        after: the same, or a dictionary of several by name, which adds the column `method`.
        facts: the facts to follow.
        metrics: any of `METRICS`.
        anchor: the target of the rows per layer (see `target_of`), or several, which adds the column `anchor`.
        tokenizer: of loaded models, where neither side and no folder has one.
        progress: show a progress bar.

    Returns:
        Frame with fact, relation, metric, layer (missing for `d_emb`, `d_soft`), before, after, change = after -
        before; all three are missing where `before` does not confirm the anchor, and `attrs["dropped"]` counts these
        facts by anchor. A model against itself gives zeros.

    Raises:
        ValueError: unknown metrics or anchors; models that differ in width, depth or vocabulary.
    """
    chosen = check_metrics(metrics, METRICS)
    anchors = check_anchors(anchor)
    check_several(after)
    first = open_model(before, beside=hooked_among(after), tokenizer=tokenizer)
    several = opened_beside(first, after, tokenizer)
    tokens = first.tokenise(facts)
    layered = [metric for metric in chosen if metric in _LAYERED]
    targets = {name: target_of(first, facts, name) for name in anchors} if layered else {}
    said = read(first, first, tokens, chosen)
    frames = []
    total = len(after) if isinstance(after, Mapping) else 1
    for name, second in tqdm(several, total=total, unit="model", desc="drift", disable=not progress):
        frames.append(_frame(facts, said, read(second, first, tokens, chosen), targets, chosen).assign(method=name))
    frame = pd.concat(frames, ignore_index=True)
    frame = frame.drop(
        columns=[*([] if isinstance(after, Mapping) else ["method"]), *(["anchor"] if isinstance(anchor, str) else [])]
    )
    frame.attrs = {"dropped": {name: target.dropped for name, target in targets.items()}}
    return frame


def noise_floor(
    before: Any,
    facts: FactSet,
    *,
    metrics: Sequence[str] = DISTANCES,
    anchor: str | Sequence[str] = "unembedding",
    tokenizer: Any = None,
    progress: bool = False,
) -> pd.DataFrame:
    """The 95th percentile of |d(x) - d(x')| over pairs of wordings of a fact, before any training.

    The wordings of a fact are its prompt and its paraphrases; all that differ are compared with each other. Each
    wording has an anchor of its own (stated in its own words), but the centroid, which is the fact's.

    Returns:
        Frame with metric, layer (missing for `d_emb`, `d_soft`), floor, n_pairs and n_facts; and anchor, if several
        are asked for. Without a pair whose anchors are confirmed the floor is missing.

    Raises:
        ValueError: no fact has a paraphrase that differs from its prompt; unknown metrics or anchors.
    """
    chosen = check_metrics(metrics, DISTANCES)
    anchors = check_anchors(anchor)
    pairs, of = _pairs(facts)
    if not pairs:
        raise ValueError(f"No fact of {facts.name!r} has a paraphrase, so there is no noise floor to measure.")
    model = open_model(before, tokenizer=tokenizer)
    wordings = facts.per_prompt()
    said = read(model, model, model.tokenise(wordings), chosen, progress)
    first, second = (torch.tensor(side) for side in zip(*pairs, strict=True))
    records = []
    for place, name in enumerate(anchors):
        layered = [metric for metric in chosen if metric == "d_layer"]
        target = _target(model, facts, wordings, of, name) if layered else None
        for metric, values in distances(said, target, layered if place else chosen).items():
            gaps = (values[:, first] - values[:, second]).abs().double().numpy()
            for layer, row in enumerate(gaps):
                where = (name, metric, layer) if metric == "d_layer" else (pd.NA, metric, pd.NA)
                seen = np.flatnonzero(~np.isnan(row))
                floor = float(np.percentile(row[seen], 95)) if len(seen) else np.nan
                records.append((*where, floor, len(seen), len({of[pairs[k][0]] for k in seen})))
    frame = pd.DataFrame(records, columns=["anchor", "metric", "layer", "floor", "n_pairs", "n_facts"])
    frame = frame.astype({"layer": "Int64", "anchor": "string"})
    return frame.drop(columns="anchor") if isinstance(anchor, str) else frame


def pushed_away(drift: pd.DataFrame, floor: pd.DataFrame) -> pd.DataFrame:
    """The share of facts whose distance to their target grew by more than the noise floor, with a Wilson interval.

    `drift` is a frame of `measure_drift` (also with method, group or anchor), `floor` one of `noise_floor`. Metrics
    that have no floor are left out. Columns: (method, group, anchor,) metric, layer, floor, n, pushed, share, low,
    high.

    Raises:
        ValueError: one of the two has several anchors and the other does not say which is its own.

    >>> drift = pd.DataFrame({"metric": "d_emb", "layer": pd.NA, "change": [0.0, 0.3]})
    >>> floor = pd.DataFrame({"metric": ["d_emb"], "layer": [pd.NA], "floor": [0.1]})
    >>> pushed_away(drift, floor)[["n", "pushed", "share"]].values.tolist()
    [[2.0, 1.0, 0.5]]
    """
    keys = [name for name in ("method", "group", "anchor", "metric", "layer") if name in drift]
    shared = [name for name in ("anchor", "metric", "layer") if name in drift and name in floor]
    if ("anchor" in drift) != ("anchor" in floor):
        raise ValueError(
            "Only one of the drift and the floor has the column `anchor`: measure both with the same anchors, given in "
            "the same way."
        )
    records = []
    levels = {_key(row, shared): row["floor"] for _, row in floor.iterrows()}
    for place, rows in drift.groupby(keys, sort=False, dropna=False):
        named = dict(zip(keys, place, strict=True))
        level = levels.get(_key(named, shared), np.nan)
        change = rows["change"].dropna()
        if np.isnan(level) or change.empty:
            continue
        pushed = int((change > level).sum())
        low, high = wilson(pushed, len(change))
        counts = {"floor": level, "n": len(change), "pushed": pushed, "share": pushed / len(change)}
        records.append({**named, **counts, "low": low, "high": high})
    found = pd.DataFrame(records, columns=[*keys, "floor", "n", "pushed", "share", "low", "high"])
    return found.astype({"layer": "Int64"})


def check_anchors(anchor: str | Sequence[str]) -> list[str]:
    """The anchors asked for, one or several; an unknown one, or none, is a `ValueError`."""
    anchors = [anchor] if isinstance(anchor, str) else list(anchor)
    for name in anchors or [""]:
        check_anchor(name)
    return anchors


def _pairs(facts: FactSet) -> tuple[list[tuple[int, int]], list[int]]:
    """Pairs of different wordings of one fact, as rows of `facts.per_prompt()`, and the fact of every row."""
    of = [i for i, fact in enumerate(facts) for _ in (fact.prompt, *fact.paraphrases)]
    rows: dict[int, dict[str, int]] = {}
    for row, fact in enumerate(facts.per_prompt()):
        rows.setdefault(of[row], {}).setdefault(fact.prompt, row)
    return [pair for own in rows.values() for pair in combinations(own.values(), 2)], of


def _target(model: HookedModel, facts: FactSet, wordings: FactSet, of: list[int], anchor: str) -> Target:
    """The anchor of every wording: its own, but the centroid, which needs all wordings of the fact."""
    return target_of(model, facts, anchor).of(of) if anchor == "centroid" else target_of(model, wordings, anchor)


def _key(row: Mapping[str, Any] | pd.Series, names: Sequence[str]) -> tuple[str, ...]:
    """A place in a frame that can be looked up, also where the layer is missing."""
    return tuple("" if pd.isna(row[name]) else str(row[name]) for name in names)


def _frame(
    facts: FactSet, first: Said, second: Said, targets: Mapping[str, Target], metrics: Sequence[str]
) -> pd.DataFrame:
    """The tidy frame of one pair of models."""
    labels = pd.DataFrame({"fact": facts.ids, "relation": [fact.relation for fact in facts]})
    frames = []
    for metric in metrics:
        if metric in first.answers:
            values = {"before": first.answers[metric].numpy(), "after": second.answers[metric].numpy()}
            frames.append(labels.assign(anchor=pd.NA, metric=metric, layer=pd.NA, **values))
    for name, target in targets.items():
        for metric, pair in _moved(first, second, target, metrics).items():
            for layer, (old, new) in enumerate(zip(*(side.double().numpy() for side in pair), strict=True)):
                frames.append(labels.assign(anchor=name, metric=metric, layer=layer, before=old, after=new))
    frame = pd.concat([one.astype({"layer": "Int64", "anchor": "string"}) for one in frames], ignore_index=True)
    return frame.assign(change=frame["after"] - frame["before"])


def _moved(
    first: Said, second: Said, target: Target, metrics: Sequence[str]
) -> dict[str, tuple[Float[Tensor, "layer fact"], Float[Tensor, "layer fact"]]]:
    """What every metric per layer was before and after."""
    assert first.hidden is not None
    assert second.hidden is not None
    found = {}
    toward, off = toward_and_off(first.hidden, second.hidden, target.points)
    zero = torch.zeros_like(toward).masked_fill(~target.confirmed, torch.nan)
    for metric, value in (("toward", toward), ("off", off)):
        if metric in metrics:
            found[metric] = zero, value
    if "d_layer" in metrics:
        found["d_layer"] = layer_distance(first.hidden, target), layer_distance(second.hidden, target)
    return found

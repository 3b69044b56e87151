"""Strategies that make a `Selection` from attribution scores, with facts streamed by in chunks.

A strategy is one function from scores, quota and seed to a boolean array (eligible layer, unit), and one line in
`STRATEGIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import xarray as xr

from workbench.selection.mask import Selection, check_unit_kind

CHUNK_BYTES = 32 * 2**20  # of scores held at once while facts stream by

Quota = int | float | Mapping[int, int | float] | Sequence[int | float]


def select(
    attribution: xr.Dataset,
    *,
    strategy: str = "layer_balanced",
    quota: Quota = 10,
    score: str = "signed",
    layers: Iterable[int] | None = None,
    seed: int = 0,
    interference: xr.Dataset | None = None,
) -> Selection:
    """Choose the units to train from attribution scores (LoKI, arXiv 2505.22120, "Selecting").

    Every fact marks the units with its lowest scores; the units with the most marks are kept; ties go to the lower mean
    score, then to the lower index. `quota` is a percentage in (0, 100) of the units of the eligible layers (for
    `per_layer_budget`: one percentage per layer, 0 freezes it). `score="magnitude"` ranks absolute scores. `layers`
    names the eligible layers; the others stay frozen. Facts stream by in chunks, so a stored result is never loaded
    whole. Raises `ValueError` for an unknown strategy, a quota without a unit, or scores that are not finite.

    >>> scores = xr.DataArray([[[3.0, 1.0, 2.0, 9.0]]], dims=("fact", "layer", "unit"), coords={"fact": ["a"]})
    >>> select(xr.Dataset({"score": scores}, attrs={"unit": "node"}), quota=50).rows(0)
    [1, 2]
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"There is no selection strategy {strategy!r}: choose one of {', '.join(STRATEGIES)}.")
    if score not in SCORES:
        raise ValueError(f"There is no score {score!r}: choose one of {', '.join(SCORES)}.")
    if interference is not None:
        raise ValueError(f"The strategy {strategy!r} does not read interference: leave `interference` out.")
    source = _score_source(attribution, score, layers)
    chosen = STRATEGIES[strategy](source, quota, seed)
    values = np.zeros((source.n_layers, source.n_units), dtype=bool)
    values[list(source.layers)] = chosen
    origin = {
        "strategy": strategy,
        "quota": {str(k): float(v) for k, v in quota.items()} if isinstance(quota, Mapping) else quota,
        "score": score,
        "layers": list(source.layers),
        "seed": seed,
        "n_facts": int(source.scores.sizes["fact"]),
        "attribution": {str(k): v for k, v in attribution.attrs.items() if isinstance(v, str | int | float | bool)},
    }
    return Selection(xr.DataArray(values, dims=("layer", "unit")), attribution.attrs["unit"], origin)


# Scores that stream by, and the vote


class ScoreSource(NamedTuple):
    """Scores (fact, layer, unit) of the eligible layers, read chunk by chunk after `transform`."""

    scores: xr.DataArray
    layers: tuple[int, ...]
    n_layers: int
    n_units: int
    transform: Callable[[np.ndarray], np.ndarray]

    def chunks(self) -> Iterator[np.ndarray]:
        """Yield arrays (fact, eligible layer, unit), each fact once, at most about `CHUNK_BYTES` at a time."""
        n_facts, n_layers, n_units = self.scores.shape
        stored = self.scores.encoding.get("chunks")
        unit = int(stored[0]) if stored else 1
        step = max(1, CHUNK_BYTES // (4 * n_layers * n_units) // unit) * unit
        where = {int(layer): i for i, layer in enumerate(self.scores["layer"].values)}
        wanted = [where[layer] for layer in self.layers]
        for start in range(0, n_facts, step):
            block = self.scores.isel(fact=slice(start, start + step))
            values = np.asarray(block.values)
            values = values if wanted == list(range(n_layers)) else values[:, wanted]
            _check_finite(values, block, self.layers)
            yield self.transform(values)


def marks(scores: np.ndarray, k: int) -> np.ndarray:
    """Mark in each row of (fact, unit) the k lowest scores, equal scores by lower index: a boolean array.

    >>> marks(np.array([[2.0, 1.0, 1.0, 1.0]]), 2).tolist()
    [[False, True, True, False]]
    """
    if k == 0:
        return np.zeros(scores.shape, dtype=bool)
    cut = np.partition(scores, k - 1, axis=1)[:, k - 1 : k]
    found = scores <= cut
    crowded = np.flatnonzero(found.sum(axis=1) > k)  # rows in which equal scores stand on both sides of the cut
    if crowded.size:
        rows, level = scores[crowded], cut[crowded]
        below, equal = rows < level, rows == level
        room = k - below.sum(axis=1, keepdims=True)
        found[crowded] = below | (equal & (np.cumsum(equal, axis=1) <= room))
    return found


def votes(scores: np.ndarray, k: int) -> np.ndarray:
    """Count for each unit how many facts of (fact, unit) have it among their k lowest scores.

    >>> votes(np.array([[0.0, 1.0, 2.0], [5.0, 4.0, 3.0]]), 2).tolist()
    [1, 2, 1]
    """
    return marks(scores, k).sum(axis=0, dtype=np.uint32)


def keep(count: np.ndarray, mean: np.ndarray, k: int) -> np.ndarray:
    """Keep the k units with the most votes; ties by lower mean score, then by lower index: a boolean array.

    >>> keep(np.array([2, 2, 2, 3]), np.array([0.5, 0.1, 0.1, 9.0]), 2).tolist()
    [False, True, False, True]
    """
    kept = np.zeros(count.shape, dtype=bool)
    kept[np.lexsort((np.arange(count.size), mean, -count))[:k]] = True
    return kept


def _tally(source: ScoreSource, count_votes: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Sum votes and scores over facts, each to an array (eligible layer, unit)."""
    count = np.zeros((len(source.layers), source.n_units), dtype=np.int64)
    total, error = np.zeros(count.shape), np.zeros(count.shape)
    for chunk in source.chunks():
        count += count_votes(chunk)
        for row in range(len(count)):  # one layer at a time stays in the processor's cache
            _add_with_error(total[row], error[row], chunk[:, row])
    return count, total + error


def _add_with_error(total: np.ndarray, error: np.ndarray, scores: np.ndarray) -> None:
    """Add (fact, unit) to `total` in place and what rounding lost to `error` (Knuth's two-sum).

    So the order in which facts are read cannot decide a tie of means, as it would in a plain floating-point sum.
    """
    new, part, lost = np.empty_like(total), np.empty_like(total), np.empty_like(total)
    for row in scores:
        np.add(total, row, out=new)
        np.subtract(new, total, out=part)
        np.subtract(new, part, out=lost)
        np.subtract(total, lost, out=lost)
        np.subtract(row, part, out=part)
        lost += part
        error += lost
        total[:] = new


# The strategies


def layer_balanced(source: ScoreSource, quota: Quota, seed: int) -> np.ndarray:
    """The same number of units in every layer: those that most facts rank among the lowest of their layer (LoKI)."""
    k = _budget(quota, source.n_units, "a layer")
    return _vote_per_layer(source, [k] * len(source.layers))


def layer_highest(source: ScoreSource, quota: Quota, seed: int) -> np.ndarray:
    """`layer_balanced` of the negated scores: in every layer the units that most facts rank among its highest."""
    return layer_balanced(_negated(source), quota, seed)


def per_layer_budget(source: ScoreSource, quota: Quota, seed: int) -> np.ndarray:
    """As `layer_balanced`, with a percentage for each layer; 0, or a layer left out of a mapping, freezes it."""
    return _vote_per_layer(source, _budgets(quota, source))


def global_lowest(source: ScoreSource, quota: Quota, seed: int) -> np.ndarray:
    """One ranking over all eligible layers: the units that most facts rank among their lowest."""
    shape = (len(source.layers), source.n_units)
    k = _budget(quota, shape[0] * shape[1], "all eligible layers")
    count, total = _tally(source, lambda chunk: votes(chunk.reshape(len(chunk), -1), k).reshape(shape))
    return keep(count.ravel(), total.ravel(), k).reshape(shape)


def global_highest(source: ScoreSource, quota: Quota, seed: int) -> np.ndarray:
    """`global_lowest` of the negated scores: most often among the highest; ties by higher mean, then lower index."""
    return global_lowest(_negated(source), quota, seed)


def random(source: ScoreSource, quota: Quota, seed: int) -> np.ndarray:
    """As many units per layer as `layer_balanced`, drawn from (seed, layer) without looking at the scores."""
    k = _budget(quota, source.n_units, "a layer")
    chosen = np.zeros((len(source.layers), source.n_units), dtype=bool)
    for row, layer in enumerate(source.layers):
        chosen[row, np.random.default_rng([seed, layer]).choice(source.n_units, k, replace=False)] = True
    return chosen


def global_random(source: ScoreSource, quota: Quota, seed: int) -> np.ndarray:
    """As many units as `global_lowest`, drawn by seed from all eligible layers without looking at the scores."""
    shape = (len(source.layers), source.n_units)
    k = _budget(quota, shape[0] * shape[1], "all eligible layers")
    chosen = np.zeros(shape[0] * shape[1], dtype=bool)
    chosen[np.random.default_rng(seed).choice(chosen.size, k, replace=False)] = True
    return chosen.reshape(shape)


STRATEGIES: dict[str, Callable[[ScoreSource, Quota, int], np.ndarray]] = {
    "layer_balanced": layer_balanced,
    "layer_highest": layer_highest,
    "per_layer_budget": per_layer_budget,
    "global_lowest": global_lowest,
    "global_highest": global_highest,
    "random": random,
    "global_random": global_random,
}
SCORES: dict[str, Callable[[np.ndarray], np.ndarray]] = {"signed": lambda scores: scores, "magnitude": np.abs}


def _negated(source: ScoreSource) -> ScoreSource:
    return source._replace(transform=lambda scores: -source.transform(scores))


def _vote_per_layer(source: ScoreSource, budgets: Sequence[int]) -> np.ndarray:
    def count_votes(chunk: np.ndarray) -> np.ndarray:
        return np.stack([votes(chunk[:, row], k) for row, k in enumerate(budgets)])

    count, total = _tally(source, count_votes)
    return np.stack([keep(count[row], total[row], k) for row, k in enumerate(budgets)])


def _budget(quota: Quota, n_units: int, place: str) -> int:
    """floor(quota n / 100) in exact arithmetic; at least one unit."""
    if isinstance(quota, bool | Mapping | Sequence):
        raise ValueError(f"This strategy takes one quota, a percentage in (0, 100), not {quota!r}.")
    if not 0 < quota < 100:
        raise ValueError(f"The quota {quota} is not a percentage in (0, 100).")
    k = int(Fraction(str(quota)) * n_units / 100)
    if k == 0:
        smallest = -(-1000000 // n_units) / 10000  # rounded up to four digits
        raise ValueError(
            f"A quota of {quota}% of {n_units} units ({place}) is less than one unit: use at least {smallest:g}."
        )
    return k


def _budgets(quota: Quota, source: ScoreSource) -> list[int]:
    """The number of units of each eligible layer for a mapping (layer -> percentage) or a sequence over all layers."""
    if not isinstance(quota, Mapping | Sequence) or isinstance(quota, str):
        raise ValueError(f"per_layer_budget takes one percentage per layer (a list or a mapping), not {quota!r}.")
    if not isinstance(quota, Mapping) and len(quota) != source.n_layers:
        raise ValueError(f"per_layer_budget got {len(quota)} percentages for {source.n_layers} layers.")
    shares = dict(quota) if isinstance(quota, Mapping) else dict(enumerate(quota))
    unknown = sorted(set(shares) - set(range(source.n_layers)))
    if unknown:
        raise ValueError(f"per_layer_budget names layer {unknown[0]}, but there are layers 0 to {source.n_layers - 1}.")
    named = [(layer, shares.get(layer, 0)) for layer in source.layers]
    budgets = [_budget(share, source.n_units, f"layer {layer}") if share != 0 else 0 for layer, share in named]
    if not any(budgets):
        raise ValueError("per_layer_budget freezes every eligible layer: give one of them more than 0 percent.")
    return budgets


# What is checked before any work, and while facts stream by


def _score_source(attribution: xr.Dataset, score: str, layers: Iterable[int] | None) -> ScoreSource:
    """Check the labels of an attribution result and settle which layers are eligible."""
    if "score" not in attribution or set(attribution["score"].dims) != {"fact", "layer", "unit"}:
        raise ValueError("An attribution result needs the variable `score` with dims (fact, layer, unit).")
    check_unit_kind(attribution.attrs.get("unit"))
    scores = attribution["score"].transpose("fact", "layer", "unit")
    if 0 in scores.shape:
        raise ValueError(f"There is nothing to select from: the scores have the shape {scores.shape}.")
    if "unit" in scores.coords and not np.array_equal(scores["unit"].values, np.arange(scores.sizes["unit"])):
        raise ValueError("The scores must cover every unit of a layer in order, from 0 on.")
    if "layer" not in scores.coords:
        scores = scores.assign_coords(layer=np.arange(scores.sizes["layer"]))
    scored = [int(layer) for layer in scores["layer"].values]
    eligible = tuple(scored if layers is None else sorted({int(layer) for layer in layers}))
    missing = [layer for layer in eligible if layer not in scored]
    if missing or not eligible:
        what = f"layer {missing[0]} has no scores" if missing else "no layer is named"
        raise ValueError(f"Cannot restrict the selection: {what}; there are scores for layers {scored}.")
    n_layers = int(attribution.attrs.get("n_layers", max(scored) + 1))
    return ScoreSource(scores, eligible, n_layers, int(scores.sizes["unit"]), SCORES[score])


def _check_finite(values: np.ndarray, block: xr.DataArray, layers: Sequence[int]) -> None:
    if not np.isfinite(values).all():
        fact, layer, unit = (int(i) for i in np.argwhere(~np.isfinite(values))[0])
        name = block["fact"].values[fact] if "fact" in block.coords else f"number {fact}"
        raise ValueError(
            f"The score of fact {name}, layer {layers[layer]}, unit {unit} is {values[fact, layer, unit]}: "
            "attribute again, or filter the facts with scores that are not finite."
        )

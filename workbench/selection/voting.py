"""The vote: scores stream by in chunks of facts, every fact marks units, the most marked are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from operator import index
from typing import NamedTuple, TypeGuard

import numpy as np
import xarray as xr

from workbench.selection.mask import check_unit_kind

CHUNK_BYTES = 16 * 2**20  # of scores held at once, and as many read meanwhile; of 32 MiB each array is paged in anew
SAMPLED = 16  # one score in so many is looked at first, to find about where the lowest end

Quota = int | float | Mapping[int, int | float] | Sequence[int | float]
SCORES: dict[str, Callable[[np.ndarray], np.ndarray]] = {"signed": lambda scores: scores, "magnitude": np.abs}


class ScoreSource(NamedTuple):
    """Scores (fact, layer, unit) of the eligible layers, read chunk by chunk after `transform`."""

    scores: xr.DataArray
    layers: tuple[int, ...]
    n_layers: int
    n_units: int
    transform: Callable[[np.ndarray], np.ndarray]

    def chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first fact, scores (fact, eligible layer, unit)), each fact once, about `CHUNK_BYTES` at a time."""
        n_facts, n_layers, n_units = self.scores.shape
        stored = self.scores.encoding.get("chunks")
        unit = int(stored[0]) if stored else 1
        step = max(1, CHUNK_BYTES // (4 * n_layers * n_units) // unit) * unit
        where = {int(layer): i for i, layer in enumerate(self.scores["layer"].values)}
        wanted = [where[layer] for layer in self.layers]

        def read(start: int) -> np.ndarray:
            values = _floating(np.asarray(self.scores.isel(fact=slice(start, start + step)).values))
            return self.transform(values if wanted == list(range(n_layers)) else values[:, wanted])

        with ThreadPoolExecutor(1) as reader:
            coming = reader.submit(read, 0)
            for start in range(0, n_facts, step):
                values = coming.result()
                if start + step < n_facts:
                    coming = reader.submit(read, start + step)
                yield start, values


def marks(scores: np.ndarray, k: int) -> np.ndarray:
    """Mark in each row of (fact, unit) the k lowest scores, equal scores by lower index: a boolean array.

    >>> marks(np.array([[2.0, 1.0, 1.0, 1.0]]), 2).tolist()
    [[False, True, True, False]]
    """
    if k == 0:
        return np.zeros(scores.shape, dtype=bool)
    scores = np.ascontiguousarray(_floating(scores))
    cut = cuts(scores, k)
    found = scores <= cut
    if np.count_nonzero(found) == k * len(found):
        return found
    crowded = np.flatnonzero(found.sum(axis=1) > k)  # rows in which equal scores stand on both sides of the cut
    rows, level = scores[crowded], cut[crowded]
    below, equal = rows < level, rows == level
    room = k - below.sum(axis=1, keepdims=True)
    found[crowded] = below | (equal & (np.cumsum(equal, axis=1) <= room))
    return found


def _floating(scores: np.ndarray) -> np.ndarray:
    """Floating-point scores as they are; integers and booleans, which know no infinity and may wrap, as float64."""
    return scores if scores.dtype.kind == "f" else scores.astype(np.float64)


def cuts(scores: np.ndarray, k: int) -> np.ndarray:
    """Find the k-th lowest score in each row of (fact, unit), floating-point numbers: (fact, 1).

    Only the scores that are no higher than a level, which a sample of the row suggests as a little too high, are put in
    order; where fewer than k are, the sample misled and the row is ordered whole.

    >>> cuts(np.array([[3.0, 1.0, 2.0], [5.0, 5.0, 5.0]]), 2).tolist()
    [[2.0], [5.0]]
    """
    n_units = scores.shape[1]
    sample = scores[:, ::SAMPLED].copy()
    expected = k * sample.shape[1] / n_units
    rank = int(expected + 3 * expected**0.5) + 1  # three standard deviations on the safe side
    if rank >= sample.shape[1]:
        return np.partition(scores, k - 1, axis=1)[:, k - 1 : k]
    sample.partition(rank, axis=1)
    where = np.flatnonzero(scores <= sample[:, rank, None])
    count = np.diff(np.searchsorted(where, np.arange(len(scores) + 1) * n_units))
    low = np.full((len(scores), max(k, count.max())), np.inf, scores.dtype)
    low[np.arange(low.shape[1]) < count[:, None]] = scores.ravel()[where]
    low.partition(k - 1, axis=1)
    cut = low[:, k - 1 : k]
    misled = count < k
    cut[misled] = np.partition(scores[misled], k - 1, axis=1)[:, k - 1 : k]
    return cut


def votes(scores: np.ndarray, k: int) -> np.ndarray:
    """Count how many facts of (fact, ..., unit) have a unit among the k lowest of its row: (..., unit).

    >>> votes(np.array([[0.0, 1.0, 2.0], [5.0, 4.0, 3.0]]), 2).tolist()
    [1, 2, 1]
    """
    count = np.zeros(scores.shape[1:], dtype=np.int64)
    for start in range(0, len(scores), 255):  # as many as a byte can count: bytes are added fastest
        some = scores[start : start + 255]
        marked = marks(some.reshape(-1, some.shape[-1]), k).reshape(some.shape)
        count += marked.view(np.uint8).sum(axis=0, dtype=np.uint8)
    return count


def keep(count: np.ndarray, mean: np.ndarray, k: int) -> np.ndarray:
    """Keep the k units with the most votes; ties by lower mean score, then by lower index: a boolean array.

    >>> keep(np.array([2, 2, 2, 3]), np.array([0.5, 0.1, 0.1, 9.0]), 2).tolist()
    [False, True, False, True]
    """
    kept = np.zeros(count.shape, dtype=bool)
    kept[np.lexsort((np.arange(count.size), mean, -count))[:k]] = True
    return kept


class Tally(NamedTuple):
    """Votes and scores of the eligible layers summed over facts, each (layer, unit)."""

    votes: np.ndarray
    total: np.ndarray
    slack: np.ndarray  # how far rounding may have moved `total`, at most


def tally(source: ScoreSource, count_votes: Callable[[np.ndarray], np.ndarray]) -> Tally:
    """Sum the votes that `count_votes` gives for a chunk, and the scores, over all facts."""
    count = np.zeros((len(source.layers), source.n_units), dtype=np.int64)
    total, largest = np.zeros(count.shape), np.zeros(count.shape)
    with ThreadPoolExecutor(1) as voter:  # NumPy lets another thread run meanwhile
        for start, chunk in source.chunks():
            counted = voter.submit(count_votes, chunk)
            part = chunk.sum(axis=0, dtype=np.float64)
            if not np.isfinite(part).all():
                _check_finite(chunk, source, start)
            total += part
            np.maximum(largest, chunk.max(axis=0), out=largest)
            np.maximum(largest, -chunk.min(axis=0), out=largest)
            count += counted.result()
    n_facts = int(source.scores.sizes["fact"])
    return Tally(count, total, largest * (n_facts**2 * 2.0**-52))


def exact_totals(source: ScoreSource, wanted: np.ndarray | None = None) -> np.ndarray:
    """Sum the scores of the wanted units (all if None) over facts, together with what rounding lost.

    So the order in which facts are read cannot decide a tie of means, as it would in a plain floating-point sum.
    """
    total = np.zeros((len(source.layers), source.n_units))
    error = np.zeros(total.shape)
    rows = range(len(total)) if wanted is None else np.flatnonzero(wanted.any(axis=1))
    for _, chunk in source.chunks():
        for row in rows:  # one layer at a time stays in the processor's cache
            units = slice(None) if wanted is None else np.flatnonzero(wanted[row])
            sums = total[row, units], error[row, units]
            _add_with_error(*sums, chunk[:, row, units])
            total[row, units], error[row, units] = sums
    return total + error


def _add_with_error(total: np.ndarray, error: np.ndarray, scores: np.ndarray) -> None:
    """Add (fact, unit) to `total` in place and what rounding lost to `error` (Knuth's two-sum)."""
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


def elect(source: ScoreSource, favour: np.ndarray, tallied: Tally, budgets: Sequence[int]) -> np.ndarray:
    """Keep the units with the most favour, as many as each budget says, ties by `keep`'s rule: (layer, unit).

    One budget per eligible layer, or a single one for all of them together. Only where the rounding of a sum of scores
    could decide are the scores read once more, for the units in question.
    """
    shape = tallied.total.shape
    ranked = favour.reshape(len(budgets), -1)
    total, slack = (array.reshape(ranked.shape) for array in (tallied.total, tallied.slack))
    unsure = np.stack([undecided(*arrays) for arrays in zip(ranked, total, slack, budgets, strict=True)])
    if unsure.any():
        exact = exact_totals(source, unsure.reshape(shape)).reshape(ranked.shape)
        total = np.where(unsure, exact, total)
    return np.stack([keep(*arrays) for arrays in zip(ranked, total, budgets, strict=True)]).reshape(shape)


def undecided(favour: np.ndarray, total: np.ndarray, slack: np.ndarray, k: int) -> np.ndarray:
    """Mark the units of which totals that are off by up to `slack` leave open whether they are among the k kept.

    >>> undecided(np.array([5, 2, 2, 2]), np.array([0.0, 1.0, 1.1, 9.0]), np.full(4, 0.2), 2).tolist()
    [False, True, True, False]
    """
    open_ = np.zeros(favour.shape, dtype=bool)
    if not 0 < k < favour.size:
        return open_
    level = np.partition(favour, favour.size - k)[favour.size - k]
    tied = np.flatnonzero(favour == level)
    room = k - int((favour > level).sum())
    if room == tied.size:
        return open_
    tied = tied[np.argsort(total[tied], kind="stable")]
    low, high = total[tied] - slack[tied], total[tied] + slack[tied]
    first_out, last_in = low[room:].min(), high[:room].max()
    between = tied[(high >= first_out) & (low <= last_in)]
    if slack[between].any():
        open_[between] = True
    return open_


def vote_per_layer(source: ScoreSource, budgets: Sequence[int]) -> np.ndarray:
    """Keep in each eligible layer as many units as its budget, by votes with that many marks: (layer, unit)."""
    tallied = tally(source, lambda chunk: votes_per_layer(chunk, budgets))
    return elect(source, tallied.votes, tallied, budgets)


def votes_per_layer(chunk: np.ndarray, budgets: Sequence[int]) -> np.ndarray:
    """Count the votes of (fact, layer, unit) with as many marks in each layer as its budget: (layer, unit).

    Layers of one budget go together: few long steps leave the interpreter to the thread that reads.
    """
    count = np.zeros(chunk.shape[1:], dtype=np.int64)
    for k in sorted(set(budgets)):
        alike = [row for row, budget in enumerate(budgets) if budget == k]
        count[alike] = votes(chunk if len(alike) == len(budgets) else chunk[:, alike], k)
    return count


# How many units


def units_in(quota: Quota, n_units: int, place: str) -> int:
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


def is_per_layer(quota: Quota) -> TypeGuard[Mapping[int, float] | Sequence[float]]:
    """Whether a quota says a percentage for each layer rather than one for all."""
    return isinstance(quota, Mapping | Sequence) and not isinstance(quota, str)


def units_per_layer(quota: Quota, source: ScoreSource) -> list[int]:
    """The number of units of each eligible layer for a mapping (layer -> percentage) or a sequence over all layers."""
    if not is_per_layer(quota):
        raise ValueError(f"per_layer_budget takes one percentage per layer (a list or a mapping), not {quota!r}.")
    if not isinstance(quota, Mapping) and len(quota) != source.n_layers:
        raise ValueError(f"The quota has {len(quota)} percentages for {source.n_layers} layers.")
    shares = dict(quota) if isinstance(quota, Mapping) else dict(enumerate(quota))
    unknown = sorted(set(shares) - set(range(source.n_layers)))
    if unknown:
        raise ValueError(f"The quota names layer {unknown[0]}, but there are layers 0 to {source.n_layers - 1}.")
    named = [(layer, shares.get(layer, 0)) for layer in source.layers]
    budgets = [units_in(share, source.n_units, f"layer {layer}") if share != 0 else 0 for layer, share in named]
    if not any(budgets):
        raise ValueError("The quota freezes every eligible layer: give one of them more than 0 percent.")
    return budgets


# What is checked before any work, and while facts stream by


def score_source(attribution: xr.Dataset, score: str, layers: Iterable[int] | None) -> ScoreSource:
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
    n_layers = int(attribution.attrs.get("n_layers", max(scored) + 1))
    if len(set(scored)) < len(scored) or not 0 <= min(scored) <= max(scored) < n_layers:
        raise ValueError(f"The scores' layers {scored} must be different ones of the {n_layers} of the model.")
    try:
        eligible = tuple(scored if layers is None else sorted({index(layer) for layer in layers}))
    except TypeError:
        raise ValueError(f"layers must be whole numbers, not {layers!r}.") from None
    missing = [layer for layer in eligible if layer not in scored]
    if missing or not eligible:
        what = f"layer {missing[0]} has no scores" if missing else "no layer is named"
        raise ValueError(f"Cannot restrict the selection: {what}; there are scores for layers {scored}.")
    return ScoreSource(scores, eligible, n_layers, int(scores.sizes["unit"]), SCORES[score])


def _check_finite(chunk: np.ndarray, source: ScoreSource, start: int) -> None:
    """Name the first score that is not finite in a chunk that begins with the fact number `start`."""
    bad = np.argwhere(~np.isfinite(chunk))
    if len(bad):
        fact, layer, unit = (int(i) for i in bad[0])
        labelled = "fact" in source.scores.coords
        name = source.scores["fact"].values[start + fact] if labelled else f"number {start + fact}"
        raise ValueError(
            f"The score of fact {name}, layer {source.layers[layer]}, unit {unit} is {chunk[fact, layer, unit]}: "
            "attribute again, or filter the facts with scores that are not finite."
        )

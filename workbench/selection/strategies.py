"""Strategies that make a `Selection` from attribution scores.

A strategy is one function from scores, quota and seed to a boolean array (eligible layer, unit), and one line in
`STRATEGIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import xarray as xr

from workbench.selection.aware import gather_evidence, interference_aware
from workbench.selection.mask import Selection
from workbench.selection.voting import (
    SCORES,
    Quota,
    ScoreSource,
    elect,
    is_per_layer,
    score_source,
    tally,
    units_in,
    units_per_layer,
    vote_per_layer,
    votes,
)


def select(
    attribution: xr.Dataset,
    *,
    strategy: str = "layer_balanced",
    quota: Quota = 10,
    score: str = "signed",
    layers: Iterable[int] | None = None,
    seed: int = 0,
    interference: xr.Dataset | None = None,
    new: xr.Dataset | None = None,
    weights: Mapping[str, int | float] | None = None,
) -> Selection:
    """Choose the units to train from attribution scores (LoKI, arXiv 2505.22120, "Selecting").

    Every fact marks the units with its lowest scores; the units with the most marks are kept; ties go to the lower mean
    score, then to the lower index. `quota` is a percentage in (0, 100) of the units of the eligible layers (for
    `per_layer_budget` one percentage per layer, 0 freezes it; `interference_aware` takes either, and leaves collisions
    out where the layers' shares are given). `score="magnitude"` ranks absolute scores. `layers`
    names the eligible layers; the others stay frozen. Facts stream by in chunks, so a stored result is never loaded
    whole. Raises `ValueError` for an unknown strategy, a quota without a unit, or scores that are not finite.

    Only `interference_aware` reads the last three: how the attributed facts collide (a result of `interference`), an
    attribution of the new facts, and the weights of its terms (`aware.WEIGHTS`; what is left out keeps its default).

    >>> scores = xr.DataArray([[[3.0, 1.0, 2.0, 9.0]]], dims=("fact", "layer", "unit"), coords={"fact": ["a"]})
    >>> select(xr.Dataset({"score": scores}, attrs={"unit": "node"}), quota=50).rows(0)
    [1, 2]
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"There is no selection strategy {strategy!r}: choose one of {', '.join(STRATEGIES)}.")
    if score not in SCORES:
        raise ValueError(f"There is no score {score!r}: choose one of {', '.join(SCORES)}.")
    if seed < 0:
        raise ValueError(f"seed must not be negative, not {seed}.")
    reads = strategy in READ_INTERFERENCE
    for name, given in (("interference", interference), ("new", new), ("weights", weights)):
        if given is not None and not reads:
            raise ValueError(f"The strategy {strategy!r} does not read {name}: leave `{name}` out.")
    source = score_source(attribution, score, layers)
    origin = {
        "strategy": strategy,
        "quota": {str(k): float(v) for k, v in quota.items()} if isinstance(quota, Mapping) else quota,
        "score": score,
        "layers": list(source.layers),
        "seed": seed,
        "n_facts": int(source.scores.sizes["fact"]),
        "attribution": _plain(attribution),
    }
    beside = {}
    if reads:
        weights = _left(weights) if is_per_layer(quota) else weights
        evidence = gather_evidence(source, attribution, interference, new, weights)
        beside = {"evidence": evidence}
        others = {"interference": interference, "new": new}
        origin |= {name: _plain(ds) for name, ds in others.items() if ds is not None}
        origin["weights"] = evidence.weights
    chosen = STRATEGIES[strategy](source, quota, seed, **beside)
    origin["budgets"] = {str(layer): int(n) for layer, n in zip(source.layers, chosen.sum(axis=1), strict=True)}
    values = np.zeros((source.n_layers, source.n_units), dtype=bool)
    values[list(source.layers)] = chosen
    return Selection(xr.DataArray(values, dims=("layer", "unit")), attribution.attrs["unit"], origin)


def check_choice(strategy: str, quota: int | float, n_units: int = 10**9, n_layers: int = 1) -> int:
    """Return how many of its units the fullest of so many layers can get by a quota.

    Raises `ValueError` for a strategy that takes no single quota, or a quota that is no share of the units.
    """
    known = [name for name in STRATEGIES if name != "per_layer_budget"]  # its quota is a list
    if strategy not in known:
        raise ValueError(f"strategy must be one of {', '.join(known)}, not {strategy!r}.")
    if strategy.startswith("global_"):
        return min(n_units, units_in(quota, n_layers * n_units, "all eligible layers"))
    each = units_in(quota, n_units, "a layer")
    return min(n_units, n_layers * each) if strategy in READ_INTERFERENCE else each


def _left(weights: Mapping[str, int | float] | None) -> dict[str, int | float]:
    """The weights of the terms that are left where the layers' shares are given."""
    if (weights or {}).get("collision"):
        raise ValueError("The quota says what every layer gets: leave out the weight of collision, or give one quota.")
    return {**(weights or {}), "collision": 0}


def _plain(ds: xr.Dataset) -> dict[str, Any]:
    """The attributes that JSON can hold."""
    return {str(k): v for k, v in ds.attrs.items() if isinstance(v, str | int | float | bool)}


# The strategies


def layer_balanced(source: ScoreSource, quota: Quota, seed: int) -> np.ndarray:
    """The same number of units in every layer: those that most facts rank among the lowest of their layer (LoKI)."""
    k = units_in(quota, source.n_units, "a layer")
    return vote_per_layer(source, [k] * len(source.layers))


def layer_highest(source: ScoreSource, quota: Quota, seed: int) -> np.ndarray:
    """`layer_balanced` of the negated scores: in every layer the units that most facts rank among its highest."""
    return layer_balanced(_negated(source), quota, seed)


def per_layer_budget(source: ScoreSource, quota: Quota, seed: int) -> np.ndarray:
    """As `layer_balanced`, with a percentage for each layer; 0, or a layer left out of a mapping, freezes it."""
    return vote_per_layer(source, units_per_layer(quota, source))


def global_lowest(source: ScoreSource, quota: Quota, seed: int) -> np.ndarray:
    """One ranking over all eligible layers: the units that most facts rank among their lowest."""
    shape = (len(source.layers), source.n_units)
    k = units_in(quota, shape[0] * shape[1], "all eligible layers")
    tallied = tally(source, lambda chunk: votes(chunk.reshape(len(chunk), -1), k).reshape(shape))
    return elect(source, tallied.votes, tallied, [k])


def global_highest(source: ScoreSource, quota: Quota, seed: int) -> np.ndarray:
    """`global_lowest` of the negated scores: most often among the highest; ties by higher mean, then lower index."""
    return global_lowest(_negated(source), quota, seed)


def random(source: ScoreSource, quota: Quota, seed: int) -> np.ndarray:
    """As many units per layer as `layer_balanced`, drawn from (seed, layer) without looking at the scores."""
    k = units_in(quota, source.n_units, "a layer")
    chosen = np.zeros((len(source.layers), source.n_units), dtype=bool)
    for row, layer in enumerate(source.layers):
        chosen[row, np.random.default_rng([seed, layer]).choice(source.n_units, k, replace=False)] = True
    return chosen


def global_random(source: ScoreSource, quota: Quota, seed: int) -> np.ndarray:
    """As many units as `global_lowest`, drawn by seed from all eligible layers without looking at the scores."""
    shape = (len(source.layers), source.n_units)
    k = units_in(quota, shape[0] * shape[1], "all eligible layers")
    chosen = np.zeros(shape[0] * shape[1], dtype=bool)
    chosen[np.random.default_rng(seed).choice(chosen.size, k, replace=False)] = True
    return chosen.reshape(shape)


STRATEGIES: dict[str, Callable[..., np.ndarray]] = {
    "layer_balanced": layer_balanced,
    "layer_highest": layer_highest,
    "per_layer_budget": per_layer_budget,
    "global_lowest": global_lowest,
    "global_highest": global_highest,
    "random": random,
    "global_random": global_random,
    "interference_aware": interference_aware,
}
#: The strategies that read `interference`, `new` and `weights`.
READ_INTERFERENCE = frozenset({"interference_aware"})


def _negated(source: ScoreSource) -> ScoreSource:
    return source._replace(transform=lambda scores: -source.transform(scores))

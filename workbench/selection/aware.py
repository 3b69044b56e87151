"""The strategy `interference_aware`: fewer units where retained facts collide, none that they lean on.

Three terms, each with a weight; with all weights zero it is `layer_balanced`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
import xarray as xr

from workbench.selection.voting import (
    Quota,
    ScoreSource,
    elect,
    exact_totals,
    is_per_layer,
    score_source,
    tally,
    units_in,
    units_per_layer,
    votes_per_layer,
)

#: The terms and their default weights.
WEIGHTS: dict[str, float] = {"collision": 1.0, "load": 1.0, "new": 1.0}
#: The measures of interference that say how far facts share units, and the one that is read where neither is there,
#: each with the sign of harm.
OVERLAPS = ("cosine", "jaccard")
CONFLICT = "gradient"
COLLISIONS = (*OVERLAPS, CONFLICT)


class Evidence(NamedTuple):
    """What is known beside the scores, for the eligible layers; zeros where a term is off."""

    collision: np.ndarray  # (layer,): standardised over layers
    load: np.ndarray  # (layer, unit): ranks within the layer, 0 to 1
    help: np.ndarray  # (layer, unit): ranks within the layer, 0 to 1
    weights: dict[str, float]


def interference_aware(source: ScoreSource, quota: Quota, seed: int, *, evidence: Evidence) -> np.ndarray:
    """As many units as `layer_balanced`, placed by what is known of the retained facts and of the new ones (ours).

    Layer: a share `max(0, 1 - w z)` of the units, z how far the layer's collisions lie above the mean of the layers, in
    standard deviations. Unit: `votes / facts - w rank(load) + w rank(help)`, ranks within the layer from 0 to 1; ties
    go to the lower mean score, then to the lower index. Where the load weight w is above 1, no number of votes makes up
    for a load that ranks 1 / w higher: the units that facts lean on most are out.

    A percentage for each layer, as `layer_advice` gives (`quotas`), stands in the place of the first term.
    """
    weight = evidence.weights
    if is_per_layer(quota):
        budgets = units_per_layer(quota, source)
    else:
        each = units_in(quota, source.n_units, "a layer")
        budgets = layer_budgets(each * len(source.layers), evidence.collision, weight["collision"], source.n_units)
    tallied = tally(source, lambda chunk: votes_per_layer(chunk, budgets))
    voted = tallied.votes / source.scores.sizes["fact"]
    utility = voted - weight["load"] * evidence.load + weight["new"] * evidence.help
    return elect(source, utility.round(12), tallied, budgets)  # rounded, so that equal sums of fractions stay ties


def layer_budgets(total: int, collision: np.ndarray, weight: float, n_units: int) -> list[int]:
    """Share `total` units among layers by `max(0, 1 - weight collision)`, at most `n_units` each, to the last unit.

    What does not fit into full layers goes to the others by the same shares, then evenly to the layers without a
    share. Fractions are settled by the largest remainder, ties by the lower layer.

    >>> layer_budgets(6, np.array([1.0, 0.0, -1.0]), 1.0, 10), layer_budgets(6, np.array([1.0, 0.0, -1.0]), 0.0, 10)
    ([0, 2, 4], [2, 2, 2])
    """
    share = np.maximum(0.0, 1.0 - weight * collision)
    ideal = np.zeros(len(share))
    while (left := total - ideal.sum()) > 1e-6:
        room = ideal < n_units
        taken = np.where(room, share, 0.0)
        taken = taken if taken.any() else room.astype(float)
        ideal = np.minimum(n_units, ideal + left * taken / taken.sum())
    whole = np.floor(ideal + 1e-9).astype(int)
    rest = np.where(whole < n_units, ideal - whole, -1.0)
    for layer in np.lexsort((np.arange(len(rest)), -rest.round(9)))[: total - whole.sum()]:
        whole[layer] += 1
    return [int(n) for n in whole]


def gather_evidence(
    source: ScoreSource,
    attribution: xr.Dataset,
    interference: xr.Dataset | None,
    new: xr.Dataset | None,
    weights: Mapping[str, int | float] | None,
) -> Evidence:
    """Check everything that the terms read against the attribution, then rank and standardise it."""
    weight = _checked_weights(weights, new)
    flat = np.zeros((len(source.layers), source.n_units))
    collision, load, helped = np.zeros(len(source.layers)), flat, flat
    if weight["collision"] or weight["load"]:
        if interference is None:
            raise ValueError(
                "The strategy 'interference_aware' needs interference=, a result of `interference` for the retained "
                "facts (or give the terms collision and load the weight 0)."
            )
        _check_same_model(attribution, interference, "interference")
        found = _restricted(interference, "interference", source, ("value", "load"))
        load = _ranks(np.asarray(found["load"].transpose("layer", "unit").values, dtype=np.float64), "load")
        collision = _collisions(found) if weight["collision"] else collision
    if weight["new"]:
        assert new is not None
        _check_same_model(attribution, new, "new")
        facts = score_source(new, "magnitude", source.layers)
        if facts.n_units != source.n_units:
            raise ValueError(f"new has {facts.n_units} units in a layer, the attribution has {source.n_units}.")
        helped = _ranks(exact_totals(facts), "score of new")
    return Evidence(collision, load, helped, weight)


def _checked_weights(weights: Mapping[str, int | float] | None, new: xr.Dataset | None) -> dict[str, float]:
    """All terms with their weights; without `new` its term is off."""
    given = dict(weights or {})
    for name, value in given.items():
        if name not in WEIGHTS:
            raise ValueError(f"interference_aware has no term {name!r}: its terms are {', '.join(WEIGHTS)}.")
        if not (np.isfinite(value) and value >= 0):
            raise ValueError(f"The weight of {name} is {value}: give a number from 0 on.")
    if new is None and given.get("new"):
        raise ValueError("The term new has a weight but there are no scores for it: give new=, or the weight 0.")
    settled = {name: float(given.get(name, default)) for name, default in WEIGHTS.items()}
    return settled if new is not None else settled | {"new": 0.0}


def _check_same_model(attribution: xr.Dataset, other: xr.Dataset, name: str) -> None:
    """Refuse a result of another unit kind or of another model."""
    for attribute, word in (("unit", "kind of unit"), ("model_digest", "model")):
        known = [ds.attrs[attribute] for ds in (attribution, other) if attribute in ds.attrs]
        if len(set(known)) > 1:
            raise ValueError(f"The attribution and {name} are of another {word} ({known[0]}, {known[1]}).")


def _restricted(ds: xr.Dataset, name: str, source: ScoreSource, variables: tuple[str, ...]) -> xr.Dataset:
    """The eligible layers of a result that covers every one of them, and every unit."""
    missing = [variable for variable in variables if variable not in ds]
    if missing:
        raise ValueError(f"{name} lacks the variable `{missing[0]}`: give a result of `interference`.")
    layers = [int(layer) for layer in ds["layer"].values] if "layer" in ds.coords else list(range(ds.sizes["layer"]))
    absent = [layer for layer in source.layers if layer not in layers]
    if absent or ds.sizes["unit"] != source.n_units:
        raise ValueError(
            f"{name} covers {ds.sizes['unit']} units of the layers {layers}; the selection is made from "
            f"{source.n_units} units of the layers {list(source.layers)}."
        )
    return ds.isel(layer=[layers.index(layer) for layer in source.layers])


def _collisions(found: xr.Dataset) -> np.ndarray:
    """Mean overlap of two facts less the mean that chance gives, standardised over layers, mean over the measures.

    Of gradients, read where no overlap is there, it is the mean cosine with its sign turned.
    """
    n_facts = found.sizes["fact"]
    if n_facts < 2:
        raise ValueError("Facts collide in pairs; interference has fewer than 2 facts.")
    scores = np.zeros(found.sizes["layer"])
    names = [str(name) for name in np.atleast_1d(found["metric"].values)] if "metric" in found.coords else []
    overlaps = [place for place, name in enumerate(names) if name in OVERLAPS]
    sign = 1 if overlaps else -1
    overlaps = overlaps or [place for place, name in enumerate(names) if name == CONFLICT]
    if names and not overlaps:
        raise ValueError(
            f"Collisions are read from {', '.join(OVERLAPS)} or {CONFLICT}; this interference has only "
            f"{', '.join(names)}: compute it with one of them as well, or give the term collision the weight 0."
        )
    found = found.isel(metric=overlaps) if names else found
    value = found["value"].transpose("metric", "layer", "fact", "other")
    by_chance = np.zeros(value.shape[:2])
    if "expected" in found:
        by_chance = found["expected"].transpose("metric", "layer").values
    for metric in range(value.shape[0]):
        mean = np.zeros(len(scores))
        for layer in range(len(scores)):  # a layer at a time: all pairs of all layers may not fit
            pairs = np.asarray(value[metric, layer].values, dtype=np.float64)
            mean[layer] = (pairs.sum() - np.trace(pairs)) / (n_facts * (n_facts - 1))
        above = (sign if names else 1) * (mean - by_chance[metric])
        if not np.isfinite(above).all():
            raise ValueError("interference holds overlaps that are not finite: compute it again.")
        spread = above.std()
        scores += (above - above.mean()) / spread if spread > 1e-12 else 0.0
    return scores / value.shape[0]


def _ranks(values: np.ndarray, name: str) -> np.ndarray:
    """Ranks within each row from 0 (lowest) to 1, equal values the mean of their ranks."""
    if not np.isfinite(values).all():
        raise ValueError(f"The {name} is not finite: compute it again.")
    ranks = pd.DataFrame(values).rank(axis=1, method="average").to_numpy()
    return (ranks - 1) / max(1, values.shape[1] - 1)

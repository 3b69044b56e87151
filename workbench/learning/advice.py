"""Which layers to train: where retained facts lean, where new facts collide with them, and how many units to take."""

from collections.abc import Mapping
from fractions import Fraction
from math import nextafter

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

from workbench.interfere.nulls import DRAWS, level_of_all
from workbench.intervals import interval, standard_ranks
from workbench.selection.aware import gather_evidence, layer_budgets
from workbench.selection.voting import ScoreSource, score_source, units_in

#: The terms of a budget and their default weights.
WEIGHTS: dict[str, float] = {"collision": 1.0, "new": 1.0}


def layer_advice(
    interference: xr.Dataset,
    *,
    new: xr.Dataset | None = None,
    quota: int | float = 10.0,
    weights: Mapping[str, int | float] | None = None,
    draws: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """Recommend how many units of every layer to train, and say why.

    The budgets share out what `quota` gives by `max(0, 1 - w z)`, as the strategy `interference_aware` does, with z
    the standard deviations by which a layer's collisions lie above those of the others. Without `new` (or with the
    weight of new 0) they are exactly its budgets; with `new`, z also has the overlap of new and retained facts.
    That strategy counts new facts by unit and never by layer; to have it give every layer what was advised,
    `select(strategy="interference_aware", quota=quotas(advice, n_units), ...)`.

    Args:
        interference: a result of `interference` for the retained facts; of its measures the overlaps "cosine"
            and "jaccard" count, "gradient" (its sign turned) where neither is there.
        new: a result of `attribute` for the facts to be taught, of the same model and unit kind.
        quota: share of all units that is trained, in percent.
        weights: of the terms "collision" and "new"; 1 each where they are left out.
        draws: shuffles of units behind the chance level, 19 at least.
        seed: of the shuffles.

    Returns:
        A row a layer: layer; `load_share` (of all that retained facts lean on, 0 to 1); `collision` (mean overlap of
        retained facts less the mean by chance, in standard deviations over layers, mean over the measures); with `new`
        also `overlap`, `low`, `high` (Spearman correlation over units of a new fact's |score| with the load: mean and
        95% interval over new facts) and `chance` (what that mean exceeds when the load's units are shuffled in any
        layer of 5% of results at most: a level corrected over layers, see `interference`);
        `budget` (units), `percent` (of the layer) and `reason`.

    Raises:
        ValueError: results that do not fit together, a weight of another name, too few draws, or a quota of less than
            one unit.
    """
    weight = _checked(weights)
    if draws < DRAWS:
        raise ValueError(f"A chance level needs at least {DRAWS} draws, not {draws}.")
    source = _as_source(interference)
    beside = xr.Dataset(attrs=interference.attrs)
    collision = gather_evidence(source, beside, interference, None, {"collision": 1, "load": 0}).collision
    load = interference["load"].transpose("layer", "unit").values.astype(np.float64)
    frame = pd.DataFrame({"layer": source.layers, "load_share": _shares(load.sum(1)), "collision": collision})
    pressure = weight["collision"] * collision
    if new is not None:
        frame = frame.assign(**_overlaps(source, load, _matching(interference, new, source), draws, seed))
        pressure = pressure + weight["new"] * _standardised(frame["overlap"].to_numpy())
    total = units_in(quota, source.n_units, "a layer") * len(source.layers)
    budget = layer_budgets(total, pressure, 1.0, source.n_units)
    frame = frame.assign(budget=budget, percent=[_percent(units, source.n_units) for units in budget])
    return frame.assign(reason=[_reason(row, total / len(frame)) for _, row in frame.iterrows()])


def quotas(advice: pd.DataFrame, n_units: int) -> dict[int, float]:
    """The budgets as percentages for `select(quota=...)`, which gives as many units.

    For the strategies "interference_aware" and "per_layer_budget".

    Raises:
        ValueError: a layer of which all units are to be trained, which no percentage below 100 says.

    >>> quotas(pd.DataFrame({"layer": [0, 1, 2], "budget": [3, 0, 1]}), 7)
    {0: 42.85714285714286, 1: 0.0, 2: 14.285714285714286}
    """
    found = {}
    for layer, budget in zip(advice["layer"], advice["budget"], strict=True):
        if budget >= n_units:
            raise ValueError(f"All units of layer {layer} are to be trained: give layer_advice a smaller quota.")
        found[int(layer)] = _percent(int(budget), n_units)
    return found


def _percent(budget: int, n_units: int) -> float:
    """The least percentage that the selection reads as so many units."""
    percent = 100 * budget / n_units
    while Fraction(str(percent)) * n_units < 100 * budget:
        percent = nextafter(percent, 100.0)
    return float(percent)


def _checked(weights: Mapping[str, int | float] | None) -> dict[str, float]:
    for name, value in (weights or {}).items():
        if name not in WEIGHTS:
            raise ValueError(f"layer_advice has no term {name!r}: its terms are {', '.join(WEIGHTS)}.")
        if not (np.isfinite(value) and value >= 0):
            raise ValueError(f"The weight of {name} is {value}: give a number from 0 on.")
    return WEIGHTS | {name: float(value) for name, value in (weights or {}).items()}


def _as_source(interference: xr.Dataset) -> ScoreSource:
    """The layers and units of an interference result, as the selection wants them."""
    if "load" not in interference or "value" not in interference:
        raise ValueError("Advice needs the variables `value` and `load`: give a result of `interference`.")
    load = interference["load"].expand_dims(fact=["load"]).transpose("fact", "layer", "unit")
    return score_source(xr.Dataset({"score": load}, attrs=interference.attrs), "magnitude", None)


def _matching(interference: xr.Dataset, new: xr.Dataset, source: ScoreSource) -> xr.DataArray:
    """The scores of new facts in the same layers, units and model."""
    for attribute, word in (("unit", "kind of unit"), ("model_digest", "model")):
        known = [str(ds.attrs[attribute]) for ds in (interference, new) if attribute in ds.attrs]
        if len(set(known)) > 1:
            raise ValueError(f"The interference and new are of another {word} ({known[0]}, {known[1]}).")
    scores = score_source(new, "magnitude", source.layers)
    if scores.n_units != source.n_units:
        raise ValueError(f"new has {scores.n_units} units in a layer, the interference has {source.n_units}.")
    return scores.scores


def _overlaps(
    source: ScoreSource, load: Float[np.ndarray, "layer unit"], scores: xr.DataArray, draws: int, seed: int
) -> dict[str, list[float]]:
    """Rank correlation of every new fact's |score| with the load, layer by layer, against shuffled units."""
    columns: dict[str, list[float]] = {"overlap": [], "low": [], "high": []}
    null = np.zeros((draws, len(source.layers)))
    for place, layer in enumerate(source.layers):
        size = np.abs(scores.sel(layer=layer).transpose("fact", "unit").values)
        if not np.isfinite(size).all():
            raise ValueError(f"new has scores in layer {layer} that are not finite: attribute again.")
        ranks, leaned = standard_ranks(size), standard_ranks(load[place])
        generator = np.random.default_rng([seed, layer])
        each = ranks @ leaned
        mean = ranks.mean(0)  # the correlation is linear in the facts' ranks
        null[:, place] = [float(mean @ generator.permutation(leaned)) for _ in range(draws)]
        low, high = interval(each)
        for name, value in zip(columns, (float(each.mean()), float(low), float(high)), strict=True):
            columns[name].append(value)
    return columns | {"chance": level_of_all(null).tolist()}


def _shares(values: Float[np.ndarray, " layer"]) -> Float[np.ndarray, " layer"]:
    return values / values.sum() if values.sum() > 0 else values


def _standardised(values: Float[np.ndarray, " layer"]) -> Float[np.ndarray, " layer"]:
    return (values - values.mean()) / values.std() if values.std() > 1e-12 else np.zeros(len(values))


def _reason(row: pd.Series, fair: float) -> str:
    """Why a layer gets what it gets, in one sentence."""
    if row["budget"] == 0:
        verdict = "freeze"
    elif row["budget"] > fair:
        verdict = "more than an even share"
    elif row["budget"] < fair:
        verdict = "less than an even share"
    else:
        verdict = "an even share"
    side = "above" if row["collision"] > 0 else "below"
    text = f"{verdict}: retained facts collide {abs(row['collision']):.1f} sd {side} the mean of the layers"
    if "overlap" in row:
        chance = "beyond chance" if row["overlap"] > row["chance"] else "no more than by chance"
        text += f", new facts share their units {chance} ({row['overlap']:.2f})"
    return f"{text}, {row['load_share']:.1%} of the load"

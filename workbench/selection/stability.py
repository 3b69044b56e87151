"""How much of a selection is kept when the facts are drawn again, and how much two selections share, against chance."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from tqdm import tqdm

from workbench.selection.mask import Selection
from workbench.selection.strategies import select


def stability(
    attribution: xr.Dataset,
    *,
    draws: int = 20,
    share: int | float = 0.5,
    replace: bool = False,
    seed: int = 0,
    progress: bool = True,
    **settings: Any,
) -> pd.DataFrame:
    """Say how much of the selection from all facts is kept when it is made from facts drawn by seed.

    LoKI (arXiv 2505.22120) reports 97.57% between reduced and full data. `share` of the facts is drawn in each of the
    `draws`, without replacement, or with it (`share=1, replace=True` is the bootstrap); `settings` go to `select`, each
    time the same (also `interference` and `new`, which are not drawn again), with the same seed.

    One row for all layers together (`layer` is <NA>), then one per layer: n_selected from all facts, `kept` (mean share
    of those units that a draw selects again, 0 to 1), `low` and `high` (2.5th and 97.5th percentile over draws), and
    `chance`: what a selection with as many units in each layer keeps on average when its units are drawn at random.

    >>> scores = xr.DataArray(np.tile([[[3.0, 1.0, 2.0, 9.0]]], (4, 1, 1)), dims=("fact", "layer", "unit"))
    >>> found = stability(xr.Dataset({"score": scores}, attrs={"unit": "node"}), quota=25, draws=2, progress=False)
    >>> found.loc[0, ["kept", "chance"]].tolist()
    [1.0, 0.25]
    """
    n_facts = int(attribution.sizes["fact"])
    if not 0 < share <= 1:
        raise ValueError(f"The share of facts that is drawn is {share}: it is above 0 and at most 1.")
    if draws < 1:
        raise ValueError(f"{draws} draws cannot be summed up: at least one is needed.")
    size = max(1, round(share * n_facts))
    if size == n_facts and not replace:
        raise ValueError(
            f"Drawing {size} of {n_facts} facts without replacement gives all of them: lower share, or set replace."
        )
    full = select(attribution, seed=seed, **settings)
    generator = np.random.default_rng(seed)
    shared = np.zeros((draws, full.n_layers))
    sizes = np.zeros((draws, full.n_layers))
    for draw in tqdm(range(draws), unit="draw", desc="stability", disable=not progress):
        chosen = np.sort(generator.choice(n_facts, size, replace=replace))
        again = select(attribution.isel(fact=chosen), seed=seed, **settings)
        shared[draw] = (again.mask.values & full.mask.values).sum(axis=1)
        sizes[draw] = again.mask.values.sum(axis=1)
    count = full.mask.values.sum(axis=1)
    expected = count * sizes / full.n_units
    rows = [_kept_row(None, shared.sum(axis=1), expected.sum(axis=1), int(count.sum()))]
    rows += [_kept_row(layer, shared[:, layer], expected[:, layer], int(n)) for layer, n in enumerate(count)]
    return pd.DataFrame(rows).astype({"layer": "Int64"})


def agreement(selections: Mapping[str, Selection]) -> pd.DataFrame:
    """Compare every two named selections of one model: a tidy frame, all layers together (`layer` <NA>) and each one.

    Columns: first, second, layer, n_first, n_second, shared (units in both), `overlap` (shared over the smaller of the
    two), `jaccard` (shared over units in either), and `chance_overlap` and `chance_jaccard`, the same with the number
    of shared units that selections drawn at random, as large in each layer, share on average. Where one of the two has
    no unit all four are NaN.

    >>> one = Selection.from_positions([[0, 1]], unit="node", n_units=4)
    >>> agreement({"one": one, "rest": ~one}).loc[0, ["overlap", "jaccard", "chance_overlap"]].tolist()
    [0.0, 0.0, 0.5]
    """
    if len(selections) < 2:
        raise ValueError(f"Selections agree in pairs; there are {len(selections)}.")
    rows = []
    for (first, one), (second, other) in combinations(selections.items(), 2):
        shared = (one & other).mask.values.sum(axis=1)  # refuses another model or unit kind
        sizes = one.mask.values.sum(axis=1), other.mask.values.sum(axis=1)
        expected = sizes[0] * sizes[1] / one.n_units
        for layer in (None, *range(one.n_layers)):
            parts = [array.sum() if layer is None else array[layer] for array in (*sizes, shared, expected)]
            rows.append({"first": first, "second": second, "layer": layer, **_agreement_row(*map(float, parts))})
    counts = dict.fromkeys(("layer", "n_first", "n_second", "shared"), "Int64")
    return pd.DataFrame(rows).astype(counts)


def _kept_row(layer: int | None, shared: np.ndarray, expected: np.ndarray, count: int) -> dict[str, Any]:
    """One row of `stability`; a layer without units keeps nothing and has no numbers."""
    nothing = np.full(len(shared), np.nan)
    kept, chance = (shared / count, expected / count) if count else (nothing, nothing)
    low, high = np.quantile(kept, [0.025, 0.975])
    numbers = {"kept": kept.mean(), "low": low, "high": high, "chance": chance.mean()}
    return {"layer": layer, "n_selected": count, **{name: float(number) for name, number in numbers.items()}}


def _agreement_row(n_first: float, n_second: float, shared: float, expected: float) -> dict[str, float]:
    """Overlap and Jaccard of two sets by their sizes, as found and as expected."""
    smaller, both = min(n_first, n_second), n_first + n_second

    def ratios(common: float) -> tuple[float, float]:
        return (common / smaller, common / (both - common)) if smaller else (np.nan, np.nan)

    (overlap, jaccard), (chance_overlap, chance_jaccard) = ratios(shared), ratios(expected)
    return {
        "n_first": n_first,
        "n_second": n_second,
        "shared": shared,
        "overlap": overlap,
        "jaccard": jaccard,
        "chance_overlap": chance_overlap,
        "chance_jaccard": chance_jaccard,
    }

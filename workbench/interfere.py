"""How facts collide, per layer: which units they share, within a relation against across, and what they lean on.

A measure is one function and one line in `METRICS`. Attribution overlap after Knowledge Neurons (arXiv 2104.08696),
which compares facts of one relation with facts of others.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Float
from tqdm import tqdm

from workbench.facts import FactSet
from workbench.models import HookedModel
from workbench.results import check_made_with, validate_interference

Scores = Float[np.ndarray, "fact unit"]
Matrix = Float[np.ndarray, "fact other"]


def cosine(scores: Scores, top: int) -> Matrix:
    """Cosine of the |score| vectors of two facts; 0 where a fact has no score at all.

    >>> cosine(np.array([[1.0, 0.0], [-2.0, 0.0], [0.0, 0.0]]), 1).tolist()
    [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    """
    size = np.abs(scores).astype(np.float64)
    norm = np.linalg.norm(size, axis=1, keepdims=True)
    unit = np.divide(size, norm, out=np.zeros_like(size), where=norm > 0)
    return unit @ unit.T


def jaccard(scores: Scores, top: int) -> Matrix:
    """Shared units over all units in the two facts' sets of the `top` largest |score|; zero scores are in no set.

    >>> jaccard(np.array([[3.0, 2.0, 0.0], [3.0, 0.0, 2.0]]), 2).round(3).tolist()
    [[1.0, 0.333], [0.333, 1.0]]
    """
    sets = top_sets(scores, top).astype(np.float64)
    shared = sets @ sets.T
    size = sets.sum(1)
    union = size[:, None] + size[None] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


#: Every measure of overlap between two facts at one layer.
METRICS: dict[str, Callable[[Scores, int], Matrix]] = {"cosine": cosine, "jaccard": jaccard}


def top_sets(scores: Scores, top: int) -> Bool[np.ndarray, "fact unit"]:
    """Marks of the `top` units with the largest |score| of every fact; ties go to the lower unit, zeros to nobody."""
    size = np.abs(scores)
    order = np.argsort(-size, axis=1, kind="stable")[:, :top]
    sets = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(sets, order, True, axis=1)
    return sets & (size > 0)


def interference(
    model: HookedModel | None,
    facts: FactSet,
    attribution: xr.Dataset,
    *,
    top: float = 1.0,
    permutations: int = 200,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Measure how much every two facts lean on the same units, layer by layer, against two nulls.

    Args:
        model: the model of the attribution, checked against its digest; None skips the check.
        facts: the attributed facts; their relations divide pairs into within and across.
        attribution: a result of `attribute`.
        top: size of the sets of `jaccard`, in percent of a layer's units.
        permutations: draws of each null.
        seed: of the draws; written into the result.
        progress: show a progress bar.

    Returns:
        Dataset with `value` (metric, layer, fact, other); `within` and `across` (means over pairs of facts of the same
        relation and of different ones), `difference`, its 95% band `null_low`..`null_high` and two-sided `p_value`
        when relations are shuffled over facts, all (metric, layer); `chance` (metric, layer): the 95th percentile of
        the largest overlap of any two facts when every fact's units are shuffled, so that a pair above it shares
        units beyond chance; `load` (layer, unit): mean |score| over facts, what the facts lean on.

    Raises:
        ValueError: fewer than two facts, or an attribution of another model or of other facts.
    """
    ids = [str(i) for i in attribution["fact"].values]
    if len(ids) < 2:
        raise ValueError(f"Interference needs at least 2 facts; the attribution has {len(ids)}.")
    if model is not None:
        check_made_with(attribution, model.digest, model.name)
    relation = {fact.id: fact.relation for fact in facts.filter(ids=ids)}
    relations = np.array([relation[i] for i in ids])
    pairs = np.triu(np.ones((len(ids), len(ids)), dtype=bool), 1)
    generator = np.random.default_rng(seed)
    shuffles = np.stack([generator.permutation(len(ids)) for _ in range(permutations)])
    n_layers, n_units = attribution.sizes["layer"], attribution.sizes["unit"]
    count = max(1, round(top / 100 * n_units))
    value = np.zeros((len(METRICS), n_layers, len(ids), len(ids)), dtype=np.float32)
    load = np.zeros((n_layers, n_units), dtype=np.float32)
    columns = ("within", "across", "difference", "null_low", "null_high", "p_value", "chance")
    statistics = {name: np.full((len(METRICS), n_layers), np.nan) for name in columns}
    for layer in tqdm(range(n_layers), unit="layer", desc="interference", disable=not progress):
        scores = attribution["score"].isel(layer=layer).values
        load[layer] = np.abs(scores).mean(0)
        for m, metric in enumerate(METRICS.values()):
            matrix = metric(scores, count)
            value[m, layer] = matrix
            for name, number in _against_shuffled_relations(matrix, relations, pairs, shuffles).items():
                statistics[name][m, layer] = number
            statistics["chance"][m, layer] = _chance(metric, scores, count, pairs, generator)
    result = xr.Dataset(
        {
            "value": (("metric", "layer", "fact", "other"), value),
            "load": (("layer", "unit"), load),
            **{name: (("metric", "layer"), array.astype(np.float32)) for name, array in statistics.items()},
        },
        coords={
            "metric": list(METRICS),
            "layer": attribution["layer"].values,
            "unit": attribution["unit"].values,
            "fact": ids,
            "other": ids,
            "relation": ("fact", list(relations)),
        },
        attrs={
            **{k: attribution.attrs[k] for k in ("unit", "method", "model_digest", "fact_digest")},
            "top_percent": top,
            "permutations": permutations,
            "seed": seed,
        },
    )
    validate_interference(result)
    return result


def _against_shuffled_relations(
    matrix: Matrix, relations: np.ndarray, pairs: Bool[np.ndarray, "fact other"], shuffles: np.ndarray
) -> dict[str, float]:
    """Within, across, their difference, and its null when relations are shuffled over facts; empty for one relation."""
    same = relations[:, None] == relations[None]
    n_within, n_across = int((same & pairs).sum()), int((~same & pairs).sum())
    if not n_within or not n_across:
        return {}
    total = float(matrix[pairs].sum())

    def difference(of: np.ndarray) -> tuple[float, float]:
        inside = float(matrix[(of[:, None] == of[None]) & pairs].sum())
        return inside / n_within, (total - inside) / n_across

    within, across = difference(relations)
    null = np.array([np.subtract(*difference(relations[shuffle])) for shuffle in shuffles])
    observed = within - across
    low, high = np.quantile(null, [0.025, 0.975])
    extreme = int((np.abs(null) >= abs(observed)).sum())
    return {
        "within": within,
        "across": across,
        "difference": observed,
        "null_low": float(low),
        "null_high": float(high),
        "p_value": (1 + extreme) / (1 + len(null)),
    }


def _chance(
    metric: Callable[[Scores, int], Matrix],
    scores: Scores,
    top: int,
    pairs: Bool[np.ndarray, "fact other"],
    generator: np.random.Generator,
    draws: int = 20,
) -> float:
    """95th percentile of the largest overlap of any pair when every fact's scores are shuffled over the units."""
    return float(
        np.quantile([metric(generator.permuted(scores, axis=1), top)[pairs].max() for _ in range(draws)], 0.95)
    )


def within_across(result: xr.Dataset) -> pd.DataFrame:
    """Tidy: metric, layer, within, across, difference, null_low, null_high, p_value, chance."""
    return result.drop_vars(["value", "load"]).drop_dims(["fact", "other", "unit"]).to_dataframe().reset_index()


def colliding_pairs(result: xr.Dataset, *, metric: str = "cosine") -> pd.DataFrame:
    """Pairs of facts that overlap beyond chance: layer, fact, other, same_relation, value, chance; strongest first."""
    rows = []
    relations = result["relation"].values
    ids = result["fact"].values
    first, second = np.triu_indices(len(ids), 1)
    for layer in result["layer"].values:
        values = result["value"].sel(metric=metric, layer=layer).values[first, second]
        chance = float(result["chance"].sel(metric=metric, layer=layer))
        found = values > chance + 1e-6
        rows.append(
            pd.DataFrame(
                {
                    "layer": int(layer),
                    "fact": ids[first[found]],
                    "other": ids[second[found]],
                    "same_relation": relations[first[found]] == relations[second[found]],
                    "value": values[found],
                    "chance": chance,
                }
            )
        )
    frame = pd.concat(rows, ignore_index=True)
    return frame.sort_values(
        ["value", "layer", "fact", "other"], ascending=[False, True, True, True], ignore_index=True
    )

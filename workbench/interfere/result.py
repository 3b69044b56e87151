"""What an interference result says, as tidy frames."""

import math

import numpy as np
import pandas as pd
import xarray as xr

from workbench.interfere.measures import METRICS
from workbench.interfere.nulls import against_relations, groups, in_pairs, mean_interval, share_by_chance
from workbench.intervals import benjamini_hochberg

#: The numbers per metric and layer, in the order of the frame; results of before may lack some.
COLUMNS = (
    "within", "across", "difference", "low", "high", "null_low", "null_high", "p_value", "q_value",
    "chance", "matched_chance", "expected", "level", "meaning_rho", "meaning_low", "meaning_high", "meaning_p",
    "meaning_q",
)  # fmt: skip
#: The nulls of a conflict rate: their shares in a result, their numbers of draws, and their columns.
NULL_RATES = (
    ("conflict_chance", "unit_draws", ("chance", "p_value", "q_value")),
    ("conflict_matched", "matched_draws", ("matched_chance", "matched_p", "matched_q")),
)
#: What relations say of a conflict rate, by the column of `against_relations`.
RELATED = {"within": "within", "across": "across", "difference": "difference", "difference_low": "low",
           "difference_high": "high", "relation_p": "p_value"}  # fmt: skip


def within_across(result: xr.Dataset) -> pd.DataFrame:
    """Tidy: metric, layer, and every number there is per metric and layer, from within to chance and meaning."""
    return result[[name for name in COLUMNS if name in result]].to_dataframe().reset_index()


def colliding_pairs(result: xr.Dataset, *, metric: str = "cosine") -> pd.DataFrame:
    """Pairs of facts whose value lies beyond chance, strongest first.

    Beyond chance is beyond the `level` of the layer: further than pairs are in draws of shuffled units (`unit_draws`),
    corrected over layers; without collisions 5% of results have some at most. Where low values are the harmful
    ones, as of "gradient", beyond is below.

    Returns:
        Frame with layer, fact, other, same_relation, value, level, and matched_chance, what the largest pair reaches by
        chance where units are shuffled among those of similar size only: a collision that does not exceed it, of facts
        that lean on loud units, may be no more than that. A pair of a measure that is not symmetric is listed for each
        direction that is beyond; `fact` is the one that suffers.

    Raises:
        ValueError: a measure that the result lacks, a result from before there were levels, or "suppression" of fewer
            than 19 `draws`, too few to judge pairs by.
    """
    _asked(result, metric)
    if "level" not in result:
        raise ValueError("This result is from before there were levels: compute the interference again.")
    harmful = METRICS[metric].harmful if metric in METRICS else 1
    if result["level"].sel(metric=metric).isnull().all():
        raise ValueError(
            f"The pairs of {metric!r} are not judged: so few draws of its null are too few. Give 19 as draws, or "
            f"judge by another measure, as {next(name for name in METRICS if name != metric)}."
        )
    rows = []
    relations = groups(result["relation"].values)
    ids = result["fact"].values
    symmetric = metric not in METRICS or METRICS[metric].symmetric
    first, second = np.triu_indices(len(ids), 1)
    suffers = metric in METRICS and METRICS[metric].suffers == "other"
    if not symmetric:
        first, second = np.concatenate([first, second]), np.concatenate([second, first])
    for layer in result["layer"].values:
        values = result["value"].sel(metric=metric, layer=layer).values[first, second]
        level, matched = (float(result[name].sel(metric=metric, layer=layer)) for name in ("level", "matched_chance"))
        found = harmful * (values - level) > 1e-6
        rows.append(
            pd.DataFrame(
                {
                    "layer": int(layer),
                    "fact": ids[(second if suffers else first)[found]],
                    "other": ids[(first if suffers else second)[found]],
                    "same_relation": relations[first[found]] == relations[second[found]],
                    "value": values[found],
                    "level": level,
                    "matched_chance": matched,
                }
            )
        )
    frame = pd.concat(rows, ignore_index=True)
    return frame.sort_values(
        ["value", "layer", "fact", "other"], ascending=[harmful < 0, True, True, True], ignore_index=True
    )


def key_statistics(result: xr.Dataset) -> pd.DataFrame:
    """How superposed the keys of each layer are: layer, mean, low, high, spread, kurtosis, n_pairs.

    Over all p_ij with i and j different (both directions): their mean with its 95% interval over facts, their standard
    deviation, and their excess kurtosis, 0 for a normal distribution and large where few pairs carry the superposition;
    NaN without any spread.
    """
    _asked(result, "superposition")
    rows = []
    apart = ~np.eye(result.sizes["fact"], dtype=bool)
    for layer in result["layer"].values:
        values = result["value"].sel(metric="superposition", layer=layer).values.astype(np.float64)
        pairs = values[apart]
        centred = pairs - pairs.mean()
        variance = float((centred**2).mean())
        kurtosis = float((centred**4).mean()) / variance**2 - 3 if variance > 0 else np.nan
        rows.append((int(layer), float(pairs.mean()), *mean_interval(values), variance**0.5, kurtosis, pairs.size))
    return pd.DataFrame(rows, columns=["layer", "mean", "low", "high", "spread", "kurtosis", "n_pairs"])


def conflict_rates(result: xr.Dataset, *, metric: str = "gradient") -> pd.DataFrame:
    """Share of pairs of facts below 0, per layer, against what chance gives, and within relations against across.

    A pair that is not symmetric is the mean of its two directions. Shuffling neurons changes no sign that all neurons
    share: where activations are never negative, as after a ReLU, the output's gradients decide most signs alone, and
    the test against chance sees next to nothing.

    Returns:
        Frame with layer, n_pairs, and in three groups: `conflict_rate` with its 95% interval over facts `low`..`high`;
        `chance` (the share in the draws of shuffled units) with the two-sided `p_value` and `q_value` of the rate
        against it, and the same of units shuffled among those of similar size: `matched_chance`, `matched_p`,
        `matched_q` (p and q by `share_by_chance` and of "gradient" alone, whose draws make pairs independent; all NaN
        in results from before the shares were kept); the rates `within` and
        `across` relations, their `difference` with its 95% interval over facts `difference_low`..`difference_high`,
        and `relation_p` and `relation_q` against relations shuffled over facts. q is by Benjamini and Hochberg over
        the layers there are.

    Raises:
        ValueError: the result lacks this measure, or was cut to fewer facts than its chance is of.
    """
    _asked(result, metric)
    if result.attrs.get("n_facts", result.sizes["fact"]) != result.sizes["fact"]:
        raise ValueError(
            f"These are {result.sizes['fact']} of the {result.attrs['n_facts']} facts that chance was drawn for: "
            "measure the interference of these facts by themselves."
        )
    relations = groups(result["relation"].values)
    values = result["value"].sel(metric=metric).transpose("layer", "fact", "other").values
    below = (values + values.transpose(0, 2, 1) < 0).astype(np.float64)
    rates, n_pairs = in_pairs(below).mean(1), math.comb(len(relations), 2)
    low, high = np.transpose([mean_interval(layer) for layer in below])
    found = {"layer": result["layer"].values, "n_pairs": n_pairs, "conflict_rate": rates, "low": low, "high": high}
    for name, drawn, (chance, p_value, q_value) in NULL_RATES:
        shares = np.full(len(rates), np.nan)
        if name in result:
            shares = result[name].sel(metric=metric).values.astype(np.float64)
        draws = result.attrs.get(drawn, {}).get(metric, 1)
        found[chance] = shares
        judged = shares if metric == "gradient" else np.full(len(rates), np.nan)
        found[p_value] = np.array([share_by_chance(*both, n_pairs, draws) for both in zip(rates, judged, strict=True)])
        found[q_value] = benjamini_hochberg(found[p_value])
    generator = np.random.default_rng(result.attrs.get("seed", 0))
    shuffles = [generator.permutation(len(relations)) for _ in range(result.attrs.get("permutations", 999))]
    of_relations = against_relations(below, relations, np.stack(shuffles))
    found |= {name: of_relations[column] for name, column in RELATED.items()}
    return pd.DataFrame(found | {"relation_q": benjamini_hochberg(of_relations["p_value"])})


def predicted_change(result: xr.Dataset, *, learning_rate: float | int) -> xr.DataArray:
    """`-eta <g_i, g_j>` (layer, fact, other), in nats: what one plain gradient step on `other` does to `fact`'s loss.

    To first order, for a step of size eta on the down-projection of one layer alone; the sum over layers is that of a
    step on all of them. The loss is the mean cross-entropy of the answer's tokens, so negative values help.
    """
    _asked(result, "gradient")
    norm = result["gradient_norm"].astype(np.float64)
    cosines = result["value"].sel(metric="gradient", drop=True).astype(np.float64)
    other = norm.rename(fact="other").drop_vars("relation", errors="ignore")
    change = -learning_rate * cosines * norm * other
    return change.transpose("layer", "fact", "other").rename("predicted_change")


def _asked(result: xr.Dataset, metric: str) -> None:
    """Refuse a result without this measure."""
    there = [str(name) for name in np.atleast_1d(result["metric"].values)]
    if metric not in there:
        raise ValueError(f"This result has no {metric!r}, only {', '.join(there)}: ask for it with metrics=.")

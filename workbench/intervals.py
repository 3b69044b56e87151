"""Means with 95% intervals (bootstrap over facts, paired before and after), shares, ranks, p values of many tests."""

import numpy as np
import pandas as pd
from jaxtyping import Float, Num

DRAWS = 2000
SEED = 0
Z95 = 1.959963984540054
LARGEST = 700.0  # nats per token whose exponential is still a finite number; a destroyed model can lie above


def wilson(successes: int, total: int) -> tuple[float, float]:
    """The 95% interval of a share (Wilson 1927); of nothing at all it is 0 to 1.

    >>> [round(end, 3) for end in wilson(8, 10)]
    [0.49, 0.943]
    """
    if total == 0:
        return 0.0, 1.0
    share, z2 = successes / total, Z95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z95 / (1 + z2 / total) * np.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return float(max(0.0, centre - half)), float(min(1.0, centre + half))


def bootstrap(
    values: Num[np.ndarray, "fact *rest"],
    weights: Num[np.ndarray, " fact"] | None = None,
    *,
    draws: int = DRAWS,
    seed: int = SEED,
) -> Float[np.ndarray, "draw *rest"]:
    """(Weighted) means of resampled facts, drawn with replacement; all columns share the drawn facts, so are paired."""
    if draws < 1:
        raise ValueError(f"A bootstrap needs at least one draw, not {draws}.")
    n = len(values)
    columns = np.asarray(values, dtype=np.float64).reshape(n, -1)
    weight = np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws) * weight
    return (counts @ columns / counts.sum(1, keepdims=True)).reshape(draws, *values.shape[1:])


def interval(
    values: Num[np.ndarray, "fact *rest"],
    weights: Num[np.ndarray, " fact"] | None = None,
    *,
    draws: int = DRAWS,
    seed: int = SEED,
) -> tuple[np.ndarray, np.ndarray]:
    """The 95% percentile bootstrap interval of each column's mean over facts.

    >>> [end.tolist() for end in interval(np.full((3, 1), 2.0))]
    [[2.0], [2.0]]
    """
    low, high = np.percentile(bootstrap(values, weights, draws=draws, seed=seed), [2.5, 97.5], axis=0)
    return np.asarray(low), np.asarray(high)


def jackknifed(
    whole: float, without: Float[np.ndarray, " fact"], *, draws: int = DRAWS, seed: int = SEED
) -> tuple[float, float]:
    """A 95% interval of a statistic from its values with each fact left out: the bootstrap of its pseudo-values.

    For statistics that a fact drawn twice would change by itself, as a rank or a similarity. The interval lies around
    `whole` and covers what as many other facts would be expected to give, not what ever more facts would.

    >>> jackknifed(0.5, np.full(4, 0.5))
    (0.5, 0.5)
    """
    low, high = interval(whole + (len(without) - 1) * (without.mean() - without), draws=draws, seed=seed)
    return float(low), float(high)


def ratio_of_sums(
    top: Num[np.ndarray, " fact"], bottom: Num[np.ndarray, " fact"], *, draws: int = DRAWS, seed: int = SEED
) -> tuple[float, float, float]:
    """`sum(top) / sum(bottom)` over facts with its 95% percentile bootstrap interval; missing where the sum is 0.

    Unlike the mean of the ratios it is not decided by a fact whose `bottom` is next to nothing.

    >>> ratio_of_sums(np.array([1.0, 1.0]), np.array([2.0, 2.0]))
    (0.5, 0.5, 0.5)
    """
    both = np.stack([top, bottom], axis=1).astype(np.float64)
    sums = np.vstack([both.mean(0), bootstrap(both, draws=draws, seed=seed)])
    value, *drawn = np.divide(sums[:, 0], sums[:, 1], out=np.full(len(sums), np.nan), where=sums[:, 1] != 0)
    if np.isnan(value):
        return np.nan, np.nan, np.nan
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return float(value), float(low), float(high)


def means(frame: pd.DataFrame, *, draws: int = DRAWS, seed: int = SEED) -> pd.DataFrame:
    """Weighted means per (method,) suite and metric, with paired bootstrap 95% intervals of the change.

    Facts (or pieces of text) are drawn with replacement, before and after together; `low` and `high` are percentiles
    of the change over `draws` draws by `seed`. From `nll` (nats per token) comes one more metric, `perplexity` =
    exp(sum(weight nll) / sum(weight)). Columns: (method,) suite, metric, n, before, after, change, low, high.

    >>> frame = pd.DataFrame({"suite": "facts", "metric": "accuracy", "fact": ["a", "b"], "weight": 1.0,
    ...                       "before": [1.0, 1.0], "after": [0.0, 1.0]})
    >>> means(frame).iloc[0, 2:].tolist()
    [2.0, 1.0, 0.5, -0.5, -1.0, 0.0]
    """
    keys = [name for name in ("method", "suite", "metric") if name in frame]
    records = []
    for key, rows in frame.groupby(keys, sort=False):
        values, weight = rows[["before", "after"]].to_numpy(np.float64), rows["weight"].to_numpy(np.float64)
        drawn = np.vstack(
            [np.average(values, axis=0, weights=weight), bootstrap(values, weight, draws=draws, seed=seed)]
        )
        forms = {key[-1]: drawn}
        if key[-1] == "nll":
            forms["perplexity"] = np.exp(np.minimum(drawn, LARGEST))
        for name, both in forms.items():
            change = both[:, 1] - both[:, 0]
            records.append((*key[:-1], name, len(rows), *both[0], change[0], *np.percentile(change[1:], [2.5, 97.5])))
    return pd.DataFrame(records, columns=[*keys, "n", "before", "after", "change", "low", "high"])


def benjamini_hochberg(p: Float[np.ndarray, " test"]) -> Float[np.ndarray, " test"]:
    """The smallest false discovery rate at which each test is called (Benjamini and Hochberg, 1995); NaN stay out.

    >>> benjamini_hochberg(np.array([0.01, 0.04, 0.03, np.nan, 0.5])).round(4).tolist()
    [0.04, 0.0533, 0.0533, nan, 0.5]
    """
    q = np.full(p.shape, np.nan)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    raw = p[order] * len(order) / np.arange(1, len(order) + 1)
    q[order] = np.minimum(1.0, np.minimum.accumulate(raw[::-1])[::-1])
    return q


def standard_ranks(rows: Num[np.ndarray, "*batch item"]) -> Float[np.ndarray, "*batch item"]:
    """Ranks along the last axis, ties sharing their mean rank, centred and of length 1; 0 where all values are equal.

    The inner product of two such rows is Spearman's rank correlation.

    >>> standard_ranks(np.array([5.0, 7.0, 7.0])).round(3).tolist()
    [-0.816, 0.408, 0.408]
    """
    ranks = pd.DataFrame(rows.reshape(-1, rows.shape[-1]).T).rank(method="average").to_numpy().T
    ranks = ranks - ranks.mean(1, keepdims=True)
    length = np.linalg.norm(ranks, axis=1, keepdims=True)
    return np.divide(ranks, length, out=np.zeros_like(ranks), where=length > 1e-9).reshape(rows.shape)

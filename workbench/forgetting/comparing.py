"""Before against after as numbers: LoKI's average, and paired tests over the same facts."""

from collections.abc import Mapping
from math import comb

import numpy as np
import pandas as pd

from workbench.intervals import DRAWS, LARGEST, SEED, benjamini_hochberg, bootstrap

#: Metrics that are 1 where a fact or item is answered right and 0 where it is not.
ANSWERED = ("accuracy", "acc_norm", "acc_bytes", "exact_match")


def loki_average(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """Average loss over benchmarks in percent: Avg = 100/N sum_i (S_i(theta_0) - S_i(theta)) / S_i(theta_0).

    LoKI (arXiv 2505.22120). Positive where the model lost; a benchmark that it gained on counts against the losses.

    >>> loki_average({"reading": 0.5, "sums": 0.25}, {"reading": 0.375, "sums": 0.25})
    12.5

    Raises:
        ValueError: the two name other benchmarks, there is none, a score is not finite, or one before is zero: a share
            of nothing cannot be lost, so such a benchmark has to be left out by name.
    """
    if set(before) != set(after) or not before:
        lone = ", ".join(sorted(set(before) ^ set(after))) or "none at all"
        raise ValueError(f"The average needs the same benchmarks before and after; on one side only: {lone}.")
    if wrong := [name for name in before if not np.isfinite([before[name], after[name]]).all()]:
        raise ValueError(f"The score of {wrong[0]} is not a finite number.")
    if zero := [name for name, score in before.items() if score == 0]:
        raise ValueError(f"Nothing can be lost where the score before is 0: leave out {', '.join(zero)}.")
    return 100 * float(np.mean([(before[name] - after[name]) / before[name] for name in before]))


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided p value of as uneven a split between lost and gained, were both as likely (McNemar's exact test).

    p = min(1, 2 P(X <= min(lost, gained))) with X binomial of lost + gained draws at one half; nothing changed is 1.

    >>> mcnemar(5, 0), mcnemar(0, 0), round(mcnemar(1, 7), 4)
    (0.0625, 1.0, 0.0703)
    """
    if lost < 0 or gained < 0:
        raise ValueError(f"Counts are not negative, unlike {min(lost, gained)}.")
    n = lost + gained
    return min(1.0, 2 * sum(comb(n, k) for k in range(min(lost, gained) + 1)) / 2**n)


def paired(frame: pd.DataFrame, *, draws: int = DRAWS, seed: int = SEED) -> pd.DataFrame:
    """Test a frame of `measure_forgetting` per (method,) suite and metric, fact by fact.

    Means are weighted (texts by their tokens); from `nll` comes one more row, `perplexity`. Intervals are 95%
    percentiles of a bootstrap over facts in which before and after share the drawn facts.

    Returns:
        Frame with (method,) suite, metric, mode, n, before, before_low, before_high, after, after_low, after_high,
        change, low, high (of the change); for answers right or wrong also lost (right before only), gained (right
        after only), p (`mcnemar`) and q (`benjamini_hochberg` over the tests of one method); draws and seed.

    >>> frame = pd.DataFrame({"suite": "facts", "metric": "accuracy", "fact": list("abc"), "weight": 1.0,
    ...                       "before": [1.0, 1.0, 0.0], "after": [0.0, 1.0, 0.0]})
    >>> [float(paired(frame)[name].item()) for name in ("n", "lost", "gained", "p")]
    [3.0, 1.0, 0.0, 1.0]
    """
    keys = [name for name in ("method", "suite", "metric", "mode") if name in frame]
    records = []
    for key, rows in frame.groupby(keys, sort=False):
        label = dict(zip(keys, key, strict=True))
        values, weight = rows[["before", "after"]].to_numpy(np.float64), rows["weight"].to_numpy(np.float64)
        drawn = np.vstack(
            [np.average(values, axis=0, weights=weight), bootstrap(values, weight, draws=draws, seed=seed)]
        )
        forms = {label["metric"]: drawn}
        if label["metric"] == "nll":
            forms["perplexity"] = np.exp(np.minimum(drawn, LARGEST))
        for name, both in forms.items():
            records.append(label | {"metric": name, "n": len(rows)} | _ends(both) | _answers(name, values))
    result = pd.DataFrame(records).astype({"lost": "Int64", "gained": "Int64"}).assign(q=np.nan)
    tested = result[result["p"].notna()]
    for _, group in tested.groupby("method") if "method" in tested else [("", tested)]:
        result.loc[group.index, "q"] = benjamini_hochberg(group["p"].to_numpy())
    return result.assign(draws=draws, seed=seed)


def _ends(drawn: np.ndarray) -> dict[str, float]:
    """Mean and interval of before, after and change, from the means themselves (first) and the drawn ones."""
    columns = {"before": drawn[:, 0], "after": drawn[:, 1], "change": drawn[:, 1] - drawn[:, 0]}
    found: dict[str, float] = {}
    for name, column in columns.items():
        prefix = "" if name == "change" else f"{name}_"
        low, high = np.percentile(column[1:], [2.5, 97.5])
        found |= {name: float(column[0]), f"{prefix}low": float(low), f"{prefix}high": float(high)}
    return found


def _answers(metric: str, values: np.ndarray) -> dict[str, object]:
    """How many answers were lost and gained, and the p value of their split; missing for other metrics."""
    if metric.partition(":")[0] not in ANSWERED or not np.isin(values, (0.0, 1.0)).all():
        return {"lost": pd.NA, "gained": pd.NA, "p": float("nan")}
    lost, gained = (int((values[:, i] > values[:, 1 - i]).sum()) for i in (0, 1))
    return {"lost": lost, "gained": gained, "p": mcnemar(lost, gained)}

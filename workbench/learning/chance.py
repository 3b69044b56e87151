"""What it would look like if it made no difference: draws of the nulls of `behaviour`, and their p-values."""

import numpy as np
from jaxtyping import Bool, Float, Int

#: Draws of a null, unless told otherwise.
PERMUTATIONS = 999


def exchanges(n_facts: int, permutations: int, seed: int) -> Bool[np.ndarray, "draw fact"]:
    """Facts whose alone and together change places, by a coin for each; nobody's in the first row."""
    swaps = np.random.default_rng(seed).random((permutations, n_facts)) < 0.5
    return np.vstack([np.zeros(n_facts, dtype=bool), swaps])


def shuffles(n_facts: int, permutations: int, seed: int) -> Int[np.ndarray, "draw fact"]:
    """Orders of facts; the first leaves them as they are."""
    generator = np.random.default_rng(seed)
    return np.stack([np.arange(n_facts), *(generator.permutation(n_facts) for _ in range(permutations))])


def of_shuffles(
    kept: Float[np.ndarray, "fact other"], orders: Int[np.ndarray, "draw fact"]
) -> tuple[float, float, float]:
    """Central 95% and p-value of `1 - sum kept[i, i]` when the second fact is another's, by its distance from the mean.

    >>> of_shuffles(np.eye(2), np.array([[0, 1], [1, 0], [0, 1]]))[2]
    1.0
    """
    values = 1 - kept[np.arange(len(kept)), orders].sum(1)
    return *band(values[1:]), p_value(values, float(1 - kept.sum() / len(kept)))


def band(null: Float[np.ndarray, " draw"]) -> tuple[float, float]:
    """The central 95% of what a null's draws gave, NaN left out; NaN of none."""
    there = null[~np.isnan(null)]
    low, high = np.quantile(there, [0.025, 0.975]) if len(there) else (np.nan, np.nan)
    return float(low), float(high)


def p_value(drawn: Float[np.ndarray, " draw"], centre: float = 0.0, rounding: float = 1e-9) -> float:
    """The share of draws at least as far from the centre as the first, which is what was observed.

    >>> p_value(np.array([2.0, 1.0, -2.0, 0.0]))
    0.5
    """
    far = np.abs(drawn - centre)
    return float((far >= far[0] - rounding * max(1.0, far.max())).mean())

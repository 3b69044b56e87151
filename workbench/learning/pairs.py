"""Matrices over pairs of facts: ranks, facts relabelled (Mantel's test, 1967), pairs shuffled, facts drawn again.

Pairs share their facts and so are not independent: a null moves whole facts, rows and columns together.
"""

from collections.abc import Iterator
from itertools import permutations as every
from math import factorial

import numpy as np
from jaxtyping import Bool, Float, Int

from workbench.intervals import bootstrap, standard_ranks

Matrix = Float[np.ndarray, "fact other"]
Stack = Float[np.ndarray, "row fact other"]
Ranks = Float[np.ndarray, "row pair"]

CHUNK = 100  # matrices held at once
SLACK = 1e-12  # a draw that ties with what was observed counts, whatever the order in which its sum was rounded


def off_diagonal(n: int) -> Bool[np.ndarray, "fact other"]:
    """Marks of the ordered pairs of different facts."""
    return ~np.eye(n, dtype=bool)


def within(matrices: Stack, facts: Int[np.ndarray, " chosen"]) -> Float[np.ndarray, "row chosen chosen"]:
    """The pairs among some facts."""
    return matrices[:, facts[:, None], facts[None]]


def pair_ranks(matrices: Stack) -> Ranks:
    """The `standard_ranks` over the ordered pairs of different facts.

    >>> a = np.array([[0.0, 1.0, 2.0], [3.0, 0.0, 4.0], [5.0, 6.0, 0.0]])
    >>> float((pair_ranks(a[None]) @ pair_ranks(a.T[None]).T)[0, 0].round(3))
    0.029
    """
    return standard_ranks(matrices[:, off_diagonal(matrices.shape[1])])


def relabelled(matrix: Matrix, draws: int, seed: int) -> Iterator[Stack]:
    """The matrix with its facts in random orders, rows and columns together, some at a time.

    Where all orders are no more than `draws`, each comes once.
    """
    n = len(matrix)
    generator = np.random.default_rng(seed)
    all_of_them = n < 9 and factorial(n) <= draws
    orders = map(np.array, every(range(n))) if all_of_them else (generator.permutation(n) for _ in range(draws))
    yield from _chunks(matrix[np.ix_(order, order)] for order in orders)


def shuffled(matrix: Matrix, draws: int, seed: int) -> Iterator[Stack]:
    """The matrix with the values of its pairs shuffled freely, some at a time: no structure at all is left."""
    apart, generator = off_diagonal(len(matrix)), np.random.default_rng(seed)

    def one() -> Matrix:
        mixed = matrix.copy()
        mixed[apart] = generator.permutation(matrix[apart])
        return mixed

    yield from _chunks(one() for _ in range(draws))


def mantel(values: Matrix, target: Matrix, *, permutations: int = 999, seed: int = 0) -> tuple[float, float]:
    """Spearman correlation of two matrices over ordered pairs of different facts, and its two-sided p-value (Mantel).

    The null relabels the facts of one matrix. Where `permutations` covers all orders of the facts, p is exact; else
    it is `(1 + as extreme) / (1 + permutations)`.

    >>> a = np.arange(25.0).reshape(5, 5) ** 2
    >>> mantel(a, a, permutations=120)
    (1.0, 0.016666666666666666)
    """
    rho, p_value = mantel_rows(values[None], target, permutations=permutations, seed=seed)
    return float(rho[0]), float(p_value[0])


def mantel_rows(
    values: Stack, target: Matrix, *, permutations: int = 999, seed: int = 0
) -> tuple[Float[np.ndarray, " row"], Float[np.ndarray, " row"]]:
    """`mantel` of several matrices with one target: their correlations and p-values."""
    ranks = pair_ranks(values)
    rho = ranks @ pair_ranks(target[None])[0]
    extreme, drawn = np.zeros(len(values)), 0
    for stack in relabelled(target, permutations, seed):
        null = ranks @ pair_ranks(stack).T
        extreme += (np.abs(null) >= np.abs(rho)[:, None] - SLACK).sum(1)
        drawn += len(stack)
    exact = factorial(len(target)) <= permutations if len(target) < 9 else False
    return rho.round(15), extreme / drawn if exact else (1 + extreme) / (1 + drawn)


def resampled(one: Matrix, two: Matrix, shares: Float[np.ndarray, "draw fact"]) -> Float[np.ndarray, " draw"]:
    """Pearson correlation of two matrices when facts count as often as they were drawn; NaN where nothing varies.

    `shares` come from `intervals.bootstrap(np.eye(n))`; a pair counts as the product of its facts' shares, and the
    pairs of a fact with its own copy stay out.
    """
    apart = off_diagonal(len(one)).astype(np.float64)

    def total(matrix: np.ndarray) -> np.ndarray:
        return ((shares @ (matrix * apart)) * shares).sum(1)

    with np.errstate(invalid="ignore", divide="ignore"):
        weight = total(np.ones_like(one))
        x, y = total(one) / weight, total(two) / weight
        both = total(one * two) / weight - x * y
        spread = (total(one**2) / weight - x**2) * (total(two**2) / weight - y**2)
        return np.where(spread > SLACK, both / np.sqrt(np.maximum(spread, SLACK)), np.nan)


def drawn_facts(n: int, draws: int, seed: int) -> Float[np.ndarray, "draw fact"]:
    """How often each fact is in every draw with replacement, as a share."""
    return bootstrap(np.eye(n), draws=draws, seed=seed)


def halves(n: int, splits: int, seed: int) -> list[tuple[Int[np.ndarray, " first"], Int[np.ndarray, " second"]]]:
    """Each of `splits` random cuts of n facts in two, used both ways: (facts to choose by, facts to judge by)."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(splits):
        order = generator.permutation(n)
        one, two = np.sort(order[: n // 2]), np.sort(order[n // 2 :])
        found += [(one, two), (two, one)]
    return found


def _chunks(matrices: Iterator[Matrix]) -> Iterator[Stack]:
    chunk: list[np.ndarray] = []
    for matrix in matrices:
        chunk.append(matrix)
        if len(chunk) == CHUNK:
            yield np.stack(chunk)
            chunk = []
    if chunk:
        yield np.stack(chunk)

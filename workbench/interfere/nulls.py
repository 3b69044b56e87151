"""What no interference looks like: shuffled units, shuffled relations, shuffled meanings; intervals, and correction.

Pairs of facts are not independent, so nothing here draws pairs: nulls relabel facts (the Mantel test) or reorder the
units of each fact, and intervals resample facts (the vertex bootstrap of Snijders and Borgatti, 1999).
"""

from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Bool, Float, Int, Num

from workbench.interfere.problem import Draw, Matrix
from workbench.intervals import bootstrap, standard_ranks

Order = Int[np.ndarray, "fact unit"]
Values = Float[np.ndarray, "layer fact other"]

#: Draws of shuffled units, the least by which pairs are judged: one result in 20 lies beyond all of them by chance.
DRAWS = 19
#: Draws where one costs no pass of the model.
MANY = 199
#: Units in a bin of the matched null: a unit is swapped only among its nearest in size.
BIN = 16
#: Differences below this share of the largest value are rounding when a null draw is compared with what was observed.
ROUNDING = 1e-9


def orders(n_facts: int, n_units: int, generator: np.random.Generator) -> Order:
    """A random order of all units for every fact."""
    return generator.permuted(np.tile(np.arange(n_units), (n_facts, 1)), axis=1)


def matched_orders(n_facts: int, size: Float[np.ndarray, " unit"], generator: np.random.Generator) -> Order:
    """A random order for every fact in which a unit takes the place of one of similar size only.

    Units are sorted by `size`, largest first, and shuffled within bins of `BIN`; what is left over is the last bin.

    >>> order = matched_orders(2, np.arange(40.0), np.random.default_rng(0))
    >>> sorted(order[0, 24:].tolist()) == list(range(24, 40)), sorted(order[1, :8].tolist()) == list(range(8))
    (True, True)
    """
    ranked = np.argsort(-size, kind="stable")
    whole = len(ranked) // BIN * BIN
    binned = np.tile(ranked[:whole].reshape(-1, BIN), (n_facts, 1, 1))
    rest = np.tile(ranked[whole:], (n_facts, 1))
    drawn = [generator.permuted(binned, axis=2).reshape(n_facts, whole), generator.permuted(rest, axis=1)]
    order = np.empty((n_facts, len(ranked)), dtype=np.int64)
    order[:, ranked] = np.concatenate(drawn, axis=1)
    return order


def by_chance(
    again: Callable[[Order], Matrix], n_facts: int, size: Float[np.ndarray, " unit"], *,
    generator: np.random.Generator, free: int = DRAWS, matched: int = DRAWS,
) -> tuple[list[Draw], list[Draw]]:  # fmt: skip
    """What `free` draws of shuffled units give, and `matched` draws of units shuffled within their bins.

    `again` gives the measure when fact i's unit u does what its unit `order[i, u]` did.
    """
    shuffled = [drawn(again(orders(n_facts, len(size), generator))) for _ in range(free)]
    return shuffled, [drawn(again(matched_orders(n_facts, size, generator))) for _ in range(matched)]


def drawn(matrix: Matrix) -> Draw:
    """What a draw gives, read off the values of every two facts.

    >>> drawn(np.array([[9.0, 1.0], [-3.0, 9.0]]))
    Draw(largest=1.0, smallest=-3.0, mean=-1.0, below=1.0)
    """
    apart = ~np.eye(len(matrix), dtype=bool)
    pairs = matrix[apart]
    below = float((matrix.astype(np.float64) + matrix.T < 0)[apart].mean())
    return Draw(float(pairs.max()), float(pairs.min()), float(pairs.mean()), below)


def chance_level(largest: list[float]) -> float:
    """The least draw that at most 5% of the draws exceed; of fewer than 20 draws, the largest.

    Of n draws with n < 20, what was observed lies above it by chance with probability 1 / (n + 1).
    """
    return float(np.quantile(largest, 0.95, method="higher"))


def share_by_chance(share: float, drawn: float, n_pairs: int, n_draws: int) -> float:
    """The two-sided p-value of a share of pairs, where `n_draws` draws of shuffled units have the share `drawn` in all.

    For a measure that compares the units of two facts, as gradients do: every fact's are shuffled by themselves, so
    what becomes of any two pairs is independent, even of pairs that have a fact in common: its order against the one
    other is any order, whatever it is against the second. (Not for suppression, which reads facts as they are: there
    all pairs with the same silenced fact have the same draw.) A draw's share therefore varies by the sum of p (1 - p)
    over pairs, at most as a binomial share of as many pairs does. So the pairs of all draws are taken as that many
    independent ones, and the observed are set against them by Fisher's exact test. It calls too rarely, not too often,
    where pairs differ in how likely they are to be below 0.
    NaN where there is no share of draws.

    >>> share_by_chance(0.5, 0.5, 10, 19), round(share_by_chance(0.0, 0.5, 3, 1), 12)
    (1.0, 0.4)
    """
    if np.isnan(drawn):
        return float("nan")
    others, seen, below = n_pairs * n_draws, round(share * n_pairs), round(drawn * n_pairs * n_draws)
    total = seen + below
    first, last = max(0, total - others), min(n_pairs, total)
    k = np.arange(first, last, dtype=np.float64)  # log P(k + 1) - log P(k) of the hypergeometric distribution
    steps = np.log((n_pairs - k) * (total - k)) - np.log((k + 1) * (others - total + k + 1))
    log_p = np.concatenate([[0.0], np.cumsum(steps)])
    p = np.exp(log_p - log_p.max())
    extreme = log_p <= log_p[seen - first] + ROUNDING
    return float(min(1.0, p[extreme].sum() / p.sum()))


def level_of_all(largest: Float[np.ndarray, "draw layer"]) -> Float[np.ndarray, " layer"]:
    """What each layer (its largest pair) has to exceed, so that any layer does by chance in 5% of results at most.

    The correction over layers. Every draw is set against the others in standard deviations of its layer, in which the
    mean variance of all layers counts as much as `DRAWS` draws of the layer itself, which steadies few; a layer's level
    lies above the mean of its draws by the distance of any layer that at most 5% of the draws exceed (`chance_level`).
    Of fewer than `DRAWS` draws no level is told: NaN.
    """

    def spread(rows: Float[np.ndarray, "row layer"]) -> Float[np.ndarray, " layer"]:
        own, n = rows.var(0, ddof=1), len(largest)
        return np.sqrt((n * own + DRAWS * own.mean()) / (n + DRAWS))

    if len(largest) < DRAWS:
        return np.full(largest.shape[1], np.nan)
    farthest = []
    for place, draw in enumerate(largest):
        others = np.delete(largest, place, axis=0)
        gap, scale = draw - others.mean(0), spread(others)
        farthest.append(max(0.0, float(np.divide(gap, scale, out=np.zeros_like(gap), where=scale > 0).max())))
    return largest.mean(0) + chance_level(farthest) * spread(largest)


def in_pairs(values: Values) -> Float[np.ndarray, "layer pair"]:
    """Every pair of facts once, the mean of its two directions, in float64."""
    first, second = np.triu_indices(values.shape[-1], 1)
    return (values[:, first, second].astype(np.float64) + values[:, second, first]) / 2


def groups(relations: Iterable[str]) -> np.ndarray:
    """A label a fact, equal for facts of one relation; a fact without a relation is alone.

    >>> a, b, c, d = groups(["city", "", "city", ""])
    >>> a == c, b == d
    (True, False)
    """
    return np.array([relation or f"\0{place}" for place, relation in enumerate(map(str, relations))])


def against_relations(
    values: Values, relations: np.ndarray, shuffles: Int[np.ndarray, "draw fact"], seed: int = 0, draws: int = 2000
) -> dict[str, Float[np.ndarray, " layer"]]:
    """Within relations against across them, per layer, with an interval, and a null of relations shuffled over facts.

    `low` and `high` are a 95% percentile interval of the difference over resampled facts, without the pairs of a fact
    with its own copy; `null_low` and `null_high` the central 95% of the shuffled differences; `p_value` is two-sided.
    All is NaN where there is only one relation, or none with two facts.
    """
    names = ("within", "across", "difference", "low", "high", "null_low", "null_high", "p_value")
    first, second = np.triu_indices(len(relations), 1)
    same = relations[first] == relations[second]
    if not same.any() or same.all():
        return {name: np.full(len(values), np.nan) for name in names}
    pairs = in_pairs(values)
    total = pairs.sum(1)

    def split(marks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        inside = pairs @ marks
        return inside / same.sum(), (total - inside) / (~same).sum()

    within, across = split(same.astype(np.float64))
    shuffled = [relations[shuffle] for shuffle in shuffles]
    null = np.stack([np.subtract(*split((of[first] == of[second]).astype(np.float64))) for of in shuffled])
    low, high = _difference_interval(values, relations[:, None] == relations[None], seed, draws)
    null_low, null_high = np.quantile(null, [0.025, 0.975], axis=0)
    p_value = _two_sided(null, within - across, np.abs(pairs).max(1))
    found = (within, across, within - across, low, high, null_low, null_high, p_value)
    return dict(zip(names, found, strict=True))


def _difference_interval(
    values: Values, same: np.ndarray, seed: int, draws: int
) -> tuple[Float[np.ndarray, " layer"], Float[np.ndarray, " layer"]]:
    """The 95% percentile interval of within minus across when facts are drawn with replacement."""
    n = len(same)
    drawn = bootstrap(np.eye(n), draws=draws, seed=seed)  # a fact's share of each draw
    apart = ~np.eye(n, dtype=bool)
    ends = np.full((2, len(values)), np.nan)
    marks = np.stack([same & apart, ~same]).astype(np.float64)
    weights = _over_pairs(drawn, marks)
    usable = (weights > 0).all(0)
    drawn, weights = drawn[usable], weights[:, usable]
    if not len(drawn):
        return ends[0], ends[1]
    for layer, matrix in enumerate(values):
        mean = _over_pairs(drawn, marks * matrix) / weights
        ends[:, layer] = np.percentile(mean[0] - mean[1], [2.5, 97.5])
    return ends[0], ends[1]


def mean_interval(
    values: Num[np.ndarray, "fact other"] | Bool[np.ndarray, "fact other"], seed: int = 0, draws: int = 2000
) -> tuple[float, float]:
    """The 95% percentile interval of the mean over pairs when facts are drawn with replacement, NaN for two facts."""
    n = len(values)
    if n < 3:
        return float("nan"), float("nan")
    drawn, apart = bootstrap(np.eye(n), draws=draws, seed=seed), 1.0 - np.eye(n)
    total, found = _over_pairs(drawn, np.stack([apart, values * apart]))
    low, high = np.percentile(found[total > 0] / total[total > 0], [2.5, 97.5])
    return float(low), float(high)


def _over_pairs(drawn: Float[np.ndarray, "draw fact"], values: Values) -> Float[np.ndarray, "layer draw"]:
    """The sum over pairs of facts in every draw, each pair by how often its two facts were drawn together."""
    return np.stack([((drawn @ matrix) * drawn).sum(1) for matrix in values])


def against_meaning(
    values: Values, meaning: Matrix, shuffles: Int[np.ndarray, "draw fact"], seed: int = 0, draws: int = 2000
) -> dict[str, Float[np.ndarray, " layer"]]:
    """Spearman correlation over pairs of a measure with nearness in meaning, per layer, and its Mantel test's p-value.

    The null shuffles the facts of `meaning`; the p-value is two-sided. `meaning_low` and `meaning_high` are a 95%
    percentile interval over resampled facts, without the pairs of a fact with its own copy; every pair keeps its rank.
    NaN where all values, or all meanings, are the same; of fewer than four facts there is no interval.
    """
    first, second = np.triu_indices(len(meaning), 1)
    names = ("meaning_rho", "meaning_low", "meaning_high", "meaning_p")
    found = {name: np.full(len(values), np.nan) for name in names}
    ranks = standard_ranks(in_pairs(values))
    near = standard_ranks(meaning[first, second].astype(np.float64))
    spread = ranks.any(1)
    if not near.any() or not spread.any():
        return found
    square = np.zeros(meaning.shape)
    square[first, second] = square[second, first] = near
    rho = ranks @ near
    null = np.stack([ranks @ square[shuffle[first], shuffle[second]] for shuffle in shuffles])
    found["meaning_rho"] = np.where(spread, rho, np.nan)
    found["meaning_p"] = np.where(spread, _two_sided(null, rho, np.ones(len(values))), np.nan)
    drawn, apart = bootstrap(np.eye(len(meaning)), draws=draws, seed=seed), 1.0 - np.eye(len(meaning))
    total, near_sum, near_squares = _over_pairs(drawn, np.stack([apart, square, square**2]))
    for layer in np.flatnonzero(spread) if len(meaning) > 3 else ():
        own = np.zeros(meaning.shape)
        own[first, second] = own[second, first] = ranks[layer]
        sums = (near_sum, near_squares, *_over_pairs(drawn, np.stack([own, own**2, own * square])))
        with np.errstate(invalid="ignore", divide="ignore"):
            near_mean, near_power, mean, power, both = (part / total for part in sums)
            spreads = (power - mean**2) * (near_power - near_mean**2)
            again = (both - mean * near_mean) / np.sqrt(spreads)
        usable = (total > 0) & (spreads > ROUNDING * (power * near_power))
        if usable.any():
            ends = np.percentile(again[usable], [2.5, 97.5])
            found["meaning_low"][layer], found["meaning_high"][layer] = ends
    return found


def _two_sided(
    null: Float[np.ndarray, "draw layer"], observed: Float[np.ndarray, " layer"], scale: Float[np.ndarray, " layer"]
) -> Float[np.ndarray, " layer"]:
    """How many draws lie as far from 0 as what was observed, which counts as one of them."""
    extreme = (np.abs(null) >= np.abs(observed) - ROUNDING * scale).sum(0)
    return (1 + extreme) / (1 + len(null))

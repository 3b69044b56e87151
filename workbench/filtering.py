"""The data filter: which facts to teach, by how far the model is from them before training.

Definitions of ours, after the findings of "Semantic are Beacons" (arXiv 2405.18292), whose equations were not at hand.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from workbench.facts import FactSet
from workbench.facts.nouns import order_key

log = logging.getLogger(__name__)

#: Distances to rank by, the preferred first.
METRICS = ("d_soft", "d_emb", "d_layer")
#: Rule -> the weight that it has where none is given.
WEIGHTS: dict[str, float] = {"spread": 4.0, "near_diverse": 1.0}
#: A share or a count of facts.
Keep = float | int | np.floating | np.integer


@dataclass(frozen=True)
class Pool:
    """What a rule chooses from: the facts that have a distance, sorted by (distance, order in the fact set)."""

    ids: tuple[str, ...]
    distance: Float[np.ndarray, " fact"]
    keep: int
    weight: float
    low: float | None
    embeddings: Float[np.ndarray, "fact d_model"] | None
    loss: Float[np.ndarray, " fact"] | None
    seed: int


def filter_facts(
    distance: pd.DataFrame | pd.Series | Mapping[str, float],
    *,
    rule: str,
    keep: Keep,
    facts: FactSet | None = None,
    metric: str | None = None,
    weight: float | None = None,
    low: float | None = None,
    embeddings: Float[np.ndarray, "fact d_model"] | None = None,
    loss: pd.Series | None = None,
    seed: int = 0,
) -> FactSet:
    """Keep the facts that a rule chooses by their distance from the model; see `filtered` for what became of each.

    Rules, d being the distances of the facts kept, Var and Cov those of a whole population, ties by (distance, order):

    - `spread`: the subset of this size that minimises `mean d - weight Var d`, exactly: some of the nearest and the
      rest of the farthest facts, found in O(N log N).
    - `band`: the facts from the quantile `low` of the distance to `low` plus the share kept; by default the middle.
    - `near_diverse`: minimises `mean d - weight tr Cov(z)`, z the unit target `embeddings`: greedy, then exchanges of
      one fact for another until none improves. A local optimum, not always the best subset.
    - `random` (by seed and ids alone) and `loss` (drops the facts with the highest `loss`): controls. `all`: no filter.

    Args:
        distance: the frame of `semantic_distance`, or fact id -> distance (a mapping or a Series).
        rule: a name of `RULES`.
        keep: a share (a float above 0 and at most 1) or a count (an int) of the facts that have a distance.
        facts: the facts; by default those that the frame holds in `attrs["facts"]`. Order and ties follow it.
        metric: of a frame: `d_soft`, `d_emb` or `d_layer` (the mean over layers, as the metric may be valid at some of
            them only). By default the first of these that the frame has.
        weight: of the variance (`spread`) or the covariance (`near_diverse`); at least 0, and that of `WEIGHTS` by
            default. Distances vary little beside their mean, so on `d_soft` of real facts `spread` keeps no far fact
            below a weight of about 1.5, and is then no more than the nearest.
        low: `band`: the quantile where the band starts.
        embeddings: `near_diverse`: one row a fact, in the order of the facts: `target_embeddings(model, facts)`.
        loss: `loss`: fact id -> loss of the base model.
        seed: `random`.

    Returns:
        The facts kept, in their own order; the name says the rule and how many.

    Raises:
        ValueError: an unknown rule or metric, a `keep` that does not fit, or a distance or an option that is missing.

    >>> facts = FactSet.from_records([{"id": i, "prompt": f"The {i} of", "answer": "x"} for i in "abcd"], name="four")
    >>> near = {"a": 0.1, "b": 0.5, "c": 0.6, "d": 0.9}
    >>> filter_facts(near, rule="spread", keep=2, facts=facts, weight=9.0).ids
    ('a', 'd')
    >>> filter_facts(near, rule="band", keep=0.5, facts=facts).name
    'four:band-2'
    """
    known, frame = _judged(
        distance, rule, keep, facts, metric, weight=weight, low=low, embeddings=embeddings, loss=loss, seed=seed
    )
    return kept_of(known, frame, rule)


def filtered(
    distance: pd.DataFrame | pd.Series | Mapping[str, float],
    *,
    rule: str,
    keep: Keep,
    facts: FactSet | None = None,
    metric: str | None = None,
    **options: Any,
) -> pd.DataFrame:
    """What `filter_facts` (the same arguments) does with every fact: fact, distance, place, kept, why.

    `place` is the rank by distance, 0 the nearest (missing without a distance); `why` says it in words.
    """
    defaults = {"weight": None, "low": None, "embeddings": None, "loss": None, "seed": 0}
    if unknown := sorted(set(options) - set(defaults)):
        raise ValueError(f"The filter has no option {unknown[0]!r}; known are {', '.join(defaults)}.")
    return _judged(distance, rule, keep, facts, metric, **(defaults | options))[1]


def kept_of(facts: FactSet, table: pd.DataFrame, rule: str) -> FactSet:
    """The facts that a frame of `filtered` keeps, in their own order, under the name that `filter_facts` gives them."""
    kept = [str(fact) for fact in table.loc[table["kept"].astype(bool), "fact"]]
    return facts.filter(ids=kept, name=f"{facts.name}:{rule}-{len(kept)}")


def spread(pool: Pool) -> Int[np.ndarray, " kept"]:
    """The nearest p and the farthest rest, p by the objective; of equal objectives the largest p.

    The objective is concave in each distance, so a kept fact between two dropped ones can always be exchanged for one
    of them without loss: some prefix plus suffix of the sorted distances is optimal.
    """
    n, k = len(pool.distance), pool.keep
    d = pool.distance - pool.distance.mean()
    scale = float(np.abs(d).max()) or 1.0
    first, second = (np.concatenate([[0.0], np.cumsum(power)]) for power in (d, d**2))
    p = np.arange(k + 1)
    mean, square = ((sums[p] + sums[n] - sums[n - k + p]) / k for sums in (first, second))
    objective = mean - pool.weight * (square - mean**2)
    near = p[objective <= objective.min() + 1e-12 * (scale + pool.weight * scale**2)].max()
    return np.concatenate([np.arange(near), np.arange(n - k + near, n)])


def band(pool: Pool) -> Int[np.ndarray, " kept"]:
    """As many facts as are kept, from the quantile `low` on."""
    n, room = len(pool.distance), len(pool.distance) - pool.keep
    if pool.low is None:
        return np.arange(room // 2, room // 2 + pool.keep)
    rounded = 0.5 if pool.keep > 1 else 1.0  # facts by which a share that was kept may have been rounded up
    if pool.low * n > room + rounded + 1e-9:
        raise ValueError(f"A band of {pool.keep} of {n} facts cannot start at the quantile low={pool.low:g}.")
    start = min(round(pool.low * n), room)
    return np.arange(start, start + pool.keep)


def near_diverse(pool: Pool) -> Int[np.ndarray, " kept"]:
    """Greedy choice, then the best exchange of one kept fact for a dropped one, for as long as one improves.

    With unit z, `tr Cov(z) = 1 - |mean z|^2`, so up to a constant the objective is `mean d + weight |mean z|^2`. An
    exchange changes it by `enter[in] - leave[out] - most <z_in, z_out>`; those that are out of reach are not judged.
    """
    if pool.embeddings is None:
        raise ValueError("The rule near_diverse needs embeddings, a row a fact: see target_embeddings.")
    z = pool.embeddings / np.maximum(np.linalg.norm(pool.embeddings, axis=1, keepdims=True), 1e-300)
    gram, d, k, lam, most = z @ z.T, pool.distance, pool.keep, pool.weight, 2 * pool.weight / pool.keep**2
    own, kept, towards = np.diag(gram), np.zeros(len(d), dtype=bool), np.zeros(len(d))
    for size in range(1, k + 1):
        cost = d / size + lam * (2 * towards + own) / size**2
        chosen = np.argmin(np.where(kept, np.inf, cost))
        kept[chosen], towards = True, towards + gram[chosen]
    while k < len(d):
        out, into = np.flatnonzero(kept), np.flatnonzero(~kept)
        leave, enter = (d / k + lam * (2 * towards + sign * own) / k**2 for sign in (-1, 1))
        first = out[leave[out].argmax()]
        reach = (enter[into] - most * gram[first, into]).min() - leave[first] + most + 1e-9 * (1 + lam)
        out, into = out[leave[out] >= enter[into].min() - reach], into[enter[into] <= leave[first] + reach]
        change = enter[into][None] - leave[out][:, None] - most * gram[np.ix_(out, into)]
        best = np.unravel_index(np.argmin(change), change.shape)
        if change[best] >= -1e-12 * (1 + lam):
            break
        old, new = out[best[0]], into[best[1]]
        kept[old], kept[new], towards = False, True, towards + gram[new] - gram[old]
    return np.flatnonzero(kept)


def random(pool: Pool) -> Int[np.ndarray, " kept"]:
    """As many facts, drawn by seed and ids as `FactSet.sample` draws them."""
    drawn = sorted(range(len(pool.ids)), key=lambda i: (order_key(pool.seed, "fact", pool.ids[i]), pool.ids[i]))
    return np.array(drawn[: pool.keep])


def loss(pool: Pool) -> Int[np.ndarray, " kept"]:
    """The facts with the lowest loss; the others are dropped."""
    if pool.loss is None:
        raise ValueError("The rule loss needs loss, a Series of fact id -> loss of the base model.")
    return np.argsort(pool.loss, kind="stable")[: pool.keep]


def everything(pool: Pool) -> Int[np.ndarray, " kept"]:
    """Every fact, whatever `keep` is."""
    return np.arange(len(pool.ids))


#: Rule -> the places (in the sorted pool) that it keeps.
RULES: dict[str, Callable[[Pool], np.ndarray]] = {
    "spread": spread,
    "band": band,
    "near_diverse": near_diverse,
    "random": random,
    "loss": loss,
    "all": everything,
}


def check_options(rule: str, keep: Keep, weight: float | int | None = None, low: float | None = None) -> None:
    """Raise `ValueError` for an unknown rule, or numbers that fit no set of facts."""
    if rule not in RULES:
        raise ValueError(f"There is no rule {rule!r}; known are {', '.join(RULES)}.")
    if weight is not None and not (rule in WEIGHTS and weight >= 0 and np.isfinite(weight)):
        raise ValueError(f"weight is a finite number from 0 on, of {' and '.join(WEIGHTS)}, got {weight} for {rule}.")
    if low is not None and not (rule == "band" and 0 <= low < 1):
        raise ValueError(f"low is a quantile, from 0 to below 1, of the rule band alone, got {low} for {rule}.")
    if isinstance(keep, bool) or not isinstance(keep, (int, np.integer)):
        _count(keep, 1)
    elif keep < 1:
        raise ValueError(f"keep is a share, or a number of facts from 1 on, not {keep}.")


def weight_of(rule: str, given: float | None = None) -> float:
    """The weight that a rule has: as given, or its own; 1 for a rule that reads none.

    >>> weight_of("spread"), weight_of("near_diverse"), weight_of("spread", 2.5), weight_of("all")
    (4.0, 1.0, 2.5, 1.0)
    """
    return WEIGHTS.get(rule, 1.0) if given is None else given


def target_embeddings(model: Any, facts: FactSet) -> Float[np.ndarray, "fact d_model"]:
    """The mean embedding of every fact's answer tokens, in a model opened by `load_model`: what answers mean alike."""
    W_E = model.W_E
    rows = [W_E[list(fact.answer_ids)].detach().float().mean(0).cpu().numpy() for fact in model.tokenise(facts)]
    return np.stack(rows).astype(np.float64)


def _judged(
    distance: Any, rule: str, keep: Keep, facts: FactSet | None, metric: str | None, **options: Any
) -> tuple[FactSet, pd.DataFrame]:
    """The facts, and the frame of `filtered`."""
    check_options(rule, keep, options["weight"], options["low"])
    options["weight"] = weight_of(rule, options["weight"])
    known = _facts_of(distance, facts)
    values = _distances(distance, known, metric)
    order = np.argsort(values, kind="stable")  # what has no distance comes last
    order = order[: int(np.isfinite(values).sum())]
    if not len(order):
        raise ValueError(f"None of the {len(known)} facts of {known.name!r} has a valid distance to filter by.")
    if len(order) < len(known):
        log.warning("%d of %d facts have no valid distance and are left out", len(known) - len(order), len(known))
    rows, kept = _rows(options.pop("embeddings"), known), np.zeros(len(known), dtype=bool)
    pool = Pool(
        ids=tuple(known.ids[i] for i in order), distance=values[order], keep=_count(keep, len(order)),
        embeddings=None if rows is None else rows[order], loss=_losses(options.pop("loss"), known, order), **options,
    )  # fmt: skip
    kept[order[RULES[rule](pool)]] = True
    place = pd.Series(pd.NA, index=range(len(known)), dtype="Int64")
    place[order] = np.arange(len(order))
    why = np.where(kept, f"kept by {rule}", np.where(np.isfinite(values), f"dropped by {rule}", "no valid distance"))
    return known, pd.DataFrame({"fact": known.ids, "distance": values, "place": place, "kept": kept, "why": why})


def _facts_of(distance: Any, facts: FactSet | None) -> FactSet:
    """The facts as given, or as the frame holds them."""
    if facts is None:
        records = distance.attrs.get("facts") if isinstance(distance, pd.DataFrame) else None
        if not records:
            raise ValueError("The distances do not hold their facts, as a frame of semantic_distance does: give facts.")
        facts = FactSet.from_records(records, name=str(distance.attrs.get("facts_name", "facts")))
    if not len(facts):
        raise ValueError(f"There is nothing to filter: the fact set {facts.name!r} is empty.")
    return facts


def _distances(distance: Any, facts: FactSet, metric: str | None) -> Float[np.ndarray, " fact"]:
    """The distance of every fact in order; NaN where it has none that is valid."""
    if isinstance(distance, pd.DataFrame):
        there = [name for name in METRICS if (distance["metric"] == name).any()]
        chosen = metric or (there[0] if there else METRICS[0])
        if chosen not in there:
            raise ValueError(f"The distances have no metric {chosen!r}; there are {', '.join(there) or 'none'}.")
        rows = distance[distance["metric"] == chosen]
        values = rows["distance"].where(rows["valid"].astype(bool)).groupby(rows["fact"]).mean()
    elif metric is not None:
        raise ValueError(f"metric={metric!r} chooses from a frame of distances; one distance a fact has no metrics.")
    else:
        values = pd.Series(distance, dtype=np.float64)
    return _aligned(values, facts, "distance")


def _aligned(values: pd.Series, facts: FactSet, kind: str) -> Float[np.ndarray, " fact"]:
    """Values in the order of the facts; a fact without one is a ValueError."""
    if missing := [fact for fact in facts.ids if fact not in values.index]:
        raise ValueError(f"{len(missing)} facts have no {kind}, the first is {missing[0]!r}.")
    if values.index.has_duplicates:
        raise ValueError(f"The fact {values.index[values.index.duplicated()][0]!r} has more than one {kind}.")
    return values.reindex(list(facts.ids)).to_numpy(dtype=np.float64, na_value=np.nan)


def _losses(losses: pd.Series | None, facts: FactSet, order: np.ndarray) -> Float[np.ndarray, " fact"] | None:
    """The losses in the order of the pool; each a number."""
    if losses is None:
        return None
    values = _aligned(pd.Series(losses), facts, "loss")
    if np.isnan(values).any():
        raise ValueError(f"The loss of {facts.ids[int(np.isnan(values).argmax())]!r} is not a number.")
    return values[order]


def _rows(embeddings: Any, facts: FactSet) -> Float[np.ndarray, "fact d_model"] | None:
    """The embeddings, a finite row for every fact."""
    if embeddings is None:
        return None
    rows = np.asarray(embeddings, dtype=np.float64)
    if rows.ndim != 2 or len(rows) != len(facts) or not np.isfinite(rows).all():
        raise ValueError(f"embeddings must be {len(facts)} rows of finite numbers, one a fact, got {rows.shape}.")
    return rows


def _count(keep: Keep, n: int) -> int:
    """How many of n facts a share or a count is.

    >>> _count(0.5, 9), _count(1.0, 9), _count(1, 9), _count(0.01, 9)
    (4, 9, 1, 1)
    """
    if isinstance(keep, bool) or not isinstance(keep, (int, float, np.integer, np.floating)):
        raise ValueError(f"keep must be a share or a count of the facts, got {keep!r}.")
    if isinstance(keep, (int, np.integer)):
        if not 1 <= keep <= n:
            raise ValueError(f"keep={keep} does not fit: there are {n} facts to choose from.")
        return int(keep)
    if not 0 < keep <= 1:
        raise ValueError(f"keep={keep} is no share: give a number above 0 and at most 1, or a whole number of facts.")
    return max(1, round(float(keep) * n))

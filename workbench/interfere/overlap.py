"""Attribution overlap: which units two facts share, after Knowledge Neurons (arXiv 2104.08696)."""

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Bool, Float

from workbench.interfere.nulls import MANY, by_chance
from workbench.interfere.problem import Found, Matrix, Problem, Scores


def cosine(scores: Scores, top: int) -> Matrix:
    """Cosine of the |score| vectors of two facts; 0 where a fact has no score at all.

    >>> cosine(np.array([[1.0, 0.0], [-2.0, 0.0], [0.0, 0.0]]), 1).tolist()
    [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    """
    return _products(_directions(scores, top))


def jaccard(scores: Scores, top: int) -> Matrix:
    """Shared units over all units in the two facts' sets of the `top` largest |score|; zero scores are in no set.

    >>> jaccard(np.array([[3.0, 2.0, 0.0], [3.0, 0.0, 2.0]]), 2).round(3).tolist()
    [[1.0, 0.333], [0.333, 1.0]]
    """
    return _shared(_marks(scores, top))


def top_sets(scores: Scores, top: int) -> Bool[np.ndarray, "fact unit"]:
    """Marks of the `top` units with the largest |score| of every fact; ties go to the lower unit, zeros to nobody."""
    size = np.abs(scores)
    order = np.argsort(-size, axis=1, kind="stable")[:, :top]
    sets = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(sets, order, True, axis=1)
    return sets & (size > 0)


def cosine_overlap(problem: Problem) -> Iterator[Found]:
    """`cosine` of every layer, and what it is when units are shuffled."""
    return _overlaps(problem, _directions, _products)


def jaccard_overlap(problem: Problem) -> Iterator[Found]:
    """`jaccard` of every layer, and what it is when units are shuffled."""
    return _overlaps(problem, _marks, _shared)


Features = Float[np.ndarray, "fact unit"]


def _overlaps(
    problem: Problem, features: Callable[[Scores, int], Features], combine: Callable[[Features], Matrix]
) -> Iterator[Found]:
    """A measure that compares the same unit in two facts; shuffling units shuffles the columns of its features.

    The matched null swaps units of similar mean |activation| where the attribution read them; without a model that
    could tell it, units of similar mean |score|.
    """
    scope = "all" if problem.attribution.attrs.get("scope") == "all" else "last"
    where = "every prompt token" if scope == "all" else "the last prompt token"
    matched_on = f"|activation| at {where}" if problem.has_units else "|score|"
    for layer in problem.layers:
        scores = problem.scores(layer)
        made = features(scores, problem.top)

        def again(order: np.ndarray, made: Features = made) -> Matrix:
            return combine(np.take_along_axis(made, order, axis=1))

        loud = problem.activation[scope][layer] if problem.has_units else np.abs(scores).mean(0).astype(np.float64)
        nulls = by_chance(again, len(scores), loud, generator=problem.generator(layer), free=MANY)
        yield Found(combine(made), *nulls, matched_on)


def _directions(scores: Scores, top: int) -> Features:
    size = np.abs(scores).astype(np.float64)
    norm = np.linalg.norm(size, axis=1, keepdims=True)
    return np.divide(size, norm, out=np.zeros_like(size), where=norm > 0)


def _products(directions: Features) -> Matrix:
    return directions @ directions.T


def _marks(scores: Scores, top: int) -> Features:
    return top_sets(scores, top).astype(np.float64)


def _shared(marks: Features) -> Matrix:
    shared = marks @ marks.T
    size = marks.sum(1)
    union = size[:, None] + size[None] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)

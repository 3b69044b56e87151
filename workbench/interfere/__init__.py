"""How facts collide, per layer: shared units, keys, gradients and suppression, each against its nulls.

A measure is one function and one line in `METRICS`.
"""

from workbench.interfere.measures import METRICS, Measure, checked_metrics, interference
from workbench.interfere.overlap import cosine, jaccard, top_sets
from workbench.interfere.problem import Found, Problem
from workbench.interfere.result import (
    colliding_pairs,
    conflict_rates,
    key_statistics,
    predicted_change,
    within_across,
)

__all__ = [
    "METRICS",
    "Found",
    "Measure",
    "Problem",
    "checked_metrics",
    "colliding_pairs",
    "conflict_rates",
    "cosine",
    "interference",
    "jaccard",
    "key_statistics",
    "predicted_change",
    "top_sets",
    "within_across",
]

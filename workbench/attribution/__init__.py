"""Which FFN units carry each fact: methods that score every unit of every layer, on one engine."""

from workbench.attribution.methods import METHODS, Problem
from workbench.attribution.scoring import attribute, batches, score_batch
from workbench.attribution.settings import FIXED, STEPS, Settings, checked_settings
from workbench.attribution.summaries import by_fact, by_layer, strongest

__all__ = [
    "FIXED",
    "METHODS",
    "STEPS",
    "Problem",
    "Settings",
    "attribute",
    "batches",
    "by_fact",
    "by_layer",
    "checked_settings",
    "score_batch",
    "strongest",
]

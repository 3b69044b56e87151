"""Which FFN units carry each fact: methods that score every unit of every layer, on one engine."""

from workbench.attribution.methods import LAYER_BY_LAYER, METHODS, Problem
from workbench.attribution.scoring import Work, attribute, batches, prepare, score_batch
from workbench.attribution.settings import FIXED, STEPS, Settings, checked_settings, filled_in
from workbench.attribution.summaries import by_fact, by_layer, fact_means, strongest

__all__ = [
    "FIXED",
    "LAYER_BY_LAYER",
    "METHODS",
    "STEPS",
    "Problem",
    "Settings",
    "Work",
    "attribute",
    "batches",
    "by_fact",
    "by_layer",
    "checked_settings",
    "fact_means",
    "filled_in",
    "prepare",
    "score_batch",
    "strongest",
]

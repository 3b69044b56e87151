"""How far each fact is from its semantic target, how far it moved, and which trained weights moved it.

Definitions of ours, after the findings of "Semantic are Beacons" (arXiv 2405.18292), whose equations were not at hand.
"""

from workbench.distances import embedding_distance, soft_distance, toward_and_off
from workbench.semantics.anchors import ANCHORS, Target, target_of
from workbench.semantics.blame import attribute_drift, drift_shares
from workbench.semantics.distance import DISTANCES, distance_summary, semantic_distance
from workbench.semantics.drift import METRICS, measure_drift, noise_floor, pushed_away
from workbench.semantics.filtered import filter_inputs
from workbench.semantics.reverting import changed_units, elsewhere, reverted
from workbench.semantics.similarity import linear_cka, rsa, similarity

__all__ = [
    "ANCHORS",
    "DISTANCES",
    "METRICS",
    "Target",
    "attribute_drift",
    "changed_units",
    "distance_summary",
    "drift_shares",
    "elsewhere",
    "embedding_distance",
    "filter_inputs",
    "linear_cka",
    "measure_drift",
    "noise_floor",
    "pushed_away",
    "reverted",
    "rsa",
    "semantic_distance",
    "similarity",
    "soft_distance",
    "target_of",
    "toward_and_off",
]

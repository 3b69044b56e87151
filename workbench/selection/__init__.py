"""Which units of which layers are trained: `Selection`, and the strategies that make one from attribution scores."""

from workbench.selection.aware import COLLISIONS, OVERLAPS, WEIGHTS
from workbench.selection.mask import Selection
from workbench.selection.stability import agreement, stability
from workbench.selection.strategies import READ_INTERFERENCE, STRATEGIES, check_choice, select
from workbench.selection.voting import SCORES, keep, marks, votes

__all__ = [
    "COLLISIONS",
    "OVERLAPS",
    "READ_INTERFERENCE",
    "SCORES",
    "STRATEGIES",
    "WEIGHTS",
    "Selection",
    "agreement",
    "check_choice",
    "keep",
    "marks",
    "select",
    "stability",
    "votes",
]

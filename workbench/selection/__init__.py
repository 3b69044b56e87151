"""Which units of which layers are trained: `Selection`, and the strategies that make one from attribution scores."""

from workbench.selection.mask import Selection
from workbench.selection.strategies import SCORES, STRATEGIES, keep, marks, select, votes

__all__ = ["SCORES", "STRATEGIES", "Selection", "keep", "marks", "select", "votes"]

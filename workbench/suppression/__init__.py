"""Suppress or enhance chosen units, and the test by which a way of choosing them is judged."""

from workbench.intervals import means
from workbench.suppression.curve import suppression_curve
from workbench.suppression.reading import Intervention, compare, enhance, scaled, suppress

__all__ = ["Intervention", "compare", "enhance", "means", "scaled", "suppress", "suppression_curve"]

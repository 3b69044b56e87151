"""A dry run: how many passes, how much memory, disk and time an attribution will take, from a short measurement."""

from workbench.planning.counting import QUERIES
from workbench.planning.measuring import plan
from workbench.planning.plan import Plan, Sample

__all__ = ["QUERIES", "Plan", "Sample", "plan"]

"""Many interventions in one pass: the engine that scores every unit of every layer at once."""

from workbench.engine.check import check_engine
from workbench.engine.queries import Batch, Clean, Points, clean_gradients, make_batch, run_clean, run_queries

__all__ = ["Batch", "Clean", "Points", "check_engine", "clean_gradients", "make_batch", "run_clean", "run_queries"]

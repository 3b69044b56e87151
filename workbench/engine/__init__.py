"""Many interventions in one pass: the engine that scores every unit of every layer at once."""

from workbench.engine.batch import Batch, copies, make_batch
from workbench.engine.check import check_engine
from workbench.engine.clean import Clean, run_clean
from workbench.engine.queries import Points, clean_gradients, run_queries
from workbench.engine.reading import readout
from workbench.engine.room import FACTS_PER_PASS, ROWS_PER_PASS, Room, out_of_memory, room_for

__all__ = [
    "FACTS_PER_PASS",
    "ROWS_PER_PASS",
    "Batch",
    "Clean",
    "Points",
    "Room",
    "check_engine",
    "clean_gradients",
    "copies",
    "make_batch",
    "out_of_memory",
    "readout",
    "room_for",
    "run_clean",
    "run_queries",
]

"""The `workbench` command: the same verbs as the package, and nothing that computes.

Rooms that need torch are imported inside the commands, so that `--help` is quick.
"""

import logging
import sys

from cyclopts import CycloptsError

from workbench.cli import (
    change,
    drifting,
    exchange,
    filtering,
    implant,
    interfering,
    knowledge,
    learning,
    neurons,
    selecting,
    straight,
    tracing,
)
from workbench.cli.app import app

__all__ = [
    "app",
    "change",
    "drifting",
    "exchange",
    "filtering",
    "implant",
    "interfering",
    "knowledge",
    "learning",
    "main",
    "neurons",
    "selecting",
    "straight",
    "tracing",
]


def main() -> None:
    """Run the command: bad input gives one sentence and exit code 1, Ctrl-C gives 130."""
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    logging.basicConfig(handlers=[handler], format="%(message)s")
    try:
        app(sys.argv[1:], exit_on_error=False, print_error=True)
    except CycloptsError:
        sys.exit(2)
    except KeyboardInterrupt:
        print(
            "Stopped; what a run folder or a zarr --out holds is kept, and the same command goes on.", file=sys.stderr
        )
        sys.exit(130)
    except (ValueError, OSError) as error:
        damaged = "checksum do not match" in str(error)  # what zarr says of numbers, when they are read
        hint = "a stored attribution is damaged; run the same attribution again, which computes only what is lost."
        print(f"workbench: {hint if damaged else error}", file=sys.stderr)
        sys.exit(1)
    except (RuntimeError, MemoryError) as error:
        from workbench.engine import out_of_memory

        if not out_of_memory(error):
            raise
        print(
            "workbench: memory ran out: give fewer facts or a smaller batch, or use --dtype bfloat16.", file=sys.stderr
        )
        sys.exit(1)

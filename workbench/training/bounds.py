"""What a watch may be told."""

import math
from numbers import Integral
from typing import Any

from workbench.facts import FactSet
from workbench.training.probing import AWAY
from workbench.training.remedies import ACTIONS


def check_watch(watch: Any, probe: FactSet, retained: FactSet | None, most: int) -> None:
    """Raise `ValueError` with one sentence for what a `DriftWatch` was given and cannot mean."""
    if not len(probe) or (retained is not None and not len(retained)):
        raise ValueError("There is nothing to watch: the set of facts is empty.")
    unknown = [metric for metric in watch.metrics if metric not in AWAY]
    if unknown or not watch.metrics:
        raise ValueError(f"metric must be among {list(AWAY)}, not {list(watch.metrics)}.")
    if watch.action not in ACTIONS:
        raise ValueError(f"action must be one of {list(ACTIONS)}, not {watch.action!r}.")
    if watch.out is not None and watch.out.suffix not in (".parquet", ".csv"):
        raise ValueError(f"out must be a .parquet or .csv file, not {watch.out}.")
    counts = {"most": most, "layers": watch.layers} | ({} if watch.every == "auto" else {"every": watch.every})
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, Integral) or count < 1:
            either = '"auto" or ' if name == "every" else ""
            raise ValueError(f"{name} must be {either}a whole number, at least 1, not {count!r}.")
    for name, part in (("share", watch.share), ("factor", watch.factor)):
        if not 0 < part <= 1:
            raise ValueError(f"{name} must be above 0 and at most 1, not {part}.")
    for name, bound in (("drift", watch.drift), ("forgetting", watch.forgetting)):
        if bound is not None and not bound >= 0:
            raise ValueError(f"The bound on {name} must be at least 0, not {bound}.")
    if watch.forgetting is not None and watch.forgetting > 1:
        raise ValueError(f"The bound on forgetting is a share, at most 1, not {watch.forgetting}.")
    if watch.floor is not None and not math.isfinite(watch.floor):
        raise ValueError(f"floor must be a finite number, not {watch.floor}.")

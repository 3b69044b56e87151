"""What a watch may be told, and what it tells when training is over."""

import math
from numbers import Integral, Real
from typing import Any

from workbench.facts import FactSet
from workbench.models import HookedModel
from workbench.training.probing import AWAY
from workbench.training.remedies import ACTIONS


def check_watch(watch: Any, probe: Any, retained: Any, most: int) -> None:
    """Raise `ValueError` with one sentence for what a `DriftWatch` was given and cannot mean."""
    if not isinstance(watch.base, HookedModel):
        raise ValueError(f"base is a model as `load_model` opens it, not {watch.base!r:.80}.")
    for name, facts in (("probe", probe), ("retained", retained)):
        if not isinstance(facts, FactSet) and not (name == "retained" and facts is None):
            raise ValueError(f"{name} is a FactSet, as `load_facts` gives, not {facts!r:.80}.")
    numbers = {"share": watch.share, "factor": watch.factor, "drift": watch.drift, "forgetting": watch.forgetting}
    for name, value in {**numbers, "floor": watch.floor}.items():
        missing = value is None and name not in ("share", "factor")
        if isinstance(value, bool) or not (missing or isinstance(value, Real)):
            raise ValueError(f"{name} must be a number, not {value!r}.")
    if not len(probe) or (retained is not None and not len(retained)):
        raise ValueError("There is nothing to watch: the set of facts is empty.")
    unknown = [metric for metric in watch.metrics if not isinstance(metric, str) or metric not in AWAY]
    if unknown or not watch.metrics:
        raise ValueError(f"metric must be among {list(AWAY)}, not {list(watch.metrics)}.")
    if not isinstance(watch.action, str) or watch.action not in ACTIONS:
        raise ValueError(f"action must be one of {list(ACTIONS)}, not {watch.action!r}.")
    if watch.out is not None and getattr(watch.out, "suffix", None) not in (".parquet", ".csv"):
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


def _number(value: float | None, form: str) -> str:
    return "no finite number" if value is None else format(value, form)


def undone(watches: Any) -> list[str]:
    """What watches did at their bounds, a sentence each, from what `training.json` has of them.

    >>> undone([{"bounds": {"drift": 0.1, "forgetting": None}, "end": {"step": 4},
    ...          "acted": [{"step": 6, "action": "stop", "drift": 0.3, "restored_step": 4}]}])
    ['stopped at step 6 beyond the bound of 0.1 on drift (0.3); these are the weights of step 4']
    """
    sentences: list[str] = []
    for watch in watches:
        for one in watch["acted"]:
            told = " and ".join(
                f"of {_number(bound, 'g')} on {name} ({_number(one[name], '.3g')})"
                for name, bound in watch["bounds"].items()
                if name in one
            )
            at = f"at step {one['step']} beyond the bound {told}"
            if "restored_step" in one:
                start = "" if one["restored_step"] else ", the start: nothing was learned"
                sentences.append(f"stopped {at}; these are the weights of step {one['restored_step']}{start}")
            elif "frozen" in one:
                layers = ", ".join(map(str, one["frozen"]))
                what = f"layers {layers} were" if layers else "all that trained was"
                sentences.append(f"{what} put back {at}")
            else:
                sentences.append(f"the learning rate was lowered to {one['learning_rate']:.3g} {at}")
    return sentences

"""A watched training that goes on from a checkpoint: where its start is read, and what an earlier watch wrote."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from workbench.results import load_frame, save_frame, write_atomically

#: How far the start as it is read again may lie from the one that was written: two machines or types round apart.
CLOSE = {"rel_tol": 0.02, "abs_tol": 1e-3}


def check_resumed(step: int, model: nn.Module, base: nn.Module, action: str | None) -> None:
    """Raise one sentence where a training that goes on cannot be compared with its start, or not be acted upon.

    Raises:
        ValueError: the base model is itself in training, the trained model puts learned tokens before the text, or
            layers are to be frozen, whose weights of the start are not at hand.
    """
    trained = {parameter.data_ptr() for parameter in model.parameters() if parameter.requires_grad}
    reason = ""
    if any(parameter.data_ptr() in trained for parameter in base.parameters()):
        reason = "the weights in training are those of the base model: give a base model of its own"
    elif any(getattr(one, "is_prompt_learning", False) for one in getattr(model, "peft_config", {}).values()):
        reason = "its learned tokens change what the base model says from the start"
    elif action == "freeze_layers":
        reason = "freeze_layers needs the weights of the start: use stop or lower_rate"
    if reason:
        raise ValueError(f"The training goes on from step {step}, which cannot be watched: {reason}.")


def rows_until(step: int, path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a frame that was written before a step; none where there is no such file.

    Raises:
        ValueError: a file with other columns.
    """
    if not path.is_file():
        return []
    try:
        frame = pd.read_csv(path) if path.suffix == ".csv" else load_frame(path)
    except ValueError:  # an empty file, or no table at all
        frame = pd.DataFrame()
    if list(frame.columns) != list(columns):
        raise ValueError(f"{path} was not written by a watch of this kind, so the training cannot go on with it.")
    return [{str(name): value for name, value in row.items()} for row in frame[frame["step"] < step].to_dict("records")]


def check_same_start(earlier: Sequence[Mapping[str, Any]], start: Sequence[Mapping[str, Any]]) -> None:
    """Raise `ValueError` where the start that was written is not the one that is read from the base model now."""
    written = {(row["group"], row["metric"]): row for row in earlier if row["step"] == 0}
    for row in start:
        old = written.get((row["group"], row["metric"]), {"n": -1, "value": math.nan})
        known = not math.isnan(row["value"])  # of forgetting it is missing where nothing was known
        if old["n"] != row["n"] or (known and not math.isclose(old["value"], row["value"], **CLOSE)):
            raise ValueError(
                f"The trajectory to go on with started elsewhere than the base model does (in {row['metric']} of the "
                f"{row['group']} facts): give the base model and facts that it started with, or another file as out."
            )


def seconds_until(earlier: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Seconds since the start, and those of them that went into watching, at the last row.

    >>> seconds_until([{"seconds": 1.0, "cost": math.nan}, {"seconds": 12.0, "cost": 0.5}])
    (12.0, 4.0)
    """
    if not earlier:
        return 0.0, 0.0
    costs = [float(row["cost"]) for row in earlier if row["cost"] == row["cost"]]
    last = float(earlier[-1]["seconds"])
    return last, last * costs[-1] / (1 + costs[-1]) if costs else last


def beside(path: Path) -> Path:
    """Where the history of the transient drift lies beside a trajectory.

    >>> beside(Path("runs/watch.csv")).name
    'watch_transient.csv'
    """
    return path.with_name(f"{path.stem}_transient{path.suffix}")


def write_frame(frame: pd.DataFrame, path: Path) -> None:
    """Write a frame as `.csv` or `.parquet`, in full or not at all."""
    if path.suffix == ".csv":
        write_atomically(path, lambda partial: frame.to_csv(partial, index=False))
    else:
        save_frame(frame, path)

"""A learning rate for every method, with the same budget for each."""

import logging
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
from tqdm import tqdm

from workbench.config import TrainConfig
from workbench.facts import ExampleSet, FactSet
from workbench.models import HookedModel, load_model
from workbench.training.losses import DivergedError
from workbench.training.methods import Adapter
from workbench.training.run import TrainingRun, implant

log = logging.getLogger(__name__)

COLUMNS = ("trial", "learning_rate", "reached", "efficacy", "steps", "epochs", "seconds", "loss", "forgetting",
           "trainable_parameters", "diverged", "chosen")  # fmt: skip


def check_rates(rates: Sequence[float]) -> None:
    """Raise `ValueError` unless these are different positive numbers, one at least."""
    if not rates or len(set(rates)) < len(rates) or not all(0 < rate < float("inf") for rate in rates):
        raise ValueError(f"rates must be different positive numbers, got {list(rates)}.")


def search_learning_rate(
    model: Any,
    facts: FactSet | ExampleSet,
    adapter_factory: Callable[[], Adapter],
    rates: Sequence[float],
    *,
    train_config: TrainConfig | None = None,
    forgetting: Callable[[TrainingRun], float] | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Train once with every learning rate, and choose one; the same rates, epochs and seed are an equal budget.

    The rule: among the rates that reach the target efficacy the one that forgets least; without `forgetting` the one
    with the highest efficacy, then the fewest steps. Where no rate reaches the target, which is warned of, the one with
    the highest efficacy, then the lowest loss. Ties go to the smaller rate. A rate with which the loss becomes infinite
    is a trial like any other, and is never chosen.

    Args:
        model: a name or folder, or a `HookedModel`.
        facts: what to teach.
        adapter_factory: gives a fresh configuration for every trial.
        rates: learning rates to try, each once.
        train_config: everything else about the training; its own learning rate is not used.
        forgetting: how much a trained model forgot, the more the worse: called with every run that reached the target,
            while its adapter still lies on disk.
        progress: show a progress bar.

    Returns:
        One row a trial, in the order given: trial, learning_rate, reached, efficacy, steps, epochs, seconds, loss
        (nats, mean of the last epoch), forgetting, trainable_parameters, diverged, chosen. No row is chosen if all
        diverged.
    """
    check_rates(rates)
    hooked = model if isinstance(model, HookedModel) else load_model(model)
    settings = train_config or TrainConfig()
    rows = []
    for trial, rate in enumerate(tqdm(rates, unit="trial", desc="learning rate", disable=not progress)):
        chosen = settings.model_copy(update={"learning_rate": float(rate)})
        with tempfile.TemporaryDirectory(prefix="workbench-search-") as scratch:
            try:
                run = implant(hooked, facts, adapter_factory(), chosen, out=scratch, progress=False)
            except DivergedError:
                rows.append({"trial": trial, "learning_rate": float(rate), "reached": False, "diverged": True})
                continue
            lost = float(forgetting(run)) if forgetting is not None and run.reached else float("nan")
        rows.append(
            {name: run.summary[name] for name in ("efficacy", "steps", "epochs", "seconds", "trainable_parameters")}
            | {"trial": trial, "learning_rate": float(rate), "reached": run.reached, "diverged": False}
            | {"loss": _last_loss(run.history), "forgetting": lost}
        )
    frame = pd.DataFrame(rows).reindex(columns=list(COLUMNS))
    best = choose(frame)
    if best is not None and not frame["reached"].any() and settings.target_loss != 0:  # 0: there is no target
        log.warning("No learning rate reached the target; the one with the highest efficacy and lowest loss is taken.")
    return frame.assign(chosen=[trial == best for trial in frame["trial"]])


def _last_loss(history: pd.DataFrame) -> float:
    """The mean loss of the steps of the last epoch.

    >>> _last_loss(pd.DataFrame({"epoch": [0.5, 1.0, 1.5, 2.0], "loss": [4.0, 3.0, 2.0, 1.0]}))
    1.5
    """
    return float(history.loc[history["epoch"] > history["epoch"].max() - 1, "loss"].mean())


def choose(trials: pd.DataFrame) -> int | None:
    """The trial that the rule of `search_learning_rate` chooses, or None if every one diverged.

    >>> trials = pd.DataFrame({"trial": [0, 1, 2], "learning_rate": [1e-4, 1e-3, 1e-2], "reached": [False, True, True],
    ...     "efficacy": [0.5, 1.0, 1.0], "steps": [9, 8, 3], "forgetting": [0.0, 0.1, 0.3], "diverged": [False] * 3})
    >>> choose(trials), choose(trials.assign(forgetting=float("nan")))
    (1, 2)
    """
    left = trials[~trials["diverged"].astype(bool)]
    reached = left[left["reached"].astype(bool)]
    if reached["forgetting"].notna().any():
        ranked = reached.sort_values(["forgetting", "learning_rate"], kind="stable")
    elif reached.empty and "loss" in left:
        order = ["efficacy", "loss", "learning_rate"]
        ranked = left.sort_values(order, ascending=[False, True, True], kind="stable")
    else:
        ranked = left.sort_values(["efficacy", "steps", "learning_rate"], ascending=[False, True, True], kind="stable")
    return int(ranked["trial"].iloc[0]) if len(ranked) else None

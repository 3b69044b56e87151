"""Watching drift and forgetting while a model is trained, in any Trainer, and doing something about it at a bound."""

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from workbench.facts import FactSet
from workbench.models import HookedModel
from workbench.results import finite
from workbench.training import transient
from workbench.training.bounds import check_watch
from workbench.training.probing import AWAY, Seen, blocks_of, device_of, growth, read_probe
from workbench.training.remedies import ACTIONS, Situation, keep_trainable
from workbench.training.resuming import beside, check_resumed, check_same_start, rows_until, seconds_until, write_frame
from workbench.training.transient import Transient

log = logging.getLogger(__name__)

COLUMNS = ("step", "seconds", "group", "metric", "n", "value", "change", "worst", "pushed", "cost")


class DriftWatch(TrainerCallback):
    """Reads a few facts while any Trainer trains any model, keeps their trajectory, and acts when a bound is crossed.

    At the start (theta_0, before the first step), every k optimiser steps and at the end, the facts are read from the
    model in training, in evaluation mode and without gradients; modes and random states are put back, so that the
    weights are the same to the bit with the watch as without. Optimiser steps are counted, whatever the accumulation.

    Bounds hold for the retained facts. Drift is the mean change of the first metric since the start, counted away from
    the answer (a fall of `logprob`); forgetting is the share of the facts answered at the start that are not answered
    any more (greedily, every token). A bound is crossed by more than its value, and by a number that is not finite.
    What is done then, at every reading that is beyond a bound:

    - `stop`: training stops and the trainable weights go back to the last reading within the bounds, at worst to the
      start, so that the run ends within them. A copy of the trainable weights is kept on the CPU. The last step is
      always read.
    - `lower_rate`: the learning rates, and those that the schedule goes back to, are multiplied by `factor`.
    - `freeze_layers`: the worst `layers` layers are dropped: their trainable weights go back to the start and stay
      there. With s_l the mean over the retained facts of `1 - cos` between the residual stream after block l at the
      last prompt token and the same at the start, the worst are those where `s_l - s_(l-1)` is largest (s_(-1) = 0),
      among the layers that still train; at a tie the lower. Where no layer is left, what trains outside of the layers
      goes back to the start too and training stops. After the last step nothing is frozen and no rate is lowered.

    A training that goes on from a checkpoint keeps its start: theta_0 is then read from `base`, and the rows of a
    trajectory at `out` up to the checkpoint stay. The weights of the start are not at hand there: `stop` goes back to
    the checkpoint at worst, and `freeze_layers` is refused.

    Args:
        base: the model that training started from: its tokenizer, embedding and names of blocks are used. Its
            embedding stays as it is also where the trained model shares its weights.
        probe: facts to watch.
        every: optimiser steps between readings; `auto` reads as often as `share` allows.
        retained: facts that the bounds hold for; None takes the probe.
        metric: one or several of `d_soft` (the cheapest), `d_emb`, `logprob` (nats).
        share: with `auto`, the most seconds of watching per second of training. A reading is taken when what was
            spent, it and the one at the end stay within the share, each taken to last as long as the slowest so far.
            The start and the end are always read: a training shorter than that pays for is beyond, and `summary`
            says so.
        each_epoch: read at the end of every epoch too, whatever that costs: for bounds, which hold at readings only.
        drift: bound on drift.
        forgetting: bound on forgetting, 0 to 1.
        action: `stop`, `lower_rate` or `freeze_layers`.
        factor: of `lower_rate`.
        layers: of `freeze_layers`.
        floor: noise floor of the first metric (see `noise_floor`), for the share of facts pushed away beyond it.
        most: read at most so many facts of each set, drawn by `seed`.
        out: a `.parquet` or `.csv` file for the trajectory, written in full at every reading; beside it goes
            `<name>_transient`, a row each time a fact went farther than before, the last of which is its `transient`.
        seed: of the draw.
        clock: seconds; for tests.

    Raises:
        ValueError: empty sets, unknown metrics or actions, impossible numbers; at the start of training a model that is
            not `base` trained, or a bound on forgetting where nothing is known; at a checkpoint, a start that cannot be
            read or is another than the one at `out`, or a bound with `stop` that is crossed already.
    """

    def __init__(
        self,
        base: HookedModel,
        probe: FactSet,
        *,
        every: int | Literal["auto"] = "auto",
        retained: FactSet | None = None,
        metric: str | tuple[str, ...] | list[str] = "d_soft",
        share: float = 0.05,
        each_epoch: bool = False,
        drift: float | None = None,
        forgetting: float | None = None,
        action: str = "stop",
        factor: float = 0.5,
        layers: int = 1,
        floor: float | None = None,
        most: int = 16,
        out: str | Path | None = None,
        seed: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.base = base
        self.metrics = tuple(metric) if isinstance(metric, tuple | list) else (metric,)
        self.every, self.share, self.each_epoch, self.floor = every, share, each_epoch, floor
        self.seed, self.clock = seed, clock
        self.drift, self.forgetting, self.action, self.factor, self.layers = drift, forgetting, action, factor, layers
        self.out = Path(out) if isinstance(out, str) else out
        check_watch(self, probe, retained, most)
        given = {"probe": probe} | ({} if retained is None else {"retained": retained})
        self.groups = {name: base.tokenise(facts.at_most(most, seed)) for name, facts in given.items()}
        self.bounded = "probe" if retained is None else "retained"
        self._restart()

    def _restart(self) -> None:
        """Forget what an earlier training left."""
        self.rows: list[dict[str, Any]] = []
        self.acted: list[dict[str, Any]] = []
        self.costs: list[float] = []
        self.start: dict[str, Seen] = {}
        self.kept: dict[str, Tensor] = {}
        self.farthest = Transient()
        self.kept_step = self.last_step = self.end_step = 0
        self.started, self.spent, self.total = self.clock(), 0.0, 0.0

    @property
    def trajectory(self) -> pd.DataFrame:
        """One row a reading, group and metric.

        Columns: step; seconds since the start; group (probe or retained); metric (forgetting too); n facts; value (mean
        over facts; of forgetting the share, missing where none was known); change since the start; worst (the change of
        the fact that moved farthest away); pushed (share of facts beyond the floor); cost (seconds of watching so far
        per second of training, missing at the start).
        """
        return pd.DataFrame(self.rows, columns=list(COLUMNS))

    @property
    def transient(self) -> pd.DataFrame:
        """How far every fact was from its start at most, over all readings: the transient drift.

        Columns: group; fact; metric; most (the largest change since the start, counted away from the answer, so that it
        is at least 0); step (the first at which it was read). After a training that went on from a checkpoint, with
        the same `out`, readings before the checkpoint count and those that were undone do not.
        """
        return self.farthest.frame

    @property
    def summary(self) -> dict[str, Any]:
        """What was watched, what it cost, what was done and where the run ended, as plain values."""
        training = max(self.total - self.spent, 0.0)
        cost = self.spent / training if training > 0 else None
        told = {
            "metric": self.metrics[0],
            "facts": {name: len(facts) for name, facts in self.groups.items()},
            "every": self.every,
            "readings": len(self.costs),
            "seconds_watching": self.spent,
            "seconds_training": training,
            "cost": cost,
            "share": self.share if self.every == "auto" else None,
            "within_share": None if self.every != "auto" or cost is None else cost <= self.share,
            "bounds": {"drift": self.drift, "forgetting": self.forgetting},
            "end": self._end(),
            "action": self.action,
            "acted": list(self.acted),
            "transient": self.farthest.means(self.metrics[0]),
            "seed": self.seed,
        }
        return finite(told)

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Read theta_0 from the model itself, and keep its trainable weights where they may be wanted."""
        self._restart()
        trained = {parameter.data_ptr() for parameter in model.parameters() if parameter.requires_grad}
        W_E = self.base.W_E.detach()
        self.W_E = (W_E.clone() if W_E.data_ptr() in trained else W_E).to(device_of(model))
        layered = self.action == "freeze_layers" and self._bounds()
        if state.global_step > 0:
            self._resume(state.global_step, model)
        self.blocks = blocks_of(model, self.base.block_names) if layered else []
        self.last_step = state.global_step
        self._reading(state, control, {"model": model, **kwargs})
        if self.forgetting is not None and not self.start[self.bounded].known.any():
            raise ValueError(
                f"The model answers none of the {len(self.groups[self.bounded])} {self.bounded} facts at the start, so "
                "forgetting has no bound: give facts that it knows as retained."
            )

    def _resume(self, step: int, model: nn.Module) -> None:
        """Take the start from the base model, and the rows and seconds before this step from an earlier trajectory."""
        began = self.clock()
        check_resumed(step, model, self.base.hf, self.action if self._bounds() else None)
        W_E = self.W_E.to(self.base.device)
        self.start = {name: read_probe(self.base.hf, facts, W_E, self.metrics) for name, facts in self.groups.items()}
        rows = [row for name, seen in self.start.items() for row in self._rows(name, seen)]
        self.rows = [] if self.out is None else rows_until(step, self.out, COLUMNS)
        self.farthest.take([] if self.out is None else rows_until(step, beside(self.out), transient.COLUMNS))
        if self.rows:
            check_same_start(self.rows, rows)
        else:
            self.rows = [{"step": 0, "seconds": 0.0} | row | {"cost": math.nan} for row in rows]
        seconds, self.spent = seconds_until(self.rows)
        self.spent += self.clock() - began
        self.started -= seconds

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Keep what began to train since the last reading, whichever callback unfroze it, before it changes."""
        if self._bounds() and self.action in ("stop", "freeze_layers"):
            began = self.clock()
            keep_trainable(model, self.kept, new=True)
            self.spent += self.clock() - began

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Read when it is time to, and at the last step in any case."""
        last = state.global_step >= state.max_steps > 0
        if last or self._due(state.global_step):
            self._reading(state, control, kwargs, last=last)

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Read where every epoch is asked for, unless the step was read just now."""
        if self.each_epoch and state.global_step != self.last_step:
            self._reading(state, control, kwargs)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Read the end where it was not read, as after a stop by others or where a better checkpoint was loaded."""
        if state.global_step != self.last_step or getattr(args, "load_best_model_at_end", False):
            self._reading(state, control, kwargs, last=True)
        self.total = self.clock() - self.started
        cost = self.summary["cost"]
        if self.summary["within_share"] is False and not self.each_epoch:
            log.warning(
                "Watching took %.0f%% of the training's time, more than %.0f%%: the training was too short for its %d "
                "readings.", 100 * cost, 100 * self.share, len(self.costs),
            )  # fmt: skip

    def _bounds(self) -> bool:
        return self.drift is not None or self.forgetting is not None

    def _due(self, step: int) -> bool:
        """Whether to read after this step."""
        if self.every != "auto":
            return step % int(self.every) == 0
        own = self.clock() - self.started - self.spent
        expected = max(self.costs[1:] or self.costs)  # the first is of a model that may have to warm up
        return self.spent + 2 * expected <= self.share * own

    def _reading(
        self, state: TrainerState, control: TrainerControl, objects: dict[str, Any], last: bool = False
    ) -> None:
        """Read every group, act on what was read, and write it down; all of it counts as a cost."""
        began = self.clock()
        model: nn.Module = objects["model"]
        seen = {
            name: read_probe(model, facts, self.W_E, self.metrics, self.blocks if name == self.bounded else ())
            for name, facts in self.groups.items()
        }
        first = not self.costs
        self.start = self.start or seen
        self.last_step = self.end_step = state.global_step
        rows = [row for name in seen for row in self._rows(name, seen[name])]
        crossed = [] if first else self._crossed(rows)
        if first and state.global_step > 0 and self.action == "stop" and (beyond := self._crossed(rows)):
            raise ValueError(
                f"The training goes on from step {state.global_step}, which is beyond the bound on {beyond[0][0]} "
                "already: go on from an earlier checkpoint."
            )
        if crossed and (self.action == "stop" or not last):
            stops, done = ACTIONS[self.action](self._situation(objects, seen[self.bounded]))
            control.should_training_stop = control.should_training_stop or stops
            self.end_step = self.kept_step if stops else self.end_step
            self.acted.append({"step": state.global_step, "action": self.action, **dict(crossed), **done})
        elif self._bounds() and (self.action == "stop" or (self.action == "freeze_layers" and first)):
            self.kept_step = state.global_step
            keep_trainable(model, self.kept)
        own = began - self.started - self.spent
        now = {"step": state.global_step, "seconds": self.clock() - self.started}
        cost = (self.spent + self.clock() - began) / own if own > 0 and not first else math.nan
        self.rows += [now | row | {"cost": cost} for row in rows]
        self._write()
        self.costs.append(self.clock() - began)
        self.spent += self.costs[-1]
        self.total = self.clock() - self.started

    def _rows(self, group: str, seen: Seen) -> list[dict[str, Any]]:
        """The metrics of one group, means over its facts."""
        start, rows = self.start[group], []
        for metric, values in seen.values.items():
            change = values - start.values[metric]
            away = AWAY[metric] * change
            self.farthest.note(group, self.groups[group], metric, away.tolist(), self.last_step)
            beyond = math.nan
            if self.floor is not None and metric == self.metrics[0]:
                beyond = float((away > self.floor).double().mean())
            rows.append(
                {"group": group, "metric": metric, "n": len(values), "value": float(values.mean()),
                 "change": float(change.mean()), "worst": AWAY[metric] * float(away.max()), "pushed": beyond}
            )  # fmt: skip
        known = int(start.known.sum())
        lost = int((start.known & ~seen.known).sum()) / known if known else math.nan
        nothing = {"change": lost, "worst": math.nan, "pushed": math.nan}
        return [*rows, {"group": group, "metric": "forgetting", "n": known, "value": lost, **nothing}]

    def _crossed(self, rows: list[dict[str, Any]]) -> list[tuple[str, float]]:
        """The bounds that a reading is beyond, with its values; what is not a number is beyond."""
        values = self._bounded_values(rows)
        bounds = {"drift": self.drift, "forgetting": self.forgetting}
        return [(name, values[name]) for name, most in bounds.items() if most is not None and not values[name] <= most]

    def _bounded_values(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """Drift and forgetting of a reading, of the facts that the bounds hold for."""
        change = {row["metric"]: row["change"] for row in rows if row["group"] == self.bounded}
        return {"drift": AWAY[self.metrics[0]] * change[self.metrics[0]], "forgetting": change["forgetting"]}

    def _end(self) -> dict[str, Any]:
        """Where training ended: after a stop, where it went back to; with a better checkpoint loaded, the last step."""
        rows = [row for row in self.rows if row["step"] == self.end_step]
        within = not self._crossed(rows) if rows and self._bounds() else None
        return {"step": self.end_step, **(self._bounded_values(rows) if rows else {}), "within_bounds": within}

    def _situation(self, objects: dict[str, Any], seen: Seen) -> Situation:
        """What a remedy has to go by."""
        before = self.start[self.bounded].states
        return Situation(
            model=objects["model"], optimizer=objects.get("optimizer"), scheduler=objects.get("lr_scheduler"),
            kept=self.kept, kept_step=self.kept_step, factor=self.factor, layers=self.layers,
            block_names=self.base.block_names,
            grown=None if before is None or seen.states is None else growth(before, seen.states),
        )  # fmt: skip

    def _write(self) -> None:
        """Write the whole trajectory, so that a run that is killed keeps it."""
        if self.out is None:
            return
        write_frame(self.trajectory, self.out)
        write_frame(self.farthest.history, beside(self.out))

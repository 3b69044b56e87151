"""What does watching a training cost? Transformers' Trainer with and without a `DriftWatch` at its defaults.

    python benchmarks/watch.py            # the default model, LoKI on 10% of the nodes, 120 facts: 10 epochs, and 1
    python benchmarks/watch.py --smoke    # a tiny random model, for tests

Trainings with and without alternate in one process. Beside the measured ratio stands the share of the training's
time that the watch states itself. See `README.md` beside this file.
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from interference import clocks, tiny_model
from loki_step import SHARE, loki, paired
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainingArguments

import workbench as wb
from workbench.config import TrainConfig
from workbench.facts import FactSet
from workbench.models import HookedModel
from workbench.results import provenance, save_json
from workbench.training import LEARNING_RATES, DriftWatch, collate, own_randomness

HERE = Path(__file__).resolve().parent


class ClockedWatch(DriftWatch):
    """A watch whose calls are timed from outside: `inside` is every second that the Trainer spent in it."""

    inside = 0.0

    def _clocked(self, event: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        started = time.perf_counter()
        event(*args, **kwargs)
        self.inside += time.perf_counter() - started

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Time the reading of the start."""
        self._clocked(super().on_train_begin, *args, **kwargs)

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Time what is kept before a step."""
        self._clocked(super().on_pre_optimizer_step, *args, **kwargs)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Time a step's end, with a reading or without."""
        self._clocked(super().on_step_end, *args, **kwargs)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Time the end."""
        self._clocked(super().on_train_end, *args, **kwargs)


@dataclass(frozen=True)
class Training:
    """A training that can be repeated, watched or not: the same weights, batches and steps every time."""

    base: HookedModel
    taught: FactSet
    probe: FactSet
    epochs: int

    def run(self, watched: bool) -> dict[str, Any]:
        """One training from the start: its seconds, seconds of CPU and losses, and what the watch says of itself."""
        model = loki(copy.deepcopy(self.base.hf))
        watch = [ClockedWatch(self.base, self.probe)] if watched else []
        with own_randomness(0), tempfile.TemporaryDirectory() as scratch:
            trainer = Trainer(
                model=model, args=self.arguments(scratch), train_dataset=self.base.tokenise(self.taught),
                data_collator=collate, callbacks=watch,
            )  # fmt: skip
            trainer.remove_callback(PrinterCallback)
            started = clocks()
            trainer.train()
            seconds, cpu = (after - before for after, before in zip(clocks(), started, strict=True))
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        told = [{**one.summary, "costs": one.costs, "inside": one.inside / (seconds - one.inside)} for one in watch]
        return {"seconds": seconds, "cpu_seconds": cpu, "losses": losses, "watch": told[0] if told else None}

    def arguments(self, folder: str) -> TrainingArguments:
        """Batches, rate and optimiser as `implant` has them by default."""
        settings = TrainConfig()
        return TrainingArguments(
            folder, num_train_epochs=self.epochs, per_device_train_batch_size=settings.batch_size,
            learning_rate=LEARNING_RATES["LOKI"], weight_decay=settings.weight_decay, lr_scheduler_type="constant",
            max_grad_norm=settings.max_grad_norm, optim="adamw_torch", logging_steps=1, save_strategy="no",
            report_to=[], disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False, use_cpu=True,
            seed=settings.seed,
        )  # fmt: skip


def check(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Raise unless every training, watched or not, has the same losses, and they fall."""
    first = runs["plain"][0]["losses"]
    if not first[-1] < first[0]:
        raise RuntimeError(f"The loss went from {first[0]:.3f} to {first[-1]:.3f}; the times mean nothing.")
    for one in [*runs["plain"], *runs["watched"]]:
        apart = [abs(a - b) for a, b in zip(one["losses"], first, strict=True)]
        if not all(gap < 1e-4 for gap in apart):
            raise RuntimeError(f"The losses of two trainings lie {max(apart):.1e} apart; the times mean nothing.")


def case(training: Training, repeats: int) -> dict[str, Any]:
    """Train in turn with and without the watch, the one that comes first changing, and compare in pairs."""
    runs: dict[str, list[dict[str, Any]]] = {"plain": [], "watched": []}
    for number in tqdm(range(repeats), unit="pair", desc=f"{training.epochs} epochs"):
        for way in ("plain", "watched") if number % 2 == 0 else ("watched", "plain"):
            runs[way].append(training.run(way == "watched"))
    check(runs)
    told = [one["watch"] for one in runs["watched"]]
    wall, cpu = (
        {way: [one[clock] for one in found] for way, found in runs.items()} for clock in ("seconds", "cpu_seconds")
    )
    stated = statistics.median(one["cost"] for one in told)
    least = statistics.median((one["costs"][0] + one["costs"][-1]) / one["seconds_training"] for one in told)
    return {
        "epochs": training.epochs,
        "steps": len(runs["plain"][0]["losses"]),
        "repeats": repeats,
        "readings": statistics.median(one["readings"] for one in told),
        "median_seconds": {way: statistics.median(found) for way, found in wall.items()},
        "share": told[0]["share"],
        "stated": stated,
        "inside": statistics.median(one["inside"] for one in told),
        "start_and_end": least,
        "within": verdict(stated, least, told[0]["share"]),
        "measured": paired(wall["watched"], wall["plain"]),
        "measured_cpu": paired(cpu["watched"], cpu["plain"]),
        "runs": runs,
    }


def verdict(stated: float, least: float, share: float) -> str:
    """Whether a watch stays within its share; it cannot where the start and the end alone, always read, are beyond.

    >>> verdict(0.08, 0.01, 0.1), verdict(0.16, 0.16, 0.1), verdict(0.11, 0.01, 0.1)
    ('yes', 'no, by design: too short', 'no')
    """
    if stated <= share:
        return "yes"
    return "no, by design: too short" if least > share else "no"


def table(found: dict[str, Any]) -> str:
    """The cases as one markdown table; the measured ratios are of pairs, with 95% intervals."""
    share = f"{found['cases'][0]['share']:.0%}"
    lines = [
        f"| epochs | steps | readings | s without | s with | stated | from outside | start and end alone | "
        f"within {share} | s with / without | CPU s with / without |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---|---:|---:|",
    ]
    for one in found["cases"]:
        seconds, ratio = one["median_seconds"], "{mean:.3f} ({low:.3f} to {high:.3f})"
        lines.append(
            f"| {one['epochs']} | {one['steps']} | {one['readings']:g} | {seconds['plain']:.1f} | "
            f"{seconds['watched']:.1f} | {one['stated']:.1%} | {one['inside']:.1%} | {one['start_and_end']:.1%} | "
            f"{one['within']} | {ratio.format(**one['measured'])} | {ratio.format(**one['measured_cpu'])} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> Path:
    """Measure the cases, print the table, write `watch.json` and `watch.md`, and give the former's path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="default's name, folder, .gguf file or hub id")
    parser.add_argument("--facts", type=int, default=120, help="how many fictional facts are taught")
    parser.add_argument("--epochs", type=int, nargs="+", default=[10, 1], help="several for several cases")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of a training with and one without")
    parser.add_argument("--smoke", action="store_true", help="a tiny random model, 6 facts, two pairs")
    parser.add_argument("--out", type=Path, default=HERE / "out", help="folder of the JSON and the table")
    options = parser.parse_args(arguments)
    taught, probe = wb.fictional(6 if options.smoke else options.facts), wb.load_facts("world")
    with tempfile.TemporaryDirectory() as scratch:
        name = tiny_model(Path(scratch) / "tiny", [*taught, *probe]) if options.smoke else options.model
        base = wb.load_model(str(name), dtype="float32")
        trainings = [Training(base, taught, probe, epochs) for epochs in ([8, 2] if options.smoke else options.epochs)]
        trainings[-1].run(watched=True)  # warms up
        cases = [case(training, 2 if options.smoke else options.repeats) for training in trainings]
    about = {"model": "tiny" if options.smoke else base.name, "facts": len(taught), "node_share": SHARE,
             "batch_size": TrainConfig().batch_size, "threads": torch.get_num_threads()}  # fmt: skip
    found = {**about, "provenance": provenance(), "cases": cases}
    written = save_json(found, options.out / "watch.json")
    (options.out / "watch.md").write_text(table(found) + "\n", encoding="utf-8")
    print(table(found))
    return written


if __name__ == "__main__":
    print(main())

"""One training path for LoKI and for every baseline: transformers' Trainer over any configuration."""

import logging
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from workbench.config import TrainConfig
from workbench.facts import ExampleSet, FactSet
from workbench.loki import expected_warnings, refuse_unmergeable, trainable_parameters
from workbench.models import HookedModel, load_model
from workbench.results import save_frame, save_json
from workbench.training.batches import Tokenised, collate, efficacy, tokenise
from workbench.training.cards import card, hub_id
from workbench.training.losses import DivergedError, SemanticLoss, weighing_all
from workbench.training.methods import Adapter, attached, kind_of, rounded, save, scheduled, starting_point, trainer_for
from workbench.training.watching import DriftWatch

log = logging.getLogger(__name__)

#: AdamW's learning rate where the user names none, by method.
LEARNING_RATES = {
    "LOKI": 1e-3,
    "LORA": 2e-3,
    "ADALORA": 5e-3,
    "SHIRA": 5e-3,
    "IA3": 2e-2,
    "LN_TUNING": 5e-3,
    "FULL": 5e-5,
}


@dataclass(frozen=True)
class TrainingRun:
    """A finished training: where its adapter lies, how it went, and the trained model.

    `history` has one row an optimiser step: step, epoch, loss (nats per learned token; KaSA and AdaLoRA add terms of
    their own), efficacy (share of trained prompts answered greedily; missing where it was not measured),
    learning_rate, seconds since the start. A loss other than plain adds nll (plain cross-entropy, nats per learned
    token) and, where it has weights, weight_mean, weight_min and weight_max over the step's tokens. `adapter` is a
    folder of peft, or a model of transformers for `Dense`.
    """

    adapter: Path
    history: pd.DataFrame
    summary: dict[str, Any]
    model: nn.Module = field(repr=False)

    @property
    def efficacy(self) -> float:
        """Share of the trained prompts that the model answers at the end."""
        return float(self.summary["efficacy"])

    @property
    def reached(self) -> bool:
        """Whether training stopped because the target efficacy was reached."""
        return bool(self.summary["reached"])


def implant(
    model_path: Any,
    facts: FactSet | ExampleSet,
    adapter: Adapter,
    train_config: TrainConfig | None = None,
    *,
    out: str | Path | None = None,
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainingRun:
    """Teach a model new facts, or a person's own examples, through an adapter, until it answers them.

    The loss is cross-entropy on the answer's tokens only (of an example: its completion, or the assistant's turns), or
    by `train_config.loss` one that attends to meaning (see `semantic_loss`; sample weights are of all samples here).
    After every epoch the trained prompts are asked; training stops at `train_config.target_efficacy`, or at
    `target_loss` where that is given, or after `max_epochs`. At one seed every method sees the same examples in the
    same order. The base model is left as it is.

    Args:
        model_path: a name or folder, or a `HookedModel`.
        facts: what to teach; of facts the prompts, and as many paraphrases as `train_config.paraphrases`.
        adapter: any peft configuration that changes weights (`LokiConfig`, `LoraConfig`, ...) or `Dense`; `adapter_for`
            makes them by name.
        train_config: rates, stopping and seed.
        out: folder for `adapter/` (safetensors), `history.parquet` and `training.json`; None is a temporary folder.
        progress: show a progress bar.
        callbacks: of your own, such as a `DriftWatch`; with any, efficacy is measured once more after they ended.

    Raises:
        TypeError: an adapter that is no configuration.
        ValueError: an adapter that learns tokens, no facts, a fact or examples longer than the context, or a loss that
            is not finite.
    """
    settings = train_config or TrainConfig()
    if not isinstance(adapter, Adapter):
        raise TypeError(f"adapter is a configuration, as adapter_for and LokiConfig make them, not {adapter!r:.80}.")
    refuse_unmergeable(adapter)
    if not len(facts):
        raise ValueError("There is nothing to implant: the fact set is empty.")
    hooked = model_path if isinstance(model_path, HookedModel) else load_model(model_path)
    items = tokenise(hooked, facts, settings.paraphrases)
    folder = Path(out) if out is not None else Path(tempfile.mkdtemp(prefix="workbench-implant-"))
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder as out.")
    method = kind_of(adapter)
    rate = settings.learning_rate or LEARNING_RATES.get(method, 1e-4)
    loss = None if settings.loss == "plain" else SemanticLoss(settings, hooked.W_E)
    watch = _Watch(items, settings, progress, loss)
    with own_randomness(settings.seed):
        args = _arguments(settings, rate, hooked.device, folder)
        model, seconds = _train(hooked, items, adapter, args, watch, callbacks)
    history = pd.DataFrame(watch.rows)
    summary = {
        "trainable_parameters": trainable_parameters(model),
        "parameters": sum(parameter.numel() for parameter in hooked.hf.parameters()),
        "efficacy": watch.efficacy,
        "target_efficacy": settings.target_efficacy,
        "target_loss": settings.target_loss,
        "reached": watch.reached,
        "steps": len(history),
        "epochs": int(watch.epochs),
        "seconds": round(seconds, 2),
        "learning_rate": rate,
        "seed": settings.seed,
        "examples": len(items),
        "facts": facts.name,
        "fact_digest": facts.digest,
        "base": hooked.name,
        "base_hub_id": hub_id(hooked.name, hooked.path),
        "base_digest": hooked.digest,
        "base_dtype": str(hooked.dtype).removeprefix("torch."),
        "peft_type": method,
        "rank": getattr(adapter, "target_r", getattr(adapter, "r", None)),
        **({"loss": "plain"} if watch.loss is None else watch.loss.summary()),
    }
    watches = [one.summary for one in callbacks if isinstance(one, DriftWatch)]
    summary |= {"watches": watches} if watches else {}
    (folder / "adapter" / "README.md").write_text(card(summary), encoding="utf-8")
    save_frame(history, folder / "history.parquet")
    save_json(summary, folder / "training.json")
    return TrainingRun(folder / "adapter", history, summary, model)


def _train(
    hooked: HookedModel,
    items: Sequence[Tokenised],
    adapter: Adapter,
    args: TrainingArguments,
    watch: "_Watch",
    given: Sequence[TrainerCallback],
) -> tuple[nn.Module, float]:
    """Train an adapter on a copy of the model and save it: the trained model, and the seconds that training took."""
    adapter = scheduled(adapter, len(items), args.per_device_train_batch_size, int(args.num_train_epochs))
    model = attached(hooked, adapter, items)
    make, callbacks = trainer_for(adapter)
    collator: Any = collate
    if watch.loss is not None:
        make, refresh, collator = weighing_all(watch.loss, items, make)
        callbacks = [*callbacks, refresh]
    with starting_point(model, adapter) as start:
        trainer = make(
            model=model, args=args, train_dataset=_Examples(items), data_collator=collator,
            callbacks=[*callbacks, *given, watch], compute_loss_func=watch.loss,
        )  # fmt: skip
        for callback in _printing_callbacks(trainer):
            trainer.remove_callback(callback)
        started = time.perf_counter()
        with expected_warnings():
            trainer.train()
        seconds = time.perf_counter() - started
        model.eval()
        if rounded(model, hooked) or given:  # a callback may have put weights back
            watch.measure(model)
        save(model, Path(args.output_dir or ".") / "adapter", hooked.tokenizer, start)
    return model, seconds


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Seed every generator inside the `with`, and leave the caller's as they were."""
    python, array = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        set_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)


class _Examples(torch.utils.data.Dataset):
    """Tokenised facts or examples as the dataset that Trainer draws from."""

    def __init__(self, items: Sequence[Tokenised]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Tokenised:
        return self.items[index]


class _Watch(TrainerCallback):
    """Keeps the history, measures efficacy after every epoch, and stops at the target."""

    def __init__(
        self, items: Sequence[Tokenised], settings: TrainConfig, progress: bool, loss: SemanticLoss | None = None
    ) -> None:
        self.items, self.settings, self.loss = items, settings, loss
        self.rows: list[dict[str, Any]] = []
        self.efficacy, self.epochs, self.reached = 0.0, 0.0, False
        self.bar = tqdm(total=settings.max_epochs, unit="epoch", desc="implant", disable=not progress)
        self.started = time.perf_counter()

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        loss = float(logs["loss"])
        if loss != loss or loss in (float("inf"), float("-inf")):
            raise DivergedError(f"The loss became {loss} at step {state.global_step}: use a smaller learning rate.")
        row = {"step": state.global_step, "epoch": float(state.epoch or 0), "loss": loss, "efficacy": float("nan")}
        seconds = time.perf_counter() - self.started
        row |= {"learning_rate": float(logs.get("learning_rate", "nan")), "seconds": seconds}
        self.rows.append(row | (self.loss.taken() if self.loss is not None else {}))

    def on_epoch_end(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self.epochs = float(state.epoch or 0)
        self.measure(model)
        self.bar.update(1)
        self.bar.set_postfix(efficacy=f"{self.efficacy:.2f}", loss=f"{self.rows[-1]['loss']:.3f}" if self.rows else "")
        control.should_training_stop = control.should_training_stop or self.reached

    def measure(self, model: nn.Module) -> None:
        """Ask the trained prompts, and say whether that is enough."""
        self.efficacy = efficacy(model, self.items)
        if self.rows:
            self.rows[-1]["efficacy"] = self.efficacy
        self.reached = self._reached()

    def _reached(self) -> bool:
        """Whether the model answers enough, or has a loss as small as asked for."""
        if self.settings.target_loss is None:
            return self.efficacy >= self.settings.target_efficacy
        epoch = [row.get("nll", row["loss"]) for row in self.rows if row["epoch"] > self.epochs - 1]
        return self.settings.target_loss > 0 and float(np.mean(epoch)) <= self.settings.target_loss

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar.close()


def _arguments(settings: TrainConfig, rate: float, device: torch.device, folder: Path) -> TrainingArguments:
    """Trainer's arguments: constant rate, no checkpoints, no reporting, the device that the model is on."""
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch_size,
        num_train_epochs=settings.max_epochs,
        learning_rate=rate,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=device.type == "cpu",
        seed=settings.seed,
        data_seed=settings.seed,
    )


def _printing_callbacks(trainer: Trainer) -> list[TrainerCallback]:
    """Trainer's own callbacks that print to the terminal."""
    return [
        c for c in trainer.callback_handler.callbacks if type(c).__name__ in ("PrinterCallback", "ProgressCallback")
    ]

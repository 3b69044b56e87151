"""One training path for LoKI and for every baseline: transformers' Trainer over any peft configuration."""

import copy
import logging
import random
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from workbench.config import TrainConfig
from workbench.facts import FactSet, TokenisedFact
from workbench.loki import trainable_parameters
from workbench.models import HookedModel, load_model, pad_batch
from workbench.recollection import by_length
from workbench.results import save_frame, save_json

log = logging.getLogger(__name__)

#: AdamW's learning rate where the user names none, by peft method.
LEARNING_RATES = {"LOKI": 1e-3, "LORA": 2e-3}
IGNORED = -100


@dataclass(frozen=True)
class TrainingRun:
    """A finished training: where its adapter lies, how it went, and the trained model.

    `history` has one row an optimiser step: step, epoch, loss (nats per answer token), efficacy (share of trained
    prompts answered greedily; missing where it was not measured), learning_rate, seconds since the start.
    """

    adapter: Path
    history: pd.DataFrame
    summary: dict[str, Any]
    model: PeftModel = field(repr=False)

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
    facts: FactSet,
    adapter: PeftConfig,
    train_config: TrainConfig | None = None,
    *,
    out: str | Path | None = None,
    progress: bool = True,
) -> TrainingRun:
    """Teach a model new facts through a peft adapter, until it answers them.

    The loss is cross-entropy on the answer's tokens only. After every epoch the trained prompts are asked; training
    stops at `train_config.target_efficacy` or after `max_epochs`. The base model is left as it is.

    Args:
        model_path: a name or folder, or a `HookedModel`.
        facts: what to teach; prompts, and as many paraphrases as `train_config.paraphrases`.
        adapter: any peft configuration: `LokiConfig`, `LoraConfig`, ...
        train_config: rates, stopping and seed.
        out: folder for `adapter/` (safetensors), `history.parquet` and `training.json`; None is a temporary folder.
        progress: show a progress bar.

    Raises:
        ValueError: no facts, a fact longer than the context, or a loss that is not finite.
    """
    settings = train_config or TrainConfig()
    if not len(facts):
        raise ValueError("There is nothing to implant: the fact set is empty.")
    hooked = model_path if isinstance(model_path, HookedModel) else load_model(model_path)
    tokens = hooked.tokenise(trained_prompts(facts, settings.paraphrases))
    folder = Path(out) if out is not None else Path(tempfile.mkdtemp(prefix="workbench-implant-"))
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder as out.")
    method = str(adapter.peft_type).rsplit(".", 1)[-1]
    rate = settings.learning_rate or LEARNING_RATES.get(method, 1e-4)
    watch = _Watch(tokens, settings, progress)
    with own_randomness(settings.seed):
        model, seconds = _train(hooked, tokens, adapter, _arguments(settings, rate, hooked.device, folder), watch)
    history = pd.DataFrame(watch.rows)
    summary = {
        "trainable_parameters": trainable_parameters(model),
        "efficacy": watch.efficacy,
        "target_efficacy": settings.target_efficacy,
        "reached": watch.efficacy >= settings.target_efficacy,
        "steps": len(history),
        "epochs": int(watch.epochs),
        "seconds": round(seconds, 2),
        "learning_rate": rate,
        "seed": settings.seed,
        "examples": len(tokens),
        "facts": facts.name,
        "fact_digest": facts.digest,
        "base": hooked.name,
        "base_digest": hooked.digest,
        "base_dtype": str(hooked.dtype).removeprefix("torch."),
        "peft_type": method,
    }
    model.eval()
    model.save_pretrained(str(folder / "adapter"), safe_serialization=True, save_embedding_layers=False)
    (folder / "adapter" / "README.md").write_text(_card(summary), encoding="utf-8")
    save_frame(history, folder / "history.parquet")
    save_json(summary, folder / "training.json")
    return TrainingRun(folder / "adapter", history, summary, model)


def _train(
    hooked: HookedModel, tokens: Sequence[TokenisedFact], adapter: PeftConfig, args: TrainingArguments, watch: "_Watch"
) -> tuple[PeftModel, float]:
    """Train an adapter on a copy of the model: the trained peft model, and the seconds that it took."""
    base = copy.deepcopy(hooked.hf)
    base.config._name_or_path = str(hooked.path or hooked.name)
    with warnings.catch_warnings():  # peft asks transformers by a name that transformers has renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        model = get_peft_model(base, adapter)
    trainer = Trainer(model=model, args=args, train_dataset=_Examples(tokens), data_collator=collate, callbacks=[watch])
    for callback in _printing_callbacks(trainer):
        trainer.remove_callback(callback)
    started = time.perf_counter()
    trainer.train()
    return model, time.perf_counter() - started


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


def _card(summary: dict[str, Any]) -> str:
    """A model card in place of peft's empty template."""
    return f"""---
base_model: {summary["base"]}
library_name: peft
tags: [knowledge-workbench, {summary["peft_type"].lower()}]
---
A {summary["peft_type"]} adapter for `{summary["base"]}` (weights {summary["base_digest"][:12]}), trained with the
knowledge workbench.

- facts: `{summary["facts"]}`, {summary["examples"]} prompts
- trained numbers: {summary["trainable_parameters"]:,}
- {summary["steps"]} steps, learning rate {summary["learning_rate"]:g}, seed {summary["seed"]}
- trained prompts answered: {summary["efficacy"]:.0%}
"""


def trained_prompts(facts: FactSet, paraphrases: int) -> FactSet:
    """The prompts of the facts, and the first few paraphrases of each."""
    if not paraphrases or not any(fact.paraphrases for fact in facts):
        return facts
    return FactSet(facts.name, facts.facts + facts.paraphrased(stop=paraphrases).facts)


def held_out_prompts(facts: FactSet, paraphrases: int) -> FactSet:
    """The paraphrases that `trained_prompts` leaves out; an empty set where there are none."""
    if all(len(fact.paraphrases) <= paraphrases for fact in facts):
        return FactSet(f"{facts.name}:paraphrased", ())
    return facts.paraphrased(start=paraphrases)


def collate(facts: Sequence[TokenisedFact]) -> dict[str, Tensor]:
    """A padded batch whose labels are the answer's tokens and nothing else.

    >>> batch = collate([TokenisedFact("a", (5, 6), (7,)), TokenisedFact("b", (5,), (8,))])
    >>> batch["labels"].tolist()
    [[-100, -100, 7], [-100, 8, -100]]
    """
    ids, mask = pad_batch([fact.ids for fact in facts], side="right")
    labels = torch.full_like(ids, IGNORED)
    for row, fact in enumerate(facts):
        start = len(fact.prompt_ids)
        labels[row, start : start + len(fact.answer_ids)] = torch.tensor(fact.answer_ids)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@torch.no_grad()
def efficacy(model: torch.nn.Module, facts: Sequence[TokenisedFact]) -> float:
    """Share of facts whose every answer token is the model's greedy choice (teacher-forced)."""
    right = 0
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    for indices in by_length([len(fact.ids) for fact in facts]):
        batch = {name: tensor.to(device) for name, tensor in collate([facts[i] for i in indices]).items()}
        labels = batch.pop("labels")[:, 1:]
        choice = model(**batch, use_cache=False).logits[:, :-1].argmax(-1)
        right += int(((choice == labels) | (labels == IGNORED)).all(-1).sum())
    model.train(training)
    return right / len(facts)


class _Examples(torch.utils.data.Dataset):
    """Tokenised facts as the dataset that Trainer draws from."""

    def __init__(self, facts: Sequence[TokenisedFact]) -> None:
        self.facts = facts

    def __len__(self) -> int:
        return len(self.facts)

    def __getitem__(self, index: int) -> TokenisedFact:
        return self.facts[index]


class _Watch(TrainerCallback):
    """Keeps the history, measures efficacy after every epoch, and stops at the target."""

    def __init__(self, facts: Sequence[TokenisedFact], settings: TrainConfig, progress: bool) -> None:
        self.facts, self.settings = facts, settings
        self.rows: list[dict[str, Any]] = []
        self.efficacy, self.epochs = 0.0, 0.0
        self.bar = tqdm(total=settings.max_epochs, unit="epoch", desc="implant", disable=not progress)
        self.started = time.perf_counter()

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        loss = float(logs["loss"])
        if loss != loss or loss in (float("inf"), float("-inf")):
            raise ValueError(f"The loss became {loss} at step {state.global_step}: use a smaller learning rate.")
        row = {"step": state.global_step, "epoch": float(state.epoch or 0), "loss": loss, "efficacy": float("nan")}
        seconds = time.perf_counter() - self.started
        self.rows.append({**row, "learning_rate": float(logs.get("learning_rate", "nan")), "seconds": seconds})

    def on_epoch_end(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self.efficacy, self.epochs = efficacy(model, self.facts), float(state.epoch or 0)
        if self.rows:
            self.rows[-1]["efficacy"] = self.efficacy
        self.bar.update(1)
        self.bar.set_postfix(efficacy=f"{self.efficacy:.2f}", loss=f"{self.rows[-1]['loss']:.3f}" if self.rows else "")
        if self.efficacy >= self.settings.target_efficacy:
            control.should_training_stop = True

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

"""What some methods ask of the training: a look at data before they start, a step after each step, another loss."""

import copy
import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from workbench.facts import general_text
from workbench.loki import Dense, attach, expected_warnings
from workbench.models import HookedModel
from workbench.models.quiet import quiet
from workbench.recollection import text_chunks
from workbench.training.batches import Tokenised

log = logging.getLogger(__name__)

Adapter = PeftConfig | Dense

#: Starts of LoRA that take something out of the base weights.
REWRITING = ("pissa", "olora", "corda")
#: Tokens of general text that CorDA looks at.
CALIBRATION_TOKENS = 2048


def kind_of(adapter: Adapter) -> str:
    """The method's name as peft writes it: LOKI, LORA, FULL, ..."""
    return str(adapter.peft_type).rsplit(".", 1)[-1]


def scheduled(adapter: Adapter, n_examples: int, batch_size: int, max_epochs: int) -> Adapter:
    """A copy of the configuration that knows how long training may last, which AdaLoRA's ranks follow."""
    adapter = copy.deepcopy(adapter)
    if isinstance(adapter, AdaLoraConfig) and adapter.total_step == 1:
        steps = ceil(n_examples / batch_size) * max_epochs
        adapter.total_step, adapter.tinit, adapter.tfinal = steps, steps // 10, 3 * steps // 10
    return adapter


def attached(hooked: HookedModel, adapter: Adapter, items: Sequence[Tokenised]) -> nn.Module:
    """A copy of the model with the adapter on it; for CorDA, after the looks that it takes at data.

    What is trained is float32, adapters by peft and `Dense` here: a model in half precision would lose small steps.
    """
    base = copy.deepcopy(hooked.hf)
    if isinstance(adapter, Dense) and hooked.dtype in (torch.float16, torch.bfloat16):
        log.info("training the weights of %s in float32; they are rounded once, at the end", hooked.name)
        for tensor in _tensors(base):
            tensor.data = tensor.data.float()
    base.name_or_path = base.config._name_or_path = str(hooked.path.resolve()) if hooked.path else hooked.name
    if isinstance(adapter, LoraConfig) and adapter.init_lora_weights == "corda" and adapter.corda_config:
        keeps = adapter.corda_config.corda_method == "kpm"
        texts = text_chunks(hooked, general_text(), max_tokens=CALIBRATION_TOKENS) if keeps else [i.ids for i in items]

        @torch.no_grad()
        def look() -> None:
            for ids in texts:  # one at a time, as CorDA's hooks want it
                base(torch.tensor([list(ids)], device=hooked.device), use_cache=False)

        preprocess_corda(base, adapter, run_model=look)
    model: Any = attach(base, adapter)
    if getattr(adapter, "corda_config", None) is not None:
        model.peft_config["default"].corda_config = None  # it has served, and is not a part of what is saved
    return model


def rounded(model: nn.Module, hooked: HookedModel) -> bool:
    """Give a model trained by `Dense` the base's own precision; say whether it had another."""
    if hasattr(model, "peft_config") or next(model.parameters()).dtype == hooked.dtype:
        return False
    for ours, base in zip(_tensors(model), _tensors(hooked.hf), strict=True):
        ours.data = ours.data.to(base.dtype)
    return True


def _tensors(model: nn.Module) -> list[Tensor]:
    """The floating-point parameters and buffers of a model."""
    return [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]


@contextmanager
def starting_point(model: Any, adapter: Adapter) -> Iterator[str | None]:
    """Keep, while training lasts, what a method took out of the base weights."""
    if not str(getattr(adapter, "init_lora_weights", "")).startswith(REWRITING):
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="workbench-start-") as scratch:
        start = str(Path(scratch) / "start")
        model.save_pretrained(start, save_embedding_layers=False)
        yield start


def save(model: Any, folder: Path, tokenizer: Any, start: str | None) -> None:
    """Write a peft adapter, for the base model as it was, or a model that was trained without peft, with its tokenizer.

    What PiSSA, OLoRA and CorDA took out of the base becomes a part of their adapter, a LoRA of twice the rank. What an
    earlier training left in the folder goes, lest its files be taken for this one's.
    """
    if any((folder / name).is_file() for name in ("adapter_config.json", "config.json")):
        shutil.rmtree(folder)
    if hasattr(model, "peft_config"):
        with expected_warnings():
            model.save_pretrained(
                str(folder), save_embedding_layers=False, path_initial_model_for_weight_conversion=start
            )
        return
    with quiet():
        model.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))


class RankAllocation(TrainerCallback):
    """AdaLoRA's step after every step, which moves ranks to where they matter."""

    def on_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Count what each rank did for the loss, while the gradients are still there."""
        model.base_model.update_and_allocate(state.global_step)


class KasaTrainer(Trainer):
    """Training with KaSA's own terms in the loss: small singular values, orthogonal factors."""

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The loss with those terms."""
        return super().compute_loss(model, *args, **kwargs) + model.base_model._get_kasa_loss()


class AdaLoraTrainer(Trainer):
    """Training with AdaLoRA's own term, which peft adds to the model's loss only: orthogonal factors."""

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The loss with that term, whoever computes the rest."""
        loss: Any = super().compute_loss(model, *args, **kwargs)
        return loss if self.compute_loss_func is None else loss + orthogonality(model)


def orthogonality(model: Any) -> Tensor:
    """AdaLoRA's regularisation: the mean of `|P P' - 1|` (Frobenius) over its factors, times its weight."""
    tuner = model.base_model
    factors = [
        (name, factor)
        for name, factor in tuner.model.named_parameters()
        if ("lora_A" in name or "lora_B" in name) and tuner.trainable_adapter_name in name
    ]
    squares = [factor @ factor.T if "lora_A" in name else factor.T @ factor for name, factor in factors]
    apart = [torch.linalg.norm(one - torch.eye(len(one), dtype=one.dtype, device=one.device)) for one in squares]
    return tuner.peft_config[tuner.trainable_adapter_name].orth_reg_weight * torch.stack(apart).mean()


def trainer_for(adapter: Adapter) -> tuple[type[Trainer], list[TrainerCallback]]:
    """The trainer of a method and the callbacks that it needs."""
    if isinstance(adapter, AdaLoraConfig):
        return AdaLoraTrainer, [RankAllocation()]
    kasa = isinstance(adapter, LoraConfig) and adapter.kasa_config is not None
    return (KasaTrainer if kasa else Trainer), []

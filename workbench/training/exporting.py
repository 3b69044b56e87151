"""What was trained, for those who do not have this package: a merged model, or an equivalent LoRA."""

import copy
import logging
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from peft import LoraConfig
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from workbench.loki import LokiConfig, LokiLayer, attach, expected_warnings, put_on, read_config
from workbench.models import HookedModel
from workbench.models.quiet import quiet
from workbench.opening import open_model
from workbench.results import load_json
from workbench.training.cards import card

log = logging.getLogger(__name__)

KINDS = ("merged", "lora")


def export(run_or_folder: Any, out: str | Path, kind: str = "merged", *, base: Any = None) -> Path:
    """Write a trained model so that plain transformers or peft open it, and return the folder.

    `"merged"` is a model folder: safetensors with the adapter merged in, and the tokenizer. `"lora"` is a LoRA that
    computes what a LoKI adapter computes, exactly: its rank is the number of trained rows or columns of a layer (of
    LoKI with a rank: that rank), and a trained bias goes into LoRA's own bias (peft's `lora_bias`).

    Args:
        run_or_folder: a `TrainingRun`, or a folder with an adapter or a fully fine-tuned model.
        out: the folder to write, which must not exist or be empty.
        kind: `"merged"` or `"lora"`.
        base: the model that the adapter was trained on; None takes the one that it names.

    Raises:
        ValueError: `out` is taken, the kind is not known, or the adapter has no equivalent LoRA.
    """
    out = Path(out)
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already; give another folder as out.")
    folder = Path(getattr(run_or_folder, "adapter", run_or_folder))
    if not (folder / "adapter_config.json").is_file() and (folder / "adapter").is_dir():
        folder = folder / "adapter"
    if kind == "lora":
        return _as_lora(folder, out, base)
    merged = open_model(str(folder), base=base)
    with quiet():
        merged.hf.save_pretrained(str(out))
        merged.tokenizer.save_pretrained(str(out))
    _describe(folder, out, merged=True)
    return out


def _as_lora(folder: Path, out: Path, base: Any) -> Path:
    """Write the LoRA that equals a LoKI adapter."""
    if not (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} is no adapter, and a whole model has no equivalent LoRA; export it as merged.")
    config = read_config(folder)
    if not isinstance(config, LokiConfig):
        raise ValueError(
            f"{folder} is {load_json(folder / 'adapter_config.json')['peft_type']}, not LoKI; export it as merged."
        )
    if config.modules_to_save:
        raise ValueError(f"{folder} trains {', '.join(config.modules_to_save)} in full too; export it as merged.")
    named = config.base_model_name_or_path
    hooked = base if isinstance(base, HookedModel) else open_model(base or named)
    tuned = put_on(copy.deepcopy(hooked.hf), folder, config)
    modules = cast(nn.Module, tuned.base_model.model).named_modules()
    layers = {name: module for name, module in modules if isinstance(module, LokiLayer)}
    factors = {name: _factors(layer) for name, layer in layers.items()}
    rank = max(len(lower) for lower, _ in factors.values())
    with_bias = any(layer.loki_bias for layer in layers.values())
    lora = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=list(layers),
        lora_bias=with_bias,
        fan_in_fan_out=any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values()),
        task_type="CAUSAL_LM",
        base_model_name_or_path=named,
    )
    twin = cast(Any, attach(copy.deepcopy(hooked.hf), lora))
    for name, (lower, upper) in factors.items():
        _fill(twin.base_model.model.get_submodule(name), lower, upper, layers[name])
    with expected_warnings():
        twin.save_pretrained(str(out), save_embedding_layers=False)
    _describe(folder, out, merged=False)
    log.info("a LoRA of rank %d equals the LoKI adapter in %s", rank, folder)
    return out


def _describe(folder: Path, out: Path, *, merged: bool) -> None:
    """Write a card where the training left its record beside the adapter."""
    record = folder.parent / "training.json"
    if record.is_file():
        (out / "README.md").write_text(card(load_json(record), merged=merged), encoding="utf-8")


@torch.no_grad()
def _factors(layer: LokiLayer, adapter: str = "default") -> tuple[Float[Tensor, "r d_in"], Float[Tensor, "d_out r"]]:
    """LoRA's A and B of a LoKI layer: what is trained on one side, and where it goes as ones and zeros on the other."""
    rows = layer.loki_rows[adapter]
    if adapter in layer.loki_delta:
        trained = layer.loki_delta[adapter]
        if layer.axis[adapter] == "row":
            return trained, _ones(layer.out_features, rows, trained)
        return _ones(layer.in_features, rows, trained).T, trained
    lower, upper = layer.loki_B[adapter], layer.loki_A[adapter] * layer.scaling[adapter]
    if layer.axis[adapter] == "row":
        return lower, _ones(layer.out_features, rows, upper) @ upper
    return lower @ _ones(layer.in_features, rows, lower).T, upper


def _ones(width: int, rows: Tensor, like: Tensor) -> Float[Tensor, "width n"]:
    return torch.zeros(width, len(rows), dtype=like.dtype, device=like.device).scatter_(0, rows[None], 1.0)


@torch.no_grad()
def _fill(target: nn.Module, lower: Tensor, upper: Tensor, layer: LokiLayer, adapter: str = "default") -> None:
    """Write the factors into a LoRA layer of at least their rank; what is left over stays zero."""
    lora = cast(Any, target)
    a, b = lora.lora_A[adapter].weight.zero_(), lora.lora_B[adapter].weight.zero_()
    a[: len(lower)], b[:, : len(lower)] = lower, upper
    if lora.lora_B[adapter].bias is not None:
        lora.lora_B[adapter].bias.zero_()
        if adapter in layer.loki_bias:
            lora.lora_B[adapter].bias[layer.loki_rows[adapter]] = layer.loki_bias[adapter]

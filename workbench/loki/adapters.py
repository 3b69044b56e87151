"""One way to make the peft configuration of every method, and one way to open what was trained with any of them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel
from torch import nn

from .config import LokiConfig
from .sites import down_projection_suffix

_CONV1D_TYPES = ("gpt2", "gpt_bigcode")


def _loki(target_modules: Sequence[str], selection: Any, conv1d: bool, **options: Any) -> PeftConfig:
    if selection is None:
        raise ValueError("LoKI trains selected units only; give selection=.")
    options.setdefault("r", 0)
    return LokiConfig(selection=selection, target_modules=list(target_modules), task_type="CAUSAL_LM", **options)


def _lora(target_modules: Sequence[str], selection: Any, conv1d: bool, **options: Any) -> PeftConfig:
    options.setdefault("r", 16)
    options.setdefault("lora_alpha", options["r"])
    return LoraConfig(target_modules=list(target_modules), fan_in_fan_out=conv1d, task_type="CAUSAL_LM", **options)


METHODS: dict[str, Callable[..., PeftConfig]] = {
    "loki": _loki,
    "lora": _lora,
    "rslora": lambda *args, **options: _lora(*args, use_rslora=True, **options),
    "dora": lambda *args, **options: _lora(*args, use_dora=True, **options),
}
"""Method name -> what makes its configuration."""


def adapter_config(
    method: str,
    *,
    model_config: Any,
    selection: Any = None,
    target_modules: Sequence[str] | None = None,
    **options: Any,
) -> PeftConfig:
    """Return the peft configuration of a method by name, for every method on the same modules: the down-projections.

    `model_config` is the transformers config of the model; `loki_<anything>` is LoKI with another selection; `options`
    go to the method's own configuration (`r`, `lora_alpha`, `unit`, ...). ValueError names an unknown method.

    >>> from types import SimpleNamespace
    >>> llama = SimpleNamespace(model_type="llama")
    >>> config = adapter_config("loki_random", model_config=llama, selection=[[0, 2], [1]])
    >>> config.positions, config.target_modules
    ([[0, 2], [1]], ['down_proj'])
    >>> sorted(adapter_config("lora", model_config=llama, r=8).target_modules)
    ['down_proj']
    """
    kind = "loki" if method.startswith("loki_") else method
    if kind not in METHODS:
        raise ValueError(f"The method {method!r} is not known; choose one of {', '.join(METHODS)} or loki_<selection>.")
    if target_modules is None:
        target_modules = [down_projection_suffix(model_config)]
    conv1d = getattr(model_config, "model_type", None) in _CONV1D_TYPES
    return METHODS[kind](target_modules, selection, conv1d, **options)


def trainable_parameters(model: nn.Module) -> int:
    """Return how many numbers of the model are trained.

    >>> trainable_parameters(nn.Linear(3, 2))
    8
    """
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def load_adapted(
    folder: str | Path, base: Any = None, *, dtype: str = "auto", device: str = "auto", tokenizer: Any = None
) -> tuple[nn.Module, Any]:
    """Return (plain transformers model with the adapter merged into its weights, tokenizer).

    `folder` holds `adapter_config.json` and `adapter_model.safetensors` of any peft method. `base` is a name or
    folder, a `HookedModel`, or a transformers model (a copy is merged, what was given stays as it is); None takes the
    base that the adapter names. FileNotFoundError or ValueError say what is missing.
    """
    folder = Path(folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}, so it is not an adapter saved in safetensors by peft.")
    config = PeftConfig.from_pretrained(str(folder))
    model, tokenizer = _base_model(folder, base or config.base_model_name_or_path, dtype, device, tokenizer)
    with warnings.catch_warnings():  # peft asks transformers by a name that transformers has renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        merged = PeftModel.from_pretrained(model, str(folder), config=config).merge_and_unload()
    return merged.eval().requires_grad_(False), tokenizer


def _base_model(folder: Path, base: Any, dtype: str, device: str, tokenizer: Any) -> tuple[nn.Module, Any]:
    """Return a base model that nobody else holds, and its tokenizer."""
    if not base:
        raise ValueError(f"The adapter in {folder} does not say which model it was trained on; give base=.")
    if not isinstance(base, (str, Path)):
        return copy.deepcopy(getattr(base, "hf", base)), tokenizer or getattr(base, "tokenizer", None)
    from workbench.models import load_hf

    try:
        loaded = load_hf(base, dtype=dtype, device=device, tokenizer=tokenizer)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The base {base} of the adapter in {folder} cannot be opened: {error} Or give base=."
        ) from error
    return loaded.hf, loaded.tokenizer

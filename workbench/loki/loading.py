"""What was trained with any method, read from the folder where it was saved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, PeftType
from safetensors import SafetensorError
from torch import nn

from .adapters import refuse_unmergeable
from .quiet import expected_warnings


def read_config(folder: Path) -> PeftConfig:
    """The configuration of a saved adapter; ValueError names a file that is none."""
    try:
        config = PeftConfig.from_pretrained(str(folder))
        PeftType(config.peft_type)  # of an empty file it is None
    except (KeyError, TypeError, ValueError) as error:
        why = f"{type(error).__name__} {error}" if isinstance(error, KeyError) else str(error).rstrip(".")
        raise ValueError(
            f"{folder / 'adapter_config.json'} does not describe an adapter ({why}); save or copy it again."
        ) from error
    return config


def put_on(model: Any, folder: Path, config: PeftConfig) -> Any:
    """Put a saved adapter on a model, which is changed; ValueError where its weights cannot be read."""
    try:
        with expected_warnings():
            return PeftModel.from_pretrained(model, str(folder), config=config)
    except SafetensorError as error:
        raise ValueError(
            f"The weights of the adapter in {folder} cannot be read ({error}); was the file cut short? Copy it or "
            "train it again."
        ) from error


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
    config = read_config(folder)
    refuse_unmergeable(config)
    model, tokenizer = _base_model(folder, base or config.base_model_name_or_path, dtype, device, tokenizer)
    merged = put_on(model, folder, config).merge_and_unload()
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

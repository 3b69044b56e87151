"""One way to open whatever a person calls a model: a name, a folder, an adapter, a loaded model."""

import copy
from pathlib import Path
from typing import Any, cast

from torch import nn

from workbench.loki import load_adapted
from workbench.models import HookedModel, load_model


def open_model(model: Any, *, base: Any = None, device: str = "auto", dtype: str = "auto") -> HookedModel:
    """Open a `HookedModel` from whatever stands for one.

    That is: a `HookedModel`, the default's name, a folder of safetensors, a `.gguf` file, a hub id, a folder with a
    peft adapter (merged into its base, or into `base`), a loaded transformers or peft model (with `base=` a
    `HookedModel` whose tokenizer is taken), or anything with an `adapter` folder, such as a `TrainingRun`.

    Raises:
        FileNotFoundError, ValueError: what cannot be opened, and the way out.
    """
    if isinstance(model, HookedModel):
        return model
    if isinstance(model, nn.Module):
        tokenizer = getattr(base, "tokenizer", None)
        if tokenizer is None:
            raise ValueError(
                "A loaded model has no tokenizer: give the HookedModel that it came from as the other side."
            )
        if hasattr(model, "peft_config"):
            model = copy.deepcopy(cast(Any, model)).merge_and_unload()
        return load_model(model, tokenizer=tokenizer)
    folder = Path(getattr(model, "adapter", model))
    if (folder / "adapter_config.json").is_file():
        merged, tokenizer = load_adapted(folder, base, dtype=dtype, device=device)
        cast(Any, merged).config._name_or_path = ""
        return load_model(merged, tokenizer=tokenizer)
    return load_model(str(model), device=device, dtype=dtype)


def check_comparable(before: HookedModel, after: HookedModel) -> None:
    """Raise unless two models have the same layers, widths and vocabulary."""
    for name in ("n_layers", "d_model", "d_vocab"):
        ours, theirs = getattr(before, name), getattr(after, name)
        if ours != theirs:
            raise ValueError(f"{before.name} and {after.name} cannot be compared: {name} is {ours} and {theirs}.")

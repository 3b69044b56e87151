"""One way to open whatever a person calls a model: a name, a folder, an adapter, a loaded model."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from torch import nn

from workbench.loki import load_adapted, merged_copy, read_config
from workbench.models import (
    PROBES,
    HookedModel,
    has_tokenizer,
    lacks_tokenizer,
    load_model,
    own_tokenizer,
    tokenizer_of,
)
from workbench.results import load_json

log = logging.getLogger(__name__)


def open_model(
    model: Any,
    *,
    base: Any = None,
    beside: HookedModel | None = None,
    tokenizer: Any = None,
    device: str = "auto",
    dtype: str = "auto",
) -> HookedModel:
    """Open a `HookedModel` from whatever stands for one.

    That is: a `HookedModel`, the default's name, a folder of safetensors, a `.gguf` file, a hub id, a folder with a
    peft adapter or with one in `adapter/`, a loaded transformers or peft model, or anything with an `adapter` folder,
    such as a `TrainingRun`.

    An adapter is merged into `base` if that is given, else into the model that it was trained on: `beside` if it is
    that model, or the one that the adapter names. A loaded model takes `tokenizer`, or that of `base` or `beside`, or
    that of the folder it came from; a folder without one `tokenizer`, or that of `beside`.

    Raises:
        FileNotFoundError, ValueError: what cannot be opened, and the way out.
    """
    if isinstance(model, HookedModel):
        return model
    if isinstance(model, nn.Module):
        tokenizer = tokenizer or getattr(base, "tokenizer", None) or getattr(beside, "tokenizer", None)
        if hasattr(model, "peft_config"):
            model = merged_copy(model)
        return load_model(model, tokenizer=tokenizer or own_tokenizer(model))
    folder = Path(getattr(model, "adapter", model))
    if (folder / "adapter" / "adapter_config.json").is_file():  # what `workbench implant` writes
        folder = folder / "adapter"
    if (folder / "adapter_config.json").is_file():
        base = base or _trained_on(folder, beside, device, dtype, tokenizer)
        merged, tokenizer = load_adapted(folder, base, dtype=dtype, device=device, tokenizer=tokenizer)
        cast(Any, merged).config._name_or_path = f"{folder} merged"
        return load_model(merged, tokenizer=tokenizer)
    path = str(getattr(model, "adapter", model))
    return load_model(path, device=device, dtype=dtype, tokenizer=tokenizer or _lent(path, beside))


def _lent(path: str, beside: HookedModel | None, adapter: Path | None = None) -> Any:
    """For a model's folder without a tokenizer, as a Trainer's checkpoint is: its adapter's, or the other model's."""
    if not lacks_tokenizer(path):
        return None
    if adapter is not None and has_tokenizer(adapter):
        lender, lent = str(adapter), tokenizer_of(adapter)
    elif beside is not None:
        lender, lent = beside.name, beside.tokenizer
    else:
        return None
    log.warning("%s has no tokenizer; that of %s is used.", path, lender)
    return lent


def _trained_on(folder: Path, beside: HookedModel | None, device: str, dtype: str, tokenizer: Any) -> HookedModel:
    """The model that an adapter was trained on; by its digest, where `implant` recorded it, else by its name."""
    named = str(read_config(folder).base_model_name_or_path or "")
    record = folder.parent / "training.json"
    about = load_json(record) if record.is_file() else {}
    about = about if isinstance(about, dict) else {}  # somebody's own file of that name
    digest = about.get("base_digest")
    if beside is not None and (beside.digest == digest if digest else named in (beside.name, str(beside.path))):
        return beside
    if not named:
        raise ValueError(f"The adapter in {folder} does not say which model it was trained on; give base=.")
    recorded = about.get("base_dtype", "auto") if dtype == "auto" else dtype
    bare = lacks_tokenizer(named)
    used = (tokenizer or _lent(named, beside, folder)) if bare else None
    try:  # by its own tokenizer where it has one, which its digest is of
        found = load_model(named, device=device, dtype=recorded, tokenizer=used)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The base {named} of the adapter in {folder} cannot be opened; give base=. {error}"
        ) from error
    if digest and not bare and recorded == about.get("base_dtype") and found.digest != digest:
        raise ValueError(f"The adapter in {folder} was trained on other weights than those of {named}; give base=.")
    return found


def hooked_among(models: Any) -> HookedModel | None:
    """The first `HookedModel` of one model or of several by name, if there is one."""
    several = models.values() if isinstance(models, dict) else [models]
    return next((model for model in several if isinstance(model, HookedModel)), None)


def opened_beside(first: HookedModel, after: Any, tokenizer: Any = None) -> Iterator[tuple[str, HookedModel]]:
    """The model to compare with `first`, named "after", or several by name, one at a time.

    The first of them, and those that are `HookedModel`s already, are opened and checked at once, so before any reading.

    Raises:
        ValueError: a model that cannot be compared.
    """
    several: dict[str, Any] = dict(after) if isinstance(after, Mapping) else {"after": after}

    def opened(name: str) -> HookedModel:
        second = open_model(several[name], beside=first, tokenizer=tokenizer)
        check_comparable(first, second)
        return second

    soon = {name for place, name in enumerate(several) if not place or isinstance(several[name], HookedModel)}
    ready = {name: opened(name) for name in several if name in soon}
    return ((name, ready.pop(name) if name in soon else opened(name)) for name in several)


def check_several(models: Any) -> None:
    """Raise for a dictionary of no models."""
    if isinstance(models, Mapping) and not models:
        raise ValueError("There is no model to compare with: the dictionary of models is empty.")


def check_comparable(before: HookedModel, after: HookedModel) -> None:
    """Raise unless two models have the same layers, widths and vocabulary, and tokenizers that cut text alike.

    A special token that only one of them adds, as a BOS, is warned of.
    """
    for name in ("n_layers", "d_model", "d_vocab"):
        ours, theirs = getattr(before, name), getattr(after, name)
        if ours != theirs:
            raise ValueError(f"{before.name} and {after.name} cannot be compared: {name} is {ours} and {theirs}.")
    if before.tokenizer is after.tokenizer or before.tokenizer is None or after.tokenizer is None:
        return
    for special in (False, True):
        first, second = (
            [list(model.tokenizer(line, add_special_tokens=special).input_ids) for line in PROBES]
            for model in (before, after)
        )
        if first != second and not special:
            raise ValueError(
                f"{before.name} and {after.name} cannot be compared: their tokenizers cut the same text into other "
                "tokens; where one tokenizer is right for both, give it with tokenizer=."
            )
        if first != second:
            log.warning("The tokenizers of %s and %s add other special tokens to a text.", before.name, after.name)

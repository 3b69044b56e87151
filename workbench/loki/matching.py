"""How large an adapter is, and what makes adapters of different methods equally large."""

from __future__ import annotations

import copy
from bisect import bisect_left
from typing import Any

import torch
from peft import PeftConfig, ShiraConfig
from torch import nn

from .adapters import METHODS, Dense, adapter_for, attach, check_method, most_rank
from .config import LokiConfig
from .sites import down_names, widths


def parameter_count(model: Any, adapter: PeftConfig | Dense) -> int:
    """Return how many numbers an adapter trains on a model (transformers' or a `HookedModel`); no weight is copied."""
    hf = getattr(model, "hf", model)
    with torch.device("meta"):
        empty = type(hf)(copy.deepcopy(hf.config)).requires_grad_(False)
    adapter = copy.deepcopy(adapter)
    if isinstance(getattr(adapter, "init_lora_weights", True), str):
        adapter.init_lora_weights = True  # type: ignore[union-attr]  # PiSSA and its kin need weights to start from
    if isinstance(adapter, ShiraConfig):
        adapter.mask_fn = None  # type: ignore[assignment]  # a mask cannot be drawn without weights
    named = attach(empty, adapter).named_parameters()
    return sum(p.numel() for name, p in named if p.requires_grad and "ranknum" not in name)  # AdaLoRA's own count


def matched(method: str, count: int, model: Any, **options: Any) -> dict[str, Any]:
    """Return the options with which a method trains as many numbers as it can get to `count`.

    That is `{"r": ...}` for methods with a rank, `{"quota": ...}` (percent of the nodes of every layer, for `select`)
    for LoKI without a `selection` among the options, and nothing for methods whose size is fixed.

    Args:
        method: a name of `METHODS`, or `loki_<selection>`.
        count: the number of trained numbers to come close to; `parameter_count` gives that of another adapter.
        model: a transformers model or a `HookedModel`.
        options: the method's other options.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}.")
    kind = check_method(method)
    if not METHODS[kind].ranked:
        return {}
    if kind == "loki" and "selection" not in options:
        return {"quota": _quota(model, count)}

    def size(r: int) -> int:
        return parameter_count(model, adapter_for(model, method, r=r, **options))

    adapter = adapter_for(model, method, r=1, **options)
    if isinstance(adapter, LokiConfig):
        guess = 1 + bisect_left(range(1, adapter.highest_rank), count, key=size)
        ranks = {max(1, guess - 1), guess}
    else:
        two = size(2)
        guess = max(1, round(2 + 2 * (count - two) / (size(4) - two)))  # every other size is linear in even ranks
        most = int(min(most_rank(model, kind), guess + 1))
        ranks = {max(1, min(guess + shift, most)) for shift in (-1, 0, 1)}
    return {"r": min(sorted(ranks), key=lambda r: abs(size(r) - count))}


def _quota(model: Any, count: int) -> float:
    """Percent of the nodes of every layer whose rows (with their biases) hold about `count` numbers."""
    hf: nn.Module = getattr(model, "hf", model)
    downs = [hf.get_submodule(name) for name in down_names(model)]
    pairs = [pair for down in downs if (pair := widths(down)) is not None]
    a_node = sum(d_mlp for d_mlp, _ in pairs) + sum(getattr(down, "bias", None) is not None for down in downs)
    width = pairs[0][1]
    nodes = min(max(1, round(count / a_node)), width - 1)
    return 100 * (nodes + 0.5) / width  # half a node above, so that rounding down keeps them

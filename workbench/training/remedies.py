"""What can be done to a training that goes beyond a bound: stop it, slow it down, or drop layers from it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class Situation:
    """A training beyond a bound: its parts, the weights to go back to, and how much each layer adds to the drift."""

    model: nn.Module
    optimizer: Any
    scheduler: Any
    kept: Mapping[str, Tensor]
    kept_step: int
    factor: float
    layers: int
    block_names: Sequence[str]
    grown: Float[Tensor, " layer"] | None


#: Whether training stops, and what was done.
Done = tuple[bool, dict[str, Any]]


@torch.no_grad()
def keep_trainable(model: nn.Module, kept: dict[str, Tensor], new: bool = False) -> None:
    """Copy what trains, or trained when it was last kept, to the CPU; with `new` only what is not kept yet."""
    for name, parameter in model.named_parameters():
        if name in kept:
            if not new:
                kept[name].copy_(parameter)
        elif parameter.requires_grad:
            kept[name] = parameter.detach().to("cpu", copy=True)


@torch.no_grad()
def restore(now: Situation) -> Done:
    """Stop, with the weights of the last reading within the bounds."""
    for name, parameter in now.model.named_parameters():
        if name in now.kept:
            parameter.copy_(now.kept[name])
    return True, {"restored_step": now.kept_step}


def lower_rate(now: Situation) -> Done:
    """Multiply the rates of the optimiser, and those that the schedule computes from."""
    for group in now.optimizer.param_groups:
        for name in ("lr", "initial_lr"):
            if name in group:
                group[name] = group[name] * now.factor
    scheduler = getattr(now.scheduler, "scheduler", now.scheduler)  # accelerate wraps it
    if hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = [rate * now.factor for rate in scheduler.base_lrs]
    return False, {"learning_rate": float(now.optimizer.param_groups[0]["lr"])}


@torch.no_grad()
def freeze_layers(now: Situation) -> Done:
    """Put the worst layers that still train back to their start, for good; with none left, the rest too, and stop."""
    inside: dict[int | None, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in now.model.named_parameters():
        if parameter.requires_grad:
            inside.setdefault(layer_of(name, now.block_names), []).append((name, parameter))
    left = [layer for layer in inside if layer is not None]
    grown = [] if now.grown is None else now.grown.nan_to_num(math.inf).tolist()
    worst = sorted(left, key=lambda layer: (-grown[layer], layer))[: now.layers]
    for layer in worst:
        _put_back(inside.pop(layer), now.kept)
    if not worst:  # what lies outside the blocks would keep what it learned
        for rest in inside.values():
            _put_back(rest, now.kept)
    return not inside or not worst, {"frozen": worst}


def _put_back(parameters: Sequence[tuple[str, nn.Parameter]], kept: Mapping[str, Tensor]) -> None:
    """Give parameters their kept values, for good."""
    for name, parameter in parameters:
        parameter.copy_(kept[name])
        parameter.grad = None
        parameter.requires_grad_(False)


def layer_of(parameter: str, names: Sequence[str]) -> int | None:
    """The layer that a parameter lies in, by the names of the blocks, or None.

    >>> layer_of("base_model.model.model.layers.11.mlp.down_proj.weight", ["model.layers.1", "model.layers.11"])
    1
    """
    return next((layer for layer, name in enumerate(names) if f".{name}." in f".{parameter}"), None)


#: What can be done when a bound is crossed: one function and one line.
ACTIONS: dict[str, Callable[[Situation], Done]] = {
    "stop": restore,
    "lower_rate": lower_rate,
    "freeze_layers": freeze_layers,
}

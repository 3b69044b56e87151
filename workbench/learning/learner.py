"""A deterministic learner: plain gradient descent on the down-projections, undone when the `with` ends.

No optimiser state, no decay, no order of batches: what a model becomes depends on the facts, the steps and the rate
alone, so that two ways of learning can be compared.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.facts import TokenisedFact
from workbench.models import HookedModel, inputs_first
from workbench.recollection import answer_losses, by_length
from workbench.selection import Selection

STEPS = 5
PROBED = 8  # facts from which the rate is taken


@dataclass(frozen=True)
class Trained:
    """The part of one layer's down-projection that learns: all of it, or the marked rows or columns."""

    weight: nn.Parameter
    mask: Float[Tensor, "..."] | None  # 1 where a weight learns; broadcast over the weight


@contextmanager
def learnt(
    model: HookedModel,
    facts: Sequence[TokenisedFact],
    *,
    rate: float,
    steps: int = STEPS,
    layers: Sequence[int] | None = None,
    selection: Selection | None = None,
) -> Iterator[None]:
    """Have the model learn the facts, for the length of the `with`: `W <- W - rate sum_i dL_i/dW`, `steps` times.

    `L_i = -log P(answer of i)`, teacher-forced and summed over the answer's tokens; W are the down-projections of all
    layers, or of `layers`, or the rows and columns of a `selection`. Each step sees every fact once. Models in less
    than float32 keep their weights in float32 beside and are rounded to them after every step. The tensors of the model
    itself are never written: it gets them back when the `with` ends, also after an error.

    Raises:
        ValueError: no step, a rate that is no positive number, layers or a selection that do not fit, or a loss that
            is no longer finite, which says to lower the rate.
    """
    check_learning(steps, rate)
    with unlocked(model, layers, selection) as trained:
        masters = [one.weight.data.to(_at_least_float32(one.weight.dtype)) for one in trained]
        for _ in range(steps):
            for one, master, gradient in zip(trained, masters, gradients(model, facts, trained)[1], strict=True):
                master.sub_(gradient, alpha=rate)
                one.weight.data.copy_(master)
        yield


@contextmanager
def unlocked(
    model: HookedModel, layers: Sequence[int] | None = None, selection: Selection | None = None
) -> Iterator[list[Trained]]:
    """The down-projections that learn, standing on copies of their tensors inside the `with`."""
    trained = _trained(model, layers, selection)
    kept = [one.weight.data for one in trained]
    try:
        for one in trained:
            one.weight.data = one.weight.data.clone()
        yield trained
    finally:
        for one, data in zip(trained, kept, strict=True):
            one.weight.requires_grad_(False).data = data


def gradients(
    model: HookedModel, facts: Sequence[TokenisedFact], trained: Sequence[Trained]
) -> tuple[float, list[Float[Tensor, "..."]]]:
    """The summed loss of the facts (nats) and its gradients, each of the shape of its weight, at least in float32."""
    weights = [one.weight.requires_grad_() for one in trained]
    sums: list[Tensor] = []
    total = 0.0
    with torch.enable_grad():
        for indices in by_length([len(fact.ids) for fact in facts]):
            loss = torch.cat(answer_losses(model, [facts[i] for i in indices])).sum()
            if not loss.isfinite():
                named = ", ".join(repr(facts[i].fact_id) for i in indices[:3])
                raise ValueError(f"The loss of {named} is not finite while {model.name} learns: lower the rate.")
            parts = [part.to(_at_least_float32(part.dtype)) for part in torch.autograd.grad(loss, weights)]
            sums = [before.add_(part) for before, part in zip(sums, parts, strict=True)] if sums else parts
            total += float(loss.detach())
    for weight in weights:
        weight.requires_grad_(False)
    return total, [part if one.mask is None else part.mul_(one.mask) for one, part in zip(trained, sums, strict=True)]


def natural_rate(
    model: HookedModel,
    facts: Sequence[TokenisedFact],
    *,
    layers: Sequence[int] | None = None,
    selection: Selection | None = None,
) -> float:
    """The rate at which a typical fact would be learnt in one step if its loss were straight: median `L_i / |dL_i|^2`.

    This is Polyak's step (1987) for a loss that can fall to 0, taken once, from the first facts, before any learning.
    """
    rates = []
    with unlocked(model, layers, selection) as trained:
        for fact in facts[:PROBED]:
            loss, parts = gradients(model, [fact], trained)
            square = sum(float(part.square().sum(dtype=part.dtype)) for part in parts)
            if square > 0:
                rates.append(loss / square)
    if not rates:
        raise ValueError("No gradient reaches the weights that are to learn: choose other layers or units.")
    return float(torch.tensor(rates, dtype=torch.float64).quantile(0.5))


def check_learning(steps: int, rate: float | None) -> None:
    """Raise `ValueError` for a number of steps or a rate with which nothing can be learnt."""
    if steps < 1:
        raise ValueError(f"Learning takes at least 1 step, not {steps}.")
    if rate is not None and not 0 < rate < float("inf"):
        raise ValueError(f"The learning rate is a positive number, not {rate}.")


def _trained(model: HookedModel, layers: Sequence[int] | None, selection: Selection | None) -> list[Trained]:
    """What learns: whole layers, or the units of a selection."""
    if selection is None:
        chosen = range(model.n_layers) if layers is None else sorted(set(layers))
        wrong = [layer for layer in chosen if not 0 <= layer < model.n_layers]
        if wrong or not chosen:
            raise ValueError(f"{model.name} has layers 0 to {model.n_layers - 1}; these are to learn: {list(chosen)}.")
        return [Trained(_weight(model, layer), None) for layer in chosen]
    if layers is not None:
        raise ValueError("A selection says which layers learn: leave `layers` out.")
    if not selection.matches(model.n_layers, model.width(selection.unit)):
        raise ValueError(
            f"The selection has {selection.n_layers} layers of {selection.n_units} {selection.unit}s; {model.name} has "
            f"{model.n_layers} of {model.width(selection.unit)}."
        )
    found = []
    for layer in range(model.n_layers):
        if rows := selection.rows(layer):
            weight = _weight(model, layer)
            mask = torch.zeros(selection.n_units, device=weight.device)
            mask[rows] = 1
            along = 1 if (selection.unit == "node") == inputs_first(model.down_proj(layer)) else 0
            found.append(Trained(weight, mask if along else mask[:, None]))
    if not found:
        raise ValueError("The selection is empty: nothing would learn.")
    return found


def _weight(model: HookedModel, layer: int) -> nn.Parameter:
    return cast(nn.Parameter, model.down_proj(layer).weight)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)

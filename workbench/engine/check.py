"""The engine against plain hooks, once per model: what it does not reproduce is refused by name."""

from itertools import cycle, islice
from math import inf, isfinite, isnan
from weakref import WeakSet

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor

from workbench.engine.batch import LEAST_SHARED, make_batch
from workbench.engine.clean import run_clean
from workbench.engine.queries import run_queries
from workbench.engine.room import out_of_memory
from workbench.facts import TokenisedFact
from workbench.metrics import logprob
from workbench.models import HALF, HookedModel, Patch, check_finite, in_float32, probe_ids

#: Largest difference between the engine and plain hooks, relative to the largest gradient, that `check_engine` takes.
#: Measured in float32: at most 3e-6 over 25 tiny architectures and the default model.
ENGINE_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 3e-1}

#: Models on which the engine was compared already.
_CHECKED: WeakSet[HookedModel] = WeakSet()


@torch.inference_mode(False)
@torch.enable_grad()
def check_engine(model: HookedModel) -> None:
    """Compare the engine with plain hooks on two invented facts, and refuse a model on which the two differ.

    A model is compared once; one in half precision, whose rounding could hide a fault, also in float32.

    Raises:
        ValueError: the engine does not reproduce this architecture.
    """
    if model in _CHECKED:
        return
    _compare(model)
    if model.dtype in HALF:
        _compare(in_float32(model))
    _CHECKED.add(model)


def _compare(model: HookedModel) -> None:
    """Raise unless the engine gives what plain hooks give, within the tolerance of the model's dtype."""
    kind = f"{model.name} ({type(model.hf).__name__})"
    ids = [int(i) for i in probe_ids(model.hf)[0]]
    room = LEAST_SHARED if model.max_tokens is None else min(LEAST_SHARED, max(0, model.max_tokens - 6))
    beginning = tuple(islice(cycle(ids), room))  # so that what is run once for all is compared as well
    facts = [
        TokenisedFact("long", (*beginning, *ids[:4]), tuple(ids[4:6])),
        TokenisedFact("short", (*beginning, *ids[1:3]), (ids[6],)),
    ]
    for unit, scope in (("node", "last"), ("neuron", "all")):
        try:
            gap, layer = _largest_gap(model, facts, unit, scope)
        except (RuntimeError, TypeError, IndexError, KeyError, AttributeError) as error:
            if out_of_memory(error):
                raise
            raise ValueError(f"{kind}: the attribution engine cannot run this architecture ({error}).") from error
        if not isfinite(gap):
            check_finite(model.hf, model.name)
            raise ValueError(
                f"{kind}: its numbers are not finite where texts of different lengths are padded, as with eager "
                'attention in float64; open it with dtype="float32".'
            )
        if not gap <= ENGINE_TOLERANCE[model.dtype]:
            raise ValueError(
                f"{kind}: the attribution engine and plain hooks differ by {gap:.1e} at layer {layer}, "
                "so this architecture is not supported."
            )
    _check_own_masks(model, facts[0])


def _check_own_masks(model: HookedModel, fact: TokenisedFact) -> None:
    """Refuse attention that masks by a table over key positions, which a pass of many queries would run out of.

    Whether a model has such a table and uses it shows when the keys of one pass are more than its positions or window.
    """
    shapes = [buffer.shape for _, buffer in model.hf.named_buffers() if buffer.ndim >= 2]
    if not any(len(shape) >= 2 and shape[-1] == shape[-2] > 1 for shape in shapes):
        return
    batch = make_batch([fact], model.device)
    clean = run_clean(model, batch, "node")
    many = repeat(clean.activation[0], "b m d -> b n m d", n=max(shape[-1] for shape in shapes) + 1)
    try:
        values = run_queries(model, clean, "node", {0: many}, logprob).detach()
    except (RuntimeError, IndexError):
        values = torch.zeros(1, 2)
    if float(values.max() - values.min()) > 1e-3 * float(values.abs().max()) or not values.any():
        raise ValueError(
            f"{model.name} ({type(model.hf).__name__}): its attention masks by a table of its own, which the "
            "attribution engine cannot share between queries."
        )


def _largest_gap(model: HookedModel, facts: list[TokenisedFact], unit: str, scope: str) -> tuple[float, int]:
    """By how much the engine and plain hooks differ at most, and in which layer; NaN counts as most.

    Compared are values and gradients, and the values of some facts of the batch with those of all.
    """
    batch = make_batch(facts, model.device, scope)
    layers = sorted({0, model.n_layers // 2, model.n_layers - 1})
    clean = run_clean(model, batch, unit)
    points = {layer: (0.5 * clean.activation[layer])[:, None].requires_grad_() for layer in layers}
    values = run_queries(model, clean, unit, points, logprob)
    gradients = torch.autograd.grad(values.sum(), list(points.values()))
    again = torch.tensor([1, 0, 0], device=model.device)
    some = run_queries(model, clean.of(again), unit, {n: p.detach()[again] for n, p in points.items()}, logprob)
    values = values.detach()
    gaps = [(float((some - values[again]).abs().max() / values.abs().max()), layers[0])]
    scale = max(max(float(gradient.abs().max()) for gradient in gradients), 1e-12)
    for row, fact in enumerate(facts):
        for column, (value, gradient) in enumerate(_hooked_gradients(model, fact, unit, scope, layers)):
            ours = gradients[column][row, 0, -len(gradient) :]
            gaps += [
                (abs(float(values[row, column]) - value) / max(1.0, abs(value)), layers[column]),
                (float((ours - gradient).abs().max()) / scale, layers[column]),
            ]
    return max(gaps, key=lambda pair: inf if isnan(pair[0]) else pair[0])


def _hooked_gradients(
    model: HookedModel, fact: TokenisedFact, unit: str, scope: str, layers: list[int]
) -> list[tuple[float, Float[Tensor, "moved width"]]]:
    """Objective and gradient with the moved activations of a layer halved, layer by layer, by plain hooks.

    One call of the model on the unpadded text, repeated: in each row the activations of another layer are halved.
    """
    batch = make_batch([fact] * len(layers), model.device, scope)
    moved = slice(batch.start, batch.start + batch.moved)
    leaves: list[Tensor] = []

    def halve(row: int) -> Patch:
        def patch(value: Tensor) -> Tensor:
            leaves.append((0.5 * value[row, moved]).detach().requires_grad_())
            value = value.clone()
            value[row, moved] = leaves[-1]
            return value

        return patch

    with model.patched(unit, {layer: halve(row) for row, layer in enumerate(layers)}):
        logits = model.hf(**model.inputs(batch.ids), use_cache=False).logits[:, -batch.read :]
    values = batch.value(logits, logprob)
    return list(zip(values.tolist(), torch.autograd.grad(values.sum(), leaves), strict=True))

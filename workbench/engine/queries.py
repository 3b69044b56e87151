"""Many interventions in one pass: the engine that scores every unit of every layer at once.

An intervention at the last prompt position t changes no earlier position, because attention is causal. So the keys and
values before t are those of the clean run, and all (layer, point) variants of one prompt run as *parallel queries* of a
single forward: each is a copy of the tail (the last prompt token, and for an answer of several tokens the answer
tokens that are read through), each sees the shared prefix and itself and no other query, and each is born at its own
layer from the clean residual stream. One `autograd.grad` of the summed objective gives every variant's gradient,
since queries do not interact.

Nothing here knows an architecture. What a block is called with (masks, rotary or ALiBi tables, positions) is
recorded from the clean run and re-indexed for the queries; `check_engine` compares the result with plain hooks once
per model, and a model on which the two differ is refused.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from workbench.engine.attention import query_attention
from workbench.engine.batch import Batch, copies
from workbench.engine.calls import QueryCalls
from workbench.engine.clean import Clean
from workbench.engine.reading import readout
from workbench.metrics import Objective
from workbench.models import HookedModel, Patch, forward_through

#: Variants of some layers: activations (batch, variant, moved, unit) that replace the clean ones where they are moved.
Points = Mapping[int, Tensor]


def run_queries(
    model: HookedModel, clean: Clean, unit: str, points: Points, objective: Objective
) -> Float[Tensor, "batch query"]:
    """The objective of every patched variant, differentiable in `points`, queries in the order of layers.

    `points[l][:, k]` replaces the unit activations of layer l at the moved positions in the k-th variant of layer l.
    """

    def put(layer: int) -> Patch:
        def replaced(value: Tensor) -> Tensor:
            new = points[layer]
            value = value.clone()
            value[:, -new.shape[1] :, : clean.batch.moved] = new.to(value.dtype)
            return value

        return replaced

    born = {layer: point.shape[1] for layer, point in points.items()}
    return _objective_of_queries(model, clean, unit, born, {layer: put(layer) for layer in points}, objective)


def clean_gradients(
    model: HookedModel, clean: Clean, unit: str, objective: Objective
) -> Float[Tensor, "layer batch moved width"]:
    """Gradient of the objective in the clean activations of every layer: one query per fact, forward and back."""
    zeros: list[Tensor] = []

    def shift(value: Tensor) -> Tensor:
        zeros.append(torch.zeros_like(value[:, :, : clean.batch.moved]).requires_grad_())
        value = value.clone()
        value[:, :, : clean.batch.moved] = value[:, :, : clean.batch.moved] + zeros[-1]
        return value

    patches = dict.fromkeys(range(model.n_layers), shift)
    values = _objective_of_queries(model, clean, unit, {0: 1}, patches, objective)
    return torch.stack([gradient[:, -1] for gradient in torch.autograd.grad(values.sum(), zeros)])


def _objective_of_queries(
    model: HookedModel,
    clean: Clean,
    unit: str,
    births: Mapping[int, int],
    patches: Mapping[int, Patch],
    objective: Objective,
) -> Float[Tensor, "batch query"]:
    """The objective of parallel queries, `births[l]` of them born at layer l from the clean residual stream.

    `patches[l]` maps the unit activations (batch, query, tail, unit) of the queries born so far to what they become.
    """
    batch, tail = clean.batch, clean.batch.tail
    n_queries = sum(births.values())
    first = min(births)
    spare = max(0, copies(len(batch.ids) * batch.read) - births[first])
    births = {**births, first: births[first] + spare}
    n_queries += spare
    calls = QueryCalls(model, clean, n_queries)
    rows_at = [tail * sum(count for at, count in births.items() if at <= layer) for layer in range(model.n_layers)]

    def forward(layer: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if layer < first:
                extra = clean.extras[layer]
                return hidden if extra is None else (hidden, *extra)
            rows = [] if layer == first else [hidden]
            if layer in births:
                rows.append(repeat(clean.resid_pre[layer], "b t d -> b (n t) d", n=births[layer]))
            return original(torch.cat(rows, 1), **calls.arguments(layer, rows_at[layer]))

        return run

    def patch(layer: int) -> Patch:
        def by_query(value: Tensor) -> Tensor:
            value = patches[layer](rearrange(value, "b (n t) d -> b n t d", t=tail))
            return rearrange(value, "b n t d -> b (n t) d")

        return by_query

    def unembed(original: Callable[..., Any]) -> Callable[..., Any]:
        """Read the answers' columns only; with a plain head give the objective in the place of its logits."""

        def run(hidden: Tensor) -> Tensor:
            hidden = rearrange(hidden, "b (n t) d -> b n t d", t=tail)[:, :, -batch.read :]
            if not clean.plain_head:
                return original(rearrange(hidden, "b n r d -> b (n r) d"))
            values = readout(head, rearrange(hidden, "b n r d -> (b n r) d"), target.flatten(), objective)
            return rearrange(values, "(b q) -> b q 1", b=len(batch.ids))

        return run

    head = model.hf.get_output_embeddings()
    target = repeat(batch.target, "b r -> b n r", n=n_queries)
    with ExitStack() as stack:
        stack.enter_context(model.patched(unit, {layer: patch(layer) for layer in patches}))
        stack.enter_context(query_attention(model.config, batch.start, tail))
        stack.enter_context(forward_through(head, unembed(head.forward)))
        for layer in range(model.n_layers):
            block = model.block(layer)
            stack.enter_context(forward_through(block, forward(layer, block.forward)))
        logits = model.hf(**_inputs_of_queries(model, batch, n_queries), use_cache=False).logits
    logits = rearrange(logits, "b (n r) v -> b n r v", r=batch.read)
    values = logits[..., 0] if clean.plain_head else objective(logits, target)
    return (values * batch.weight[:, None]).sum(-1)[:, spare:]


def _inputs_of_queries(model: HookedModel, batch: Batch, n_queries: int) -> dict[str, Any]:
    """What the model is called with: the tail of every query, at the positions of the prompt's own."""
    inputs = model.inputs(repeat(batch.ids[:, batch.start :], "b t -> b (n t)", n=n_queries))
    if "position_ids" in inputs:
        positions = model.inputs(batch.ids, batch.mask)["position_ids"][:, batch.start :]
        inputs["position_ids"] = repeat(positions, "b t -> b (n t)", n=n_queries)
    return inputs

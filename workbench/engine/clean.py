"""The clean run of a batch, and what the engine keeps of it."""

import inspect
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from workbench.engine.batch import Batch, copies
from workbench.models import HookedModel


@dataclass(frozen=True)
class Clean:
    """What the engine keeps of the clean run of a batch."""

    batch: Batch
    resid_pre: list[Tensor]  # per layer (batch, tail, d_model)
    calls: list[dict[str, Any]]  # per layer, what its block was called with for the columns after the shared ones
    extras: list[tuple[Any, ...] | None]  # per layer, what its block returned besides the residual stream
    keys: list[tuple[Tensor, Tensor]]  # per layer, keys and values of the prefix
    activation: Float[Tensor, "layer batch moved width"]
    logits: Float[Tensor, "batch read d_vocab"]
    plain_head: bool  # whether the logits are what the unembedding gives, without a scale or a cap after it

    def of(self, rows: Int[Tensor, " row"]) -> "Clean":
        """The clean run of the facts with these indices, which may repeat."""
        n = len(self.batch.ids)
        return replace(
            self,
            batch=self.batch.of(rows),
            resid_pre=[value[rows] for value in self.resid_pre],
            calls=[{name: _rows_of(value, rows, n, name) for name, value in call.items()} for call in self.calls],
            extras=[_rows_of(extra, rows, n) for extra in self.extras],
            keys=[(key[rows], value[rows]) for key, value in self.keys],
            activation=self.activation[:, rows],
            logits=self.logits[rows],
        )


def _rows_of(value: Any, rows: Int[Tensor, " row"], n: int, name: str = "") -> Any:
    """Those parts of what a block was called with that belong to some facts of a batch of `n`.

    Tensors have the batch first, ALiBi's times the heads; vectors, tables without a batch and a first axis of 1 are
    shared.
    """
    if isinstance(value, tuple):
        return tuple(_rows_of(part, rows, n, name) for part in value)
    if not isinstance(value, Tensor) or value.ndim < 2 or name == "position_bias":
        return value
    if name == "position_embeddings" and value.ndim == 2:
        return value
    if name == "alibi" and value.shape[0] > 1:
        return value.unflatten(0, (n, -1))[rows].flatten(0, 1)
    return value[rows] if value.shape[0] == n else value


@torch.no_grad()
def run_clean(model: HookedModel, batch: Batch, unit: str) -> Clean:
    """Run the facts once, unpatched, and keep what the queries need."""
    if (times := copies(batch.ids.numel())) > 1:
        facts = torch.arange(len(batch.ids), device=model.device)
        return run_clean(model, batch.of(facts.repeat(times)), unit).of(facts)
    calls: list[dict[str, Any]] = []
    extras: list[tuple[Any, ...] | None] = []
    resid_pre: list[Tensor] = []
    activation: list[Tensor] = []
    cache = _shared_cache(model, batch)
    fed = batch.start - batch.shared  # the tail's place among the columns that are fed

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)  # a copy: the block is called with the dictionary itself
        hidden, *rest = args or [kwargs.pop("hidden_states")]
        names = list(inspect.signature(module.forward).parameters)[1:]
        resid_pre.append(hidden[:, fed:].clone())  # a view would keep the whole prompt's
        calls.append(dict(zip(names, rest, strict=False)) | kwargs)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        extras.append(None if isinstance(output, Tensor) else tuple(output[1:]))

    def keep(value: Tensor) -> Tensor:
        activation.append(value[:, fed : fed + batch.moved].clone())
        return value

    unembedded: list[Tensor] = []
    head = model.hf.get_output_embeddings()
    with ExitStack() as stack:
        # a slice as it is would make a batched product, with a copy of the unembedding for every fact
        stack.callback(head.register_forward_pre_hook(lambda module, args: (args[0].contiguous(),)).remove)
        stack.callback(head.register_forward_hook(lambda module, args, output: unembedded.append(output)).remove)
        stack.enter_context(model.patched(unit, dict.fromkeys(range(model.n_layers), keep)))
        for layer in range(model.n_layers):
            stack.callback(model.block(layer).register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(model.block(layer).register_forward_hook(after).remove)
        inputs = model.inputs(batch.ids, batch.mask)
        for name in inputs.keys() & {"input_ids", "position_ids"}:
            inputs[name] = inputs[name][:, batch.shared :]
        inputs |= model.keeping(batch.read + (len(batch.ids) * batch.read == 1))
        logits = model.hf(**inputs, past_key_values=cache, use_cache=True).logits[:, -batch.read :]
    plain = isinstance(head, nn.Linear) and torch.equal(unembedded[0][:, -batch.read :].float(), logits.float())
    layers: list[Any] = list(cache.layers)
    keys = [(layer.keys[..., : batch.start, :], layer.values[..., : batch.start, :]) for layer in layers]
    if len(keys) != model.n_layers or any(key.shape[-2] != batch.start for key, _ in keys):
        raise ValueError(f"{model.name}: its cache does not keep every key, so the engine cannot share the prefix.")
    return Clean(batch, resid_pre, calls, extras, keys, torch.stack(activation), logits, plain)


def _shared_cache(model: HookedModel, batch: Batch) -> DynamicCache:
    """Keys and values of the first `batch.shared` columns, from one run of the tokens that all prompts begin with.

    Prompts are padded on the left, so the shared tokens of a shorter one begin later; what lies under its padding is
    masked.
    """
    cache = DynamicCache()
    if not batch.shared:
        return cache
    padding = (batch.mask == 0).int().cumprod(-1).sum(-1)
    longest = int(padding.argmin())
    inputs = model.inputs(batch.ids[longest, None, : batch.shared])
    once: Any = model.hf(**inputs, past_key_values=DynamicCache(), use_cache=True, **model.keeping(1)).past_key_values
    columns = (torch.arange(batch.shared, device=padding.device) - padding[:, None]).clamp(min=0)
    for layer, kept in enumerate(once.layers):
        keys, values = (part[0][:, columns].transpose(0, 1) for part in (kept.keys, kept.values))
        cache.update(keys, values, layer)
    return cache

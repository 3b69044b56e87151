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

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from workbench.engine.attention import query_attention
from workbench.engine.reading import readout
from workbench.facts import TokenisedFact
from workbench.metrics import Objective
from workbench.models import HookedModel, pad_batch

#: Variants of some layers: activations (batch, variant, moved, unit) that replace the clean ones where they are moved.
Points = Mapping[int, Tensor]


@dataclass(frozen=True)
class Batch:
    """Several facts as one padded tensor whose prompts end at the same column.

    The columns from `start` on are the *tail*, which every query holds a copy of; its first `moved` columns are those
    whose activations are replaced. After its last columns the answers are read: `target` says which token each is
    compared with, and `weight` is 0 where an answer is shorter than the longest.
    """

    ids: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    start: int
    moved: int
    target: Int[Tensor, "batch read"]
    weight: Float[Tensor, "batch read"]

    @property
    def tail(self) -> int:
        """Number of columns that every query holds."""
        return self.ids.shape[1] - self.start

    @property
    def read(self) -> int:
        """Number of last columns after which something is read."""
        return self.target.shape[1]

    def value(self, logits: Float[Tensor, "batch read d_vocab"], objective: Objective) -> Float[Tensor, " batch"]:
        """The objective of every fact, summed over its answer's tokens."""
        return (objective(logits, self.target) * self.weight).sum(-1)

    def of(self, rows: Int[Tensor, " row"]) -> "Batch":
        """The facts with these indices, which may repeat."""
        parts = {name: getattr(self, name)[rows] for name in ("ids", "mask", "target", "weight")}
        return replace(self, **parts)


@dataclass(frozen=True)
class Clean:
    """What the engine keeps of the clean run of a batch."""

    batch: Batch
    resid_pre: list[Tensor]  # per layer (batch, tail, d_model)
    calls: list[dict[str, Any]]  # per layer, what its block was called with
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
            calls=[{name: _rows_of(value, rows, n) for name, value in call.items()} for call in self.calls],
            extras=[_rows_of(extra, rows, n) for extra in self.extras],
            keys=[(key[rows], value[rows]) for key, value in self.keys],
            activation=self.activation[:, rows],
            logits=self.logits[rows],
        )


def _rows_of(value: Any, rows: Int[Tensor, " row"], n: int) -> Any:
    """Those parts of what a block was called with that belong to some facts of a batch of `n`.

    Tensors have the batch first, alone or times the heads (ALiBi); a first axis of 1 and vectors are shared.
    """
    if isinstance(value, tuple):
        return tuple(_rows_of(part, rows, n) for part in value)
    if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[0] % n:
        return value
    return value.unflatten(0, (n, -1))[rows].flatten(0, 1)


def make_batch(facts: Sequence[TokenisedFact], device: torch.device, scope: str = "last") -> Batch:
    """Prompts padded on the left, answers on the right.

    With `scope="last"` the last prompt token is moved and the prefix before it is shared; with `scope="all"` every
    prompt token is. The last answer token is a target only: nothing is read after it, so it is not fed.
    """
    prompts, prompt_mask = pad_batch([fact.prompt_ids for fact in facts], side="left")
    answers, answer_mask = pad_batch([fact.answer_ids for fact in facts], side="right")
    start = prompts.shape[1] - 1 if scope == "last" else 0
    tensors = (
        torch.cat([prompts, answers[:, :-1]], 1),
        torch.cat([prompt_mask, answer_mask[:, :-1]], 1),
        answers,
        answer_mask.float(),
    )
    ids, mask, target, weight = (tensor.to(device) for tensor in tensors)
    return Batch(ids, mask, start, prompts.shape[1] - start, target, weight)


class _PrefixCache(DynamicCache):
    """Keys and values of the clean prefix, in front of whatever the queries bring; holds nothing of theirs."""

    def __init__(self, prefix: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.prefix = prefix

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        key, value = self.prefix[layer_idx]
        return torch.cat([key, key_states], -2), torch.cat([value, value_states], -2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.prefix[layer_idx][0].shape[-2]


@torch.no_grad()
def run_clean(model: HookedModel, batch: Batch, unit: str) -> Clean:
    """Run the facts once, unpatched, and keep what the queries need."""
    calls: list[dict[str, Any]] = []
    extras: list[tuple[Any, ...] | None] = []
    resid_pre: list[Tensor] = []
    activation: list[Tensor] = []
    cache = DynamicCache()

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, *rest = args or [kwargs.pop("hidden_states")]
        names = list(inspect.signature(module.forward).parameters)[1:]
        resid_pre.append(hidden[:, batch.start :])
        calls.append(dict(zip(names, rest, strict=False)) | kwargs)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        extras.append(None if isinstance(output, Tensor) else tuple(output[1:]))

    def keep(value: Tensor) -> Tensor:
        activation.append(value[:, batch.start : batch.start + batch.moved].clone())
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
        inputs = model.inputs(batch.ids, batch.mask) | model.keeping(batch.read)
        logits = model.hf(**inputs, past_key_values=cache, use_cache=True).logits[:, -batch.read :]
    plain = isinstance(head, nn.Linear) and torch.equal(unembedded[0][:, -batch.read :].float(), logits.float())
    layers: list[Any] = list(cache.layers)
    keys = [(layer.keys[..., : batch.start, :], layer.values[..., : batch.start, :]) for layer in layers]
    if len(keys) != model.n_layers or any(key.shape[-2] != batch.start for key, _ in keys):
        raise ValueError(f"{model.name}: its cache does not keep every key, so the engine cannot share the prefix.")
    return Clean(batch, resid_pre, calls, extras, keys, torch.stack(activation), logits, plain)


def run_queries(
    model: HookedModel, clean: Clean, unit: str, points: Points, objective: Objective
) -> Float[Tensor, "batch query"]:
    """The objective of every patched variant, differentiable in `points`, queries in the order of layers.

    `points[l][:, k]` replaces the unit activations of layer l at the moved positions in the k-th variant of layer l.
    """
    batch, tail = clean.batch, clean.batch.tail
    n_queries = sum(value.shape[1] for value in points.values())
    calls = _QueryCalls(model, clean, n_queries)
    first = min(points)
    born: dict[int, int] = {}
    count = 0
    for layer in range(model.n_layers):
        count += points[layer].shape[1] if layer in points else 0
        born[layer] = count

    def forward(layer: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if layer < first:
                extra = clean.extras[layer]
                return hidden if extra is None else (hidden, *extra)
            rows = [] if layer == first else [hidden]
            if layer in points:
                rows.append(repeat(clean.resid_pre[layer], "b t d -> b (n t) d", n=points[layer].shape[1]))
            return original(torch.cat(rows, 1), **calls.arguments(layer, born[layer] * tail))

        return run

    def patch(layer: int) -> Callable[[Tensor], Tensor]:
        def replace(value: Tensor) -> Tensor:
            new = points[layer]
            value = rearrange(value, "b (n t) d -> b n t d", t=tail).clone()
            value[:, -new.shape[1] :, : batch.moved] = new.to(value.dtype)
            return rearrange(value, "b n t d -> b (n t) d")

        return replace

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
        stack.enter_context(model.patched(unit, {layer: patch(layer) for layer in points}))
        stack.enter_context(query_attention(model.config, batch.start, tail))
        stack.enter_context(_forward_through(head, unembed(head.forward)))
        for layer in range(model.n_layers):
            block = model.block(layer)
            stack.enter_context(_forward_through(block, forward(layer, block.forward)))
        ids = repeat(batch.ids[:, batch.start :], "b t -> b (n t)", n=n_queries)
        inputs = model.inputs(ids)
        if "position_ids" in inputs:
            positions = model.inputs(batch.ids, batch.mask)["position_ids"][:, batch.start :]
            inputs["position_ids"] = repeat(positions, "b t -> b (n t)", n=n_queries)
        logits = model.hf(**inputs, use_cache=False).logits
    logits = rearrange(logits, "b (n r) v -> b n r v", r=batch.read)
    values = logits[..., 0] if clean.plain_head else objective(logits, target)
    return (values * batch.weight[:, None]).sum(-1)


def clean_gradients(
    model: HookedModel, batch: Batch, unit: str, objective: Objective
) -> Float[Tensor, "layer batch moved width"]:
    """Gradient of the objective in the clean activations of every layer: one forward, one backward, no queries."""
    moved = slice(batch.start, batch.start + batch.moved)
    zeros: list[Tensor] = []

    def shift(value: Tensor) -> Tensor:
        zeros.append(torch.zeros_like(value[:, moved]).requires_grad_())
        value = value.clone()
        value[:, moved] = value[:, moved] + zeros[-1]
        return value

    with model.patched(unit, dict.fromkeys(range(model.n_layers), shift)):
        inputs = model.inputs(batch.ids, batch.mask) | model.keeping(batch.read)
        logits = model.hf(**inputs, use_cache=False).logits[:, -batch.read :]
    return torch.stack(torch.autograd.grad(batch.value(logits, objective).sum(), zeros))


@contextmanager
def _forward_through(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Give a module another forward inside the `with`, and afterwards what it had, its own or one it was given."""
    given = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if given is None:
            del module.forward
        else:
            module.forward = given


class _QueryCalls:
    """What each block is called with for the queries: what it was called with in the clean run, re-indexed."""

    def __init__(self, model: HookedModel, clean: Clean, n_queries: int) -> None:
        batch = clean.batch
        device = batch.ids.device
        own = torch.arange(batch.tail, device=device).repeat(n_queries)
        query = torch.arange(n_queries, device=device).repeat_interleave(batch.tail)
        self.model, self.clean = model, clean
        self.cache = _PrefixCache(clean.keys)
        self.rows = batch.start + own
        self.columns = torch.cat([torch.arange(batch.start, device=device), self.rows])
        shared = torch.ones(len(own), batch.start, dtype=torch.bool, device=device)
        self.own: Bool[Tensor, "row column"] = torch.cat([shared, query[:, None] == query[None]], 1)
        self.masks: dict[int, Float[Tensor, "batch 1 row column"]] = {}

    def arguments(self, layer: int, n_rows: int) -> dict[str, Any]:
        """Keyword arguments of the block of `layer` when `n_rows` rows of queries have been born."""
        call = self.clean.calls[layer]
        return {name: self._reindexed(name, value, n_rows) for name, value in call.items()}

    def _reindexed(self, name: str, value: Any, n_rows: int) -> Any:
        rows, columns = self.rows[:n_rows], self.columns[: self.clean.batch.start + n_rows]
        if name == "attention_mask":
            return self._mask(value)[:, :, :n_rows, : len(columns)]
        if isinstance(value, Cache):
            return self.cache
        if name in ("position_ids", "cache_position"):
            return None if value is None else value[..., rows]
        if name == "position_embeddings":
            tables = value if isinstance(value, tuple) else (value,)
            tables = tuple(table[..., rows, :] for table in tables)
            return tables if isinstance(value, tuple) else tables[0]
        if name in ("alibi", "position_bias"):
            return None if value is None else value[..., columns]
        if isinstance(value, Tensor):
            kind = type(self.model.hf).__name__
            raise ValueError(f"{self.model.name}: the blocks of a {kind} take {name!r}, which the engine cannot share.")
        return value

    def _mask(self, value: Tensor | None) -> Float[Tensor, "batch 1 row column"]:
        """Additive mask: what a token saw in the clean run, of the prefix and of its own query only."""
        if id(value) not in self.masks:
            if value is None:
                seen = self.rows[:, None] >= self.columns
                padding = self.clean.batch.mask.bool()[:, None, None, self.columns]
                allowed = padding & seen
            elif value.ndim != 4:
                raise ValueError(f"{self.model.name}: its attention takes a mask of shape {tuple(value.shape)}; "
                                 'open it with attn_implementation="sdpa" or "eager".')  # fmt: skip
            else:
                value = value[..., self.rows, :][..., self.columns]
                allowed = value if value.dtype == torch.bool else value > torch.finfo(value.dtype).min / 2
            zero = torch.zeros((), dtype=self.model.dtype, device=self.rows.device)
            self.masks[id(value)] = zero.masked_fill(~(allowed & self.own), torch.finfo(self.model.dtype).min)
        return self.masks[id(value)]

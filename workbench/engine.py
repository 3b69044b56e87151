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
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from workbench.facts import TokenisedFact
from workbench.metrics import Objective, logprob
from workbench.models import HookedModel, pad_batch, probe_ids

#: Largest difference between the engine and plain hooks, relative to the largest gradient, that `check_engine` takes.
#: Measured in float32: at most 3e-6 over 25 tiny architectures and the default model.
ENGINE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 3e-1}

#: Models on which the engine was compared already.
_CHECKED: WeakSet[HookedModel] = WeakSet()

#: Variants of some layers: activations (batch, variant, moved, unit) that replace the clean ones where they are moved.
Points = Mapping[int, Tensor]


@dataclass(frozen=True)
class Batch:
    """Several facts as one padded tensor whose prompts end at the same column.

    The columns from `start` on are the *tail*, which every query holds a copy of; its first `moved` columns are those
    whose activations are replaced. `target` and `weight` say what is read after each column of the tail; `weight` is 0
    where nothing is.
    """

    ids: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    start: int
    moved: int
    target: Int[Tensor, "batch tail"]
    weight: Float[Tensor, "batch tail"]

    @property
    def tail(self) -> int:
        """Number of columns that every query holds."""
        return self.target.shape[1]


@dataclass(frozen=True)
class Clean:
    """What the engine keeps of the clean run of a batch."""

    batch: Batch
    resid_pre: list[Tensor]  # per layer (batch, tail, d_model)
    calls: list[dict[str, Any]]  # per layer, what its block was called with
    extras: list[tuple[Any, ...] | None]  # per layer, what its block returned besides the residual stream
    keys: list[tuple[Tensor, Tensor]]  # per layer, keys and values of the prefix
    activation: Float[Tensor, "layer batch moved width"]
    logits: Float[Tensor, "batch tail d_vocab"]


def make_batch(facts: Sequence[TokenisedFact], device: torch.device, scope: str = "last") -> Batch:
    """Prompts padded on the left, answers on the right.

    With `scope="last"` the last prompt token is moved and the prefix before it is shared; with `scope="all"` every
    prompt token is. The last answer token is a target only: nothing is read after it, so it is not fed.
    """
    prompts, prompt_mask = pad_batch([fact.prompt_ids for fact in facts], side="left")
    answers, answer_mask = pad_batch([fact.answer_ids for fact in facts], side="right")
    start = prompts.shape[1] - 1 if scope == "last" else 0
    unread = torch.zeros_like(prompts[:, start:-1])
    tensors = (
        torch.cat([prompts, answers[:, :-1]], 1),
        torch.cat([prompt_mask, answer_mask[:, :-1]], 1),
        torch.cat([unread, answers], 1),
        torch.cat([unread, answer_mask], 1).float(),
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

    with ExitStack() as stack:
        stack.enter_context(model.patched(unit, dict.fromkeys(range(model.n_layers), keep)))
        for layer in range(model.n_layers):
            stack.callback(model.block(layer).register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(model.block(layer).register_forward_hook(after).remove)
        inputs = model.inputs(batch.ids, batch.mask)
        logits = model.hf(**inputs, past_key_values=cache, use_cache=True).logits[:, batch.start :]
    layers: list[Any] = list(cache.layers)
    keys = [(layer.keys[..., : batch.start, :], layer.values[..., : batch.start, :]) for layer in layers]
    if len(keys) != model.n_layers or any(key.shape[-2] != batch.start for key, _ in keys):
        raise ValueError(f"{model.name}: its cache does not keep every key, so the engine cannot share the prefix.")
    return Clean(batch, resid_pre, calls, extras, keys, torch.stack(activation), logits)


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

    with ExitStack() as stack:
        stack.enter_context(model.patched(unit, {layer: patch(layer) for layer in points}))
        for layer in range(model.n_layers):
            block = model.block(layer)
            stack.callback(block.__dict__.pop, "forward", None)
            block.forward = forward(layer, block.forward)
        ids = repeat(batch.ids[:, batch.start :], "b t -> b (n t)", n=n_queries)
        inputs = model.inputs(ids)
        if "position_ids" in inputs:
            positions = model.inputs(batch.ids, batch.mask)["position_ids"][:, batch.start :]
            inputs["position_ids"] = repeat(positions, "b t -> b (n t)", n=n_queries)
        logits = model.hf(**inputs, use_cache=False).logits
    logits = rearrange(logits, "b (n t) v -> b n t v", t=tail)
    target = repeat(batch.target, "b t -> b n t", n=n_queries)
    return (objective(logits, target) * batch.weight[:, None]).sum(-1)


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
        logits = model.hf(**model.inputs(batch.ids, batch.mask), use_cache=False).logits[:, batch.start :]
    value = (objective(logits, batch.target) * batch.weight).sum()
    return torch.stack(torch.autograd.grad(value, zeros))


def check_engine(model: HookedModel) -> None:
    """Compare the engine with plain hooks on two invented facts, and refuse a model on which the two differ.

    A model is compared once.

    Raises:
        ValueError: the engine does not reproduce this architecture.
    """
    if model in _CHECKED:
        return
    kind = f"{model.name} ({type(model.hf).__name__})"
    ids = [int(i) for i in probe_ids(model.hf)[0]]
    facts = [TokenisedFact("long", tuple(ids[:4]), tuple(ids[4:6])), TokenisedFact("short", tuple(ids[1:3]), (ids[6],))]
    batch = make_batch(facts, model.device)
    layers = sorted({0, model.n_layers // 2, model.n_layers - 1})
    try:
        clean = run_clean(model, batch, "node")
        points = {layer: (0.5 * clean.activation[layer])[:, None].requires_grad_() for layer in layers}
        values = run_queries(model, clean, "node", points, logprob)
        gradients = torch.autograd.grad(values.sum(), list(points.values()))
    except (RuntimeError, TypeError, IndexError, KeyError, AttributeError) as error:
        raise ValueError(f"{kind}: the attribution engine cannot run this architecture ({error}).") from error
    scale = max(float(gradient.abs().max()) for gradient in gradients)
    for column, layer in enumerate(layers):
        for row, fact in enumerate(facts):
            value, gradient = _hooked_gradient(model, fact, layer)
            gap = max(
                abs(float(values[row, column].detach()) - value) / max(1.0, abs(value)),
                float((gradients[column][row, 0] - gradient).abs().max()) / max(scale, 1e-12),
            )
            if not gap <= ENGINE_TOLERANCE[model.dtype]:
                raise ValueError(
                    f"{kind}: the attribution engine and plain hooks differ by {gap:.1e} at layer {layer}, "
                    "so this architecture is not supported."
                )
    _CHECKED.add(model)


def _hooked_gradient(model: HookedModel, fact: TokenisedFact, layer: int) -> tuple[float, Float[Tensor, "1 width"]]:
    """Objective and gradient with the node activation of one layer halved, by a plain hook on an unpadded text."""
    batch = make_batch([fact], model.device)
    leaf: list[Tensor] = []

    def halve(value: Tensor) -> Tensor:
        leaf.append((0.5 * value[:, batch.start]).detach().requires_grad_())
        value = value.clone()
        value[:, batch.start] = leaf[0]
        return value

    with model.patched("node", {layer: halve}):
        logits = model.hf(**model.inputs(batch.ids), use_cache=False).logits[:, batch.start :]
    value = logprob(logits, batch.target).sum()
    return float(value.detach()), torch.autograd.grad(value, leaf)[0]


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

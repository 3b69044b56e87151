"""What each block is called with for the queries: what it was called with in the clean run, re-indexed."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import Cache, DynamicCache

from workbench.engine.clean import Clean
from workbench.models import HookedModel


class QueryCalls:
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
        columns = self.columns[: self.clean.batch.start + n_rows]
        rows = self.rows[:n_rows] - self.clean.batch.shared  # the call was made for the columns after the shared ones
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
                value = value[..., self.rows - self.clean.batch.shared, :][..., self.columns]
                allowed = value if value.dtype == torch.bool else value > torch.finfo(value.dtype).min / 2
            zero = torch.zeros((), dtype=self.model.dtype, device=self.rows.device)
            self.masks[id(value)] = zero.masked_fill(~(allowed & self.own), torch.finfo(self.model.dtype).min)
        return self.masks[id(value)]


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

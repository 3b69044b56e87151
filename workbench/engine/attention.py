"""Attention of parallel queries: each sees the shared prefix and itself, so only those scores are made.

A general attention would score every query against every other and mask the result. Where a model takes its attention
from transformers' table of functions (all that run with "sdpa"), this one stands in for the length of a pass; others
keep their own, with the mask.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "workbench_queries"


@contextmanager
def query_attention(config: Any, prefix: int, tail: int) -> Iterator[None]:
    """Let the blocks of a model attend as queries of `tail` tokens behind `prefix` shared ones, inside the `with`."""
    if config._attn_implementation != "sdpa":
        yield
        return
    ALL_ATTENTION_FUNCTIONS[NAME] = partial(attend, prefix=prefix, tail=tail)
    ALL_MASK_ATTENTION_FUNCTIONS[NAME] = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"
        del ALL_ATTENTION_FUNCTIONS[NAME], ALL_MASK_ATTENTION_FUNCTIONS[NAME]


def attend(
    module: nn.Module,
    query: Float[Tensor, "batch head row d_head"],
    key: Float[Tensor, "batch kv_head column d_head"],
    value: Float[Tensor, "batch kv_head column d_head"],
    attention_mask: Float[Tensor, "_ 1 row column"],
    *,
    prefix: int,
    tail: int,
    scaling: float | None = None,
    softcap: float | None = None,
    **unused: Any,
) -> tuple[Float[Tensor, "batch row head d_head"], None]:
    """Scaled dot-product attention over the first `prefix` columns and the query's own `tail` columns.

    Rows and the columns after the prefix are queries of `tail` tokens, in order; the additive mask says what else a
    token must not see (padding, windows, its own later tokens).
    """
    kv_heads = key.shape[1]
    query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    query = rearrange(query, "b (k g) r d -> b k g r d", k=kv_heads)
    groups, rows = query.shape[2:4]
    flat = rearrange(query, "b k g r d -> b k (g r) d")
    before = rearrange(flat @ key[:, :, :prefix].mT, "b k (g r) p -> b k g r p", g=groups)
    own_query = rearrange(query, "b k g (n t) d -> b k g n t d", t=tail)
    own_key, own_value = (rearrange(x[:, :, prefix:], "b k (n t) d -> b k 1 n t d", t=tail) for x in (key, value))
    own = (own_query * own_key).sum(-1)[..., None] if tail == 1 else own_query @ own_key.mT
    scores = torch.cat([before, rearrange(own, "b k g n t s -> b k g (n t) s")], -1)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    blocks = rearrange(attention_mask[:, 0, :, prefix:], "b (n t) (m s) -> b n m t s", t=tail, s=tail)
    own_mask = rearrange(blocks.diagonal(dim1=1, dim2=2), "b t s n -> b (n t) s")
    mask = torch.cat([attention_mask[:, 0, :, :prefix], own_mask], -1)
    exact = torch.promote_types(query.dtype, torch.float32)  # of float64 the mask's lowest number is no float32
    weight = (scores + mask[:, None, None]).softmax(-1, dtype=exact).to(query.dtype)
    seen = rearrange(weight[..., :prefix], "b k g r p -> b k (g r) p") @ value[:, :, :prefix]
    own_weight = rearrange(weight[..., prefix:], "b k g (n t) s -> b k g n t s", t=tail)
    own_seen = own_weight * own_value if tail == 1 else own_weight @ own_value
    total = rearrange(seen, "b k (g r) d -> b k g r d", r=rows) + rearrange(own_seen, "b k g n t d -> b k g (n t) d")
    return rearrange(total, "b k g r d -> b r (k g) d").contiguous(), None

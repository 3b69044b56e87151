"""How far an answer is from its target: formulas on logits, embeddings and hidden states, with no model behind them.

Definitions of ours, after the findings of "Semantic are Beacons" (arXiv 2405.18292), whose equations were not at hand.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize


def embedding_distance(
    W_E: Float[Tensor, "d_vocab d_model"], greedy: Sequence[Sequence[int]], gold: Sequence[Sequence[int]]
) -> list[float]:
    """`d_emb`: `1 - cos` of the mean embeddings of two token sequences per fact; exactly 0 where they are equal.

    >>> embedding_distance(torch.eye(2), [[0], [1]], [[0], [0]])
    [0.0, 1.0]
    """
    distances = []
    for a, y in zip(greedy, gold, strict=True):
        if list(a) == list(y):
            distances.append(0.0)
            continue
        said, meant = (W_E[list(ids)].float().mean(0) for ids in (a, y))
        distances.append(float(1 - cosine_similarity(said, meant, dim=0)))
    return distances


def soft_distance(
    logits: Float[Tensor, "token d_vocab"], target: Int[Tensor, " token"], W_E: Float[Tensor, "d_vocab d_model"]
) -> Float[Tensor, " token"]:
    """`sum_v P(v) (1 - cos(W_E[v], W_E[target]))` per token: the distance to expect of a sampled token.

    Differentiable in the logits. Written as `1 - (P @ unit(W_E)) . unit(W_E[target])`, so that nothing larger than the
    logits and the embedding is ever held; the softmax runs in float32 at least, the embedding is read in its own dtype
    and normed in the softmax's. An embedding of zeros is orthogonal to everything. The mean over an answer's tokens is
    the `d_soft` of a fact.

    >>> W_E = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    >>> soft_distance(torch.tensor([[0.0, 0.0]]), torch.tensor([0]), W_E)
    tensor([1.])
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    unit = normalize(W_E.to(wide), dim=-1)
    return 1 - torch.einsum("td,td->t", logits.to(wide).softmax(-1) @ unit, unit[target])


def cosine_distance(a: Float[Tensor, "*rows d_model"], b: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows"]:
    """`1 - cos` of every row with its partner, at least 0; exactly 0 where the two rows are equal.

    >>> cosine_distance(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 3.0], [1.0, 0.0]]))
    tensor([1., 0.])
    """
    distance = (1 - cosine_similarity(a, b, dim=-1)).clamp(min=0)
    return distance.masked_fill((a == b).all(-1), 0)


def toward_and_off(
    before: Float[Tensor, "layer fact d_model"],
    after: Float[Tensor, "layer fact d_model"],
    anchor: Float[Tensor, "*layer fact d_model"],
) -> tuple[Float[Tensor, "layer fact"], Float[Tensor, "layer fact"]]:
    """The part of a movement that goes toward an anchor and the part that does not, in units of the distance to it.

    With r = anchor - before and Dh = after - before: `toward = <Dh, r>/|r|^2` and `off = |Dh - toward r|/|r|`, so that
    `|after - anchor|^2/|r|^2 = (1 - toward)^2 + off^2`. The anchor is one per fact, or one per layer and fact.

    >>> h, c = torch.zeros(1, 1, 2), torch.tensor([[2.0, 0.0]])
    >>> [x.item() for x in toward_and_off(h, h + torch.tensor([1.0, 1.0]), c)]
    [0.5, 0.5]
    """
    residual, moved = anchor - before, after - before
    square = torch.einsum("lfd,lfd->lf", residual, residual)
    toward = torch.einsum("lfd,lfd->lf", moved, residual) / square
    rest = moved - rearrange(toward, "l f -> l f 1") * residual
    return toward, rest.norm(dim=-1) / square.sqrt()

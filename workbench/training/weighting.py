"""What a loss that attends to meaning weighs by: distances of samples in training, sample weights, token weights.

Definitions of ours, after the findings of "Semantic are Beacons" (arXiv 2405.18292), whose equations were not at hand.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, pad

from workbench.distances import soft_distance
from workbench.recollection import by_length
from workbench.training.batches import IGNORED, Tokenised, collate


class Tokens(NamedTuple):
    """The learned tokens of a batch: what is predicted for each, and which sequence (row) it belongs to."""

    logits: Float[Tensor, "token d_vocab"]
    target: Int[Tensor, " token"]
    row: Int[Tensor, " token"]
    nll: Float[Tensor, " token"]


def sample_weights(distance: Float[Tensor, " sample"], beta: float, clip: float = 5.0) -> Float[Tensor, " sample"]:
    """`N softmax(beta zscore(d))`, between 1/clip and clip, with mean 1; float64, and no gradient goes through it.

    Clipping and the mean hold together: the weights are `min(max(c v, 1/clip), clip)`, v the softmax weights and c the
    factor (1 where nothing is clipped) that makes their mean 1. Equal distances, or `beta` 0, give exactly 1.

    >>> sample_weights(torch.tensor([0.0, 1.0]), 0.5)
    tensor([0.5379, 1.4621], dtype=torch.float64)
    >>> sample_weights(torch.tensor([0.0, 1.0]), 9.0, clip=1.5)
    tensor([0.6667, 1.3333], dtype=torch.float64)
    """
    d = distance.detach().double().cpu()
    if not d.isfinite().all():
        raise ValueError("A distance is not a finite number, so that samples cannot be weighed by it.")
    if not len(d):
        return d
    centred = d - d.mean()
    spread = centred.square().mean().sqrt()
    level = beta * centred / spread if spread > 1e-12 * (1 + d.abs().max()) else torch.zeros_like(d)
    raised = (level - level.max()).exp()
    weights = raised / raised.mean()
    low, high = 1 / clip, clip
    if low <= weights.min() and weights.max() <= high:
        return weights
    less, more = -torch.tensor(1e3).double(), torch.tensor(1e3).double()  # of log c; the mean grows with c
    logs = level - level.max() - raised.mean().log()
    for _ in range(200):
        middle = (less + more) / 2
        mean = (logs + middle).exp().clamp(low, high).mean()
        less, more = (middle, more) if mean < 1 else (less, middle)
    return (logs + more).exp().clamp(low, high)


def token_weights(
    logits: Float[Tensor, "token d_vocab"],
    target: Int[Tensor, " token"],
    W_E: Float[Tensor, "d_vocab d_model"],
    gamma: float,
) -> Float[Tensor, " token"]:
    """`1 + gamma (1 - cos(W_E[argmax], W_E[target]))`: more where the greedy token means something else; no gradient.

    >>> W_E = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    >>> token_weights(torch.tensor([[3.0, 0.0], [0.0, 3.0]]), torch.tensor([0, 0]), W_E, 0.5).tolist()
    [1.0, 2.0]
    """
    said = logits.detach().argmax(-1)
    apart = 1 - cosine_similarity(W_E[said].float(), W_E[target].float(), dim=-1)
    return 1 + gamma * apart.masked_fill(said == target, 0)


def learned_tokens(logits: Float[Tensor, "batch place d_vocab"], labels: Int[Tensor, "batch pos"]) -> Tokens:
    """The predictions of all learned tokens of a batch, in float32 at least, with their cross-entropy in nats.

    Where logits are longer than labels, a method such as prompt tuning has put tokens of its own in front.
    """
    in_front = max(0, logits.shape[1] - labels.shape[1])
    labels = pad(labels, (in_front, 0), value=IGNORED)[:, 1:].to(logits.device)
    row, position = (labels != IGNORED).nonzero(as_tuple=True)
    chosen = logits[row, position]
    chosen = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
    target = labels[row, position]
    return Tokens(chosen, target, row, cross_entropy(chosen, target, reduction="none"))


def sample_distances(tokens: Tokens, n: int, W_E: Float[Tensor, "d_vocab d_model"]) -> Float[Tensor, " sample"]:
    """`d_soft` of each of n sequences, the mean over its learned tokens; float64 on the CPU."""
    distance = soft_distance(tokens.logits, tokens.target, W_E).cpu().double()
    row = tokens.row.cpu()
    count = torch.bincount(row, minlength=n).clamp(min=1)
    return torch.zeros(n, dtype=torch.float64).index_add(0, row, distance) / count


@torch.no_grad()
def distances_now(
    model: nn.Module, items: Sequence[Tokenised], W_E: Float[Tensor, "d_vocab d_model"]
) -> Float[Tensor, " sample"]:
    """`d_soft` of everything that is trained, by the model as it is now."""
    training, device = model.training, next(model.parameters()).device
    W_E = W_E.to(device)
    model.eval()
    distance = torch.zeros(len(items), dtype=torch.float64)
    for indices in by_length([len(item.ids) for item in items]):
        batch = {name: tensor.to(device) for name, tensor in collate([items[i] for i in indices]).items()}
        labels = batch.pop("labels")
        tokens = learned_tokens(model(**batch, use_cache=False).logits, labels)
        distance[list(indices)] = sample_distances(tokens, len(indices), W_E)
    model.train(training)
    return distance

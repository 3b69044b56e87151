"""Logits to one number per fact: pure functions over tensors, no model."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

Objective = Callable[[Float[Tensor, "*batch d_vocab"], Int[Tensor, "*batch"]], Float[Tensor, "*batch"]]


def logprob(logits: Float[Tensor, "*batch d_vocab"], target: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Log-probability of the target token, in nats.

    >>> logprob(torch.zeros(4), torch.tensor(1)).item()
    -1.3862943649291992
    """
    return logit(logits, target) - torch.logsumexp(_wide(logits), -1)


def prob(logits: Float[Tensor, "*batch d_vocab"], target: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Probability of the target token.

    >>> prob(torch.zeros(4), torch.tensor(1)).item()
    0.25
    """
    return logprob(logits, target).exp()


def logit(logits: Float[Tensor, "*batch d_vocab"], target: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Logit of the target token."""
    return _wide(logits.gather(-1, target[..., None])[..., 0])


def margin(logits: Float[Tensor, "*batch d_vocab"], target: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Logit of the target token minus the best other logit; positive where the target is the greedy choice.

    >>> margin(torch.tensor([1.0, 5.0, 3.0]), torch.tensor(1)).item()
    2.0
    """
    others = logits.scatter(-1, target[..., None], -torch.inf)
    return logit(logits, target) - _wide(others.amax(-1))


def rank(logits: Float[Tensor, "*batch d_vocab"], target: Int[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
    """How many tokens come before the target token; 0 is the greedy choice, ties go to the lower index.

    >>> rank(torch.tensor([1.0, 5.0, 5.0]), torch.tensor(2)).item()
    1
    """
    own = logits.gather(-1, target[..., None])
    index = torch.arange(logits.shape[-1], device=logits.device)
    before = (logits > own) | ((logits == own) & (index < target[..., None]))
    return before.sum(-1)


def kl(before: Float[Tensor, "*batch d_vocab"], after: Float[Tensor, "*batch d_vocab"]) -> Float[Tensor, "*batch"]:
    """Kullback-Leibler divergence of the next-token distribution after from the one before, in nats.

    >>> kl(torch.zeros(2), torch.tensor([0.0, 1.0])).item() > 0
    True
    """
    before, after = before.float().log_softmax(-1), after.float().log_softmax(-1)
    return (before.exp() * (before - after)).sum(-1)


def _wide(values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """At least float32."""
    return values if values.dtype == torch.float64 else values.float()


#: What attribution can differentiate; each gives one number per answer token, summed over the answer's tokens.
OBJECTIVES: dict[str, Objective] = {"logprob": logprob, "prob": prob, "logit": logit, "margin": margin}

"""The last step of a pass, fused: from hidden states to the objective without keeping a logit.

The logits of a thousand queries are far larger than everything before them. Here they exist for a few rows at a time:
each piece gives its objective, the objective's gradient in the logits in closed form and with it the gradient in the
hidden states, and is forgotten. Of the objective `logit` only the target's row of the unembedding is read at all.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.metrics import Objective, logit, logprob, margin, prob

#: Numbers in one piece of logits: small enough for the processor's caches, large enough for full matrix products.
PIECE = 2**23


def readout(
    head: nn.Linear, hidden: Float[Tensor, "row d_embed"], target: Int[Tensor, " row"], objective: Objective
) -> Float[Tensor, " row"]:
    """`objective(head(hidden), target)` of every row, differentiable in `hidden`; `head` is linear.

    >>> head = nn.Linear(2, 3)
    >>> hidden, target = torch.ones(1, 2), torch.tensor([2])
    >>> torch.allclose(readout(head, hidden, target, logprob), logprob(head(hidden), target))
    True
    """
    if objective is logit:
        value = torch.einsum("rd,rd->r", hidden, head.weight[target])
        value = value if head.bias is None else value + head.bias[target]
        return value if value.dtype == torch.float64 else value.float()
    return _Fused.apply(hidden, head.weight, head.bias, target, GRADIENTS[objective])


class _Fused(torch.autograd.Function):
    """An objective of linear logits, piece by piece; the gradient in the hidden states is made on the way."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, into: Any) -> Tensor:
        size = max(1, PIECE // len(weight))
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        values = []
        buffer = weight.new_empty(min(size, len(hidden)), len(weight))
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            logits = torch.mm(hidden[rows], weight.T, out=buffer[: len(hidden[rows])])
            logits = logits if bias is None else logits.add_(bias)
            value, gradient = into(logits, target[rows], slopes is not None)
            values.append(value)
            if slopes is not None:
                torch.mm(gradient.to(weight.dtype), weight, out=slopes[rows])
        ctx.save_for_backward(*([] if slopes is None else [slopes]))
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (slopes,) = ctx.saved_tensors
        return (slopes * grads[0][:, None]).to(slopes.dtype), None, None, None, None


Pair = tuple[Tensor, Tensor | None]


def _logprob(logits: Float[Tensor, "row d_vocab"], target: Int[Tensor, " row"], with_gradient: bool) -> Pair:
    """Value, and gradient `onehot - softmax`, in the place of the logits."""
    own = logit(logits, target)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    top = logits.amax(-1, keepdim=True)
    share = logits.sub_(top).exp_()
    total = share.sum(-1, keepdim=True)
    value = own - top[:, 0] - total[:, 0].log()
    if not with_gradient:
        return value, None
    share.mul_(-1 / total)
    return value, share.scatter_add_(1, target[:, None], torch.ones_like(total))


def _prob(logits: Float[Tensor, "row d_vocab"], target: Int[Tensor, " row"], with_gradient: bool) -> Pair:
    """Value p, and gradient `p (onehot - softmax)`."""
    value, gradient = _logprob(logits, target, with_gradient)
    value = value.exp()
    return value, gradient if gradient is None else gradient.mul_(value[:, None])


def _margin(logits: Float[Tensor, "row d_vocab"], target: Int[Tensor, " row"], with_gradient: bool) -> Pair:
    """Value, and gradient +1 at the target and -1 at the best other token."""
    own = logit(logits, target)
    best, index = logits.scatter_(1, target[:, None], -torch.inf).max(-1)
    value = own - best.to(own.dtype)
    if not with_gradient:
        return value, None
    ones = torch.ones_like(best)[:, None]
    return value, logits.zero_().scatter_(1, target[:, None], ones).scatter_(1, index[:, None], -ones)


#: Value and gradient in the logits of every objective, which may write over the logits.
GRADIENTS: dict[Objective, Callable[[Tensor, Tensor, bool], Pair]] = {
    logprob: _logprob,
    prob: _prob,
    margin: _margin,
}

"""The projection by a passing copy of the weight with the delta in it: one product instead of two for many tokens."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

#: Adding the delta to a copy of the weight takes as long as this many products of a token with each of its rows
#: (float32 on a CPU: 0.7 ns for a number that is copied, 0.02 ns for a multiplication and addition).
COPY_IN_TOKENS = 32


class Folded(torch.autograd.Function):
    """`y = x (W + D)^T + b`, D zero but for some rows (dim 0) or columns (dim 1), which alone get a gradient.

    `part` is what the gradient of D reads of x: all of it, or for columns theirs. For the backward pass it is kept, and
    what exists anyway: W and D. The copy of W is made again there, and so is `part` where x is a product, as in a gated
    FFN, whose two factors autograd keeps for themselves.
    """

    @staticmethod
    def forward(
        x: Float[Tensor, "*batch d_in"],
        part: Float[Tensor, "*batch n_in"],
        weight: Float[Tensor, "d_out d_in"],
        bias: Float[Tensor, " d_out"] | None,
        delta: Float[Tensor, "n_out n_in"],
        index: Int[Tensor, " trained"],
        dim: int,
    ) -> Float[Tensor, "*batch d_out"]:
        """Project by the copy."""
        return F.linear(x, changed(weight, delta, index, dim), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what the gradients need."""
        x, part, weight, _, delta, index, ctx.dim = inputs
        ctx.product = x.grad_fn if part is x and is_kept_in_factors(x) else None
        keeps = ctx.needs_input_grad[4] and ctx.product is None
        ctx.save_for_backward(part if keeps else None, weight, delta, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the input, the bias and the delta."""
        (grad,) = grads
        part, weight, delta, index = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        by_x = by_bias = by_delta = None
        if ctx.needs_input_grad[0]:
            by_x = grad @ changed(weight, delta, index, ctx.dim)
        if ctx.needs_input_grad[3]:
            by_bias = rows.sum(0)
        if ctx.needs_input_grad[4]:
            part = part if ctx.product is None else ctx.product._saved_self * ctx.product._saved_other
            outputs = rows.index_select(-1, index) if ctx.dim == 0 else rows
            by_delta = outputs.T @ part.flatten(0, -2)
        return by_x, None, None, by_bias, by_delta, None, None


def changed(
    weight: Float[Tensor, "d_out d_in"], delta: Float[Tensor, "n_out n_in"], index: Int[Tensor, " trained"], dim: int
) -> Float[Tensor, "d_out d_in"]:
    """W + D, laid out in memory as W is (that of a `Conv1D` is transposed), so that products with both round alike."""
    if weight.is_contiguous():
        return weight.index_add(dim, index, delta)
    return weight.T.index_add(1 - dim, index, delta.T).T


def is_kept_in_factors(x: Tensor) -> bool:
    """Say whether x is a product of two tensors that autograd keeps until after the backward pass of what x feeds.

    Not where hooks pack what is kept (checkpointing, offloading): unpacking is theirs to time. Nor where x was changed
    in place after the product (ablations under `no_grad`, which leave its `grad_fn`).
    """
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if hooks is None or hooks(True) is not None or type(x.grad_fn).__name__ != "MulBackward0" or x._version:
        return False
    return x.grad_fn._saved_self is not None and x.grad_fn._saved_other is not None  # type: ignore[union-attr]


def is_plain(weight: object) -> bool:
    """Say whether a weight is an ordinary floating-point tensor: not quantised, not sharded."""
    return (
        isinstance(weight, Tensor)
        and type(weight) in (Tensor, nn.Parameter)
        and weight.is_floating_point()
        and weight.ndim == 2
    )


def folds(base: nn.Module, x: Tensor, delta: Tensor, width: int, trained: int) -> bool:
    """Say whether the copy is the cheaper way for this input, and an exact one.

    `trained` of `width` rows (or columns) are trained. It needs plain frozen weights of the adapter's and the input's
    dtype, float32 or float64 (half precision would lose a small delta in the sum with the weight), no autocast, and a
    base layer whose call nobody watches or replaces; a compiler fuses what it is given, and is asked for first, so that
    it reads nothing of the input.
    """
    if torch.compiler.is_compiling():
        return False
    tokens = x.numel() // max(1, x.shape[-1])
    if trained * tokens < COPY_IN_TOKENS * width or type(base) not in (nn.Linear, Conv1D) or x.ndim < 2:
        return False
    weight = base.weight
    watched = (base._forward_hooks, base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks)
    return (
        isinstance(weight, Tensor)
        and is_plain(weight)
        and not weight.requires_grad
        and x.dtype == weight.dtype == delta.dtype
        and x.dtype in (torch.float32, torch.float64)
        and x.device == weight.device == delta.device
        and not any(watched)
        and "forward" not in vars(base)
        and not torch.is_autocast_enabled(x.device.type)
    )


def folded(
    base: nn.Module,
    x: Float[Tensor, "*batch d_in"],
    delta: Float[Tensor, "n_out n_in"],
    bias_delta: Float[Tensor, " trained"] | None,
    index: Int[Tensor, " trained"],
    dim: int,
) -> Float[Tensor, "*batch d_out"]:
    """Return the base projection with the delta added to some of its rows (dim 0) or columns (dim 1)."""
    weight, bias = base.weight, base.bias
    assert isinstance(weight, Tensor)
    assert bias is None or isinstance(bias, Tensor)
    if bias is not None and bias_delta is not None:
        bias = bias.index_add(0, index, bias_delta.to(bias.dtype))
    weight = weight.T if isinstance(base, Conv1D) else weight
    part = x if dim == 0 else x.index_select(-1, index)
    result = Folded.apply(x, part, weight, bias, delta, index, dim)
    assert isinstance(result, Tensor)
    return result

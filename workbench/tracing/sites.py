"""Where hooks go: the sites that are restored, and entering a model at any layer."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.models import HookedModel, forward_through, probe_ids

Patch = Callable[[Tensor], Tensor]

#: What can be restored: a block's output, the output of its FFN's down-projection, that of its attention's projection.
SITES = ("resid", "mlp", "attn")

#: Largest difference of logits, relative to the largest, when a model is entered at a layer. Measured: 0.
ENTRY_TOLERANCE = 1e-3


def stream(output: Any) -> Tensor:
    """The residual stream in what a block returns."""
    return output if isinstance(output, Tensor) else output[0]


def attention_output(model: HookedModel, layer: int) -> nn.Module:
    """The projection that ends the attention of a layer; its output is what attention writes before any post-norm.

    It is found through TransformerLens' bridge, whose modules share their weights with those of `model.hf`.

    Raises:
        ValueError: the bridge does not know it.
    """
    known = getattr(getattr(model.bridge.blocks[layer].attn, "o", None), "original_component", None)
    weight = getattr(known, "weight", None)
    if isinstance(weight, Tensor):
        for module in model.block(layer).modules():
            own = getattr(module, "weight", None)
            if isinstance(own, Tensor) and own.data_ptr() == weight.data_ptr() and own.shape == weight.shape:
                return module
    raise ValueError(
        f"{model.name} ({type(model.hf).__name__}): the output projection of the attention of layer {layer} is not "
        "known, so attention cannot be traced; use site='resid' or 'mlp'."
    )


@contextmanager
def patched_site(model: HookedModel, site: str, patches: Mapping[int, Patch]) -> Iterator[None]:
    """Replace what some layers write at a site inside the `with`: `patches[layer](value)`, shape (batch, pos, d_model).

    No hook outlives the `with`, also after an error.
    """
    if site == "mlp":
        with model.patched("node", patches):
            yield
        return

    def after(patch: Patch) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            return patch(output) if isinstance(output, Tensor) else (patch(output[0]), *output[1:])

        return hook

    with ExitStack() as stack:
        for layer, patch in patches.items():
            module = model.block(layer) if site == "resid" else attention_output(model, layer)
            stack.callback(module.register_forward_hook(after(patch)).remove)
        yield


@contextmanager
def kept_inputs(model: HookedModel, kept: list[Tensor]) -> Iterator[None]:
    """Append the residual stream that goes into each block to `kept`, in the order of the layers."""

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept.append(args[0] if args else kwargs["hidden_states"])

    with ExitStack() as stack:
        for layer in range(model.n_layers):
            stack.callback(model.block(layer).register_forward_pre_hook(keep, with_kwargs=True).remove)
        yield


@contextmanager
def entered(
    model: HookedModel, layer: int, hidden: Float[Tensor, "batch pos d_model"], n_extra: int | None
) -> Iterator[None]:
    """Let the model begin at a layer: blocks below are passed over, and `hidden` goes into block `layer`.

    With `layer` = n_layers it goes into the final norm. `n_extra` is how many values a block returns besides the
    stream (None where it returns the stream alone), from `enterable`. Token ids set the shape only.
    """

    def passed(*args: Any, **kwargs: Any) -> Any:
        return hidden if n_extra is None else (hidden, *[None] * n_extra)

    def begun(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("hidden_states", None)
        return original(hidden, *args[1:], **kwargs)

    with ExitStack() as stack:
        for place in range(min(layer + 1, model.n_layers)):
            block: Any = model.block(place)
            stack.enter_context(forward_through(block, passed if place < layer else partial(begun, block.forward)))
        yield


@torch.no_grad()
def enterable(model: HookedModel) -> int | None:
    """Check on a probe that entering a model at a layer gives its own logits; returns `n_extra` of `entered`.

    Raises:
        ValueError: the model hands more from block to block than the residual stream.
    """
    ids = probe_ids(model.hf).to(model.device)
    kept: list[Tensor] = []
    counts: list[int | None] = []

    def count(module: nn.Module, args: Any, output: Any) -> None:
        counts.append(None if isinstance(output, Tensor) else len(output) - 1)
        kept[model.n_layers :] = [stream(output)]

    with ExitStack() as stack:
        stack.enter_context(kept_inputs(model, kept))
        stack.callback(model.block(model.n_layers - 1).register_forward_hook(count).remove)
        expected = model.logits(ids)
    for layer in sorted({0, model.n_layers // 2, model.n_layers}):
        try:
            with entered(model, layer, kept[layer], counts[0]):
                found = model.logits(torch.zeros_like(ids))
            gap = float((found - expected).abs().max() / expected.abs().max())
        except (RuntimeError, TypeError, IndexError, KeyError, AttributeError) as error:
            raise ValueError(_refusal(model, layer, str(error))) from error
        if not gap <= ENTRY_TOLERANCE:
            raise ValueError(_refusal(model, layer, f"logits differ by {gap:.1e}"))
    return counts[0]


def _refusal(model: HookedModel, layer: int, reason: str) -> str:
    kind = f"{model.name} ({type(model.hf).__name__})"
    return f"{kind} cannot be entered at layer {layer} with the residual stream alone ({reason}), so it is not traced."

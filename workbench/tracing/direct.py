"""Direct logit attribution: what every layer's attention and FFN add to the answer's logit, on the straight way out.

The residual stream before the final norm is the embedding plus all writes. With the scale of the final norm frozen at
its value in this run, the way from there to the answer's logit is linear, so the logit has one term per write.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from workbench.facts import FactSet, TokenisedFact
from workbench.models import HookedModel, pad_batch
from workbench.recollection import by_length
from workbench.tracing.sites import Patch, enterable, entered, kept_inputs, patched_site, stream

#: Largest error, relative to the largest number, in the checks that the blocks add and that the norm is a norm.
#: Measured in float32: 4e-7 over 12 tiny architectures and the default model.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Writes:
    """What is added to the residual stream at the last position: the embedding, and every layer's two modules."""

    embedding: Float[Tensor, "fact d_model"]
    attention: Float[Tensor, "layer fact d_model"]
    mlp: Float[Tensor, "layer fact d_model"]

    def total(self) -> Float[Tensor, "fact d_model"]:
        """The residual stream before the final norm."""
        return self.embedding + (self.attention + self.mlp).sum(0)


@dataclass(frozen=True)
class FinalNorm:
    """The final norm as `gain * x / scale + bias`, x with its mean taken off where `centred`; scale depends on x."""

    gain: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    centred: bool

    def centre(self, value: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The value as the norm scales it."""
        return value - value.mean(-1, keepdim=True) if self.centred else value


def direct_logit_attribution(model: HookedModel, facts: FactSet, *, progress: bool = False) -> pd.DataFrame:
    """Split the logit of the answer's first token, at the last prompt token, into what each module adds to it.

    The write of an FFN is what a block returns minus what it returns with the down-projection silenced; the write of
    attention is the rest of what the block adds. So parallel blocks and norms after a module are accounted for. The
    logit is the unembedding's own output, before a softcap or scaling.

    Returns a frame with fact, relation, component ("embedding", "attention", "mlp", "bias"), layer (missing for
    embedding and bias) and logit; the terms of a fact add up to its logit. "embedding" is all that goes into the first
    block, positions included; "bias" is that of the final norm and of the unembedding.

    Raises:
        ValueError: a model whose blocks do not add to the residual stream, or whose final norm is neither a layer norm
            nor an RMS norm.
    """
    tokens = model.tokenise(facts)
    n_extra = enterable(model)
    norm = final_norm(model, n_extra)
    rows: dict[int, pd.DataFrame] = {}
    with tqdm(total=len(tokens), unit="fact", desc="direct", disable=not progress) as bar:
        for indices in by_length([len(fact.prompt_ids) for fact in tokens]):
            batch = [tokens[i] for i in indices]
            rows.update(zip(indices, _split(model, batch, norm, n_extra), strict=True))
            bar.update(len(indices))
    labelled = [rows[i].assign(fact=fact.id, relation=fact.relation) for i, fact in enumerate(facts)]
    frame = pd.concat(labelled, ignore_index=True)
    return frame[["fact", "relation", "component", "layer", "logit"]]


def _split(model: HookedModel, batch: list[TokenisedFact], norm: FinalNorm, n_extra: int | None) -> list[pd.DataFrame]:
    """The terms of the answer's logit of a few facts."""
    writes = read_writes(model, *pad_batch([fact.prompt_ids for fact in batch], side="left"))
    answers = torch.tensor([fact.answer_ids[0] for fact in batch], device=model.device)
    rows = model.W_U[answers].float()
    direction = norm.centre(norm.gain * rows) / frozen_scale(model, norm, writes.total(), n_extra)
    bias = rows @ norm.bias
    head_bias = getattr(model.hf.get_output_embeddings(), "bias", None)
    if head_bias is not None:
        bias = bias + head_bias[answers].float()
    terms = torch.cat([writes.embedding[None], writes.attention, writes.mlp]) * direction
    logits = torch.cat([terms.sum(-1), bias[None]])
    layers = list(range(model.n_layers))
    component = ["embedding", *["attention"] * model.n_layers, *["mlp"] * model.n_layers, "bias"]
    layer = pd.array([pd.NA, *layers, *layers, pd.NA], dtype="Int64")
    return [pd.DataFrame({"component": component, "layer": layer, "logit": own}) for own in logits.T.tolist()]


@torch.no_grad()
def read_writes(model: HookedModel, ids: Int[Tensor, "fact pos"], mask: Int[Tensor, "fact pos"]) -> Writes:
    """What each module adds to the residual stream at the last position of a batch padded on the left.

    Every block runs three times on the same input: as it is, with the down-projection's output zero, and with that of
    attention zero as well, which must give back the input.
    """
    silenced: set[str] = set()
    attention: list[Tensor] = []
    mlp: list[Tensor] = []
    resid_pre: list[Tensor] = []

    def silence(site: str) -> Patch:
        return lambda value: torch.zeros_like(value) if site in silenced else value

    def again(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        after, before = stream(output)[:, -1], resid_pre[-1][:, -1]
        try:
            silenced.add("mlp")
            without_mlp = stream(module.forward(*args, **kwargs))[:, -1]
            silenced.add("attn")
            without_both = stream(module.forward(*args, **kwargs))[:, -1]
        finally:
            silenced.clear()
        _check_adds(model, before, without_both)
        mlp.append(after.float() - without_mlp.float())
        attention.append(without_mlp.float() - before.float())

    with ExitStack() as stack:
        for site in ("mlp", "attn"):
            patches = dict.fromkeys(range(model.n_layers), silence(site))
            stack.enter_context(patched_site(model, site, patches))
        stack.enter_context(kept_inputs(model, resid_pre))
        for layer in range(model.n_layers):
            block: nn.Module = model.block(layer)
            stack.callback(block.register_forward_hook(again, with_kwargs=True).remove)
        model.logits(ids, mask, last=1)
    return Writes(resid_pre[0][:, -1].float(), torch.stack(attention), torch.stack(mlp))


def _check_adds(model: HookedModel, before: Tensor, without_both: Tensor) -> None:
    gap = float((without_both - before).abs().max() / before.abs().max())
    if not gap <= TOLERANCE[model.dtype]:
        raise ValueError(
            f"{model.name} ({type(model.hf).__name__}): its blocks do more to the residual stream than add to it, so a "
            "logit is not a sum over layers; use logit_lens."
        )


@torch.no_grad()
def normed(
    model: HookedModel, states: Float[Tensor, "state d_model"], n_extra: int | None
) -> Float[Tensor, "state d_embed"]:
    """What the unembedding reads, for residual states as they would stand before the final norm."""
    read: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        read.append(args[0][:, -1].float())

    handle = model.hf.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        with entered(model, model.n_layers, states[:, None].to(model.dtype), n_extra):
            model.logits(torch.zeros(len(states), 1, dtype=torch.long, device=model.device), last=1)
    finally:
        handle.remove()
    return read[0]


def final_norm(model: HookedModel, n_extra: int | None) -> FinalNorm:
    """Read the final norm by what it does to three states: nothing, a constant, and alternating signs.

    Nothing gives the bias; a constant is lost where the mean is taken off; alternating signs show the gain. They are
    large, so that the norm's epsilon does not matter.
    """
    signs = torch.ones(model.d_model, device=model.device)
    signs[1::2] = -1
    bias, constant, alternating = normed(model, torch.stack([0 * signs, 100 + 0 * signs, 100 * signs]), n_extra)
    if bias.shape != signs.shape or not torch.isfinite(bias).all():
        raise ValueError(_no_norm(model))
    centred = bool((constant - bias).abs().max() < 1e-3 * (alternating - bias).abs().max())
    value = signs - signs.mean() if centred else signs
    gain = (alternating - bias) / value * value.square().mean().sqrt()
    return FinalNorm(gain, bias, centred)


def frozen_scale(
    model: HookedModel, norm: FinalNorm, states: Float[Tensor, "fact d_model"], n_extra: int | None
) -> Float[Tensor, "fact 1"]:
    """The scale by which the final norm divides each state; checked to be all that it does besides gain and bias."""
    after = normed(model, states, n_extra)
    scaled = norm.gain * norm.centre(states)
    scale = scaled.square().sum(-1, keepdim=True) / (scaled * (after - norm.bias)).sum(-1, keepdim=True)
    gap = float((scaled / scale + norm.bias - after).abs().max() / after.abs().max())
    if not gap <= TOLERANCE[model.dtype]:
        raise ValueError(_no_norm(model))
    return scale


def _no_norm(model: HookedModel) -> str:
    return (
        f"{model.name} ({type(model.hf).__name__}): what stands between its last block and its unembedding is neither "
        "a layer norm nor an RMS norm, so a logit is not a sum over layers; use logit_lens."
    )

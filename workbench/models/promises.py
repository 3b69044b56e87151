"""What a model must hold before anything is read from it, and the sentences that refuse those that do not."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from workbench.models.hooked import HookedModel

#: Largest difference of logits between the bridge (eager attention) and plain transformers, relative to the largest
#: logit. Measured in float32: 3e-7 on tiny random models, 2e-6 on the default model; in float64,
#: where norms still compute in float32, 3e-7.
PARITY = {torch.float64: 2e-6, torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 6e-2}

#: Numbers in which quantised weights are kept.
QUANTISED = (torch.int8, torch.uint8, torch.int32)


def refuse_unsupported(hf: Any, name: str) -> None:
    """Raise unless the model is a causal language model with dense FFNs and plain, finite weights."""
    kind = f"{name} is a {type(hf).__name__}"
    text = hf.config.get_text_config()
    if any(getattr(hf.config, part, None) is not None for part in ("vision_config", "audio_config")):
        raise ValueError(f"{kind}, which sees or hears as well; only decoder-only language models are supported.")
    if getattr(hf.config, "is_encoder_decoder", False):
        raise ValueError(f"{kind}, an encoder-decoder; only decoder-only language models are supported.")
    if getattr(hf.config, "add_cross_attention", False):
        raise ValueError(f"{kind} with cross-attention, half of an encoder-decoder; only decoder-only language models "
                         "are supported.")  # fmt: skip
    if not getattr(text, "num_hidden_layers", 1):
        raise ValueError(f"{kind} without a layer, so there is nothing to look into.")
    if hf.get_output_embeddings() is None or hf.get_input_embeddings() is None:
        raise ValueError(f"{kind}, which has no language-model head; only decoder-only language models are supported.")
    for key in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"):
        if getattr(text, key, None):
            count = getattr(text, key)
            raise ValueError(f"{kind}, a mixture of {count} experts per layer; only dense FFNs are supported.")
    for tensor_name, tensor in (*hf.named_parameters(), *hf.named_buffers()):
        if tensor.ndim > 1 and tensor.dtype in QUANTISED:
            number = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{kind} whose {tensor_name} is {number}: it is quantised, and what it computes cannot be "
                             "attributed to its weights; open the unquantised model.")  # fmt: skip
    check_finite(hf, name)
    ids = probe_ids(hf)
    changed = ids.clone()
    changed[0, -1] = ids[0, 0]
    try:
        with torch.no_grad():
            before, after = (hf.eval()(input_ids=x, use_cache=False).logits[0, :-1] for x in (ids, changed))
    except (RuntimeError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{kind} that transformers itself cannot run ({str(error)[:200]}).") from error
    if float((before - after).abs().max()) > 1e-6 * float(before.abs().max()):
        raise ValueError(f"{kind} in which later tokens change earlier ones, as in an encoder; "
                         "only decoder-only language models are supported.")  # fmt: skip


@torch.no_grad()
def check_finite(hf: Any, name: str) -> None:
    """Raise if a weight is NaN or infinite, with the name of the first and the number of such values."""
    for key, weight in hf.named_parameters():
        if weight.numel() and not all(end.isfinite() for end in torch.aminmax(weight)):
            n, kind = int((~torch.isfinite(weight)).sum()), str(weight.dtype).removeprefix("torch.")
            raise ValueError(
                f"the weight {key} of {name} has {n} NaN or infinite values in {kind}; "
                "the checkpoint is damaged, or needs a wider dtype such as float32"
            )


@torch.no_grad()
def check_promises(model: HookedModel) -> None:
    """Parity with plain transformers, identity patches that change nothing, equal widths taken from tensors."""
    ids = probe_ids(model.hf)
    plain = model.logits(ids)
    try:
        bridged = model.bridge(ids, prepend_bos=False)
    except RuntimeError as error:
        kind = type(model.hf).__name__
        raise ValueError(f"{model.name}: TransformerLens cannot run this {kind} ({str(error)[:200]}).") from error
    gap = float((plain - bridged).abs().max() / plain.abs().max().clamp(min=1e-6))
    if not gap <= PARITY[model.dtype]:
        raise ValueError(
            f"{model.name}: TransformerLens' bridge and plain transformers differ by {gap:.1e} of the largest logit."
        )
    for unit in ("node", "neuron"):
        widths: list[int] = []

        def identity(activation: Tensor, widths: list[int] = widths) -> Tensor:
            widths.append(activation.shape[-1])
            return activation.clone()

        with model.patched(unit, dict.fromkeys(range(model.n_layers), identity)):
            patched = model.logits(ids)
        if widths != [model.width(unit)] * model.n_layers:
            raise ValueError(f"{model.name}: the layers have FFNs of different widths {widths}; they must be equal.")
        if not torch.equal(patched, plain):
            raise ValueError(f"{model.name}: patching {unit}s with themselves changes the logits.")


def probe_ids(hf: Any) -> Int[Tensor, "1 pos"]:
    """A short row of arbitrary, distinct token ids for checking a model."""
    embedding = hf.get_input_embeddings().weight
    n_ids = min(embedding.shape[0], 1000)
    return (torch.arange(1, min(8, n_ids) + 1, device=embedding.device) * 37 % n_ids)[None]

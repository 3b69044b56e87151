"""`load_model`: from a name to a `HookedModel` that keeps its promises."""

import copy
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from workbench.models.devices import pick_device, pick_dtype
from workbench.models.half import HALF, in_float32
from workbench.models.hooked import HookedModel
from workbench.models.promises import check_promises, refuse_unsupported
from workbench.models.sources import load_hf, read_tokenizer

log = logging.getLogger(__name__)


def load_model(
    name_or_path: Any,
    *,
    revision: str | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    tokenizer: Any = None,
    trust_remote_code: bool = False,
) -> HookedModel:
    """Open a language model for looking into it, and check that looking changes nothing.

    `name_or_path` is the default's name (`"smollm2-135m"`), a folder of safetensors, a `.gguf` file, a hub id, or a
    loaded transformers model together with `tokenizer=`, which is left untouched. `device="auto"` and
    `dtype="auto"` pick, and log what they picked. Remote code runs only with `trust_remote_code=True`.

    Raises:
        ValueError: the model is not a decoder with dense FFNs, its weights are not finite, or one of the promises
            (parity with plain transformers, identity patch, equal widths) does not hold; the sentence says which.
        FileNotFoundError: there is no such model; the sentence names the way out.
    """
    if not isinstance(name_or_path, (str, os.PathLike, nn.Module)):
        raise ValueError(f"A model is a name, a path or a transformers model, not a {type(name_or_path).__name__}.")
    if not isinstance(name_or_path, nn.Module):
        loaded = load_hf(
            name_or_path,
            revision=revision,
            device=device,
            dtype=dtype,
            tokenizer=tokenizer,
            trust_remote_code=trust_remote_code,
        )
        return hook(loaded.hf, loaded.tokenizer, name=loaded.name, path=loaded.path)
    if hasattr(name_or_path, "get_base_model") or hasattr(name_or_path, "_orig_mod"):  # peft's, torch.compile's
        way = "give its _orig_mod" if hasattr(name_or_path, "_orig_mod") else "merge its adapter first"
        raise ValueError(f"A {type(name_or_path).__name__} is no plain transformers model: {way}.")
    if not hasattr(name_or_path, "config"):
        raise ValueError(f"A {type(name_or_path).__name__} is no transformers model: it has no config.")
    if any(parameter.is_meta for parameter in name_or_path.parameters()):
        raise ValueError("The model has weights on the meta device, which are no numbers: load it in full first.")
    if tokenizer is None:
        raise ValueError("A loaded model needs its tokenizer: give tokenizer=.")
    hf = structural_copy(name_or_path)
    if device != "auto":
        hf = hf.to(pick_device(device))
    if dtype != "auto":
        hf = hf.to(pick_dtype(dtype, next(hf.parameters()).device))
    source = str(getattr(hf.config, "_name_or_path", "") or "")
    return hook(hf, tokenizer, name=source or type(hf).__name__, path=None)


def own_tokenizer(model: Any) -> Any:
    """The tokenizer of the folder that a loaded model came from, or None."""
    source = str(getattr(model.config, "_name_or_path", "") or "")
    folder = Path(source)
    return read_tokenizer(folder, source) if source and (folder / "config.json").is_file() else None


def hook(hf: Any, tokenizer: Any, *, name: str, path: Path | None) -> HookedModel:
    """Put a bridge beside a plain model, find its sites, and check every promise."""
    hf = structural_copy(hf)
    hf.config.return_dict = True
    refuse_unsupported(hf, name)
    twin = structural_copy(hf)
    names = {id(module): module_name for module_name, module in twin.named_modules()}
    bridge = boot(twin, tokenizer, name)
    try:
        blocks, downs = sites(bridge, names, name)
    except (RuntimeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"{name}: TransformerLens does not find the blocks of this {type(hf).__name__} ({str(error)[:200]})."
        ) from error
    model = HookedModel(name, hf, tokenizer, bridge, blocks, downs, path)
    check_promises(model)
    if model.dtype in HALF:
        exact = in_float32(model)
        check_promises(replace(exact, bridge=boot(structural_copy(exact.hf), tokenizer, name)))
    kind = f"{str(model.dtype).removeprefix('torch.')} on {model.device}"
    log.info("%s: %d layers, d_model %d, d_mlp %d, %s", name, model.n_layers, model.d_model, model.d_mlp, kind)
    return model


def sites(bridge: Any, names: dict[int, str], name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the block and of the down-projection of every layer, each attention plus a dense FFN (else refused)."""
    blocks, downs = [], []
    for layer, block in enumerate(bridge.blocks):
        mlp: Any = getattr(block, "mlp", None)
        kind = type(bridge.original_model).__name__
        if "MoE" in type(mlp).__name__:
            raise ValueError(f"{name} is a mixture of experts ({kind}); only dense FFNs are supported.")
        if not hasattr(mlp, "out") or not hasattr(block, "attn"):
            raise ValueError(f"{name} ({kind}): layer {layer} is not attention plus a dense FFN.")
        blocks.append(names[id(block.original_component)])
        downs.append(names[id(mlp.out.original_component)])
    return tuple(blocks), tuple(downs)


def boot(twin: Any, tokenizer: Any, name: str) -> Any:
    """TransformerLens' bridge over a copy whose module tree it may change."""
    from transformer_lens.model_bridge import TransformerBridge

    twin.config.architectures = twin.config.architectures or [type(twin).__name__]
    tokenizer = copy.deepcopy(tokenizer)  # TransformerLens sets its padding, and loads it anew unless it adds BOS
    tokenizer.init_kwargs |= {"name_or_path": name, "add_bos_token": True}
    device = next(twin.parameters()).device
    try:
        with torch.random.fork_rng():  # it draws weights for the parts of a joint projection, and then sets them
            return TransformerBridge.boot_transformers(name, hf_model=twin, tokenizer=tokenizer, device=device)
    except Exception as error:
        raise ValueError(
            f"{name}: TransformerLens cannot look into a {type(twin).__name__} ({str(error)[:200] or repr(error)})."
        ) from error


def structural_copy(model: nn.Module) -> Any:
    """The same module tree over the same storage, frozen and in evaluation mode; the original is left untouched."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    memo |= {id(buffer): buffer for buffer in model.buffers()}
    return copy.deepcopy(model, memo).eval()

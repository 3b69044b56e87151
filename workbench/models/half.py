"""What half precision would hide: the first layers of a model in float32, on which its promises are checked as well.

Rounding in bfloat16 or float16 is larger than many a fault, so a model that float32 refuses could pass. How a model
works shows in one layer of every kind, so that no copy of all of it is needed.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from workbench.models.hooked import HookedModel

#: Types in which rounding may hide a fault.
HALF = (torch.bfloat16, torch.float16)
#: At least so many layers, so that one hands on to another; so many tokens, of which `probe_ids` takes a few.
LEAST_LAYERS, MOST_TOKENS = 2, 1000


def in_float32(model: HookedModel) -> HookedModel:
    """The first layers of a model in float32, one of every kind of layer among them, without its bridge."""
    hf, names = model.hf, model.block_names
    blocks = [hf.get_submodule(name) for name in names]
    n_layers = layers_of_every_kind(blocks)
    dropped = {id(module) for block in blocks[n_layers:] for module in block.modules()}
    wanted = {id(tensor) for module in hf.modules() if id(module) not in dropped for tensor in _own_tensors(module)}
    head = hf.get_output_embeddings()
    by_token = {id(tensor) for tensor in (model.W_E, *head.parameters())}
    memo: dict[int, Any] = {}
    for tensor in chain(hf.parameters(), hf.buffers()):
        value = tensor.detach()
        value = value[:MOST_TOKENS] if id(tensor) in by_token else value
        value = value.float() if id(tensor) in wanted and value.is_floating_point() else value
        memo[id(tensor)] = nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
    short = copy.deepcopy(hf, memo).eval()
    stack, _, first = names[0].rpartition(".")
    del short.get_submodule(stack)[int(first) + n_layers :]
    short.config.get_text_config().num_hidden_layers = n_layers
    short.get_input_embeddings().padding_idx = None  # it may lie beyond the tokens that are left
    return replace(model, hf=short, bridge=None, block_names=names[:n_layers], down_names=model.down_names[:n_layers])


def layers_of_every_kind(blocks: Sequence[nn.Module]) -> int:
    """How many first layers have one of every kind among them: alike in modules and plain settings, but for numbers.

    >>> wide, narrow = nn.Sequential(nn.Dropout(0.5)), nn.Sequential(nn.Dropout(0.1))
    >>> layers_of_every_kind([wide] * 9), layers_of_every_kind([wide, wide, wide, narrow, wide])
    (2, 4)
    """
    kinds = [_kind(block) for block in blocks]
    return max(min(len(blocks), LEAST_LAYERS), *(kinds.index(kind) + 1 for kind in kinds))


def _kind(block: nn.Module) -> list[Any]:
    """The modules of a block, with their settings that are plain values and not the number of the layer."""
    number, plain = ("layer_idx", "layer_id", "layer_number"), (bool, int, float, str)
    return [
        (name, type(part), {k: v for k, v in vars(part).items() if isinstance(v, plain) and k not in number})
        for name, part in block.named_modules()
    ]


def _own_tensors(module: nn.Module) -> Iterable[Tensor]:
    return chain(module.parameters(recurse=False), module.buffers(recurse=False))

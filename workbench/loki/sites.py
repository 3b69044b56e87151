"""Where the feed-forward projections of a decoder lie, and which of their rows or columns an adapter trains."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

Axis = Literal["row", "column"]

DOWN_PROJECTIONS: dict[str, str] = {
    **dict.fromkeys(
        (
            *(
                "llama",
                "mistral",
                "ministral",
                "qwen2",
                "qwen3",
                "smollm3",
                "granite",
                "stablelm",
                "olmo",
                "olmo2",
                "olmo3",
            ),
            *(
                "gemma",
                "gemma2",
                "gemma3",
                "gemma3_text",
                "phi3",
                "glm",
                "glm4",
                "cohere",
                "cohere2",
                "nemotron",
                "mpt",
            ),
        ),
        "down_proj",
    ),
    **dict.fromkeys(("gpt2", "gpt_neo", "gpt_bigcode", "starcoder2"), "mlp.c_proj"),
    **dict.fromkeys(("opt", "phi"), "fc2"),
    **dict.fromkeys(("gpt_neox", "gpt_neox_japanese", "bloom", "falcon", "persimmon"), "dense_4h_to_h"),
    **dict.fromkeys(("gptj", "codegen"), "mlp.fc_out"),
}
"""The down-projection's name, as a suffix of its module path, per `model_type`."""

_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")


@dataclass(frozen=True)
class Site:
    """One projection that an adapter touches: its layer, and the rows or columns (in torch's [out, in]) it trains."""

    layer: int
    axis: Axis
    index: tuple[int, ...]
    bias: bool


def widths(module: nn.Module) -> tuple[int, int] | None:
    """Return (input width, output width) of a linear projection, or None for any other module.

    >>> widths(nn.Linear(6, 4)), widths(Conv1D(4, 6)), widths(nn.ReLU())
    ((6, 4), (6, 4), None)
    """
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    if isinstance(module, nn.Linear) or type(module).__name__.endswith("Linear"):
        d_in, d_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
        return (d_in, d_out) if isinstance(d_in, int) and isinstance(d_out, int) else None
    return None


def is_conv1d(module: nn.Module) -> bool:
    """Whether a projection is GPT-2's `Conv1D`, whose weight is (in, out).

    >>> is_conv1d(Conv1D(4, 6)), is_conv1d(nn.Linear(6, 4))
    (True, False)
    """
    return isinstance(module.get_base_layer() if isinstance(module, BaseTunerLayer) else module, Conv1D)


def refuse_experts(model_config: object) -> None:
    """Raise ValueError, naming the model type, when the model is a mixture of experts."""
    get_text = getattr(model_config, "get_text_config", None)
    text = get_text() if callable(get_text) else model_config
    for name in _EXPERT_COUNTS:
        count = getattr(text, name, None)
        if isinstance(count, int) and count > 1:
            raise ValueError(
                f"{getattr(text, 'model_type', 'this model')} is a mixture of experts ({name}={count}); LoKI selects "
                "units of one dense feed-forward layer per block, so choose a dense model."
            )


def down_projection_suffix(model_config: object) -> str:
    """Return the down-projection's module suffix for a transformers config (ValueError for an unknown `model_type`)."""
    refuse_experts(model_config)
    model_type = getattr(model_config, "model_type", None)
    if model_type not in DOWN_PROJECTIONS:
        raise ValueError(
            f"The down-projection of model_type {model_type!r} is not known; name it with target_modules=[...], for "
            f"example [{DOWN_PROJECTIONS['llama']!r}]."
        )
    return DOWN_PROJECTIONS[model_type]


def down_names(model: Any) -> list[str]:
    """The path of every layer's down-projection: a `HookedModel` knows it, of a transformers model it is found."""
    known = getattr(model, "down_names", None)
    return list(down_projections(model).values()) if known is None else list(known)


def down_projections(model: nn.Module, target_modules: str | Sequence[str] | None = None) -> dict[int, str]:
    """Return layer -> module path of the feed-forward down-projection.

    `target_modules` is peft's: a regular expression for the whole path, or a list of suffixes. None takes the table of
    known families, and beyond it looks for the one projection per block that maps d_mlp to d_model. ValueError when
    nothing or more than one module per layer is found, or for a mixture of experts.
    """
    config = getattr(model, "config", None)
    refuse_experts(config)
    names = dict(_outer_modules(model))
    known = DOWN_PROJECTIONS.get(getattr(config, "model_type", ""))
    if target_modules is None:
        target_modules = [known] if known else _down_by_structure(names, config)
    found: dict[int, str] = {}
    for name in names:
        if not _matches(target_modules, name):
            continue
        layer = next((int(part) for part in name.split(".") if part.isdigit()), None)
        pair = widths(names[name])
        if layer is None or pair is None:
            raise ValueError(
                f"target_modules={target_modules!r} names {name} ({type(names[name]).__name__}), which is not a linear "
                "projection inside a numbered block; name the down-projection of each layer."
            )
        if not (f".{name}".endswith(f".{known}") if known else _may_be_down(pair, config)):
            raise ValueError(
                f"target_modules={target_modules!r} names {name} ({pair[0]} to {pair[1]}), which is not the projection "
                f"from d_mlp down to d_model; name {known or 'the down-projection of each layer'}, or leave it out."
            )
        if layer in found:
            raise ValueError(
                f"Both {found[layer]} and {name} answer to target_modules={target_modules!r} in layer {layer}; LoKI "
                "needs one down-projection per layer (mixtures of experts are not supported): be more specific."
            )
        found[layer] = name
    if sorted(found) != list(range(len(found))) or not found:
        raise ValueError(
            f"target_modules={target_modules!r} finds a down-projection in layers {sorted(found)} of "
            f"{type(model).__name__}, not in every layer from 0; name it with target_modules=[...]."
        )
    return dict(sorted(found.items()))


def found_modules(model: nn.Module) -> list[str]:
    """Return `target_modules` for a model of any family: one suffix where it names the down-projections and no more."""
    found = down_projections(model)
    suffixes = {name.split(f".{layer}.")[-1] for layer, name in found.items()}
    if len(suffixes) == 1 and sum(_matches(list(suffixes), name) for name, _ in _outer_modules(model)) == len(found):
        return list(suffixes)
    return list(found.values())


def plan_sites(
    model: nn.Module,
    positions: Sequence[Sequence[int]],
    *,
    unit: Literal["node", "neuron"],
    n_units: int | None = None,
    layers: Sequence[int] | None = None,
    target_modules: str | Sequence[str] | None = None,
    train_keys: bool = False,
    train_bias: bool = True,
    exclude_modules: str | Sequence[str] | None = None,
) -> dict[str, Site]:
    """Return module path -> `Site` for every projection that the selected units touch, checked against the model.

    Nodes are rows of the down-projection and carry its bias; neurons are its columns, which carry none, and with
    `train_keys` the rows (and bias) of the up- and gate-projection. `exclude_modules` are left out, as peft's are.
    ValueError names what does not fit.
    """
    down = down_projections(model, target_modules)
    if len(positions) != len(down):
        raise ValueError(
            f"The selection has {len(positions)} layers but {type(model).__name__} has {len(down)}; make a selection "
            "from this model's own attribution."
        )
    sites: dict[str, Site] = {}
    names = dict(_outer_modules(model))
    for layer, name in down.items():
        d_mlp, d_model = _widths_of(names, name)
        width = d_model if unit == "node" else d_mlp
        if n_units is not None and n_units != width:
            raise ValueError(
                f"The selection is over {n_units} {unit}s per layer but layer {layer} of {type(model).__name__} has "
                f"{width} (d_model {d_model}, d_mlp {d_mlp}); check unit= and the model."
            )
        index = tuple(positions[layer])
        if index and index[-1] >= width:
            raise ValueError(
                f"Layer {layer}: {unit} {index[-1]} is out of range, {name} has {unit}s 0 to {width - 1}; check unit= "
                "and the model of the selection."
            )
        if not index or (layers is not None and layer not in layers):
            continue
        if unit == "node":
            sites[name] = Site(layer, "row", index, bias=train_bias)
            continue
        sites[name] = Site(layer, "column", index, bias=False)
        for key, halves in _keys(names, name) if train_keys else ():
            rows = tuple(half * d_mlp + i for half in range(halves) for i in index)
            sites[key] = Site(layer, "row", rows, bias=train_bias)
    return {name: site for name, site in sites.items() if not _matches(exclude_modules or (), name)}


def _outer_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the named modules, leaving out the insides of tuner layers."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name.startswith(inside) or not inside:
            yield name, module
            if isinstance(module, BaseTunerLayer):
                inside = (*inside, name + ".")


def _widths_of(names: dict[str, nn.Module], name: str) -> tuple[int, int]:
    found = widths(names[name])
    if found is None:
        raise ValueError(f"{name} ({type(names[name]).__name__}) is not a linear projection; check target_modules.")
    return found


def _matches(target_modules: str | Sequence[str], name: str) -> bool:
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, name) is not None
    return any(name == target or name.endswith("." + target) for target in target_modules)


def _keys(names: dict[str, nn.Module], down: str) -> list[tuple[str, int]]:
    """Return (path, halves) of the projections beside `down` that feed it; 2 halves: gate and up fused."""
    d_mlp, d_model = _widths_of(names, down)
    parent = down.rpartition(".")[0]
    beside = [(name, widths(module)) for name, module in names.items() if name.rpartition(".")[0] == parent]
    keys = [
        (name, pair[1] // d_mlp)
        for name, pair in beside
        if name != down and pair is not None and pair[0] == d_model and pair[1] in (d_mlp, 2 * d_mlp)
    ]
    if not keys:
        raise ValueError(f"No up- or gate-projection was found beside {down}; use train_keys=False for this model.")
    return keys


def _down_by_structure(names: dict[str, nn.Module], config: object) -> list[str]:
    """Find, in each numbered block, the one projection from d_mlp to d_model."""
    model_type, (d_mlp, d_model) = getattr(config, "model_type", None), _stated_widths(config)
    fits = [
        name
        for name, module in names.items()
        if (pair := widths(module)) is not None
        and pair[1] == d_model
        and (pair[0] == d_mlp if d_mlp else pair[0] > pair[1])
        and any(part.isdigit() for part in name.split("."))
    ]
    blocks = [next(part for part in name.split(".") if part.isdigit()) for name in fits]
    if not fits or len(set(blocks)) != len(blocks):
        raise ValueError(
            f"The down-projection of model_type {model_type!r} is not known and not plain from its shapes; name it "
            "with target_modules=[...]."
        )
    return fits


def _stated_widths(config: object) -> tuple[Any, Any]:
    """Return what a configuration says of (d_mlp, d_model), None where it says nothing."""
    d_mlp = next(
        (v for k in ("intermediate_size", "ffn_dim", "ffn_hidden_size") if (v := getattr(config, k, None))), None
    )
    return d_mlp, getattr(config, "hidden_size", None)


def _may_be_down(pair: tuple[int, int], config: object) -> bool:
    """Say whether a projection of these widths, which a user names, can be one from d_mlp to d_model."""
    d_mlp, d_model = _stated_widths(config)
    return pair[1] == (d_model or pair[1]) and (pair[0] > pair[1] or pair[0] == d_mlp)

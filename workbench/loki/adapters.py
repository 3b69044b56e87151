"""One way to make the peft configuration of every method, and to put it on a model and merge it."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from peft import (
    AdaLoraConfig,
    IA3Config,
    KasaConfig,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    ShiraConfig,
    get_peft_model,
)
from peft.tuners.lora.config import CordaConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .config import LokiConfig, checked_layers
from .model import refuse_stacked
from .quiet import expected_warnings
from .sites import DOWN_PROJECTIONS, down_names, down_projection_suffix, is_conv1d, widths

_CONV1D_TYPES = ("gpt2", "openai-gpt")
#: Paths of the normalisations of every family: input_layernorm, ln_1, final_layer_norm, norm, q_norm, norm_1, ...
NORMS = r"(.*\.)?(\w*norm|norm_\w+|ln_\w+)"


@dataclass(frozen=True)
class Dense:
    """Fine-tuning of the weights themselves, without peft: all of them, or those of the modules named.

    `target_modules` are suffixes of module paths; None is every weight of the model.
    """

    target_modules: tuple[str, ...] | None = None

    @property
    def peft_type(self) -> str:
        """`"FULL"`, where a peft configuration has the name of its method."""
        return "FULL"


class Method(NamedTuple):
    """What makes the configuration of a method, and what it takes."""

    make: Callable[..., PeftConfig | Dense]
    ranked: bool = True  # whether it has a rank `r`
    conv1d: bool = True  # whether it takes GPT-2's `Conv1D`
    below: int | None = None  # how far its rank stays below the number of singular values; None: any rank


def _loki(target_modules: list[str], conv1d: bool, *, selection: Any = None, **options: Any) -> PeftConfig:
    if selection is None:
        raise ValueError("LoKI trains selected units only; give selection=.")
    options.setdefault("r", 0)
    return LokiConfig(selection=selection, target_modules=target_modules, task_type="CAUSAL_LM", **options)


def _lora(target_modules: list[str], conv1d: bool, *, r: int = 16, **options: Any) -> PeftConfig:
    options.setdefault("lora_alpha", r)
    return LoraConfig(r=r, target_modules=target_modules, fan_in_fan_out=conv1d, task_type="CAUSAL_LM", **options)


def _adalora(target_modules: list[str], conv1d: bool, *, r: int = 16, **options: Any) -> PeftConfig:
    """`r` is the rank to end with; it begins with half as much again. `total_step=1` is set when training starts."""
    defaults = {"init_r": r + (r + 1) // 2, "lora_alpha": r, "total_step": 1} | options
    return AdaLoraConfig(
        target_r=r, target_modules=target_modules, fan_in_fan_out=conv1d, task_type="CAUSAL_LM", **defaults
    )


def _shira(target_modules: list[str], conv1d: bool, *, r: int = 16, **options: Any) -> PeftConfig:
    options.setdefault("random_seed", 0)
    return ShiraConfig(r=r, target_modules=target_modules, task_type="CAUSAL_LM", **options)


def _ia3(target_modules: list[str], conv1d: bool, **options: Any) -> PeftConfig:
    return IA3Config(
        target_modules=target_modules,
        feedforward_modules=target_modules,  # scales the inputs, as (IA)3 does for feed-forward layers
        fan_in_fan_out=conv1d,
        task_type="CAUSAL_LM",
        **options,
    )


def _corda(
    target_modules: list[str], conv1d: bool, *, corda_method: Literal["ipm", "kpm"] = "kpm", **options: Any
) -> PeftConfig:
    """`kpm` keeps what general text uses and adapts the rest; `ipm` adapts what the training data uses."""
    corda = CordaConfig(corda_method=corda_method)
    return _lora(target_modules, conv1d, init_lora_weights="corda", corda_config=corda, **options)


def _ln_tuning(target_modules: list[str], conv1d: bool, **options: Any) -> PeftConfig:
    return LNTuningConfig(target_modules=NORMS, task_type="CAUSAL_LM", **options)


METHODS: dict[str, Method] = {
    "loki": Method(_loki),
    "lora": Method(_lora),
    "rslora": Method(lambda *args, **options: _lora(*args, use_rslora=True, **options)),
    "dora": Method(lambda *args, **options: _lora(*args, use_dora=True, **options)),
    "pissa": Method(lambda *args, **options: _lora(*args, init_lora_weights="pissa", **options), below=0),
    "olora": Method(lambda *args, **options: _lora(*args, init_lora_weights="olora", **options), conv1d=False, below=0),
    "corda": Method(_corda, below=0),
    "kasa": Method(lambda *args, **options: _lora(*args, kasa_config=KasaConfig(), **options), conv1d=False, below=1),
    "adalora": Method(_adalora),
    "shira": Method(_shira, conv1d=False),
    "ia3": Method(_ia3, ranked=False),
    "ln_tuning": Method(_ln_tuning, ranked=False),
    "full_ffn": Method(lambda target_modules, conv1d: Dense(tuple(target_modules)), ranked=False),
    "full": Method(lambda target_modules, conv1d: Dense(), ranked=False),
}
"""Method name -> what makes its configuration."""

BASELINES = tuple(name for name in METHODS if name != "loki")
"""The methods that need no selection."""


def adapter_config(
    method: str,
    *,
    model_config: Any,
    selection: Any = None,
    target_modules: Sequence[str] | None = None,
    conv1d: bool | None = None,
    **options: Any,
) -> PeftConfig | Dense:
    """Return the configuration of a method by name, for every method on the same modules: the down-projections.

    `model_config` is the transformers config of the model, which is of a known family (`adapter_for` takes the model
    itself, of any); `conv1d` says whether its projections are GPT-2's `Conv1D`, by default by family;
    `loki_<anything>` is LoKI with another selection; `options` go to the method's own configuration (`r`,
    `lora_alpha`, `unit`, ...). `ln_tuning` trains the normalisations and `full` every weight, whatever the
    modules. ValueError names an unknown method, or one that does not fit the model.

    >>> from types import SimpleNamespace
    >>> llama = SimpleNamespace(model_type="llama")
    >>> config = adapter_config("loki_random", model_config=llama, selection=[[0, 2], [1]])
    >>> config.positions, config.target_modules
    ([[0, 2], [1]], ['down_proj'])
    >>> sorted(adapter_config("lora", model_config=llama, r=8).target_modules)
    ['down_proj']
    >>> adapter_config("full_ffn", model_config=llama)
    Dense(target_modules=('down_proj',))
    """
    kind = check_method(method)
    row = METHODS[kind]
    if not row.ranked and "r" in options:
        raise ValueError(f"The method {method!r} has no rank; leave r out.")
    if selection is not None:
        options["selection"] = selection
    if kind != "loki" and "selection" in options:
        raise ValueError(f"The method {method!r} takes no selection; leave it out, or use loki.")
    if conv1d is None:
        conv1d = getattr(model_config, "model_type", None) in _CONV1D_TYPES
    if conv1d and not row.conv1d:
        raise ValueError(
            f"peft's {method!r} does not adapt the Conv1D layers of {model_config.model_type}; choose another method, "
            "for example lora."
        )
    if target_modules is None:
        target_modules = [down_projection_suffix(model_config)]
    return row.make(list(target_modules), conv1d, **options)


def adapter_for(
    model: Any, method: str, *, layers: Collection[int] | int | None = None, **options: Any
) -> PeftConfig | Dense:
    """Return the configuration of a method on a model's own down-projections, whatever the family.

    `model` is a `HookedModel` or a transformers model. `layers` restricts every method to some layers: `ln_tuning` to
    the normalisations inside them, `full` to their weights. `options` are those of `adapter_config`.
    """
    hf = getattr(model, "hf", model)
    names, kind, given = down_names(model), check_method(method), checked_layers(layers)
    part = list(range(len(names))) if given is None else given
    outside = [layer for layer in part if not 0 <= layer < len(names)]
    if outside or not part:
        found = f"holds {outside[0]}" if outside else "is empty"
        raise ValueError(f"layers {found}; the layers of this model are 0 to {len(names) - 1}.")
    if kind != "loki" and "target_modules" not in options:
        _check_rank(kind, options.get("r", 16), most_rank(model, kind))
    if kind == "loki":
        options["layers"] = given
    elif len(part) < len(names):
        options["target_modules"] = [names[layer] for layer in part]
    if getattr(hf.config, "model_type", None) not in DOWN_PROJECTIONS:
        options.setdefault("target_modules", names)
    conv1d = is_conv1d(hf.get_submodule(names[0]))
    config = adapter_config(method, model_config=hf.config, conv1d=conv1d, **options)
    blocks = tuple(re.sub(r"(\.\d+)\..*", r"\1", names[layer]) for layer in part if len(part) < len(names))
    if kind == "full" and blocks:
        return Dense(blocks)
    if isinstance(config, LNTuningConfig):
        config.target_modules = _normalisations(hf, tuple(block + "." for block in blocks) or "")
    return config


def most_rank(model: Any, kind: str) -> int | float:
    """Return the highest rank that a method can have on a model's down-projections, infinity where any does."""
    below, hf = METHODS[kind].below, getattr(model, "hf", model)
    pairs = [widths(hf.get_submodule(name)) for name in down_names(model)]
    return math.inf if below is None else min(min(pair or (math.inf,)) for pair in pairs) - below


def _check_rank(kind: str, rank: int, most: int | float) -> None:
    """Raise ValueError for a rank that a method cannot have."""
    if METHODS[kind].ranked and not 1 <= rank <= most:
        between = "at least 1" if most == math.inf else f"1 to {most} on the down-projections of this model"
        raise ValueError(f"The rank of {kind!r} must be {between}, not {rank}.")


def _normalisations(hf: nn.Module, start: str | tuple[str, ...]) -> list[str] | str:
    """What names the normalisations that have weights: one expression where it names no other, or their paths."""
    named = [name for name, _ in hf.named_modules() if re.fullmatch(NORMS, name)]
    found = [n for n in named if n.startswith(start) and any(True for _ in hf.get_submodule(n).parameters())]
    if not found:
        raise ValueError(f"The normalisations of {type(hf).__name__} have no weights; choose another method.")
    return NORMS if found == named else found


def check_method(method: str) -> str:
    """Return the row of `METHODS` that a name stands for, or raise a `ValueError` that lists them.

    >>> check_method("loki_random"), check_method("lora")
    ('loki', 'lora')
    """
    kind = "loki" if method.startswith("loki_") else method
    if kind not in METHODS:
        raise ValueError(f"The method {method!r} is not known; choose one of {', '.join(METHODS)} or loki_<selection>.")
    return kind


def attach(model: nn.Module, adapter: PeftConfig | Dense) -> nn.Module:
    """Return the model with the adapter's parameters trainable and all others frozen; the model itself is changed."""
    if isinstance(adapter, Dense):
        model.requires_grad_(adapter.target_modules is None)
        for path, module in model.named_modules():
            if any(path == name or path.endswith("." + name) for name in adapter.target_modules or ()):
                module.requires_grad_(True)
        return model
    with expected_warnings():
        return get_peft_model(model, adapter)


def trainable_parameters(model: nn.Module) -> int:
    """Return how many numbers of the model are trained.

    >>> trainable_parameters(nn.Linear(3, 2))
    8
    """
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def merged_copy(model: nn.Module) -> Any:
    """Return a plain copy of a model with its active adapters merged, put on it by peft or by transformers itself.

    Adapters that are disabled are left out. ValueError where one method lies over another, or for learned tokens.
    """
    refuse_stacked(model)
    for adapter in getattr(model, "peft_config", {}).values():
        refuse_unmergeable(adapter)
    plain: Any = copy.deepcopy(model)
    if hasattr(plain, "merge_and_unload"):
        return plain.merge_and_unload()
    for name, module in list(plain.named_modules()):
        if isinstance(module, BaseTunerLayer):
            if isinstance(getattr(module, "base_layer", None), BaseTunerLayer):
                raise ValueError(f"{name} carries two methods, which peft cannot merge; put them on different modules.")
            if not module.disable_adapters:
                module.merge()
            plain.set_submodule(name, module.get_base_layer())
        elif isinstance(module, AuxiliaryTrainingWrapper):
            merging = not module.disable_adapters
            plain.set_submodule(name, module.unload_and_optionally_merge_module(merging, False, None))
    del plain.peft_config
    plain._hf_peft_config_loaded = False
    return plain


def refuse_unmergeable(adapter: PeftConfig | Dense) -> None:
    """Raise ValueError, naming the method, for one whose learned tokens are no part of any weight."""
    if not isinstance(adapter, Dense) and (adapter.is_prompt_learning or adapter.is_adaption_prompt):
        raise ValueError(
            f"{str(adapter.peft_type).rpartition('.')[2]} puts learned tokens before the text or into attention, which "
            "no weight can hold, so it cannot be merged into a plain model; train a method that changes weights."
        )

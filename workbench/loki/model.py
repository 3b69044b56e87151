"""LoKI's tuner: attaches deltas to the selected rows or columns of each feed-forward layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _ExcludedModule
from torch import Tensor, nn

from .config import LokiConfig
from .layer import LokiLayer
from .sites import DOWN_PROJECTIONS, Site, found_modules, plan_sites


def refuse_stacked(model: nn.Module) -> None:
    """Raise ValueError where another method lies over a `LokiLayer`: peft would unload both and merge one."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and isinstance(getattr(module, "base_layer", None), LokiLayer):
            raise ValueError(
                f"The LoKI adapter of {name} lies below a {type(module).__name__} of another method, and peft cannot "
                "merge both; put the other method on other modules."
            )


class LokiModel(BaseTuner):
    """A model whose selected feed-forward units carry trainable deltas, everything else frozen (arXiv 2505.22120)."""

    prefix: str = "loki_"
    tuner_layer_cls = LokiLayer
    target_module_mapping = {model_type: [name] for model_type, name in DOWN_PROJECTIONS.items()}  # noqa: RUF012
    _sites: dict[str, Site]

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        known = self.target_module_mapping.get(model_config.get("model_type", ""))
        if isinstance(peft_config, LokiConfig) and peft_config.target_modules is None and known:
            peft_config.target_modules = list(known)
        return peft_config

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """Plan every site, so that a selection that does not fit raises before the model is touched.

        What an earlier adapter of the same name left on other sites goes: it would be trained and saved with this one.
        """
        assert isinstance(peft_config, LokiConfig)
        assert peft_config.positions is not None
        if peft_config.target_modules is None:  # peft wants them named, and an adapter says what it was trained on
            peft_config.target_modules = found_modules(model)
        self._sites = plan_sites(
            model,
            peft_config.positions,
            unit="node" if peft_config.unit == "node" else "neuron",
            n_units=peft_config.n_units,
            layers=peft_config.layers,
            target_modules=peft_config.target_modules,
            train_keys=peft_config.train_keys,
            train_bias=peft_config.train_bias,
            exclude_modules=peft_config.exclude_modules,
        )
        if not self._sites:
            raise ValueError(
                f"exclude_modules={peft_config.exclude_modules!r} leaves out every module that the selection trains."
            )
        for name in self._sites:
            module = model.get_submodule(name)
            if isinstance(module, BaseTunerLayer) and not isinstance(module, LokiLayer):
                raise ValueError(
                    f"{name} already carries a {type(module).__name__} of another method; LoKI needs the plain "
                    "projection, so attach the other method to other modules or merge it first."
                )
        layers = {name: module for name, module in model.named_modules() if isinstance(module, LokiLayer)}
        same = [name for name, config in self.peft_config.items() if config is peft_config]
        if merged := [name for name in same for layer in layers.values() if name in layer.merged_adapters]:
            raise ValueError(
                f"An earlier adapter {merged[0]!r} is merged into this model; unmerge it first (unmerge_adapter), or "
                "give the new one another name."
            )
        for name in layers.keys() - self._sites.keys():
            for adapter in same:
                layers[name].drop(adapter)

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> Any:  # type: ignore[override]
        found = super()._check_target_module_exists(peft_config, key)
        return found if isinstance(found, _ExcludedModule) else key in self._sites

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, LokiConfig)
        site = self._sites[current_key]
        if isinstance(target, LokiLayer):
            target.update_layer(adapter_name, site, peft_config)
            return
        layer = LokiLayer(target, adapter_name, site, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        refuse_stacked(self.model)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Add the deltas to the base weights in place; ValueError where another method lies over a `LokiLayer`."""
        refuse_stacked(self.model)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Iterator:
        """Refuse an adapter for each sample of a batch, which peft would pass over without a word."""
        if adapter_names is not None:
            raise ValueError(
                "LoKI has no adapter_names, an adapter for each sample: choose by set_adapter, one batch an adapter."
            )
        yield

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; where it was active, the same remaining one becomes active in every layer."""
        before = list(self.active_adapters)
        super().delete_adapter(adapter_name)
        if adapter_name in before:
            self.set_adapter([name for name in before if name != adapter_name] or sorted(self.peft_config)[:1])

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Check the rows in the file against those of the configuration, and narrow factors wider than their rows."""
        remapped: dict[str, Any] = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        for name, buffer in model.named_buffers():
            if not name.endswith(f".loki_rows.{adapter_name}"):
                continue
            stored = remapped.get(name)
            if stored is None or stored.shape != buffer.shape or not torch.equal(stored.to(buffer), buffer):
                where = name.removesuffix(f".loki_rows.{adapter_name}")
                raise ValueError(
                    f"The adapter file and adapter_config.json disagree on which units of {where} are trained; one of "
                    "the two belongs to another adapter."
                )
        for name, lower in model.named_parameters():
            upper = name.replace(".loki_B.", ".loki_A.")
            if name.endswith(f".loki_B.{adapter_name}") and {name, upper} <= remapped.keys():
                remapped[upper], remapped[name] = _narrow(remapped[upper], remapped[name], len(lower))
        return remapped


def _narrow(upper: Tensor, lower: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors with the same product whose rank is no more than the number of the rows, or columns, that they change.

    >>> _narrow(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]]), 1)
    (tensor([[1.]]), tensor([[11.]]))
    """
    if len(lower) <= rank or rank not in (len(upper), lower.shape[1]):
        return upper, lower
    one = torch.eye(rank, dtype=lower.dtype, device=lower.device)
    return (one, upper @ lower) if len(upper) == rank else (upper @ lower, one)

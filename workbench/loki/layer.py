"""The layer that carries LoKI's deltas: a projection of which only some rows or columns are trained."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from jaxtyping import Float
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from .config import LokiConfig
from .folding import folded, folds, is_plain
from .sites import Axis, Site, widths


class LokiLayer(nn.Module, BaseTunerLayer):
    """A linear projection plus zero-initialised deltas on selected rows (outputs) or columns (inputs).

    Rows S: `y[..., S] += x D^T + b`. Columns S: `y += x[..., S] D^T`. Deltas are kept in torch's [out, in] order, also
    over GPT-2's `Conv1D`. The base weight is only read and written when merging.
    """

    adapter_layer_names = ("loki_delta", "loki_A", "loki_B", "loki_bias")
    other_param_names = ("loki_rows", "axis", "scaling")

    def __init__(self, base_layer: nn.Module, adapter_name: str, site: Site, config: LokiConfig) -> None:
        super().__init__()
        pair = widths(base_layer)
        if pair is None:
            raise ValueError(f"LoKI adapts linear projections, not {type(base_layer).__name__}; check target_modules.")
        self.base_layer = base_layer
        self.in_features, self.out_features = pair
        self.loki_delta = nn.ParameterDict()
        self.loki_A = nn.ParameterDict()
        self.loki_B = nn.ParameterDict()
        self.loki_bias = nn.ParameterDict()
        self.loki_rows = BufferDict(persistent=True)
        self.axis: dict[str, Axis] = {}
        self.scaling: dict[str, float] = {}
        self._originals: list[tuple[str, Tensor, Tensor | None]] = []
        self._disable_adapters = False
        self.merged_adapters = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, site, config)

    def update_layer(self, adapter_name: str, site: Site, config: LokiConfig) -> None:
        """Add the adapter's deltas, in place of earlier ones of its name.

        They are zeros, or for r > 0 a zero A and a random B (Kaiming uniform, as LoRA).
        """
        self.drop(adapter_name)
        n_out, n_in = self.out_features, self.in_features
        if site.axis == "row":
            n_out = len(site.index)
        else:
            n_in = len(site.index)
        if config.r == 0:
            self.loki_delta[adapter_name] = nn.Parameter(torch.zeros(n_out, n_in))
        else:
            generator = torch.Generator().manual_seed(config.init_seed * 100_003 + site.layer)
            rank, bound = min(config.r, len(site.index)), 1 / math.sqrt(n_in)
            random = torch.rand(rank, n_in, generator=generator, device="cpu") * (2 * bound) - bound
            self.loki_A[adapter_name] = nn.Parameter(torch.zeros(n_out, rank))
            self.loki_B[adapter_name] = nn.Parameter(random)
        if site.bias and getattr(self.get_base_layer(), "bias", None) is not None:
            self.loki_bias[adapter_name] = nn.Parameter(torch.zeros(len(site.index)))
        self.loki_rows[adapter_name] = torch.tensor(site.index, dtype=torch.int64)
        self.axis[adapter_name] = site.axis
        self.scaling[adapter_name] = config.scaling
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def drop(self, adapter_name: str) -> None:
        """Forget what an adapter of this name left here; which adapters are active stays as it is."""
        for name in (*self.adapter_layer_names, *self.other_param_names):
            if adapter_name in (held := getattr(self, name)):
                del held[adapter_name]

    def forward(self, x: Float[Tensor, "*batch d_in"], *args: Any, **kwargs: Any) -> Float[Tensor, "*batch d_out"]:
        """Return the base projection plus the active deltas."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        names = [name for name in self.active_adapters if name in self.loki_rows]
        if len(names) == 1 and not args and not kwargs and self._folds(x, names[0]):
            (name,) = names
            rows, dim = self.loki_rows[name], self._dim(name)
            return folded(self.base_layer, x, self.loki_delta[name], self._bias_delta(name), rows, dim)
        result = self.base_layer(x, *args, **kwargs)
        for name in names:
            rows = self.loki_rows[name]
            if self.axis[name] == "row":
                change = self._product(x, name).to(result.dtype)
                # unlike index_add, scatter_add keeps only the (expanded, so free) index for the backward pass
                result = result.scatter_add(-1, rows.expand_as(change), change)
            else:
                result = result + self._product(x.index_select(-1, rows), name).to(result.dtype)
        return result

    def _folds(self, x: Tensor, name: str) -> bool:
        """Say whether this adapter, trained in full, is best added to a passing copy of the weight."""
        if name not in self.loki_delta:
            return False
        width = self.out_features if self.axis[name] == "row" else self.in_features
        return folds(self.base_layer, x, self.loki_delta[name], width, len(self.loki_rows[name]))

    def _product(self, x: Float[Tensor, "*batch n_in"], name: str) -> Float[Tensor, "*batch n_out"]:
        """Return x D^T + b in the adapter's dtype."""
        bias = self._bias_delta(name)
        if name in self.loki_delta:
            delta = self.loki_delta[name]
            return F.linear(self._cast_input_dtype(x, delta.dtype), delta, bias)
        lower, upper = self.loki_B[name], self.loki_A[name]
        product = F.linear(F.linear(self._cast_input_dtype(x, lower.dtype), lower), upper) * self.scaling[name]
        return product if bias is None else product + bias

    def _delta(self, name: str) -> Float[Tensor, "n_out n_in"]:
        """Return the change of the selected rows (or columns) themselves."""
        if name in self.loki_delta:
            return self.loki_delta[name].detach()
        return (self.loki_A[name].detach() @ self.loki_B[name].detach()) * self.scaling[name]

    def get_delta_weight(self, adapter: str) -> Float[Tensor, "rows columns"]:
        """Return the dense change of the base weight, in the base layer's own orientation."""
        delta = self._delta(adapter)
        dense = torch.zeros(self.out_features, self.in_features, dtype=delta.dtype, device=delta.device)
        dense.index_copy_(self._dim(adapter), self.loki_rows[adapter], delta)
        return dense.T if isinstance(self.get_base_layer(), Conv1D) else dense

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the deltas to the base weight in place, keeping the touched rows so that `unmerge` restores every bit.

        `safe_merge` raises ValueError, before this layer is changed, when the result is not finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.loki_rows:
                continue
            weight, bias = self._base_weight(), None
            rows, dim = self.loki_rows[name], self._dim(name)
            before = weight.index_select(dim, rows)
            after = _sum(before, self._delta(name))
            bias_before = bias_after = None
            if name in self.loki_bias:
                bias = self._base_bias()
                bias_before = bias.index_select(0, rows)
                bias_after = _sum(bias_before, self.loki_bias[name].detach())
            parts = [after] if bias_after is None else [after, bias_after]
            if safe_merge and not all(bool(part.isfinite().all()) for part in parts):
                raise ValueError(f"Merging adapter {name!r} gives weights that are not finite; it was not merged here.")
            weight.index_copy_(dim, rows, after)
            if bias is not None and bias_after is not None:
                bias.index_copy_(0, rows, bias_after)
            self._originals.append((name, before, bias_before))
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put back the rows that merging changed, last merged first."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self._originals:
            name, before, bias_before = self._originals.pop()
            self.merged_adapters.remove(name)
            rows = self.loki_rows[name]
            weight = self._base_weight()
            weight.index_copy_(self._dim(name), rows, before.to(weight))
            if bias_before is not None:
                bias = self._base_bias()
                bias.index_copy_(0, rows, bias_before.to(bias))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Say whether a LoRA can hold this adapter: its change of the weight, yes; a trained bias, no."""
        return adapter_name not in self.loki_bias

    def _bias_delta(self, name: str) -> Tensor | None:
        return self.loki_bias[name] if name in self.loki_bias else None  # noqa: SIM401

    def _base_bias(self) -> Float[Tensor, " d_out"]:
        bias = self.get_base_layer().bias
        assert isinstance(bias, Tensor)
        return bias.data

    def _dim(self, name: str) -> int:
        return 0 if self.axis[name] == "row" else 1

    def _base_weight(self) -> Float[Tensor, "d_out d_in"]:
        """Return a writable view of the base weight in torch's [out, in] order."""
        weight = self.get_base_layer().weight
        if not isinstance(weight, Tensor) or not is_plain(weight):
            raise ValueError(
                f"A {type(self.get_base_layer()).__name__} with quantised or sharded weights cannot be merged exactly; "
                "load the base model in plain floats, attach the adapter and merge there."
            )
        return weight.data.T if isinstance(self.get_base_layer(), Conv1D) else weight.data

    def __repr__(self) -> str:
        return "loki." + super().__repr__()


def _sum(before: Tensor, delta: Tensor) -> Tensor:
    """Add in the wider dtype and round once to the base's."""
    wide = torch.promote_types(before.dtype, delta.dtype)
    return (before.to(wide) + delta.to(before.device, wide)).to(before.dtype)

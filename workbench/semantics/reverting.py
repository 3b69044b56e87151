"""Trained units of the down-projections: which differ between two models, and putting them back.

A unit is a node (a row of the down-projection, with its bias) or a neuron (a column of it). A `HookedModel` may share
the storage of its weights with the model that it was opened from: inside `reverted` that model is changed as well, and
afterwards, also after an error, every weight is again what it was, to the bit.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import xarray as xr
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from workbench.models import HookedModel, check_unit, inputs_first
from workbench.selection import Selection

#: Some rows, or some columns, of a matrix.
Place = tuple[list[int]] | tuple[slice, list[int]]


@dataclass(frozen=True)
class Change:
    """How the trained units of one layer differ: `before - after` of their weights, what reverting them adds."""

    unit: str
    index: Int[Tensor, " chosen"]
    weight: Float[Tensor, "chosen width"]
    bias: Float[Tensor, " chosen"] | None

    @property
    def differs(self) -> bool:
        """Whether any of these weights is another than before."""
        return bool(self.weight.any()) or (self.bias is not None and bool(self.bias.any()))

    def added(
        self, inputs: Float[Tensor, "batch pos d_mlp"], mask: Bool[Tensor, "batch chosen"]
    ) -> Float[Tensor, "batch pos d_model"] | Float[Tensor, "batch pos chosen"]:
        """What reverting each row's masked units adds to the output: on `index` for nodes, everywhere for neurons."""
        share = rearrange(mask, "b k -> b 1 k").to(inputs)
        if self.unit == "neuron":
            return (inputs[..., self.index] * share) @ self.weight
        return share * (inputs @ self.weight.T + (0 if self.bias is None else self.bias))


def changed_units(before: HookedModel, after: HookedModel, unit: str | None = None) -> Selection:
    """The units whose weights differ, to the bit, between two models.

    `unit` is "node" (a row of a down-projection or its bias) or "neuron" (a column); None takes the kind of which fewer
    differ, nodes where it is equal, so that the units that LoKI trained are found as they were chosen.

    Raises:
        ValueError: weights of different names, shapes or types.
    """
    check_same_weights(before, after)
    masks: dict[str, list[np.ndarray]] = {"node": [], "neuron": []}
    for layer in range(before.n_layers):
        differ = _matrix(before.down_proj(layer)) != _matrix(after.down_proj(layer)).to(before.device)
        rows = differ.any(1)
        first, second = _bias(before.down_proj(layer)), _bias(after.down_proj(layer))
        if first is not None and second is not None:
            rows = rows | (first != second.to(first.device))
        masks["node"].append(rows.cpu().numpy())
        masks["neuron"].append(differ.any(0).cpu().numpy())
    if unit is None:
        unit = min(masks, key=lambda kind: float(np.mean(masks[kind])))
    mask = xr.DataArray(np.stack(masks[check_unit(unit)]), dims=("layer", "unit"))
    return Selection(mask, unit, {"changed": [before.name, after.name]})


def elsewhere(before: HookedModel, after: HookedModel, units: Selection) -> list[str]:
    """Names of the weights that differ beyond some units of the down-projections: what reverting those leaves."""
    check_same_weights(before, after)
    first, second = _weights(before), _weights(after)
    inside = {name: layer for layer, name in enumerate(before.down_names)}
    names = []
    for name in dict(before.hf.named_parameters()) | dict(after.hf.named_parameters()):  # of a tied pair one
        module, _, kind = name.rpartition(".")
        differ = first[name] != second[name].to(first[name].device)
        if module in inside and kind in ("weight", "bias"):
            differ = differ.clone()
            if kind == "weight":
                transposed = differ.T if inputs_first(before.down_proj(inside[module])) else differ
                transposed[_place(units, inside[module])] = False
            elif units.unit == "node":
                differ[units.rows(inside[module])] = False
        if bool(differ.any()):
            names.append(name)
    return names


@contextmanager
def reverted(after: HookedModel, before: HookedModel, units: Selection) -> Iterator[None]:
    """Give some units of `after` the weights of `before` inside the `with`; exact, and put back bit by bit.

    Raises:
        ValueError: a selection that does not fit the model, or weights of different names, shapes or types.
    """
    check_same_weights(before, after)
    check_fits(units, after)
    kept: list[tuple[Tensor, Place, Tensor, Tensor]] = []
    for layer in range(after.n_layers):
        if not (rows := units.rows(layer)):
            continue
        ours, theirs = after.down_proj(layer), before.down_proj(layer)
        place = _place(units, layer)
        weight, base = _matrix(ours), _matrix(theirs)
        kept.append((weight, place, weight[place].clone(), base[place].to(weight.device)))
        bias, base_bias = _bias(ours), _bias(theirs)
        if units.unit == "node" and bias is not None and base_bias is not None:
            kept.append((bias, (rows,), bias[rows].clone(), base_bias[rows].to(bias.device)))
    try:
        for tensor, where, _, new in kept:
            tensor[where] = new
        after.__dict__.pop("digest", None)  # the digest says which weights the model has now
        yield
    finally:
        for tensor, where, old, _ in kept:
            tensor[where] = old
        after.__dict__.pop("digest", None)


def changes(before: HookedModel, after: HookedModel, units: Selection) -> dict[int, Change]:
    """How the units of every layer that has some differ, in float32 on the device of `after`."""
    found = {}
    for layer in range(after.n_layers):
        if rows := units.rows(layer):
            ours, theirs = after.down_proj(layer), before.down_proj(layer)
            gap = (_matrix(theirs).to(after.device).float() - _matrix(ours).float())[_place(units, layer)]
            bias, base_bias = _bias(ours), _bias(theirs)
            added = None
            if units.unit == "node" and bias is not None and base_bias is not None:
                added = (base_bias.to(after.device).float() - bias.float())[rows]
            weight = gap if units.unit == "node" else gap.T
            found[layer] = Change(units.unit, torch.tensor(rows, device=after.device), weight.contiguous(), added)
    return found


@contextmanager
def partly_reverted(
    after: HookedModel, by_layer: Mapping[int, Change], masks: Mapping[int, Bool[Tensor, "batch chosen"]]
) -> Iterator[None]:
    """Revert other units for every row of a batch: what `reverted` does to the weights, done to their outputs.

    `masks[layer]` says, row by row, which of the units of `by_layer[layer]` are reverted. Equal to reverting the
    weights up to rounding.
    """
    inputs: dict[int, Tensor] = {}

    def keep(layer: int, value: Tensor) -> Tensor:
        inputs[layer] = value
        return value

    def add(layer: int, value: Tensor) -> Tensor:
        change = by_layer[layer]
        added = change.added(inputs[layer].float(), masks[layer].to(value.device)).to(value)
        return value.index_add(-1, change.index, added) if change.unit == "node" else value + added

    seen = {layer: (lambda value, layer=layer: keep(layer, value)) for layer in masks}
    written = {layer: (lambda value, layer=layer: add(layer, value)) for layer in masks}
    with after.patched("neuron", seen), after.patched("node", written):
        yield


def check_same_weights(before: HookedModel, after: HookedModel) -> None:
    """Raise unless the two models have weights of the same names, shapes and type; tied ones count under each name."""
    if before.dtype != after.dtype:
        raise ValueError(
            f"{before.name} has weights of type {before.dtype} and {after.name} of {after.dtype}, which differ "
            'everywhere; open both with dtype="float32".'
        )
    ours, theirs = ({name: tuple(one.shape) for name, one in _weights(model).items()} for model in (before, after))
    for name in ours | theirs:
        if ours.get(name) != theirs.get(name):
            sizes = [str(one[name]) if name in one else "missing" for one in (ours, theirs)]
            raise ValueError(
                f"{before.name} and {after.name} are not of one architecture: {name} is {sizes[0]} and {sizes[1]}; "
                "give a model and one that was trained from it."
            )


def check_fits(units: Selection, model: HookedModel) -> None:
    """Raise unless a selection is over this model's layers and units."""
    if not units.matches(model.n_layers, model.width(units.unit)):
        raise ValueError(
            f"The selection is over {units.n_layers} layers of {units.n_units} {units.unit}s, but {model.name} has "
            f"{model.n_layers} of {model.width(units.unit)}: give a selection of this model."
        )


def _weights(model: HookedModel) -> dict[str, Tensor]:
    return dict(model.hf.named_parameters(remove_duplicate=False))


def _matrix(module: nn.Module) -> Float[Tensor, "d_model d_mlp"]:
    """The weight of a down-projection with a row per node: a view, transposed for `Conv1D`."""
    weight = cast(Tensor, module.weight).detach()
    return weight.T if inputs_first(module) else weight


def _bias(module: nn.Module) -> Float[Tensor, " d_model"] | None:
    bias = cast(Tensor | None, getattr(module, "bias", None))
    return None if bias is None else bias.detach()


def _place(units: Selection, layer: int) -> Place:
    """Where the units of a layer lie in the matrix with a row per node."""
    rows = units.rows(layer)
    return (rows,) if units.unit == "node" else (slice(None), rows)

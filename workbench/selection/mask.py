"""`Selection`: a boolean mask over layers and units, with its axes, its unit kind and where it came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from workbench.results import load_json, save_json

UNIT_KINDS = ("node", "neuron")


@dataclass(frozen=True, eq=False)
class Selection:
    """A boolean mask over (layer, unit) that says which units are trained; the rest stays frozen.

    `unit` is "node" (an index along d_model, a row of `down_proj.weight`) or "neuron" (an index along d_mlp, a column
    of it). `origin` says where the selection came from. `order` is how a position file listed the units of each layer,
    kept only so that the file can be written back equal; it takes no part in equality.

    >>> chosen = Selection.from_positions([[2, 0], []], unit="node", n_units=4)
    >>> chosen.rows(0), chosen.n_selected, (~chosen).n_selected
    ([0, 2], 2, 6)
    """

    mask: xr.DataArray
    unit: str
    origin: dict[str, Any] = field(default_factory=dict)
    order: tuple[tuple[int, ...], ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "mask", _checked_mask(self.mask))
        check_unit_kind(self.unit)
        if self.order is not None and [sorted(rows) for rows in self.order] != self._sorted_positions():
            raise ValueError("The order of a Selection lists other units than its mask: leave `order` out.")

    @property
    def n_layers(self) -> int:
        """Number of layers, selected from or not."""
        return int(self.mask.sizes["layer"])

    @property
    def n_units(self) -> int:
        """Number of units in a layer (d_model for nodes, d_mlp for neurons)."""
        return int(self.mask.sizes["unit"])

    @property
    def n_selected(self) -> int:
        """Number of selected units over all layers."""
        return int(self.mask.values.sum())

    def rows(self, layer: int) -> list[int]:
        """Return the selected units of one layer, ascending."""
        if not 0 <= layer < self.n_layers:
            raise ValueError(f"There is no layer {layer}: this selection has layers 0 to {self.n_layers - 1}.")
        return [int(row) for row in np.flatnonzero(self.mask.values[layer])]

    def positions(self) -> list[list[int]]:
        """Return one list of unit indices per layer: in the order of the file they came from, else ascending."""
        return self._sorted_positions() if self.order is None else [list(rows) for rows in self.order]

    def per_layer(self) -> pd.DataFrame:
        """Return a frame with columns layer, n_selected and share (of the units of that layer, 0 to 1)."""
        counts = self.mask.values.sum(axis=1)
        return pd.DataFrame({"layer": range(self.n_layers), "n_selected": counts, "share": counts / self.n_units})

    def matches(self, n_layers: int, n_units: int) -> bool:
        """Say whether the mask has this shape."""
        return (self.n_layers, self.n_units) == (n_layers, n_units)

    def to_positions(self, path: str | Path) -> Path:
        """Write LoKI's position file: a JSON list with one list of unit indices per layer."""
        return save_json(self.positions(), path)

    @classmethod
    def from_positions(
        cls, source: str | Path | Sequence[Sequence[int]], *, unit: str, n_units: int, n_layers: int | None = None
    ) -> Selection:
        """Read LoKI's position file (or the same lists in memory) for a model with `n_units` units in each layer."""
        if isinstance(source, str | Path):
            name, lists = str(source), load_json(source)
        else:
            name, lists = "The position list", [list(rows) for rows in source]
        _check_positions(lists, name, n_units, n_layers)
        values = np.zeros((len(lists), n_units), dtype=bool)
        for layer, rows in enumerate(lists):
            values[layer, rows] = True
        order = tuple(tuple(int(row) for row in rows) for rows in lists)
        unsorted = any(list(rows) != sorted(rows) for rows in order)
        origin = {"positions": Path(source).name} if isinstance(source, str | Path) else {"positions": "given"}
        return cls(xr.DataArray(values, dims=("layer", "unit")), unit, origin, order if unsorted else None)

    def save(self, path: str | Path) -> Path:
        """Write the selection with its unit kind, shape and origin as JSON."""
        shape = {"unit": self.unit, "n_layers": self.n_layers, "n_units": self.n_units}
        return save_json({**shape, "positions": self.positions(), "origin": self.origin}, path)

    @classmethod
    def load(cls, path: str | Path) -> Selection:
        """Read what `save` wrote."""
        record = load_json(path)
        wanted = {"unit", "n_layers", "n_units", "positions", "origin"}
        if not isinstance(record, dict) or not wanted <= set(record):
            raise ValueError(
                f"{path} is not a saved selection (it needs {', '.join(sorted(wanted))}): "
                "read a bare position file with Selection.from_positions."
            )
        lists, n_units, n_layers = record["positions"], record["n_units"], record["n_layers"]
        if not all(type(number) is int and number > 0 for number in (n_units, n_layers)):
            raise ValueError(f"{path} is not a saved selection: n_units and n_layers are whole numbers above 0.")
        _check_positions(lists, str(path), n_units, n_layers)
        found = cls.from_positions(lists, unit=record["unit"], n_units=n_units, n_layers=n_layers)
        return cls(found.mask, found.unit, record["origin"], found.order)

    def __and__(self, other: Selection) -> Selection:
        return self._combined(other, np.logical_and, "and")

    def __or__(self, other: Selection) -> Selection:
        return self._combined(other, np.logical_or, "or")

    def __xor__(self, other: Selection) -> Selection:
        return self._combined(other, np.logical_xor, "xor")

    def __sub__(self, other: Selection) -> Selection:
        return self._combined(other, np.greater, "minus")

    def __invert__(self) -> Selection:
        return Selection(~self.mask, self.unit, {"not": self.origin})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Selection):
            return NotImplemented
        return self.unit == other.unit and np.array_equal(self.mask.values, other.mask.values)

    def __hash__(self) -> int:
        return hash((self.unit, self.mask.shape, self.mask.values.tobytes()))

    def _combined(self, other: Selection, operation: np.ufunc, word: str) -> Selection:
        if (self.unit, self.mask.shape) != (other.unit, other.mask.shape):
            raise ValueError(
                f"Cannot combine a selection of {self.unit}s of shape {self.mask.shape} with one of {other.unit}s "
                f"of shape {other.mask.shape}: both must come from the same model and unit kind."
            )
        values = operation(self.mask.values, other.mask.values)
        return Selection(self.mask.copy(data=values), self.unit, {word: [self.origin, other.origin]})

    def _sorted_positions(self) -> list[list[int]]:
        return [self.rows(layer) for layer in range(self.n_layers)]


def check_unit_kind(unit: object) -> None:
    """Refuse anything but "node" and "neuron"."""
    if unit not in UNIT_KINDS:
        raise ValueError(f'The unit kind {unit!r} is unknown: it is "node" (d_model) or "neuron" (d_mlp).')


def _checked_mask(mask: xr.DataArray) -> xr.DataArray:
    """Return a read-only copy with dims (layer, unit) and coordinates that count from 0."""
    if set(mask.dims) != {"layer", "unit"}:
        raise ValueError(f"A selection's mask has the dims (layer, unit), not {mask.dims}.")
    if mask.dtype != bool:
        raise ValueError(f"A selection's mask is boolean, not {mask.dtype}: compare the numbers with something first.")
    mask = mask.transpose("layer", "unit")
    if 0 in mask.shape:
        raise ValueError(f"A selection's mask needs at least one layer and one unit; its shape is {mask.shape}.")
    for dim in ("layer", "unit"):
        if dim in mask.coords and not np.array_equal(mask[dim].values, np.arange(mask.sizes[dim])):
            raise ValueError(f"A selection's mask covers every {dim} from 0 on, in order: reindex it first.")
    values = np.array(mask.values)
    values.setflags(write=False)
    axes = {"layer": np.arange(values.shape[0]), "unit": np.arange(values.shape[1])}
    return xr.DataArray(values, dims=("layer", "unit"), coords=axes, name="mask")


def _check_positions(lists: Any, name: str, n_units: int, n_layers: int | None) -> None:
    """Refuse what is not one list of distinct unit indices in range per layer."""
    if not isinstance(lists, list) or not lists or not all(isinstance(rows, list) for rows in lists):
        raise ValueError(f"{name} is not a list of lists: a position file has one list of unit indices per layer.")
    if n_layers is not None and len(lists) != n_layers:
        raise ValueError(f"{name} has positions for {len(lists)} layers, but the model has {n_layers}.")
    for layer, rows in enumerate(lists):
        for row in rows:
            if isinstance(row, bool) or not isinstance(row, int | np.integer):
                raise ValueError(f"{name}, layer {layer}: {row!r} is not a unit index (a whole number).")
            if not 0 <= row < n_units:
                raise ValueError(
                    f"{name}, layer {layer}: unit {row} is out of range, the layer has units 0 to {n_units - 1}; "
                    "check that the file belongs to this model and unit kind."
                )
        if len(set(rows)) != len(rows):
            twice = next(row for row in rows if rows.count(row) > 1)
            raise ValueError(f"{name}, layer {layer}: unit {twice} is listed twice; list every unit once.")

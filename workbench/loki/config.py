"""The configuration of LoKI as a peft method: which units are trained, and how."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftType

UNITS = ("node", "neuron")


@dataclass
class LokiConfig(PeftConfig):
    """Train only the selected feed-forward units of a decoder (LoKI, arXiv 2505.22120, "Implanting").

    Nodes: `W_S = W_S0 + D`, S rows of the down-projection, and the bias entries S. Neurons: the same for its columns,
    and with `train_keys` the rows S of the up- and gate-projection. `r > 0`: `D = (alpha / r) A B` (equation 11).

    >>> config = LokiConfig(selection=[[3, 1], []], unit="node")
    >>> config.positions, config.unit, config.r
    ([[1, 3], []], 'node', 0)
    """

    selection: InitVar[Any] = None
    """A `Selection`, the path of a saved one or of a position JSON, or a list of lists: layer -> unit indices.

    Stored as `positions`.
    """
    positions: list[list[int]] | None = field(default=None, metadata={"help": "Layer -> sorted unit indices."})
    unit: str | None = field(
        default=None,
        metadata={"help": "'node' (index along d_model) or 'neuron' (along d_mlp); default: the selection's."},
    )
    n_units: int | None = field(
        default=None, metadata={"help": "Units per layer the selection was made over, checked against the model."}
    )
    layers: Any = field(
        default=None, metadata={"help": "Train only this layer of the selection, or these; kept as a sorted list."}
    )
    r: Any = field(
        default=0, metadata={"help": "Rank inside the selected rows, or their number where it is smaller; 0: in full."}
    )
    loki_alpha: Any = field(
        default=None, metadata={"help": "Scaling numerator for r > 0, as LoRA's alpha; default: r, a scaling of 1."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by alpha / sqrt(r) instead of alpha / r."})
    train_keys: bool = field(
        default=False, metadata={"help": "For neurons: train their rows of the up- and gate-projection too."}
    )
    train_bias: bool = field(
        default=True,
        metadata={"help": "Train the bias entries of the trained rows where there are any (in full, also for r > 0)."},
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Suffixes (or one regular expression) of the down-projections; default: by model_type."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "List of module names or regex expression of the module names to exclude from LoKI."},
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "List of modules apart from LoKI layers to be set as trainable and saved with the adapter."},
    )
    init_seed: int = field(default=0, metadata={"help": "Seed of the random factor B for r > 0."})

    def __post_init__(self, selection: Any) -> None:
        super().__post_init__()
        self.peft_type = PeftType("LOKI")
        if selection is not None:
            if self.positions is not None:
                raise ValueError("LokiConfig got both selection and positions; give one of them.")
            self._take(selection)
        if self.positions is None:
            raise ValueError(
                "LokiConfig needs selection=: a Selection, the path of a position JSON, or a list of lists."
            )
        self.unit = self.unit or "node"
        self.positions = _checked_positions(self.positions)
        self.layers = checked_layers(self.layers)
        if isinstance(self.target_modules, (set, tuple)):
            self.target_modules = sorted(self.target_modules)
        self._check()
        if selection is not None and self.r > self.highest_rank:  # a saved adapter, which has positions, is read
            raise ValueError(
                f"r={self.r} is more than the {self.highest_rank} {self.unit}s that a layer trains at most; give a "
                "lower r, or r=0 to train them in full."
            )

    def _take(self, selection: Any) -> None:
        """Fill positions, unit and n_units from whatever the user calls a selection."""
        mask = getattr(selection, "mask", None)
        if mask is None:
            self.positions = self._read(selection) if isinstance(selection, (str, Path)) else selection
            return
        if self.unit is not None and self.unit != selection.unit:
            raise ValueError(f"The selection is over {selection.unit}s but unit={self.unit!r} was given; drop unit=.")
        labels = mask["layer"].values.tolist() if "layer" in mask.coords else list(range(mask.sizes["layer"]))
        if labels != list(range(len(labels))):
            raise ValueError(
                f"The selection covers layers {labels}, not every layer from 0; use layers= to restrict it."
            )
        rows = mask.transpose("layer", "unit").values
        self.positions = [[int(i) for i in row.nonzero()[0]] for row in rows]
        self.unit, self.n_units = selection.unit, int(mask.sizes["unit"])

    def _read(self, path: str | Path) -> list[list[int]]:
        """The positions of a file, with unit and n_units where it is a saved selection; errors name the file."""
        found = _read_json(path)
        saved = found if isinstance(found, dict) else {"positions": found}
        for name in ("unit", "n_units"):
            given, said = getattr(self, name), saved.get(name)
            if None not in (given, said) and given != said:
                raise ValueError(f"{path} is a selection with {name}={said!r} but {name}={given!r} was given; drop it.")
            setattr(self, name, given if said is None else said)
        try:
            return _checked_positions(saved.get("positions"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def _check(self) -> None:
        """Raise ValueError for settings that do not fit together."""
        positions = self.positions or []
        if self.unit not in UNITS:
            raise ValueError(f"unit must be 'node' or 'neuron', got {self.unit!r}.")
        if self.train_keys and self.unit != "neuron":
            raise ValueError(
                "train_keys=True belongs to unit='neuron': a node has no row in the up- and gate-projection."
            )
        rank = _whole(self.r)
        if rank is None or rank < 0:
            raise ValueError(f"r must be 0 (the rows in full) or a positive whole rank, got {self.r!r}.")
        self.r = rank
        alpha = self.loki_alpha
        if alpha is not None and (
            isinstance(alpha, bool) or not isinstance(alpha, Real) or not 0 < float(alpha) < math.inf
        ):
            raise ValueError(f"loki_alpha must be a positive number, got {alpha!r}.")
        if self.r == 0 and (self.loki_alpha is not None or self.use_rslora):
            raise ValueError("loki_alpha and use_rslora scale the low-rank form; give r > 0 or leave them out.")
        if self.layers is not None:
            outside = [layer for layer in self.layers if not 0 <= layer < len(positions)]
            if outside:
                raise ValueError(
                    f"layers={self.layers} names {outside}, but the selection has layers 0 to {len(positions) - 1}."
                )
        if not self.highest_rank:
            within = "" if self.layers is None else f" within layers={self.layers}"
            raise ValueError(f"The selection is empty{within}: there is nothing to train; raise the quota.")

    @property
    def highest_rank(self) -> int:
        """How many units are trained in the layer with the most of them."""
        positions = self.positions or []
        layers = range(len(positions)) if self.layers is None else self.layers
        return max((len(positions[layer]) for layer in layers), default=0)

    @property
    def scaling(self) -> float:
        """What the low-rank product is multiplied by: alpha / r, or alpha / sqrt(r) with `use_rslora`; 1 for r = 0."""
        if self.r == 0:
            return 1.0
        alpha = self.r if self.loki_alpha is None else self.loki_alpha
        return alpha / (self.r**0.5 if self.use_rslora else self.r)


def _read_json(path: str | Path) -> Any:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no position file {path}; give a JSON list of lists, or a saved selection.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is not JSON ({error}); a position file is a JSON list of lists of indices."
        ) from error


def _checked_positions(positions: Any) -> list[list[int]]:
    """Return sorted plain lists; ValueError for anything but distinct non-negative integers."""
    positions = positions.tolist() if hasattr(positions, "tolist") else positions  # an array, or a tensor
    if not isinstance(positions, Sequence) or isinstance(positions, str) or not positions:
        raise ValueError("A selection is a list with one list of unit indices per layer.")
    checked = []
    for layer, rows in enumerate(positions):
        if isinstance(rows, (str, bytes)) or not hasattr(rows, "__iter__"):
            raise ValueError(f"Layer {layer} of the selection is {rows!r}, not a list of unit indices.")
        values = list(rows)
        wrong = [value for value in values if (index := _whole(value)) is None or index < 0]
        if wrong:
            raise ValueError(f"Layer {layer} of the selection holds {wrong[0]!r}; indices are integers from 0.")
        indices = sorted(operator.index(value) for value in values)
        if len(set(indices)) != len(indices):
            raise ValueError(f"Layer {layer} of the selection names a unit twice.")
        checked.append(indices)
    return checked


def checked_layers(layers: Any) -> list[int] | None:
    """Return a sorted plain list of one layer, or of any collection of them (a range, an array, a set)."""
    if layers is None:
        return None
    one = _whole(layers)
    given = [one] if one is not None else list(layers) if hasattr(layers, "__iter__") else [layers]
    wrong = [layer for layer in given if _whole(layer) is None]
    if wrong:
        raise ValueError(f"layers={layers!r} holds {wrong[0]!r}; layers are whole numbers.")
    return sorted({operator.index(layer) for layer in given})


def _whole(value: Any) -> int | None:
    """The plain integer that a number of Python, numpy or torch is, or None."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None

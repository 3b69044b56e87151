"""What a person asks of a fine-tune."""

import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from workbench.config import TrainConfig
from workbench.filtering import weight_of
from workbench.results import load_json

#: What a start leaves that was stopped before its settings were written.
BEGUN = {".lock", "stages"}


@dataclass(frozen=True)
class FineTune:
    """What is asked for: everything that decides the result.

    Attributes:
        data: facts by name or file, or a file of prompts and completions or of chats (`load_training_data`).
        model: the default's name, a folder of safetensors, a `.gguf` file or a hub id.
        method: `loki`, or any other name of `workbench.loki.METHODS`.
        quota: LoKI: percent of the units of a layer that are trained.
        strategy: LoKI: how units are selected. `interference_aware` reads how the attributed facts collide, and where
            `data` are facts an attribution of them too; of examples it has none, so that this term is off.
        score: LoKI: `magnitude` or `signed`.
        selection: a position file, or a saved selection: LoKI trains it instead of one from attribution, another method
            the layers in which it has units.
        layers: train only these layers; None is those of the selection, or all.
        unit: LoKI: `node` or `neuron`; None is that of a saved selection, or `node`.
        rank: rank of the methods that have one (LoKI: 0 trains the selected rows in full).
        rates: learning rates to search; none takes that of `training`, or the method's default.
        retained: facts that the model may know, to be attributed and to be read before and after.
        max_facts: LoKI: attribute at most this many known facts (and, where the strategy reads them, new ones).
        max_retained: read at most this many known facts before and after.
        general: the shipped prose (`general`), or a text file, a passage a paragraph.
        general_tokens: read at most this many tokens of it.
        epochs: passes over the data; None is 3 for examples, and for facts `training.max_epochs`.
        training: target, batch size, rate, seed.
        filter: of facts: the rule by which some are kept to be taught (`filter_facts`); `all` keeps all.
        keep: of a filter: the share (a float) or the number of the facts that is kept.
        filter_weight: of the rules `spread` and `near_diverse`; None is the rule's own (`filter_facts`).
        watch: stop before more than this share of the known facts is no longer answered; None does not watch.
        watch_drift: stop before the mean semantic distance (d_soft) of the known facts grows by more than this.
        format: format of a file of facts.
        chat: put what is taught (facts, or prompts with completions) and the retained facts through the chat template;
            chats in `data` always are.
        device: where the model is put.
        dtype: the type of its weights.
    """

    data: str
    model: str = "smollm2-135m"
    method: str = "loki"
    quota: float = 10.0
    strategy: str = "layer_balanced"
    score: str = "magnitude"
    selection: str | None = None
    layers: tuple[int, ...] | None = None
    unit: str | None = None
    rank: int | None = None
    rates: tuple[float, ...] = ()
    retained: str = "world"
    max_facts: int = 30
    max_retained: int = 80
    general: str = "general"
    general_tokens: int = 1024
    epochs: int | None = None
    training: TrainConfig = field(default_factory=TrainConfig)
    filter: str = "all"
    keep: float | int = 0.7
    filter_weight: float | None = None
    watch: float | None = None
    watch_drift: float | None = None
    format: str = "auto"
    chat: bool = False
    device: str = "auto"
    dtype: str = "auto"

    def settled(self) -> "FineTune":
        """The same with the filter's own weight where none is given, and a unit where none is named: that of a saved
        selection, or the node.

        ValueError where the unit that is named is not that of the selection.
        """
        saved = None if self.selection is None else load_json(self.selection)
        said = saved.get("unit") if isinstance(saved, dict) else None
        if self.unit and said and self.unit != said:
            raise ValueError(f"{self.selection} is a selection of {said}s, not of {self.unit}s; leave the unit out.")
        weight = weight_of(self.filter, self.filter_weight)
        return replace(self, unit=self.unit or said or "node", filter_weight=weight)

    def chosen(self) -> str:
        """How LoKI's units are chosen, in words."""
        if self.selection is not None:
            return f"given, {Path(self.selection).name}"
        by = "" if "random" in self.strategy else f" by {self.score}"
        return f"{self.strategy}{by}, {self.quota:g}% of the {self.unit or 'node'}s"

    def settings(self) -> dict[str, Any]:
        """Every setting as plain values."""
        return asdict(self) | {"training": self.training.model_dump(), "rates": list(self.rates),
                               "layers": None if self.layers is None else list(self.layers)}  # fmt: skip

    def check_out(self, out: Path) -> None:
        """Raise unless the folder is new, empty, or holds this very fine-tune."""
        if out.is_file():
            raise ValueError(f"{out} is a file; give a folder as out.")
        if out.is_dir() and not {entry.name for entry in out.iterdir()} <= BEGUN:
            if not (out / "settings.json").is_file() or not (out / "stages").is_dir():
                raise ValueError(f"{out} holds something that is not a fine-tune; give another folder as out.")
            before, now = FineTune(self.data).settings() | load_json(out / "settings.json"), self.settings()
            other = [name for name in now if before[name] != now[name]]
            if other:
                raise ValueError(
                    f"{out} holds a fine-tune with another {other[0]} ({before[other[0]]!r}, not {now[other[0]]!r}); "
                    "give another folder as out."
                )
        there = next(parent for parent in (out.absolute(), *out.absolute().parents) if parent.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise PermissionError(
                f"{out} cannot be written: {there} is no folder that you may write to; give another out."
            )

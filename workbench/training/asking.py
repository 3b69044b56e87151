"""What a person asks of a fine-tune."""

import os
from dataclasses import asdict, dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any

from workbench.config import TrainConfig
from workbench.facts import ExampleSet, FactSet, general_text, load_facts, load_training_data
from workbench.filtering import METRICS, check_options, weight_of
from workbench.loki import METHODS, check_method
from workbench.results import load_json
from workbench.selection import READ_INTERFERENCE, check_choice
from workbench.training.search import check_rates

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
        filter_low: of the rule `band`: the quantile where it starts; None is the middle.
        filter_metric: the distance by which a filter judges: d_soft, d_emb or d_layer.
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
    filter_low: float | None = None
    filter_metric: str = "d_soft"
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
        within = "" if self.layers is None else f" of layers {', '.join(map(str, sorted(set(self.layers))))}"
        return f"{self.strategy}{by}, {self.quota:g}% of the {self.unit or 'node'}s{within}"

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
            before, now = FineTune(self.data).settings() | _settings_in(out / "settings.json"), self.settings()
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


def _settings_in(file: Path) -> dict[str, Any]:
    """The settings of an earlier start, or one sentence where they are lost."""
    try:
        settings = load_json(file)
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(
            f"{file} is damaged, so nothing says which fine-tune {file.parent} holds; give another folder as out."
        )
    return settings


def check_finetune(asked: FineTune, out: Path) -> tuple[FineTune, FactSet | ExampleSet, FactSet]:
    """What is asked with its unit settled, the data and the retained facts.

    Raises for everything that can be known to be wrong before a model is opened.
    """
    kind = check_method(asked.method)
    if kind == "loki" != asked.method:
        raise ValueError(f"The method is loki, not {asked.method!r}: strategy and score say what it selects.")
    for name, value, fits in (
        ("rank", asked.rank, METHODS[kind].ranked),
        ("unit", asked.unit, kind == "loki" or asked.selection is not None),
    ):
        if value is not None and not fits:
            raise ValueError(f"The method {asked.method!r} takes no {name}; leave it out.")
    check_choice(asked.strategy, asked.quota)
    aware = kind == "loki" and asked.selection is None and asked.strategy in READ_INTERFERENCE
    if aware and asked.max_facts < 2:
        raise ValueError(f"{asked.strategy} reads how facts collide, in pairs: give max_facts of 2 or more.")
    if asked.selection is not None and not Path(asked.selection).is_file():
        raise FileNotFoundError(f"There is no file {asked.selection} (selection).")
    check_options(asked.filter, asked.keep, asked.filter_weight, asked.filter_low)
    if asked.filter_metric not in METRICS:
        raise ValueError(f"filter_metric is one of {', '.join(METRICS)}, not {asked.filter_metric!r}.")
    asked = asked.settled()
    if asked.watch is not None and not 0 <= asked.watch <= 1:
        raise ValueError(f"watch is a share of the known facts, 0 to 1, not {asked.watch}.")
    if asked.watch_drift is not None and not 0 <= asked.watch_drift < inf:
        raise ValueError(f"watch_drift is a finite bound of at least 0, not {asked.watch_drift}.")
    if asked.rates:
        check_rates(asked.rates)
        if asked.training.learning_rate is not None:
            raise ValueError("rates are searched for the learning rate, so none is given beside them; leave one out.")
    general_text(asked.general)
    asked.check_out(out)
    data = load_training_data(asked.data, format=asked.format)
    if asked.filter != "all" and not isinstance(data, FactSet):
        raise ValueError(f"The filter {asked.filter!r} is for facts, and {asked.data} holds examples; leave it out.")
    if asked.filter != "all" and isinstance(asked.keep, int) and asked.keep > len(data):
        raise ValueError(f"keep={asked.keep} does not fit: {asked.data} holds {len(data)} facts.")
    return asked, data, load_facts(asked.retained)

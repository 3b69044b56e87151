"""A fine-tune that forgets less, for a person with a model and a data file: from known facts to a model with a card."""

import logging
import shutil
from collections.abc import Callable, Collection
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import xarray as xr

from workbench.attribution import attribute
from workbench.facts import ExampleSet, FactSet, general_text
from workbench.filtering import WEIGHTS, filtered, kept_of
from workbench.forgetting import measure_forgetting
from workbench.interfere import interference
from workbench.loki import adapter_for, check_method, parameter_count
from workbench.models import HookedModel, load_model
from workbench.opening import open_model
from workbench.recollection import read_facts, recall, text_chunks
from workbench.results import RunDir, digest_of, load_frame, load_json, save_frame, save_json
from workbench.results.damage import stored_arrays, unreadable
from workbench.selection import READ_INTERFERENCE, Selection, check_choice, select
from workbench.semantics import filter_inputs
from workbench.training import (
    DriftWatch,
    FineTune,
    TrainingRun,
    card,
    check_finetune,
    efficacy,
    export,
    figures_of,
    held_out_prompts,
    implant,
    search_learning_rate,
    tokenise,
)

log = logging.getLogger(__name__)

#: Passes over a person's own examples where nothing else is asked for; facts are repeated until they are known.
EXAMPLE_EPOCHS = 3


def finetune(asked: FineTune, out: str | Path, *, command: str = "", progress: bool = True) -> RunDir:
    """Teach a model what a person's data holds, and say what it cost; write everything into a folder.

    LoKI: facts that the model knows are attributed, the units that matter least to them are selected, and only those
    are trained. Every method is then read on the retained facts and on general text, before and after.

    The folder gets `adapter/`, `merged/` (safetensors and tokenizer, for plain transformers), `README.md` (the card,
    also in both), `forgetting.parquet`, `training.json`, `history.parquet`, and for LoKI `attribution.zarr` and
    `selection.json`; with a filter `filter.parquet`, what became of every fact. A second start with the same settings
    does only what is missing or cannot be read.

    Raises:
        FileNotFoundError, ValueError, PermissionError: what does not fit, before any long work starts.
    """
    asked, data, retained = check_finetune(asked, Path(out))
    folder = RunDir(Path(out))
    way = _Way(asked, data, retained, folder, command, progress)  # before the folder: what does not fit leaves none
    folder.file("stages").mkdir(parents=True, exist_ok=True)
    with folder.lock():
        asked.check_out(folder.path)  # another start may have ended since
        save_json(asked.settings(), folder.file("settings.json"))
        units = None if asked.selection is None else load_json(asked.selection)
        key = {"settings": asked.settings(), "model": way.model.digest, "data": way.data.digest,
               "retained": way.retained.digest, "text": digest_of(way.general), "selection": units}  # fmt: skip
        for name, files, work in way.stages():
            lost = unreadable(path for file in files for path in folder.path.glob(file))
            if lost is not None:
                log.warning("%s cannot be read, and is made anew", lost)
            if lost is not None or not folder.stage_done(name, key):
                folder.invalidate(name)
                work()
                folder.mark_done(name, key, files)
    return folder


class _Way:
    """The stages of one fine-tune, and what they share."""

    def __init__(
        self,
        asked: FineTune,
        data: FactSet | ExampleSet,
        retained: FactSet,
        folder: RunDir,
        command: str,
        progress: bool,
    ) -> None:
        self.asked, self.folder, self.command, self.progress = asked, folder, command, progress
        self.model: HookedModel = load_model(asked.model, device=asked.device, dtype=asked.dtype)
        template = self.model.tokenizer if asked.chat else None
        self.data = data
        if template:
            self.data = data.as_chat(template) if isinstance(data, FactSet) else data.as_chat()
        self.retained = retained.as_chat(template) if template else retained
        if isinstance(data, FactSet) and (both := retained.sharing_prompts(data)):
            told = "%d facts of %s have a prompt that is taught, and count as forgotten where the answer is another one"
            log.warning(told, len(both), asked.retained)
        few = EXAMPLE_EPOCHS if isinstance(data, ExampleSet) else asked.training.max_epochs
        self.training = asked.training.model_copy(update={"max_epochs": asked.epochs or few})
        tokenise(self.model, self.data, self.training.paraphrases)  # raises for what the model cannot be taught
        self.model.tokenise(self.retained)
        self.general = general_text(asked.general)
        text_chunks(self.model, self.general, max_tokens=asked.general_tokens)
        self.loki = check_method(asked.method) == "loki"
        if not self.loki or asked.selection:
            parameter_count(self.model, self._adapter())  # raises where it does not fit the model
        else:
            unit = asked.unit or "node"
            n_layers = len(set(asked.layers or range(self.model.n_layers)))
            most = check_choice(asked.strategy, asked.quota, self.model.width(unit), n_layers)
            if asked.rank is not None and asked.rank > most:
                raise ValueError(
                    f"A rank of {asked.rank} is more than the {most} {unit}s of a layer that a quota of "
                    f"{asked.quota:g}% trains at most; take a lower rank, or a higher quota."
                )
            adapter_for(self.model, asked.method, selection=[[0]] * self.model.n_layers, layers=asked.layers)

    def stages(self) -> list[tuple[str, tuple[str, ...], Callable[[], None]]]:
        """Name, files and work of every stage."""
        selecting: list[tuple[str, tuple[str, ...], Callable[[], None]]] = []
        if self.loki and self.asked.selection is None:
            new = ("attribution_new.zarr",) if self._reads_new else ()
            selecting = [("selection", ("attribution.zarr", *new, "selection.json"), self._select)]
        tables = ["search.parquet"] if self.asked.rates else []
        tables += [] if self.asked.watch is None and self.asked.watch_drift is None else ["trajectory.parquet"]
        filtering = [("filter", ("filter.parquet",), self._filter)] if self.asked.filter != "all" else []
        return [
            *filtering,
            ("recall", ("recall.parquet",), self._recall),
            *selecting,
            ("training", ("adapter/*", "training.json", "history.parquet", *tables), self._train),
            ("merged", ("merged/*",), self._merge),
            ("forgetting", ("forgetting.parquet",), self._forget),
            ("card", ("README.md", "adapter/README.md", "merged/README.md"), self._describe),
        ]

    @cached_property
    def known(self) -> FactSet:
        """The retained facts that the base model answers."""
        frame = load_frame(self.folder.file("recall.parquet"))
        known = [str(i) for i in frame.index[frame["known"]]]
        choosing = self.loki and self.asked.selection is None
        if not known and (choosing or self.asked.watch is not None or self.asked.watch_drift is not None):
            way_out = "a selection, or another method" if choosing else "or leave watch and watch_drift out"
            raise ValueError(
                f"{self.model.name} knows none of the {len(frame)} facts of {self.asked.retained}, so there is "
                f"nothing to {'attribute' if choosing else 'watch'}; give other retained facts, {way_out}."
            )
        return self.retained.filter(ids=known)

    @cached_property
    def attributed(self) -> FactSet:
        """LoKI: the known facts that choose the units; half of them at most, so that others are left to be read."""
        facts = self._split[0] if len(self._split[0]) else self.known  # a single one
        if len(facts) < 2 and self.asked.strategy in READ_INTERFERENCE:
            raise ValueError(
                f"{self.model.name} knows {len(self.known)} of the facts of {self.asked.retained}; "
                f"{self.asked.strategy} needs 4, two to collide and two to be read: give other retained facts."
            )
        return facts

    @cached_property
    def tuning(self) -> FactSet:
        """The facts by which a learning rate is chosen: none where none is searched."""
        most = self.asked.max_retained if self.asked.rates else 0
        return self._split[1].apart(most, self.training.seed)[0]

    @cached_property
    def read(self) -> FactSet:
        """The known facts on which forgetting is read: they chose neither unit nor rate, unless there are no others."""
        tuning = set(self.tuning.ids)
        left = self._split[1].filter(where=lambda fact: fact.id not in tuning)
        return left.at_most(self.asked.max_retained, self.training.seed)

    @cached_property
    def _split(self) -> tuple[FactSet, FactSet]:
        choosing = self.asked.max_facts if self.loki and self.asked.selection is None else 0
        return self.known.apart(choosing, self.training.seed)

    @cached_property
    def taught(self) -> FactSet | ExampleSet:
        """The data, of facts what the filter keeps."""
        if self.asked.filter == "all" or not isinstance(self.data, FactSet):
            return self.data
        return kept_of(self.data, load_frame(self.folder.file("filter.parquet")), self.asked.filter)

    def _filter(self) -> None:
        """Judge the facts by what the model says of them before training."""
        asked, facts = self.asked, self.data
        assert isinstance(facts, FactSet)
        distance, needed = filter_inputs(
            self.model, facts, asked.filter, metric=asked.filter_metric, progress=self.progress
        )
        weight = asked.filter_weight if asked.filter in WEIGHTS else None
        how: dict[str, Any] = {
            "keep": asked.keep,
            "weight": weight,
            "low": asked.filter_low,
            "seed": self.training.seed,
        }
        table = filtered(distance, rule=asked.filter, **needed, **how)
        save_frame(table, self.folder.file("filter.parquet"))

    def _recall(self) -> None:
        """Ask retained facts in the order of the seed, until enough are known or none is left."""
        wanted, asked = self.asked.max_facts + self.asked.max_retained * (2 if self.asked.rates else 1), 0
        frames: list[pd.DataFrame] = []
        while asked < len(self.retained) and sum(int(frame["known"].sum()) for frame in frames) < wanted:
            before = set(self.retained.sample(asked, self.training.seed).ids) if asked else set()
            asked = min(len(self.retained), max(2 * wanted, 2 * asked))
            drawn = self.retained.sample(asked, self.training.seed)
            frames.append(recall(self.model, drawn.filter(ids=set(drawn.ids) - before), progress=self.progress))
        save_frame(pd.concat(frames), self.folder.file("recall.parquet"))

    @property
    def _reads_new(self) -> bool:
        """Whether the selection reads what helps the facts to be taught."""
        return self.asked.strategy in READ_INTERFERENCE and isinstance(self.data, FactSet)

    def _score(self, name: str, facts: FactSet) -> xr.Dataset:
        """Attribute facts, or what an earlier start left to do or what was damaged since."""
        out, unit = self.folder.file(f"{name}.zarr"), self.asked.unit or "node"
        self.folder.begin(name, {"facts": facts.digest, "model": self.model.digest, "unit": unit}, out)
        try:
            if out.exists():
                stored_arrays(out, "r")
        except (OSError, ValueError) as error:  # no other damage is beyond repair
            raise ValueError(f"{out} cannot be read; delete it and start again, which makes it anew.") from error
        return attribute(self.model, facts, unit=unit, out=out, progress=self.progress)

    def _select(self) -> None:
        asked = self.asked
        scores = self._score("attribution", self.attributed)
        beside: dict[str, Any] = {}
        if asked.strategy in READ_INTERFERENCE:
            how: dict[str, Any] = {"seed": self.training.seed, "progress": self.progress}
            beside = {"interference": interference(self.model, self.attributed, scores, **how)}
        if self._reads_new:
            assert isinstance(self.taught, FactSet)
            beside["new"] = self._score("attribution_new", self.taught.at_most(asked.max_facts, self.training.seed))
        options: dict[str, Any] = {"strategy": asked.strategy, "score": asked.score, "seed": self.training.seed}
        chosen = select(scores, quota=asked.quota, layers=asked.layers, **options, **beside)
        chosen.save(self.folder.file("selection.json"))

    def _adapter(self) -> Any:
        """A fresh configuration of the method."""
        options: dict[str, Any] = {} if self.asked.rank is None else {"r": self.asked.rank}
        layers: Collection[int] | None = self.asked.layers
        if self.loki and self.asked.selection:
            options |= {"selection": self.asked.selection, "unit": self.asked.unit}
        elif self.loki:
            options |= {"selection": Selection.load(self.folder.file("selection.json"))}
        elif self.asked.selection:
            layers = self._layers_of(self.asked.selection)
        return adapter_for(self.model, self.asked.method, layers=layers, **options)

    def _layers_of(self, path: str) -> list[int]:
        """The layers in which a selection has units, of those asked for."""
        config = adapter_for(self.model, "loki", selection=path, unit=self.asked.unit, layers=self.asked.layers)
        parameter_count(self.model, config)  # raises where the selection is not of this model
        chosen = range(self.model.n_layers) if self.asked.layers is None else sorted(set(self.asked.layers))
        return [layer for layer in chosen if config.positions[layer]]  # type: ignore[union-attr]

    def _train(self) -> None:
        for name in ("merged", "forgetting", "card"):
            self.folder.invalidate(name)  # of another training
        settings = self.training
        if self.asked.rates:
            found = search_learning_rate(
                self.model, self.taught, self._adapter, self.asked.rates, train_config=settings,
                forgetting=self._lost if len(self.tuning) else None, progress=self.progress,
            )  # fmt: skip
            save_frame(found, self.folder.file("search.parquet"))
            if not found["chosen"].any():
                raise ValueError(f"The loss became infinite with every rate of {list(self.asked.rates)}; try smaller.")
            rate = float(found.loc[found["chosen"], "learning_rate"].iloc[0])
            settings = settings.model_copy(update={"learning_rate": rate})
        watch = []
        bounds: dict[str, Any] = {"forgetting": self.asked.watch, "drift": self.asked.watch_drift}
        if any(bound is not None for bound in bounds.values()):
            place = self.folder.file("trajectory.parquet")
            watch = [DriftWatch(self.model, self.known, **bounds, each_epoch=True, out=place, seed=settings.seed)]
        options: dict[str, Any] = {"out": self.folder.path, "callbacks": watch, "progress": self.progress}
        implant(self.model, self.taught, self._adapter(), settings, **options)

    def _lost(self, run: TrainingRun) -> float:
        """Share of the facts for tuning that a trained model does not answer."""
        tuned = open_model(str(run.adapter), base=self.model)
        readings = read_facts(tuned, tuned.tokenise(self.tuning), greedy=False)
        return 1 - sum(reading.known for reading in readings) / len(readings)

    def _merge(self) -> None:
        shutil.rmtree(self.folder.file("merged"), ignore_errors=True)  # of a start that was stopped
        export(self.folder.file("adapter"), self.folder.file("merged"), base=self.model)

    def _forget(self) -> None:
        suites: dict[str, Any] = {"retained": self.read, "general": self.general}
        if isinstance(self.taught, FactSet):
            suites["paraphrase"] = held_out_prompts(self.taught, self.training.paraphrases)
        suites = {name: suite for name, suite in suites.items() if len(suite)}
        tuned = load_model(str(self.folder.file("merged")), device=self.asked.device, dtype=self.model.dtype)
        frame = measure_forgetting(
            self.model, tuned, suites, max_tokens=self.asked.general_tokens, progress=self.progress
        )
        save_frame(frame, self.folder.file("forgetting.parquet"))

    def _describe(self) -> None:
        about = load_json(self.folder.file("training.json"))
        items = tokenise(self.model, self.taught, self.training.paraphrases)
        numbers = {"trained prompts answered before": f"{efficacy(self.model.hf, items):.0%}"}
        numbers |= figures_of(load_frame(self.folder.file("forgetting.parquet")))
        numbers = {"selection": self.asked.chosen(), **numbers} if self.loki else numbers
        if self.asked.rates:
            reached = int(load_frame(self.folder.file("search.parquet"))["reached"].sum())
            told = "" if self.training.target_loss == 0 else f", of which {reached} reached the target"
            numbers["learning rates tried"] = f"{len(self.asked.rates)}{told}"
        for place, merged in (("README.md", True), ("merged/README.md", True), ("adapter/README.md", False)):
            text = card(about, numbers=numbers, command=self.command, merged=merged)
            self.folder.file(place).write_text(text, encoding="utf-8")

"""The straight way, stage by stage: a run is a folder, and a second start does only what is missing."""

import logging
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pandas as pd

from workbench.attribution import attribute, filled_in
from workbench.config import Config
from workbench.facts import FactSet, general_text, load_facts
from workbench.forgetting import measure_forgetting, neighbourhood_as_before
from workbench.interfere import interference
from workbench.learning import foresee, layer_advice, quotas
from workbench.loki import METHODS, adapter_for, check_method
from workbench.models import HookedModel, load_model
from workbench.opening import open_model
from workbench.pipeline import checks
from workbench.recollection import recall, text_chunks
from workbench.reporting import report
from workbench.results import (
    RunDir,
    load_frame,
    load_json,
    open_result,
    provenance,
    save_frame,
    save_json,
    save_result,
)
from workbench.selection import Selection, select
from workbench.semantics import measure_drift
from workbench.training import held_out_prompts, implant

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """A step of the way: what it depends on, what it writes, and the work."""

    name: str
    key: Any
    files: tuple[str, ...]
    work: Callable[[], None]


def run(config: Config | str | Path, *, progress: bool = True) -> RunDir:
    """Go the straight way and write everything into `config.out`; what is there already is not done again.

    `config` is a `Config` or the path of a TOML or JSON file of settings.

    Stages: recall, attribution, interference, advice, prediction where it is asked for, selection and implant per
    method, drift, forgetting, report. Each is keyed by its settings and the digests of its inputs, so that a changed
    setting redoes what depends on it and nothing else, and a run killed anywhere goes on where it was; a training
    that was killed begins anew.

    Raises:
        ValueError, FileNotFoundError: settings or inputs that do not fit, before any long work; or another run at
            work in the folder.
    """
    config = config if isinstance(config, Config) else Config.read(config)
    checks.check(config)
    folder = RunDir(Path(config.out))
    folder.file("stages").mkdir(parents=True, exist_ok=True)
    with folder.lock(), folder.logged("log.txt"):
        way = _Way(config, folder, progress)
        save_json(config.model_dump(mode="json"), folder.file("config.json"))
        for stage in way.stages():
            if folder.stage_done(stage.name, stage.key):
                log.info("%s: done before", stage.name)
                continue
            started = time.perf_counter()
            folder.invalidate(stage.name)
            log.info("%s: started", stage.name)
            stage.work()
            way.record(stage.name, time.perf_counter() - started)
            folder.mark_done(stage.name, stage.key, stage.files)
    return folder


class _Way:
    """The stages of one run, and what they share; everything is opened when it is first needed."""

    def __init__(self, config: Config, folder: RunDir, progress: bool) -> None:
        self.config, self.folder, self.progress = config, folder, progress
        self.definition = filled_in(config.attribution.model_dump(exclude={"max_facts"})) | {"seed": config.seed}
        self.retained = load_facts(config.retained)
        self.implanted = load_facts(config.implanted)
        self.taught = self.retained.sharing_prompts(self.implanted)
        if self.taught:
            log.warning("%d facts of %s have a taught prompt: they are left out", len(self.taught), config.retained)
        checks.check_ids(config, self.retained, self.implanted)
        self._check_harm(self.retained)
        self.model: HookedModel = load_model(config.model, device=config.device, dtype=config.dtype)
        for facts in (self.retained, self.implanted):
            self.model.tokenise(facts)
        self.measured: dict[str, Any] = config.interference.model_dump(exclude={"harm"}) | {"seed": config.seed}
        self.general = general_text(config.evaluation.general)
        text_chunks(self.model, self.general, max_tokens=config.evaluation.general_tokens)
        checks.check_selection(config, self.model, self.definition["unit"])

    def stages(self) -> Iterator[Stage]:
        """All stages in order; a key is made when its turn comes, from what lies in the folder by then."""
        config = self.config
        base = {"model": self.model.digest, "dtype": str(self.model.dtype)}
        known = {**base, "retained": self.retained.digest}
        yield Stage("recall", known, ("recall.parquet",), self._recall)
        known |= {"taught": " ".join(self.taught)} if self.taught else {}
        new = {**base, "implanted": self.implanted.digest}
        yield Stage("recall_new", new, ("recall_new.parquet",), self._recall_new)
        attributed = {**known, **self.definition, "max_facts": config.attribution.max_facts}
        yield Stage("attribution", attributed, ("attribution.zarr", "facts/retained.jsonl"), self._attribute)
        among = {**attributed, "interference": self.measured}
        yield Stage("interference", among, ("interference.zarr",), self._interfere)
        both = {**among, **new}
        if checks.is_advised(config) or config.interference.harm:
            yield Stage("attribution_new", {**attributed, **new}, ("attribution_new.zarr",), self._attribute_new)
        if checks.is_advised(config):
            trainable = {name: getattr(config.selection, name) for name in ("quota", "layers")}
            yield Stage("advice", {**both, **trainable}, ("advice.parquet",), self._advise)
        if config.interference.harm:
            yield Stage("prediction", both, ("prediction.parquet", "prediction.json"), self._predict)
        trained: dict[str, Any] = {}
        for method in config.methods:
            if method in checks.LOKI_METHODS:
                chosen, work = self._chosen(method, both), partial(self._select, method)
                yield Stage(f"selection-{method}", chosen, (f"selection/{method}.json",), work)
        for method in config.methods:
            chosen = self._chosen(method, both) if method in checks.LOKI_METHODS else self._restricted()
            trained[method] = {**new, "selection": chosen, "training": config.training.model_dump()}
            files = tuple(f"implant/{method}/{name}" for name in ("adapter", "history.parquet", "training.json"))
            yield Stage(f"implant-{method}", trained[method], files, partial(self._implant, method))
        read = {**known, **config.evaluation.model_dump(), "seed": config.seed}
        read |= {"trained": trained, "text": self.general, "max_facts": config.attribution.max_facts}
        if config.methods:
            yield Stage("drift", {"trained": trained, **attributed}, ("drift.parquet",), self._drift)
            yield Stage("forgetting", read, ("forgetting.parquet",), self._forget)
        version = provenance()["packages"].get("knowledge-workbench")  # a new one makes new pages
        everything = {"config": config.model_dump(mode="json"), **both, **read, "version": version}
        yield Stage("report", everything, ("report.html",), self._report)

    @cached_property
    def known(self) -> FactSet:
        """The retained facts that the base model answers, but for those whose prompt is taught."""
        frame = load_frame(self.folder.file("recall.parquet"))
        ids = [str(i) for i in frame.index[frame["known"]] if str(i) not in self.taught]
        if len(ids) < 4:
            raise ValueError(
                f"{self.model.name} knows {len(ids)} of the {len(self.retained)} facts of {self.config.retained} that "
                "are not taught; at least 4 are needed, two to attribute and two to read: give other facts as retained."
            )
        return self.retained.filter(ids=ids)

    @cached_property
    def attributed(self) -> FactSet:
        """The known facts that are attributed, drawn by seed: at most half, so that others are left to be read."""
        return self._split[0]

    @cached_property
    def new(self) -> FactSet:
        """The facts to be taught that are attributed too, as many as of the known ones at most."""
        most = self.config.attribution.max_facts
        return self.implanted if most is None else self.implanted.at_most(most, self.config.seed)

    @cached_property
    def read(self) -> FactSet:
        """The known facts on which forgetting is read: none of them was attributed."""
        return self._split[1].at_most(self.config.evaluation.max_retained, self.config.seed)

    @cached_property
    def _split(self) -> tuple[FactSet, FactSet]:
        most = self.config.attribution.max_facts
        return self.known.apart(len(self.known) if most is None else most, self.config.seed)

    @cached_property
    def trained(self) -> dict[str, HookedModel]:
        """Every trained model, its adapter merged."""
        adapters = {method: self.folder.file(f"implant/{method}/adapter") for method in self.config.methods}
        return {method: open_model(adapter, base=self.model) for method, adapter in adapters.items()}

    def _recall(self) -> None:
        save_frame(recall(self.model, self.retained, progress=self.progress), self.folder.file("recall.parquet"))

    def _recall_new(self) -> None:
        save_frame(recall(self.model, self.implanted, progress=self.progress), self.folder.file("recall_new.parquet"))
        self.implanted.save(self.folder.file("facts/implanted.jsonl"))

    def _attribute(self) -> None:
        self._check_harm(self.known)
        self.attributed.save(self.folder.file("facts/retained.jsonl"))
        self._score("attribution", self.attributed)

    def _attribute_new(self) -> None:
        self._score("attribution_new", self.new)

    def _score(self, name: str, facts: FactSet) -> None:
        out = self.folder.file(f"{name}.zarr")
        self.folder.begin(name, {**self.definition, "facts": facts.digest, "model": self.model.digest}, out)
        attribute(self.model, facts, **self.definition, out=out, progress=self.progress)

    def _check_harm(self, known: FactSet) -> None:
        """Raise if too few facts would be attributed, of these known ones and the new ones, for what harm is to say."""
        most = self.config.attribution.max_facts
        drawn = known.apart(len(known) if most is None else most, self.config.seed)[0]
        checks.check_harm(self.config, len({*drawn.ids, *self.new.ids}))

    def _interfere(self) -> None:
        self._check_harm(self.known)
        scores = open_result(self.folder.file("attribution.zarr"))
        with self._unfinished("interference", self.attributed) as parts:
            found = interference(
                self.model, self.attributed, scores, **self.measured, parts=parts, progress=self.progress
            )
            save_result(found, self.folder.file("interference.zarr"), kind="interference")

    @contextmanager
    def _unfinished(self, name: str, facts: FactSet) -> Iterator[Path | None]:
        """A folder for the readings of suppression while they are made, of the same settings; gone after success."""
        if "suppression" not in self.measured["metrics"]:
            yield None
            return
        out = self.folder.file(f"{name}.parts")
        settings = {**self.config.attribution.model_dump(), "interference": self.measured}
        self.folder.begin(f"{name}-parts", {**settings, "facts": facts.digest, "model": self.model.digest}, out)
        yield out
        shutil.rmtree(out, ignore_errors=True)

    def _advise(self) -> None:
        found, new = (open_result(self.folder.file(f"{name}.zarr")) for name in ("interference", "attribution_new"))
        chosen = self.config.selection
        if chosen.layers is not None:
            found = found.sel(layer=sorted(set(chosen.layers)))
        frame = layer_advice(found, new=new, quota=chosen.quota, seed=self.config.seed)
        save_frame(frame, self.folder.file("advice.parquet"))

    def _predict(self) -> None:
        known = set(self.attributed.ids)
        facts = FactSet("both", (*self.attributed, *(fact for fact in self.new if fact.id not in known)))
        scores = [open_result(self.folder.file(f"{name}.zarr")) for name in ("attribution", "attribution_new")]
        scores[1] = scores[1].sel(fact=[fact.id for fact in facts if fact.id not in known])
        out, key = self.folder.file("harm.zarr"), {"facts": facts.digest, "model": self.model.digest}
        self.folder.begin("harm", key, out)
        with self._unfinished("prediction", facts) as parts:
            frame, about = foresee(
                self.model, facts, scores, out=out, **self.measured, parts=parts, progress=self.progress
            )
            save_frame(frame, self.folder.file("prediction.parquet"))
            save_json(about, self.folder.file("prediction.json"))

    def _selection(self, method: str) -> dict[str, Any]:
        """Arguments of `select` for a LoKI method."""
        return {**self.config.selection.model_dump(), "seed": self.config.seed, **checks.LOKI_METHODS[method]}

    def _chosen(self, method: str, both: dict[str, Any]) -> dict[str, Any]:
        """What a selection depends on: interference and new facts only where its strategy follows the advice."""
        apart = set() if checks.reads_advice(self.config, method) else {"interference", "implanted"}
        return {name: value for name, value in both.items() if name not in apart} | self._selection(method)

    def _select(self, method: str) -> None:
        scores = open_result(self.folder.file("attribution.zarr"))
        settings = self._selection(method)
        if checks.reads_advice(self.config, method):
            read = {"interference": "interference.zarr", "new": "attribution_new.zarr"}
            settings |= {name: open_result(self.folder.file(file)) for name, file in read.items()}
            advice, width = load_frame(self.folder.file("advice.parquet")), scores.sizes["unit"]
            advice["budget"] = advice["budget"].clip(upper=width - 1)  # a percentage stays below 100
            settings["quota"] = quotas(advice, width)
        select(scores, **settings).save(self.folder.file(f"selection/{method}.json"))

    def _layers(self) -> list[int]:
        """The layers that every method trains: those where LoKI has units, or without LoKI those asked for."""
        path = self.folder.file("selection/loki.json")
        if "loki" in self.config.methods and path.is_file():
            return [layer for layer, rows in enumerate(Selection.load(path).positions()) if rows]
        chosen = self.config.selection.layers
        return list(range(self.model.n_layers)) if chosen is None else sorted(set(chosen))

    def _restricted(self) -> dict[str, Any]:
        """What a baseline takes over from the selection: its layers, where they are not all."""
        layers = self._layers()
        return {} if len(layers) == self.model.n_layers else {"layers": layers}

    def _implant(self, method: str) -> None:
        options: dict[str, Any] = {"r": self.config.training.lora_rank} if METHODS[check_method(method)].ranked else {}
        if method not in checks.LOKI_METHODS:
            options |= self._restricted()
        else:
            options = {"selection": Selection.load(self.folder.file(f"selection/{method}.json"))}
        adapter = adapter_for(self.model, method, **options)
        out = self.folder.file(f"implant/{method}")
        implant(self.model, self.implanted, adapter, self.config.training, out=out, progress=self.progress)

    def _drift(self) -> None:
        others = self._split[1].at_most(len(self.attributed), self.config.seed)
        groups = {"implanted": self.implanted, "retained": others}
        frames = [
            measure_drift(self.model, self.trained, facts, progress=self.progress).assign(group=group)
            for group, facts in groups.items()
        ]
        save_frame(pd.concat(frames, ignore_index=True), self.folder.file("drift.parquet"))

    def _forget(self) -> None:
        shown = self.config.training.paraphrases
        suites: dict[str, Any] = {
            "efficacy": self.implanted,
            "paraphrase": held_out_prompts(self.implanted, shown),
            "neighbourhood": neighbourhood_as_before(self.model, self.implanted),
            "retained": self.read,
            "general": self.general,
        }
        suites = {name: suite for name, suite in suites.items() if len(suite)}
        frame = measure_forgetting(
            self.model, self.trained, suites, max_tokens=self.config.evaluation.general_tokens, progress=self.progress
        )
        save_frame(frame, self.folder.file("forgetting.parquet"))

    def _report(self) -> None:
        report(self.folder.path)

    def record(self, stage: str, seconds: float) -> None:
        """Add a stage's duration to `provenance.json`."""
        path = self.folder.file("provenance.json")
        old = load_json(path) if path.is_file() else {}
        model = self.model
        about = {"name": model.name, "digest": model.digest, "n_layers": model.n_layers, "d_model": model.d_model,
                 "d_mlp": model.d_mlp, "dtype": str(model.dtype).removeprefix("torch.")}  # fmt: skip
        names = [one.name for one in self.stages()]
        stages = {name: spent for name, spent in old.get("stages", {}).items() if name in names}
        stages[stage] = round(seconds, 2)
        tokens = {facts.name: facts.tokenisation_report(model.tokenizer) for facts in (self.retained, self.implanted)}
        command = f"workbench run --config {shlex.quote(str(self.folder.file('config.json')))}"
        save_json({**provenance(), "model": about, "stages": stages, "tokens": tokens, "command": command}, path)

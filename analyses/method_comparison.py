"""Which way of fine-tuning forgets least for the same facts learned? LoKI's selections against baselines of peft.

Every method is taught the same invented facts until it answers the target share of them. The learning rate of every
method of `--methods` is searched on the first seed, with as many trials for each: among the rates that reach the target
the one after which most of a tuning set of known facts is still answered. At that rate the method is trained with every
seed, and what it forgot is read on other known facts, on plain prose, and on paraphrases of what was taught. Those of
`--once` are trained with one seed at their default rate, as a check that they run. Publishes
`figures/method_comparison.*`; every trial is kept, and a second start does only what is missing.

    python analyses/method_comparison.py            # the full comparison, some hours on two cores
    python analyses/method_comparison.py --smoke    # the same way on few facts, rates and epochs, for tests
"""

import argparse
import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import xarray as xr

import workbench as wb
from workbench.config import TrainConfig
from workbench.facts import FactSet, general_text
from workbench.figures import forgetting_compared
from workbench.intervals import means
from workbench.loki import adapter_config, matched, parameter_count
from workbench.models import HookedModel
from workbench.opening import open_model
from workbench.reporting import places, publish
from workbench.results import (
    digest_of,
    load_frame,
    load_json,
    open_result,
    provenance,
    save_frame,
    save_json,
    save_result,
)
from workbench.training import LEARNING_RATES, DivergedError, held_out_prompts, implant
from workbench.training.methods import kind_of
from workbench.training.search import choose

KEYS = ["suite", "metric", "fact", "weight"]
HERE = Path(__file__).resolve().parent.parent
#: Ways to choose LoKI's nodes: arguments of `select`.
SELECTIONS: dict[str, dict[str, Any]] = {
    "loki_signed": {"strategy": "layer_balanced", "score": "signed"},
    "loki_magnitude": {"strategy": "layer_balanced", "score": "magnitude"},
    "loki_random": {"strategy": "random"},
    "loki_highest": {"strategy": "layer_highest", "score": "magnitude"},
    "loki_interference": {"strategy": "interference_aware", "score": "magnitude"},
}
#: Methods with a rank once more, with the rank that makes them as large as LoKI.
MATCHED = {"lora_matched": "lora", "dora_matched": "dora", "pissa_matched": "pissa"}
METHODS = (*SELECTIONS, "lora", "dora", "pissa", "full", *MATCHED)
ONCE = ("rslora", "olora", "corda", "kasa", "shira", "ia3", "ln_tuning", "adalora", "full_ffn")


@dataclass(frozen=True)
class Study:
    """What is compared, on which facts, and where it is kept."""

    out: Path
    model_name: str
    methods: tuple[str, ...]
    once: tuple[str, ...]
    factors: tuple[float, ...]
    seeds: tuple[int, ...]
    new: str
    retained: str
    attributed: int
    asked: int
    tokens: int
    quota: float
    steps: int | None
    all_facts: bool
    settings: TrainConfig

    @cached_property
    def model(self) -> HookedModel:
        """The base model."""
        return wb.load_model(self.model_name)

    @cached_property
    def taught(self) -> FactSet:
        """What is to be learned."""
        return wb.load_facts(self.new)

    @cached_property
    def known(self) -> FactSet:
        """The retained facts that the model knows."""
        facts = wb.load_facts(self.retained)
        if not self.all_facts:
            table = self.out / f"recall-{facts.digest[:12]}.parquet"
            if not table.is_file():
                save_frame(wb.recall(self.model, facts), table)
            recall = load_frame(table)
            facts = facts.filter(ids=[str(i) for i in recall.index[recall["known"]]])
        needed = self.attributed + 2
        if len(facts) < needed:
            raise ValueError(f"{len(facts)} known facts are too few: {needed} are needed at least.")
        return facts

    @cached_property
    def parts(self) -> tuple[FactSet, FactSet, FactSet]:
        """Known facts, drawn by seed 0: those that choose LoKI's nodes, those for tuning, those on which is read."""
        chosen, others = self.known.apart(self.attributed, seed=0)
        tuning, held_out = others.at_most(2 * self.asked, seed=0).apart(self.asked, seed=0)
        return chosen, tuning, held_out

    @property
    def chosen(self) -> FactSet:
        """These choose LoKI's nodes."""
        return self.parts[0]

    @property
    def tuning(self) -> FactSet:
        """By these the learning rate is chosen."""
        return self.parts[1]

    @property
    def held_out(self) -> FactSet:
        """On these forgetting is read: neither attributed nor used for tuning."""
        return self.parts[2]

    @cached_property
    def scores(self) -> xr.Dataset:
        """Attribution of known facts."""
        steps: dict[str, Any] = {"steps": self.steps}
        return wb.attribute(self.model, self.chosen, out=self.out / "scores.zarr", **steps)

    def selection(self, method: str) -> wb.Selection:
        """The nodes that a LoKI method trains."""
        options: dict[str, Any] = dict(SELECTIONS[method])
        if options["strategy"] == "interference_aware":
            place = self.out / "interference.zarr"
            if not place.exists():
                found = wb.interference(self.model, self.chosen, self.scores)
                save_result(found, place, kind="interference")
            new = wb.attribute(self.model, self.taught, method="grad_x_act", out=self.out / "new.zarr")
            options |= {"interference": open_result(place), "new": new}
        return wb.select(self.scores, quota=self.quota, **options)

    def adapter(self, method: str) -> Any:
        """A fresh configuration of a method on the down-projections."""
        options: dict[str, Any] = {}
        if method in SELECTIONS:
            options = {"selection": self.selection(method)}
        elif method in MATCHED:
            size = parameter_count(self.model, self.adapter("loki_random"))
            options = matched(MATCHED[method], size, self.model)
        return adapter_config(MATCHED.get(method, method), model_config=self.model.config, **options)

    def trial(self, method: str, factor: float, seed: int) -> dict[str, Any]:
        """One training and what it forgot: a row, kept with the readings of every fact beside it."""
        place = self._place(method, factor, seed)
        adapter = self.adapter(method)
        rate = factor * LEARNING_RATES[kind_of(adapter)]
        settings = self.settings.model_copy(update={"learning_rate": rate, "seed": seed})
        key = self._key(settings, adapter)
        if (place / "trial.json").is_file():
            kept = load_json(place / "trial.json")
            if kept.get("key") != key:
                raise ValueError(f"{place} holds a trial with other facts or settings: give another folder as --out.")
            return kept
        row = {"method": method, "factor": factor, "seed": seed, "learning_rate": rate, "key": key}
        scratch = place / "training"
        try:
            run = implant(self.model, self.taught, adapter, settings, out=scratch)
        except DivergedError:
            row |= {"diverged": True, "reached": False, "efficacy": 0.0, "steps": 0, "forgetting": None}
        else:
            suites: dict[str, Any] = {"retained": self.held_out, "general": general_text()}
            if seed == self.seeds[0]:
                suites["tuning"] = self.tuning
            if len(worded := held_out_prompts(self.taught, self.settings.paraphrases)):
                suites["paraphrase"] = worded
            after = open_model(run.adapter, base=self.model)
            frame = wb.measure_forgetting(self.model, after, suites, max_tokens=self.tokens)
            save_frame(frame, place / "forgetting.parquet")
            names = ("reached", "efficacy", "steps", "epochs", "trainable_parameters", "seconds")
            row |= {"diverged": False, **{name: run.summary[name] for name in names}}
            of_tuning = frame[(frame["suite"] == "tuning") & (frame["metric"] == "accuracy")]
            searched = run.reached and seed == self.seeds[0]
            row["forgetting"] = -float(of_tuning["change"].mean()) if searched else None
        shutil.rmtree(scratch, ignore_errors=True)  # weights; the readings stay
        save_json(row, place / "trial.json")
        return row

    def _key(self, settings: TrainConfig, adapter: Any) -> str:
        """What a trial depends on, so that one with other settings is not taken for it."""
        facts = [self.taught.digest, self.held_out.digest, self.tuning.digest]
        options = adapter.to_dict() if hasattr(adapter, "to_dict") else str(adapter)
        return digest_of(
            [self.model.digest, facts, settings.model_dump(), json.dumps(options, default=_plain), self.tokens]
        )

    def _place(self, method: str, factor: float, seed: int) -> Path:
        """The folder of a trial."""
        return self.out / "trials" / f"{method}-{factor:g}-{seed}"

    def search(self, method: str) -> float | None:
        """The factor to its default rate with which a method forgets least of the tuning set, on the first seed."""
        rows = [{"trial": n, **self.trial(method, factor, self.seeds[0])} for n, factor in enumerate(self.factors)]
        best = choose(pd.DataFrame(rows).astype({"forgetting": float}))
        return None if best is None else self.factors[best]

    def readings(self, rows: list[dict[str, Any]]) -> pd.DataFrame:
        """What was forgotten in several trials of one method, fact by fact, the mean over trials."""
        together = pd.concat([self.reading(row) for row in rows])
        return together.groupby(KEYS, sort=False)[["before", "after", "change"]].mean().reset_index()

    def reading(self, row: dict[str, Any]) -> pd.DataFrame:
        """What was forgotten in one trial, fact by fact."""
        return load_frame(self._place(row["method"], row["factor"], row["seed"]) / "forgetting.parquet")


def _plain(value: Any) -> Any:
    """What JSON has no word for: sets in order, the rest as text."""
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def against(after: dict[str, pd.DataFrame], other: str) -> pd.DataFrame:
    """Every method minus another, paired over the same facts (means over seeds), with 95% intervals over facts."""
    names = {"change": f"minus_{other}", "low": f"minus_{other}_low", "high": f"minus_{other}_high"}
    parts = []
    theirs = after[other][[*KEYS, "after"]].rename(columns={"after": "before"})
    for method, rows in after.items():
        pairs = means(rows[[*KEYS, "after"]].merge(theirs, on=KEYS)).rename(columns=names)
        parts.append(pairs.assign(method=method)[["method", "suite", "metric", *names.values()]])
    return pd.concat(parts)


def seed_range(readings: list[pd.DataFrame]) -> pd.DataFrame:
    """The lowest and the highest mean over facts of any seed: suite, metric, seed_low, seed_high."""
    each = pd.concat([means(one).assign(seed=seed) for seed, one in enumerate(readings)])
    return each.groupby(["suite", "metric"], sort=False)["after"].agg(seed_low="min", seed_high="max").reset_index()


def compared(study: Study) -> tuple[pd.DataFrame, pd.DataFrame]:
    """All trials, and per method what was forgotten with intervals over facts (means over seeds)."""
    trials, summaries, after = [], [], {}
    for method in (*study.methods, *study.once):
        factor = study.search(method) if method in study.methods else 1.0
        if method in study.methods:
            trials += [study.trial(method, one, study.seeds[0]) | {"chosen": False} for one in study.factors]
        if factor is None:
            continue
        seeds = study.seeds if method in study.methods else study.seeds[:1]
        rows = [study.trial(method, factor, seed) | {"chosen": True} for seed in seeds]
        trials += rows
        reached = [row for row in rows if row["reached"]]
        whole = reached or [row for row in rows if not row["diverged"]]  # at matched efficacy, where there is any
        if whole:
            after[method] = study.readings(whole)
            edge = (
                method in study.methods
                and len(study.factors) > 1
                and factor in (min(study.factors), max(study.factors))
            )
            about = {name: float(pd.Series([row[name] for row in whole]).mean()) for name in ("efficacy", "steps")}
            size = whole[0]["trainable_parameters"]
            numbers = means(after[method]).assign(
                method=method, learning_rate=whole[0]["learning_rate"], seeds=len(whole), trainable_parameters=size,
                reached=len(reached), edge=edge, **about,
            ).merge(seed_range([study.reading(row) for row in whole]), on=["suite", "metric"])  # fmt: skip
            summaries.append(numbers)
    kept = pd.DataFrame(trials).drop(columns="key").sort_values("chosen", kind="stable")
    frame = pd.concat(summaries, ignore_index=True)
    for other in ("lora", "full"):
        if other in after:
            frame = frame.merge(against(after, other), on=["method", "suite", "metric"], how="left")
    return kept.drop_duplicates(["method", "factor", "seed"], keep="last"), frame


def study_of(options: argparse.Namespace) -> Study:
    """The full study, or a small one for tests."""
    shared = {"out": options.out, "model_name": options.model, "quota": options.quota, "all_facts": options.all_facts}
    if not options.smoke:
        settings = TrainConfig(max_epochs=options.max_epochs)
        return Study(
            methods=tuple(options.methods), once=tuple(options.once), factors=tuple(options.factors),
            seeds=tuple(options.seeds), new=options.new, retained=options.retained, attributed=options.attributed,
            asked=options.asked, tokens=options.tokens, steps=None, settings=settings, **shared,
        )  # fmt: skip
    few = wb.load_facts(options.retained)
    few = few if options.all_facts else few.filter(relations=["capital"]).sample(8, seed=0)
    return Study(
        methods=("loki_magnitude", "loki_interference", "lora"), once=("ia3",), factors=(0.5, 1.0), seeds=(0, 1),
        new="fictional:2", retained=str(few.save(options.out / "retained.jsonl")), attributed=3, asked=2, tokens=64,
        steps=1, settings=TrainConfig(max_epochs=2, target_efficacy=0.5), **shared,
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> Path:
    """Run the comparison, publish its figure and table, and give the path of the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=METHODS, help="searched and trained with every seed")
    parser.add_argument("--once", nargs="*", default=ONCE, help="trained once at the default rate")
    parser.add_argument("--factors", type=float, nargs="+", default=[0.2, 0.5, 1.0], help="of the default rate")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--model", default="smollm2-135m", help="default's name, folder, .gguf file or hub id")
    parser.add_argument("--new", default="fictional:30", help="facts that are taught")
    parser.add_argument("--retained", default="world", help="facts of which those that the model knows are to stay")
    parser.add_argument("--all-facts", action="store_true", help="take retained facts that the model does not know too")
    parser.add_argument("--attributed", type=int, default=30, help="known facts that are attributed")
    parser.add_argument("--asked", type=int, default=100, help="known facts for tuning, and as many for reading")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of plain prose")
    parser.add_argument("--quota", type=float, default=10.0, help="nodes that LoKI trains, in percent")
    parser.add_argument("--max-epochs", type=int, default=60, help="a training gives up after so many")
    parser.add_argument("--out", type=Path, help="where trials are kept; in runs when not given")
    parser.add_argument("--figures", type=Path, help="where the figure is published")
    parser.add_argument("--smoke", action="store_true", help="few methods, facts, rates and epochs")
    options = parser.parse_args(arguments)
    options.out, options.figures = places(HERE, "method_comparison", options.out, options.figures, options.smoke)
    options.out.mkdir(parents=True, exist_ok=True)
    study = study_of(options)
    trials, frame = compared(study)
    save_frame(trials.reset_index(drop=True), study.out / "trials.parquet")
    about = {
        **provenance(), "model": study.model_name, "new": study.new, "factors": list(study.factors),
        "seeds": list(study.seeds), "settings": study.settings.model_dump(), "smoke": options.smoke,
        "trials": json.loads(trials.to_json(orient="records")),
    }  # fmt: skip
    drawn = frame[(frame["metric"] == "accuracy") & frame["suite"].isin(["retained", "paraphrase"])]
    written = publish(forgetting_compared(drawn), frame, "method_comparison", options.figures, about)
    chosen = frame[
        (frame["suite"].isin(["retained", "general"])) & frame["metric"].isin(["accuracy", "perplexity", "kl"])
    ]
    columns = ["method", "metric", "learning_rate", "edge", "seeds", "reached", "before", "after", "seed_low"]
    columns += ["seed_high", "change", "low", "high", *(name for name in chosen if name.startswith("minus_"))]
    print(chosen[columns].to_string(index=False, float_format=lambda x: f"{x:.4g}"))
    return written[0]


if __name__ == "__main__":
    print(main())

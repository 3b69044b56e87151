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
from workbench.loki import adapter_config
from workbench.models import HookedModel
from workbench.opening import open_model
from workbench.reporting import publish
from workbench.results import load_frame, load_json, open_result, provenance, save_frame, save_json, save_result
from workbench.training import LEARNING_RATES, DivergedError, held_out_prompts, implant
from workbench.training.methods import kind_of
from workbench.training.search import choose

HERE = Path(__file__).resolve().parent.parent
#: Ways to choose LoKI's nodes: arguments of `select`.
SELECTIONS: dict[str, dict[str, Any]] = {
    "loki_signed": {"strategy": "layer_balanced", "score": "signed"},
    "loki_magnitude": {"strategy": "layer_balanced", "score": "magnitude"},
    "loki_random": {"strategy": "random"},
    "loki_highest": {"strategy": "layer_highest", "score": "magnitude"},
    "loki_interference": {"strategy": "interference_aware", "score": "magnitude"},
}
METHODS = (*SELECTIONS, "lora", "dora", "pissa", "full")
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
        """Known facts in an order drawn by seed 0: the first are attributed, the next are for tuning, then the rest."""
        facts = wb.load_facts(self.retained)
        if not self.all_facts:
            table = self.out / "recall.parquet"
            if not table.is_file():
                save_frame(wb.recall(self.model, facts), table)
            recall = load_frame(table)
            facts = facts.filter(ids=[str(i) for i in recall.index[recall["known"]]])
        needed = self.attributed + 2
        if len(facts) < needed:
            raise ValueError(f"{len(facts)} known facts are too few: {needed} are needed at least.")
        return facts.sample(len(facts), seed=0)

    @property
    def tuning(self) -> FactSet:
        """By these the learning rate is chosen."""
        rest = self.known[self.attributed :]
        return rest[: min(self.asked, len(rest) // 2)]

    @property
    def held_out(self) -> FactSet:
        """On these forgetting is read: neither attributed nor used for tuning."""
        rest = self.known[self.attributed :]
        return rest[len(self.tuning) : len(self.tuning) + self.asked]

    @cached_property
    def scores(self) -> xr.Dataset:
        """Attribution of known facts."""
        steps: dict[str, Any] = {"steps": self.steps}
        return wb.attribute(self.model, self.known[: self.attributed], out=self.out / "scores.zarr", **steps)

    def selection(self, method: str) -> wb.Selection:
        """The nodes that a LoKI method trains."""
        options: dict[str, Any] = dict(SELECTIONS[method])
        if options["strategy"] == "interference_aware":
            place = self.out / "interference.zarr"
            if not place.exists():
                found = wb.interference(self.model, self.known[: self.attributed], self.scores)
                save_result(found, place, kind="interference")
            new = wb.attribute(self.model, self.taught, method="grad_x_act", out=self.out / "new.zarr")
            options |= {"interference": open_result(place), "new": new}
        return wb.select(self.scores, quota=self.quota, **options)

    def adapter(self, method: str) -> Any:
        """A fresh configuration of a method on the down-projections."""
        options = {"selection": self.selection(method)} if method in SELECTIONS else {}
        return adapter_config(method, model_config=self.model.config, **options)

    def trial(self, method: str, factor: float, seed: int) -> dict[str, Any]:
        """One training and what it forgot: a row, kept with the readings of every fact beside it."""
        place = self._place(method, factor, seed)
        if (place / "trial.json").is_file():
            return load_json(place / "trial.json")
        adapter = self.adapter(method)
        rate = factor * LEARNING_RATES[kind_of(adapter)]
        row = {"method": method, "factor": factor, "seed": seed, "learning_rate": rate}
        settings = self.settings.model_copy(update={"learning_rate": rate, "seed": seed})
        scratch = place / "training"
        try:
            run = implant(self.model, self.taught, adapter, settings, out=scratch)
        except DivergedError:
            row |= {"diverged": True, "reached": False, "efficacy": 0.0, "steps": 0, "forgetting": None}
        else:
            suites: dict[str, Any] = {"retained": self.held_out, "tuning": self.tuning, "general": general_text()}
            if len(worded := held_out_prompts(self.taught, self.settings.paraphrases)):
                suites["paraphrase"] = worded
            after = open_model(run.adapter, base=self.model)
            frame = wb.measure_forgetting(self.model, after, suites, max_tokens=self.tokens)
            save_frame(frame, place / "forgetting.parquet")
            names = ("reached", "efficacy", "steps", "epochs", "trainable_parameters", "seconds")
            row |= {"diverged": False, **{name: run.summary[name] for name in names}}
            of_tuning = frame[(frame["suite"] == "tuning") & (frame["metric"] == "accuracy")]
            row["forgetting"] = -float(of_tuning["change"].mean()) if run.reached else None
        shutil.rmtree(scratch, ignore_errors=True)  # weights; the readings stay
        save_json(row, place / "trial.json")
        return row

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
        folders = [self._place(row["method"], row["factor"], row["seed"]) for row in rows]
        frames = [load_frame(folder / "forgetting.parquet") for folder in folders]
        keys = ["suite", "metric", "fact", "weight"]
        return pd.concat(frames).groupby(keys, sort=False)[["before", "after", "change"]].mean().reset_index()


def compared(study: Study) -> tuple[pd.DataFrame, pd.DataFrame]:
    """All trials, and per method what was forgotten with intervals over facts (means over seeds)."""
    trials, summaries = [], []
    for method in (*study.methods, *study.once):
        factor = study.search(method) if method in study.methods else 1.0
        if method in study.methods:
            trials += [study.trial(method, one, study.seeds[0]) | {"chosen": False} for one in study.factors]
        if factor is None:
            continue
        seeds = study.seeds if method in study.methods else study.seeds[:1]
        rows = [study.trial(method, factor, seed) | {"chosen": True} for seed in seeds]
        trials += rows
        whole = [row for row in rows if not row["diverged"]]
        if whole:
            about = {name: float(pd.Series([row[name] for row in whole]).mean()) for name in ("efficacy", "steps")}
            size = whole[0]["trainable_parameters"]
            numbers = means(study.readings(whole)).assign(
                method=method, learning_rate=whole[0]["learning_rate"], seeds=len(whole), trainable_parameters=size,
                reached=sum(row["reached"] for row in whole), **about,
            )  # fmt: skip
            summaries.append(numbers)
    kept = pd.DataFrame(trials).sort_values("chosen", kind="stable")
    return kept.drop_duplicates(["method", "factor", "seed"], keep="last"), pd.concat(summaries, ignore_index=True)


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
    parser.add_argument("--max-epochs", type=int, default=40, help="a training gives up after so many")
    parser.add_argument("--out", type=Path, default=HERE / "runs" / "method_comparison", help="where trials are kept")
    parser.add_argument("--figures", type=Path, default=HERE / "figures", help="where the figure is published")
    parser.add_argument("--smoke", action="store_true", help="few methods, facts, rates and epochs")
    options = parser.parse_args(arguments)
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
    columns = ["method", "metric", "learning_rate", "seeds", "reached", "efficacy", "before", "after", "low", "high"]
    print(chosen[columns].to_string(index=False, float_format=lambda x: f"{x:.4g}"))
    return written[0]


if __name__ == "__main__":
    print(main())

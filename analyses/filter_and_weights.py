"""Do the data filter and the semantic loss weights help? Less drift and less forgetting for as much learned?

Every arm is taught invented facts with the same method until its training loss (plain cross-entropy of an epoch) is at
or below the same value. Arms: all facts; the facts that `spread`, `band` and `near_diverse` keep, by the distance of
the base model; as many drawn at random, and as many with the lowest loss, as controls; all facts with sample weights
(beta of both signs), with token weights, and with the semantic term, each also as its control, whose weights or
meanings go to the wrong facts or tokens; and full fine-tuning. Measured on the facts kept and on all: answers, drift
(d_emb, and the share pushed away by more than paraphrases differ); and forgetting: known facts, and KL on prose. The
seed moves initialisation, the order of training, the random drop, and the controls. Publishes
`figures/filter_and_weights.*`; every trial is kept, and a second start does only what is missing.

    python analyses/filter_and_weights.py            # the whole study, about an hour on two cores
    python analyses/filter_and_weights.py --smoke    # the same way on few facts, arms and epochs, for tests
"""

import argparse
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import workbench as wb
from workbench.config import TrainConfig
from workbench.facts import FactSet, general_text
from workbench.figures import forgetting_compared
from workbench.intervals import means
from workbench.models import HookedModel
from workbench.opening import open_model
from workbench.reporting import places, publish
from workbench.results import digest_of, load_frame, load_json, provenance, save_frame, save_json
from workbench.semantics import filter_inputs, measure_drift, noise_floor, semantic_distance
from workbench.training import implant

HERE = Path(__file__).resolve().parent.parent
RULES = ("spread", "band", "near_diverse", "random", "loss")
#: Arms that train on all facts: what is trained, and changes of the training settings.
WHOLE: dict[str, dict[str, Any]] = {
    "all": {},
    "sample": {"loss": "sample", "beta": 1.0},
    "sample_negative": {"loss": "sample", "beta": -1.0},
    "sample_permuted": {"loss": "sample", "beta": 1.0, "permuted": True},
    "sample_negative_permuted": {"loss": "sample", "beta": -1.0, "permuted": True},
    "token": {"loss": "token", "gamma": 1.0},
    "token_permuted": {"loss": "token", "gamma": 1.0, "permuted": True},
    "soft": {"loss": "soft", "soft_weight": 1.0},
    "soft_permuted": {"loss": "soft", "soft_weight": 1.0, "permuted": True},
    "full": {},
}
#: (suite, metric) -> what the printed table calls it.
MEASURES = {
    ("kept", "accuracy"): "kept facts answered",
    ("taught", "accuracy"): "all facts answered",
    ("taught", "d_emb"): "d_emb of all facts",
    ("taught", "pushed_away"): "all facts pushed away",
    ("retained", "accuracy"): "known facts answered",
    ("general", "kl"): "KL on prose",
}


@dataclass(frozen=True)
class Study:
    """What is compared, on which facts, and where it is kept."""

    out: Path
    model_name: str
    method: str
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    new: str
    retained: str
    all_facts: bool
    asked: int
    tokens: int
    spread_weight: float
    quota: float
    settings: TrainConfig

    @cached_property
    def model(self) -> HookedModel:
        """The base model."""
        return wb.load_model(self.model_name)

    @cached_property
    def taught(self) -> FactSet:
        """What is to be learned, before any filter."""
        return wb.load_facts(self.new)

    @cached_property
    def known(self) -> FactSet:
        """The retained facts that the model knows, among as many as are needed, drawn by seed 0."""
        facts = wb.load_facts(self.retained)
        if not self.all_facts:
            drawn = facts.at_most(5 * self.asked, seed=0)
            recall = wb.recall(self.model, drawn)
            facts = drawn.filter(ids=[str(fact) for fact in recall.index[recall["known"]]])
        if len(facts) < 2:
            raise ValueError(f"The model knows {len(facts)} of the retained facts of {self.retained}: 2 are needed.")
        return facts

    @cached_property
    def attributed(self) -> FactSet:
        """Known facts, drawn by seed 0, that choose LoKI's nodes."""
        return self.known.apart(30, seed=0)[0]

    @cached_property
    def held_out(self) -> FactSet:
        """Others, drawn by seed 0, on which forgetting is read."""
        return self.known.apart(30, seed=0)[1].at_most(self.asked, seed=0)

    @cached_property
    def distance(self) -> pd.DataFrame:
        """How far the base model is from every fact that is taught."""
        return semantic_distance(self.model, self.taught, metrics=("d_soft",))

    @cached_property
    def selection(self) -> wb.Selection:
        """The nodes that LoKI trains: those that matter least to known facts, attributed once."""
        scores = wb.attribute(self.model, self.attributed, out=self.out / "scores.zarr")
        return wb.select(scores, strategy="layer_balanced", score="magnitude", quota=self.quota)

    def adapter(self, method: str) -> Any:
        """A fresh configuration of a method."""
        options: dict[str, Any] = {"selection": self.selection} if method == "loki" else {}
        return wb.adapter_config(method, model_config=self.model.config, **options)

    @cached_property
    def floor(self) -> float:
        """How much d_emb differs between wordings of a fact: below that nothing counts as pushed away."""
        return float(noise_floor(self.model, self.taught, metrics=("d_emb",))["floor"].iloc[0])

    def facts_of(self, arm: str, seed: int) -> FactSet:
        """What an arm is taught."""
        rule, _, share = arm.partition("-")
        if arm in WHOLE:
            return self.taught
        options: dict[str, Any] = {"keep": float(share), "seed": seed}
        if rule == "spread":
            options["weight"] = self.spread_weight
        distance, needed = filter_inputs(self.model, self.taught, rule, known=self.distance)
        return wb.filter_facts(distance, rule=rule, **needed, **options)

    def trial(self, arm: str, seed: int) -> dict[str, Any]:
        """One training: a row, with what every fact became beside it."""
        place = self.out / "trials" / f"{arm}-seed{seed}"
        settings = self.settings.model_copy(update={"seed": seed, **WHOLE.get(arm, {})})
        key = self._key(settings)
        if (place / "trial.json").is_file():
            kept = load_json(place / "trial.json")
            if kept.get("key") != key:
                raise ValueError(f"{place} holds a trial with other facts or settings: give another folder as --out.")
            return kept
        facts = self.facts_of(arm, seed)
        adapter = self.adapter("full" if arm == "full" else self.method)
        scratch = place / "training"
        run = implant(self.model, facts, adapter, settings, out=scratch)
        after = open_model(run.adapter, base=self.model)
        suites: dict[str, Any] = {"taught": self.taught, "retained": self.held_out, "general": general_text()}
        frame = wb.measure_forgetting(self.model, after, suites, max_tokens=self.tokens)
        drift = measure_drift(self.model, after, self.taught, metrics=("d_emb", "d_soft"))
        save_frame(frame, place / "forgetting.parquet")
        save_frame(drift, place / "drift.parquet")
        history = run.history.assign(nll=run.history.get("nll", run.history["loss"]))
        last = history[history["epoch"] > history["epoch"].iloc[-1] - 1]
        names = ("reached", "efficacy", "steps", "epochs", "seconds", "trainable_parameters", "learning_rate")
        row = {"arm": arm, "seed": seed, "key": key, "kept": list(facts.ids), "nll": float(last["nll"].mean())}
        row |= {name: run.summary[name] for name in names}
        row |= {name: value for name, value in run.summary.items() if name.startswith("weight_m")}
        shutil.rmtree(scratch, ignore_errors=True)  # weights; the readings stay
        save_json(row, place / "trial.json")
        return row

    def _key(self, settings: TrainConfig) -> str:
        """What a trial depends on, so that one with other settings is not taken for it."""
        facts = [self.taught.digest, self.attributed.digest, self.held_out.digest]
        how = [self.method, self.quota, self.spread_weight, self.tokens]
        return digest_of([self.model.digest, facts, settings.model_dump(), how])

    def readings(self, arm: str, seed: int) -> pd.DataFrame:
        """What became of every fact and piece of text in one trial, answers and drift also on the kept facts alone."""
        place = self.out / "trials" / f"{arm}-seed{seed}"
        kept = load_json(place / "trial.json")["kept"]
        drift = load_frame(place / "drift.parquet").assign(suite="taught", weight=1.0)
        away = drift[drift["metric"] == "d_emb"].assign(metric="pushed_away", before=0.0)
        away["after"] = (away["change"] > self.floor).astype(float)
        columns = ["suite", "metric", "fact", "weight", "before", "after"]
        frames = (load_frame(place / "forgetting.parquet"), drift, away)
        both = pd.concat([one[columns] for one in frames], ignore_index=True)
        own = both[(both["suite"] == "taught") & both["fact"].isin(kept)].assign(suite="kept")
        return pd.concat([both, own], ignore_index=True).assign(method=arm, seed=seed)


def summary(readings: pd.DataFrame) -> pd.DataFrame:
    """Per arm, suite and metric: means over seeds with paired intervals over facts, and the range over seeds."""
    keys = ["method", "suite", "metric", "fact", "weight"]
    over = readings.groupby(keys, sort=False)[["before", "after"]].mean().reset_index()
    frame = means(over)
    each = pd.concat([means(rows).assign(seed=seed) for seed, rows in readings.groupby("seed")])
    spans = each.groupby(["method", "suite", "metric"], sort=False)["after"].agg(seed_low="min", seed_high="max")
    return frame.merge(spans.reset_index(), on=["method", "suite", "metric"], how="left")


def against_all(readings: pd.DataFrame) -> pd.DataFrame:
    """Every arm minus the arm `all` on the same facts and seeds: `difference` with its paired interval over facts."""
    keys = ["suite", "metric", "fact", "weight"]
    mean = readings.groupby(["method", *keys], sort=False)["after"].mean().reset_index()
    everything = mean[(mean["method"] == "all") & (mean["suite"] != "kept")].drop(columns="method")
    on_kept = everything[everything["suite"] == "taught"].assign(suite="kept")  # by each arm's own kept facts
    other = pd.concat([everything, on_kept], ignore_index=True).rename(columns={"after": "before"})
    pairs = mean.merge(other, on=keys)
    found = means(pairs)
    names = {"change": "difference", "low": "difference_low", "high": "difference_high"}
    return found.rename(columns=names)[["method", "suite", "metric", *names.values()]]


def compared(study: Study) -> tuple[pd.DataFrame, pd.DataFrame]:
    """All trials, and the tidy frame of what they show."""
    trials = [study.trial(arm, seed) for seed in study.seeds for arm in study.arms]
    readings = pd.concat([study.readings(arm, seed) for seed in study.seeds for arm in study.arms], ignore_index=True)
    frame = summary(readings).merge(against_all(readings), on=["method", "suite", "metric"], how="left")
    about = pd.DataFrame(trials).drop(columns=["kept", "key"])
    numbers = about.groupby("arm", sort=False)[["nll", "efficacy", "epochs", "steps"]].mean().reset_index()
    numbers["reached"] = numbers["arm"].map(about.groupby("arm")["reached"].sum())  # of the seeds
    return about, frame.merge(numbers.rename(columns={"arm": "method"}), on="method")


def table(frame: pd.DataFrame) -> pd.DataFrame:
    """The numbers that answer the question: a row per measure and arm, beside the difference to training on all."""
    rows = frame.set_index(["suite", "metric"])
    columns = [
        "after",
        "seed_low",
        "seed_high",
        "difference",
        "difference_low",
        "difference_high",
        "epochs",
        "nll",
        "reached",
    ]
    parts = [rows.loc[[key], ["method", *columns]].assign(measure=name) for key, name in MEASURES.items()]
    return pd.concat(parts)[["measure", "method", *columns]]


def study_of(options: argparse.Namespace) -> Study:
    """The full study, or a small one for tests."""
    smoke = options.smoke
    shares, filters = (options.keep, RULES) if not smoke else ([0.5], ("near_diverse", "random"))
    whole = tuple(WHOLE) if not smoke else ("all", "sample_permuted", "full")
    arms = (*whole[:1], *(f"{rule}-{share:g}" for share in shares for rule in filters), *whole[1:])
    if unknown := sorted(set(options.arms or ()) - set(arms)):
        raise ValueError(f"There is no arm {unknown[0]!r} here; known are {', '.join(arms)}.")
    settings = TrainConfig(
        max_epochs=1 if smoke else options.max_epochs, target_loss=options.target_loss,
        learning_rate=options.learning_rate, batch_size=options.batch_size,
    )  # fmt: skip
    return Study(
        out=options.out, model_name=options.model, method=options.method,
        arms=tuple(arm for arm in arms if arm == "all" or options.arms is None or arm in options.arms),
        seeds=tuple(options.seeds[:2] if smoke else options.seeds), new="fictional:4" if smoke else options.new,
        retained=options.retained, all_facts=options.all_facts, asked=4 if smoke else options.asked,
        tokens=64 if smoke else options.tokens, spread_weight=options.spread_weight,
        quota=options.quota, settings=settings,
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> Path:
    """Run the study, publish its figure and table, and give the path of the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="loki", choices=("loki", "lora"), help="how facts are taught")
    parser.add_argument("--quota", type=float, default=10.0, help="loki: nodes that are trained, in percent")
    parser.add_argument("--arms", nargs="+", help="only these, as all spread-0.7 sample; every one when not given")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.7], help="shares of the facts that filters keep")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--model", default="smollm2-135m", help="default's name, folder, .gguf file or hub id")
    parser.add_argument("--new", default="fictional:120", help="facts that are taught")
    parser.add_argument("--retained", default="world", help="facts of which those that the model knows are to stay")
    parser.add_argument("--all-facts", action="store_true", help="take retained facts that the model does not know too")
    parser.add_argument("--asked", type=int, default=80, help="known facts on which forgetting is read")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of plain prose")
    parser.add_argument("--target-loss", type=float, default=0.5, help="training ends at this loss; 0: by epochs alone")
    parser.add_argument("--max-epochs", type=int, default=8, help="a training gives up after so many")
    parser.add_argument("--batch-size", type=int, default=6, help="facts per step: small, so that few epochs suffice")
    parser.add_argument("--learning-rate", type=float, help="of every arm; the method's own default when not given")
    parser.add_argument("--spread-weight", type=float, default=4.0, help="of the variance in the rule spread")
    parser.add_argument("--out", type=Path, help="where trials are kept; in runs when not given")
    parser.add_argument("--figures", type=Path, help="where the figure is published")
    parser.add_argument("--name", default="filter_and_weights", help="of the figure: another one for some arms alone")
    parser.add_argument("--smoke", action="store_true", help="few facts and arms, one epoch, two seeds")
    options = parser.parse_args(arguments)
    options.out, options.figures = places(HERE, "filter_and_weights", options.out, options.figures, options.smoke)
    options.out.mkdir(parents=True, exist_ok=True)
    study = study_of(options)
    trials, frame = compared(study)
    save_frame(trials, study.out / "trials.parquet")
    about = {
        **provenance(), "model": study.model_name, "method": study.method, "new": study.new, "seeds": list(study.seeds),
        "arms": list(study.arms), "spread_weight": study.spread_weight, "quota": study.quota,
        "settings": study.settings.model_dump(), "smoke": options.smoke,
        "trials": trials.replace({np.nan: None}).to_dict(orient="records"),
    }  # fmt: skip
    drawn = frame[(frame["metric"] == "accuracy") & frame["suite"].isin(["taught", "kept", "retained"])]
    written = publish(forgetting_compared(drawn), frame, options.name, options.figures, about)
    print(table(frame).to_string(index=False, float_format=lambda x: f"{x:.3g}"))
    return written[0]


if __name__ == "__main__":
    print(main())

"""Does interference measured before training predict the harm that learning one fact does to another?

For one set of facts (invented ones, and with --lre known ones from files in the LRE format): attribution, interference
by every measure there is, the harm of learning each fact alone, what learning them together does, the table and the
verdict of the prediction, and the layers to train. Publishes `figures/interference_study.*` (the prediction),
`figures/interference_study_measures.*` (every measure per layer, with intervals and nulls),
`figures/interference_study_conflicts.*` (how many gradients conflict), `figures/interference_study_behaviour.*` (what
learning together does to each layer) and `figures/interference_study_layers.*` (the advice); a second start does only
what is missing.

    python analyses/interference_study.py --lre FOLDER    # the full study
    python analyses/interference_study.py --smoke         # the same way on few facts and steps, for tests
"""

import argparse
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

import workbench as wb
from workbench.figures import (
    advice_by_layer,
    behaviour_by_layer,
    conflicts_by_layer,
    interference_by_layer,
    prediction,
)
from workbench.interfere import METRICS, conflict_rates, within_across
from workbench.intervals import standard_ranks
from workbench.learning import averages, by_layer, verdict
from workbench.models import HookedModel
from workbench.reporting import places, publish
from workbench.results import load_frame, open_result, provenance, save_frame, save_result
from workbench.results.labelled import kind_of

HERE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Study:
    """What is asked, and the folder that keeps what is done."""

    asked: argparse.Namespace

    @cached_property
    def model(self) -> HookedModel:
        """The model, opened when something is missing."""
        return wb.load_model(self.asked.model)

    @cached_property
    def taught(self) -> wb.FactSet:
        """The facts that are new to the model."""
        return wb.load_facts(self.asked.facts)

    @cached_property
    def retained(self) -> wb.FactSet | None:
        """The facts of the LRE files that the model knows, so many drawn by seed; None without a folder."""
        if self.asked.lre is None:
            return None
        facts = wb.load_facts(self.asked.lre, format="lre")
        known = wb.recall(self.model, facts, progress=True).query("known").index
        if not len(known):
            raise ValueError(f"{self.model.name} knows none of the facts in {self.asked.lre}.")
        return facts.filter(ids=known).at_most(self.asked.max_lre, self.asked.seed)

    @cached_property
    def facts(self) -> wb.FactSet:
        """All of them."""
        return wb.FactSet("study", (*self.taught, *(self.retained or ())))

    @cached_property
    def attribution(self) -> xr.Dataset:
        """Scores of all facts."""
        out = self.asked.out / "attribution.zarr"
        return wb.attribute(self.model, self.facts, unit=self.asked.unit, steps=self.asked.ig_steps, out=out)

    @cached_property
    def interference(self) -> xr.Dataset:
        """Every measure, each kept as soon as it is done."""
        parts = [self.measured(metric) for metric in self.asked.metrics]
        return xr.concat(parts, dim="metric", data_vars="minimal", coords="minimal", compat="override", join="exact")

    def measured(self, metric: str) -> xr.Dataset:
        """One measure, read where it is stored already."""
        folder = self.asked.out / f"interference_{metric}.zarr"
        options: dict[str, Any] = {"permutations": self.asked.permutations, "seed": self.asked.seed}
        if kind_of(folder) is not None:
            stored = open_result(folder)
            now = {"fact_digest": self.facts.digest, "model_digest": self.model.digest, **options}
            if all(stored.attrs.get(name) == value for name, value in now.items()):
                return stored
        found = wb.interference(self.model, self.facts, self.attribution, metrics=[metric], **options)
        save_result(found, folder, kind="interference")
        return found

    def first_order(self) -> pd.DataFrame:
        """How well suppression to first order tells the whole drop, over ordered pairs of different facts, per layer.

        Rank correlation, correlation, mean |drop| (nats) and mean distance between the two (nats); empty without both.
        """
        names = ("suppression", "linear_suppression")
        both = [self.measured(name)["value"][0] for name in names] if {*names} <= {*self.asked.metrics} else []
        apart, rows = ~np.eye(len(self.facts), dtype=bool), []
        for layer in both[0]["layer"].values if both else ():
            exact, linear = (value.sel(layer=layer).values[apart].astype(np.float64) for value in both)
            rho, r = float(standard_ranks(exact) @ standard_ranks(linear)), np.corrcoef(exact, linear)[0, 1]
            rows.append((int(layer), rho, float(r), float(np.abs(exact).mean()), float(np.abs(exact - linear).mean())))
        return pd.DataFrame(rows, columns=["layer", "rho", "r", "mean_drop", "mean_gap"])

    @cached_property
    def harm(self) -> xr.Dataset:
        """What learning each fact alone does to all."""
        return wb.harm(self.model, self.facts, steps=self.asked.steps, out=self.asked.out / "harm.zarr")

    def behaviour(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The new facts, alone against together."""
        files = [self.asked.out / f"behaviour_{name}.parquet" for name in ("facts", "layers")]
        options = {name: getattr(self.asked, name) for name in ("steps", "permutations", "seed")}
        made = {**options, "fact_digest": self.taught.digest, "model_digest": self.model.digest}
        there = [load_frame(file).attrs if file.exists() else {} for file in files]
        if any({name: found.get(name) for name in made} != made for found in there):
            for frame, file in zip(wb.behaviour(self.model, self.taught, **options), files, strict=True):
                save_frame(frame, file)
        one, two = (load_frame(file) for file in files)
        return one, two

    def advice(self) -> pd.DataFrame:
        """The layers to train: among known facts where there are some, with the new facts beside them."""
        if self.retained is None:
            shared = [metric for metric in self.asked.metrics if not METRICS[metric].signed] or self.asked.metrics
            overlaps = self.interference.sel(metric=shared)
            return wb.layer_advice(overlaps, quota=self.asked.quota, seed=self.asked.seed)
        known, new = (self.attribution.sel(fact=list(facts.ids)) for facts in (self.retained, self.taught))
        among = wb.interference(self.model, self.retained, known, permutations=self.asked.permutations)
        return wb.layer_advice(among, new=new, quota=self.asked.quota, seed=self.asked.seed)


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options, smaller ones with `--smoke`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="default's name, folder, .gguf file or hub id")
    parser.add_argument("--facts", default="fictional:30", help="facts that are new to the model")
    parser.add_argument("--lre", help="folder with files in the LRE format: of its facts those that the model knows")
    parser.add_argument("--max-lre", type=int, default=30, help="at most so many known facts")
    parser.add_argument("--metrics", nargs="+", choices=list(METRICS), default=list(METRICS))
    parser.add_argument("--unit", choices=["node", "neuron"], default="node")
    parser.add_argument("--steps", type=int, default=5, help="gradient steps on every fact")
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--permutations", type=int, default=999)
    parser.add_argument("--quota", type=float, default=10.0, help="units that are trained, in percent")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder of results; in runs when not given")
    parser.add_argument("--figures", type=Path, help="where figures are published")
    parser.add_argument("--smoke", action="store_true", help="one gradient step, one step of attribution, few draws")
    options = parser.parse_args(arguments)
    options.out, options.figures = places(HERE, "interference_study", options.out, options.figures, options.smoke)
    options.ig_steps = 1 if options.smoke else None
    if options.smoke:
        options.steps, options.splits, options.permutations = 1, 1, 9
    return options


def main(arguments: list[str] | None = None) -> Path:
    """Run the study, publish its figures, and give the path of the first."""
    asked = parsed(arguments)
    study = Study(asked)
    frame = wb.predicts(
        study.interference, study.harm, splits=asked.splits, permutations=asked.permutations, seed=asked.seed
    )
    each = by_layer(study.interference, study.harm, permutations=asked.permutations, seed=asked.seed)
    save_frame(each, asked.out / "by_layer.parquet")
    per_fact, per_layer = study.behaviour()
    advice = study.advice()
    settings = {name: value for name, value in vars(asked).items() if name not in ("out", "figures", "lre")}
    settings |= {name: Path(settings[name]).name for name in ("model", "facts")}  # no folders of this machine
    first_order = study.first_order()
    tables = [frame.drop(columns=["n_facts", "splits", "seed"]), averages(per_fact), per_layer, advice, first_order]
    about = {
        **provenance(),
        "settings": settings,
        "n_facts": len(study.facts),
        "n_known": len(study.retained or ()),
        "learning_rate": study.harm.attrs["rate_used"],
        "verdict": verdict(frame),
        "behaviour": averages(per_fact).to_dict("records"),
        "first_order": first_order.to_dict("records"),
    }
    written = publish(prediction(frame), frame, "interference_study", asked.figures, about)
    publish(advice_by_layer(advice), advice, "interference_study_layers", asked.figures, about)
    publish(behaviour_by_layer(per_layer), per_layer, "interference_study_behaviour", asked.figures, about)
    measured = within_across(study.interference)
    publish(interference_by_layer(measured), measured, "interference_study_measures", asked.figures, about)
    if "gradient" in asked.metrics:
        rates = conflict_rates(study.measured("gradient"))
        publish(conflicts_by_layer(rates), rates, "interference_study_conflicts", asked.figures, about)
        tables.append(rates)
    for table in tables:
        print(table.to_string(index=False, float_format=lambda x: f"{x:.3g}"))
    print(verdict(frame))
    return written[0]


if __name__ == "__main__":
    print(main())

"""Which attribution method, with how many steps? Compares methods by completeness, agreement and speed.

One cell per model, unit kind, method, number of steps and relation, each a stored result in a folder of its own. Facts
are those that the model knows, so many of each relation, drawn by seed. Scores are compared fact by fact with those of
a reference: the exact ablation of every unit where it is among the methods, else `ig` with the most steps. Publishes
`figures/attribution_sweep.*` (completeness gap by steps) and `figures/attribution_sweep_agreement.*`; a second start
does only what is missing, and does not open a model of which nothing is.

    python analyses/attribution_sweep.py            # the full sweep, over night
    python analyses/attribution_sweep.py --smoke    # the same way on few facts, methods and steps, for tests
"""

import argparse
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

import workbench as wb
from workbench.attribution import FIXED, checked_settings
from workbench.figures import agreement_map, gap_by_steps
from workbench.reporting import places, publish
from workbench.results import digest_of, load_json, open_result, provenance, save_json

HERE = Path(__file__).resolve().parent.parent
ADAPTIVE = 0
#: Methods whose scores are not shares of an effect, so that they have no gap to it.
NO_GAP = ("activation", "random", "loki-paper")
TOP = 0.01  # share of a layer's units whose overlap is taken


@dataclass(frozen=True)
class Sweep:
    """What is compared, on which facts, and where it is kept."""

    out: Path
    models: tuple[str, ...]
    units: tuple[str, ...]
    methods: tuple[str, ...]
    steps: tuple[int, ...]
    relations: tuple[str, ...]
    facts: str
    per_relation: int
    all_facts: bool
    seed: int


@dataclass(frozen=True)
class Cell:
    """One attribution; `steps` is 0 where their number adapts, and 1 where a method has no path."""

    unit: str
    method: str
    steps: int
    relation: str

    @property
    def asked(self) -> int | None:
        """The steps to ask for: None where they adapt or the method fixes them."""
        return self.steps or None if FIXED[self.method]["steps"] is None else None

    @property
    def place(self) -> str:
        """Where it lies in the folder of its model."""
        return f"{self.unit}/{self.method}-{self.steps or 'adaptive'}/{name_of(self.relation)}"


class Subject:
    """One model of the sweep: its facts and its folder; opened when it is first needed."""

    def __init__(self, sweep: Sweep, name: str) -> None:
        self.sweep, self.name = sweep, name
        self.folder = sweep.out / "-".join([name_of(name), *changing(name)])

    @cached_property
    def model(self) -> wb.HookedModel:
        """The open model."""
        return wb.load_model(self.name)

    @cached_property
    def facts(self) -> dict[str, wb.FactSet]:
        """The facts of every relation: those it knows, drawn by seed; kept in the folder."""
        sweep = self.sweep
        asked = [sweep.facts, *changing(sweep.facts), list(sweep.relations)]
        key = digest_of([asked, sweep.per_relation, sweep.all_facts, sweep.seed])[:12]
        kept = self.folder / f"facts-{key}.jsonl"
        if not kept.is_file():
            chosen = wb.load_facts(sweep.facts)
            chosen = chosen.filter(relations=sweep.relations) if sweep.relations else chosen
            if not sweep.all_facts:
                known = wb.recall(self.model, chosen).query("known").index
                if known.empty:
                    raise ValueError(f"{self.name} knows none of the {len(chosen)} facts; give others, or --all-facts.")
                chosen = chosen.filter(ids=known)
            groups = (chosen.filter(relations=[relation]) for relation in chosen.relations)
            drawn = [group.sample(min(sweep.per_relation, len(group)), seed=sweep.seed) for group in groups]
            chosen.filter(ids=[fact for group in drawn for fact in group.ids]).save(kept)
        facts = wb.load_facts(kept)
        return {relation: facts.filter(relations=[relation]) for relation in facts.relations}

    def result(self, cell: Cell) -> tuple[xr.Dataset, float]:
        """Scores of one cell and seconds a fact (NaN where none was timed); what is missing or damaged is computed."""
        facts = self.facts[cell.relation]
        place = self.folder / f"{cell.place}-{facts.digest[:12]}"
        about, scores = place.with_name(f"{place.name}.json"), place.with_name(f"{place.name}.zarr")
        found = readable(scores)
        if found is None or not about.is_file():
            begun = readable(scores, partial=True)
            left = len(facts) - (0 if begun is None else begun.sizes["fact"])
            _ = self.model.digest  # opened before the clock starts
            started = time.perf_counter()
            wb.attribute(self.model, facts, method=cell.method, unit=cell.unit, steps=cell.asked, out=scores)
            spent = (time.perf_counter() - started) / left if left else None
            if not about.is_file():
                save_json({"model": self.model.name, "dtype": str(self.model.dtype), "seconds_per_fact": spent}, about)
            found = open_result(scores)
        seconds = load_json(about)["seconds_per_fact"]
        return found, float("nan") if seconds is None else seconds


def readable(place: Path, partial: bool = False) -> xr.Dataset | None:
    """A stored result in memory; None where it is missing or damaged, or unfinished (unless `partial`)."""
    try:
        return open_result(place, partial=partial).load()
    except (FileNotFoundError, ValueError):
        return None


def changing(name: str) -> list[str]:
    """What tells a file or folder from an earlier one of its name, by sizes and times; nothing for other names."""
    place = Path(name)
    if not place.exists():
        return []
    files = sorted(place.rglob("*")) if place.is_dir() else [place]
    return [digest_of([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files])[:8]]


def shown(model: str) -> str:
    """A model as it is named in the frame: a folder by its last part."""
    return Path(model).name if Path(model).exists() else model


def name_of(text: str) -> str:
    """A text as a file name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-")


def cells(sweep: Sweep, relation: str, unit: str) -> Iterator[Cell]:
    """Every cell of a relation and unit kind that its method's definition allows."""
    for method in sweep.methods:
        fixed = FIXED[method]
        if fixed.get("unit", unit) != unit:
            continue
        for steps in sweep.steps if fixed["steps"] is None else (fixed["steps"],):
            yield Cell(unit, method, steps, relation)


def check(sweep: Sweep) -> None:
    """Refuse what no cell can be made of, before a model is opened."""
    if sweep.per_relation < 1:
        raise ValueError(f"--per-relation must be at least 1, not {sweep.per_relation}.")
    asked = [cell for unit in sweep.units for cell in cells(sweep, "", unit)]
    if not asked:
        raise ValueError(f"{', '.join(sweep.methods)} is not defined for {' and '.join(sweep.units)}s: give --units.")
    for cell in asked:
        checked_settings(cell.method, cell.unit, cell.asked)


def reference_of(found: list[Cell]) -> Cell:
    """The cell that the others are compared with: exact ablation, or `ig` with the most steps."""
    exact = [cell for cell in found if cell.method == "ablation"]
    return exact[0] if exact else max(found, key=lambda cell: (cell.method == "ig", cell.steps))


def sweep_all(sweep: Sweep) -> pd.DataFrame:
    """All cells, resumable, as one tidy frame: a row per cell and layer, and one over all layers (layer missing)."""
    check(sweep)
    frames = []
    for name in sweep.models:
        subject = Subject(sweep, name)
        for relation in subject.facts:
            for unit in sweep.units:
                todo = list(cells(sweep, relation, unit))
                if not todo:
                    continue  # of methods that are defined for the other unit kind
                reference = reference_of(todo)
                scores, _ = subject.result(reference)
                frames += [
                    summary(*subject.result(cell), scores).assign(
                        model=shown(name), unit=unit, method=cell.method, steps=cell.steps, relation=relation,
                        reference=label(reference.method, reference.steps),
                    )
                    for cell in todo
                ]  # fmt: skip
    frame = pd.concat(frames, ignore_index=True)
    first = ["model", "unit", "method", "steps", "relation", "layer"]
    return frame[[*first, *(column for column in frame if column not in first)]]


def summary(ds: xr.Dataset, seconds: float, reference: xr.Dataset) -> pd.DataFrame:
    """Per layer: mean |score|, relative gap, agreement with the reference; means over facts."""
    score, exact = ds["score"].values, reference["score"].values
    effect = np.abs(score.sum(-1) + ds["gap"].values)
    share = np.abs(ds["gap"].values) / np.maximum(effect, 0.2 * effect.max(1, keepdims=True))
    rows = [
        {
            "layer": layer,
            "mean_abs": np.abs(score[:, part]).mean(),
            "gap": np.nan if ds.attrs["method"] in NO_GAP else share[:, part].mean(),
            "spearman": np.mean([spearman(a, b) for a, b in zip(score[:, part], exact[:, part], strict=True)]),
            "overlap": np.mean([overlap(a, b) for a, b in zip(score[:, part], exact[:, part], strict=True)]),
        }
        for layer, part in [*((layer, slice(layer, layer + 1)) for layer in range(score.shape[1])), (None, slice(None))]
    ]
    frame = pd.DataFrame(rows).astype({"layer": "Int64"})
    return frame.assign(facts=len(score), seconds_per_fact=seconds)


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """Rank correlation of two arrays; ties share their mean rank; NaN where one is constant."""
    ranks = [pd.Series(values.ravel()).rank().to_numpy() for values in (one, other)]
    if any(rank.std() == 0 for rank in ranks):
        return float("nan")
    return float(np.corrcoef(*ranks)[0, 1])


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Share of the units with the largest |score| (1%, one at least) that two arrays have in common."""
    count = max(1, int(TOP * one.size))
    tops = [set(np.argsort(-np.abs(values.ravel()), kind="stable")[:count].tolist()) for values in (one, other)]
    return len(tops[0] & tops[1]) / count


def label(method: str, steps: int) -> str:
    """How a method and its steps are written in figures."""
    if FIXED[method]["steps"] is not None:
        return method
    return f"{method}, {'adaptive' if steps == ADAPTIVE else '1 step' if steps == 1 else f'{steps} steps'}"


def gaps(frame: pd.DataFrame) -> pd.DataFrame:
    """What `gap_by_steps` draws: means over relations, with their range, for every model, unit kind and method."""
    whole = frame[frame["layer"].isna() & frame["gap"].notna()]
    names = series(whole, whole["method"])
    grouped = whole.assign(series=names).groupby(["series", "steps"], sort=False)["gap"]
    return grouped.agg(gap="mean", low="min", high="max").reset_index()


def agreements(frame: pd.DataFrame) -> pd.DataFrame:
    """What `agreement_map` draws: mean rank correlation over relations, by layer."""
    rows = frame[frame["layer"].notna()]
    labels = pd.Series([label(*pair) for pair in zip(rows["method"], rows["steps"], strict=True)], index=rows.index)
    grouped = rows.assign(series=series(rows, labels)).groupby(["series", "layer"], sort=False)["spearman"]
    return grouped.mean().rename("agreement").reset_index()


def series(rows: pd.DataFrame, labels: pd.Series) -> pd.Series:
    """Names of the lines of a figure: with the model and the unit kind where there are several."""
    for column in ("unit", "model"):
        if rows[column].nunique() > 1:
            labels = labels + ", " + rows[column]
    return labels


def main(arguments: list[str] | None = None) -> Path:
    """Run the sweep, publish its figures, and give the path of the first."""
    sweep, figures, smoke = parsed(arguments)
    frame = sweep_all(sweep)
    about: dict[str, Any] = {**provenance(), "smoke": smoke}
    about |= {name: getattr(sweep, name) for name in ("units", "methods", "steps", "facts", "per_relation", "seed")}
    about |= {"models": [shown(name) for name in sweep.models], "facts": shown(sweep.facts)}
    written = publish(gap_by_steps(gaps(frame)), frame, "attribution_sweep", figures, about)
    reference = " or ".join(frame["reference"].unique())
    publish(agreement_map(agreements(frame), reference), frame, "attribution_sweep_agreement", figures, about)
    whole = frame[frame["layer"].isna()].groupby(["model", "unit", "method", "steps"], sort=False)
    table = whole[["mean_abs", "gap", "spearman", "overlap", "seconds_per_fact"]].mean().reset_index()
    print(table.to_string(index=False, float_format=lambda x: f"{x:.3g}"))
    return written[0]


def parsed(arguments: list[str] | None) -> tuple[Sweep, Path, bool]:
    """The sweep that was asked for, the folder of its figures, and whether it is the short one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2-135m"], help="default's name, folders, hub ids")
    parser.add_argument("--units", nargs="+", default=["node", "neuron"], choices=["node", "neuron"])
    parser.add_argument("--methods", nargs="+", default=list(FIXED), choices=list(FIXED))
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 1, 2, 4, 8, 16, 32], help="0: as many as needed")
    parser.add_argument("--facts", default="world", help="world, or a file or folder of facts")
    parser.add_argument("--relations", nargs="+", default=[], help="all that the facts have, unless given")
    parser.add_argument("--per-relation", type=int, default=8, help="facts of each relation")
    parser.add_argument("--all-facts", action="store_true", help="also facts that a model does not know")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of facts")
    parser.add_argument("--out", type=Path, help="folder of the cells; in runs when not given")
    parser.add_argument("--figures", type=Path, help="where the figures are published")
    parser.add_argument("--smoke", action="store_true", help="two relations, two facts each, three methods, few steps")
    given = vars(parser.parse_args(arguments))
    smoke = given.pop("smoke")
    given["out"], figures = places(HERE, "attribution_sweep", given["out"], given.pop("figures"), smoke)
    if smoke:
        relations = given["relations"] or list(wb.load_facts(given["facts"]).relations[:2])
        given |= {"methods": ["ig", "grad_x_act", "random"], "steps": [0, 1, 4], "per_relation": 2}
        given |= {"relations": relations, "units": ["node"]}
    lists = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    return Sweep(**given | lists), figures, smoke


if __name__ == "__main__":
    print(main())

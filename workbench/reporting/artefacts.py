"""Read what a run folder holds; whatever a run has not made yet is simply absent."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import xarray as xr

from workbench.facts import FactSet, load_facts
from workbench.results import load_frame, load_json, open_result
from workbench.selection import COLLISIONS, Selection

NO_FACTS = FactSet("none", ())
RETAINED = "facts/retained.jsonl"


@dataclass(frozen=True)
class Artefacts:
    """The results of one run; empty where a stage has not run."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    recall: pd.DataFrame = field(default_factory=pd.DataFrame)
    recall_new: pd.DataFrame = field(default_factory=pd.DataFrame)
    facts: FactSet = NO_FACTS
    attribution: xr.Dataset = field(default_factory=xr.Dataset)
    interference: xr.Dataset = field(default_factory=xr.Dataset)
    advice: pd.DataFrame = field(default_factory=pd.DataFrame)
    prediction: pd.DataFrame = field(default_factory=pd.DataFrame)
    predicted: dict[str, Any] = field(default_factory=dict)
    selections: dict[str, Selection] = field(default_factory=dict)
    history: pd.DataFrame = field(default_factory=pd.DataFrame)
    training: dict[str, dict[str, Any]] = field(default_factory=dict)
    drift: pd.DataFrame = field(default_factory=pd.DataFrame)
    forgetting: pd.DataFrame = field(default_factory=pd.DataFrame)


STAGES = ("recall", "recall_new", "attribution", "interference", "advice", "prediction", "selections", "history",
          "drift", "forgetting")  # fmt: skip


def has(artefact: pd.DataFrame | xr.Dataset | FactSet | dict[str, Any]) -> bool:
    """Say whether an artefact is there and holds anything.

    >>> has(pd.DataFrame({"a": [1]})), has(xr.Dataset()), has({})
    (True, False, False)
    """
    if isinstance(artefact, xr.Dataset):
        return bool(artefact.data_vars) and 0 not in artefact.sizes.values()
    return len(artefact) > 0


def read_artefacts(folder: str | Path) -> Artefacts:
    """Read a run folder; an unreadable artefact is named in one sentence (`ValueError`)."""
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"There is no run folder {path}: start a run first, or name the folder of one.")
    config = _json(path / "config.json")
    methods = _methods(path, config)
    histories = [
        load_frame(path / "implant" / m / "history.parquet").assign(method=m)
        for m in methods
        if _has(path, m, "history.parquet")
    ]
    trainings = {
        m: load_json(path / "implant" / m / "training.json") for m in methods if _has(path, m, "training.json")
    }
    among = config.get("interference", {})
    asked = among.get("harm", True)  # else an earlier run left it, and so with advice, drift and forgetting
    advised = {*COLLISIONS} & {*among.get("metrics", COLLISIONS)}
    found = Artefacts(
        folder=path,
        config=config,
        provenance=_json(path / "provenance.json"),
        recall=_frame(path / "recall.parquet"),
        recall_new=_frame(path / "recall_new.parquet"),
        facts=load_facts(path / RETAINED) if (path / RETAINED).is_file() else NO_FACTS,
        attribution=_dataset(path / "attribution.zarr"),
        interference=_dataset(path / "interference.zarr"),
        advice=_frame(path / "advice.parquet") if advised else pd.DataFrame(),
        prediction=_frame(path / "prediction.parquet") if asked else pd.DataFrame(),
        predicted=_json(path / "prediction.json") if asked else {},
        selections={m: Selection.load(path / "selection" / f"{m}.json") for m in _methods(path, config, "selection")},
        history=pd.concat(histories, ignore_index=True) if histories else pd.DataFrame(),
        training=trainings,
        drift=_of_methods(path / "drift.parquet", config),
        forgetting=_of_methods(path / "forgetting.parquet", config),
    )
    if not any(has(getattr(found, name)) for name in STAGES):
        raise FileNotFoundError(f"The folder {path} holds no results of a run: start a run in it first.")
    return found


def _methods(path: Path, config: dict[str, Any], kind: str = "implant") -> list[str]:
    """The methods of a run, the usual ones first; what an earlier run with other methods left is not among them."""
    names = {p.stem if kind == "selection" else p.name for p in (path / kind).glob("*") if not p.name.startswith(".")}
    names &= set(config.get("methods", names))
    usual = ("loki", "loki_random", "lora")
    return [*(name for name in usual if name in names), *sorted(names.difference(usual))]


def _has(path: Path, method: str, name: str) -> bool:
    return (path / "implant" / method / name).is_file()


def _json(path: Path) -> dict[str, Any]:
    found = load_json(path) if path.is_file() else {}
    if not isinstance(found, dict):
        raise ValueError(f"{path} does not hold a JSON object: delete it and start the run again.")
    return found


def _frame(path: Path) -> pd.DataFrame:
    return load_frame(path) if path.is_file() else pd.DataFrame()


def _of_methods(path: Path, config: dict[str, Any]) -> pd.DataFrame:
    """A table by method, without what an earlier run with other methods left."""
    if "methods" not in config:
        return _frame(path)
    frame = _frame(path) if config["methods"] else pd.DataFrame()
    return frame[frame["method"].isin(config["methods"])] if len(frame) else frame


def _dataset(path: Path) -> xr.Dataset:
    """A stored result; of one that was interrupted, the facts that are done."""
    return open_result(path, partial=True) if path.exists() else xr.Dataset()

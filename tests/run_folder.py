"""Fabricate a small, plausible run folder with every artefact of a run, from one seed and without any model."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr

from workbench.facts import FactSet
from workbench.results import save_result
from workbench.selection import Selection

METHODS = ("loki", "loki_random", "lora")
NASTY = "<img src=x onerror=\"window.hacked=1\"> </script><script>window.hacked=1</script> <b>bold</b> & 'quoted' 🦊"
N_LAYERS, N_UNITS = 8, 40


def fabricate_recall(rng: np.random.Generator, per_relation: int = 8) -> pd.DataFrame:
    """Eight relations from well known to unknown; the first fact carries text that must never run."""
    relations = [
        "capital",
        "language",
        "currency",
        "author",
        "element",
        "opposite",
        "continent",
        "<b>odd</b> & relation",
    ]
    records = []
    for place, relation in enumerate(relations):
        for i in range(per_relation):
            prob = float(rng.beta(1 + 5 * (1 - place / 8), 1 + 4 * place / 8))
            nasty = place == 0 and i == 0
            records.append(
                {
                    "fact": "a/</script><b>x</b>" if nasty else f"{relation}/{i:02d}",
                    "relation": relation,
                    "subject": f"subject {i}",
                    "prompt": NASTY if nasty else f"The {relation} of subject {i} is",
                    "answer": f"Answer {i}",
                    "predicted": f" Answer {i}" if prob > 0.45 else " the",
                    "prob": prob,
                    "logprob": float(np.log(prob)),
                    "rank": 0 if prob > 0.45 else int(rng.integers(1, 50)),
                    "margin": (prob - 0.45) * 8,
                    "n_tokens": 1 + i % 3,
                    "known": prob > 0.45 or nasty,
                }
            )
    return pd.DataFrame(records).set_index("fact")


def fabricate_attribution(rng: np.random.Generator, recall: pd.DataFrame) -> xr.Dataset:
    """Scores that grow with the layer; facts of one relation share units, more so in later layers."""
    known = recall[recall["known"]]
    relations = known["relation"].to_numpy(str)
    names, codes = np.unique(relations, return_inverse=True)
    shared = rng.normal(size=(len(names), N_LAYERS, N_UNITS)) * np.linspace(0, 1.4, N_LAYERS)[:, None]
    scale = (0.01 + 0.08 * np.linspace(0, 1, N_LAYERS) ** 3)[:, None]
    score = (shared[codes] + rng.standard_t(4, size=(len(known), N_LAYERS, N_UNITS))) * scale
    return xr.Dataset(
        {
            "score": (("fact", "layer", "unit"), score.astype(np.float32)),
            "gap": (("fact", "layer"), rng.normal(scale=0.01, size=score.shape[:2]).astype(np.float32)),
            "target_prob": (("fact",), known["prob"].to_numpy(np.float32)),
        },
        coords={
            "fact": known.index.to_numpy(str),
            "layer": np.arange(N_LAYERS),
            "unit": np.arange(N_UNITS),
            "relation": ("fact", relations),
        },
        attrs={
            **{"unit": "node", "method": "ig", "steps": 8, "rule": "midpoint", "baseline": "zero", "scope": "last"},
            **{"objective": "logprob", "target": "gold", "model_digest": "ab" * 32, "fact_digest": "cd" * 32},
        },
    )


def fabricate_interference(rng: np.random.Generator, attribution: xr.Dataset) -> xr.Dataset:
    """The real cosines and a Jaccard of those scores, with a plausible null band."""
    size = np.abs(attribution["score"].values.astype(np.float64)).transpose(1, 0, 2)
    unit = size / np.linalg.norm(size, axis=2, keepdims=True)
    cosine = unit @ unit.transpose(0, 2, 1)
    top = size >= np.sort(size, axis=2)[:, :, -4:-3]
    both = np.einsum("lfu,lgu->lfg", top.astype(float), top.astype(float))
    value = np.stack([cosine, both / (8 - both)]).astype(np.float32)
    relations = attribution["relation"].values
    same = (relations[:, None] == relations[None]) & ~np.eye(len(relations), dtype=bool)
    within, across = value[:, :, same].mean(-1), value[:, :, relations[:, None] != relations[None]].mean(-1)
    band = np.abs(rng.normal(0.012, 0.001, size=within.shape))
    per_layer = {
        "within": within,
        "across": across,
        "difference": within - across,
        "null_low": -band,
        "null_high": band,
    }
    per_layer["p_value"] = np.where(np.abs(within - across) > band, 0.001, 0.4)
    return xr.Dataset(
        {
            "value": (("metric", "layer", "fact", "other"), value),
            "load": (("layer", "unit"), size.mean(axis=1).astype(np.float32)),
            **{name: (("metric", "layer"), values) for name, values in per_layer.items()},
        },
        coords={
            "metric": ["cosine", "jaccard"],
            "layer": np.arange(N_LAYERS),
            "unit": np.arange(N_UNITS),
            "fact": attribution["fact"].values,
            "other": attribution["fact"].values,
            "relation": ("fact", relations),
        },
        attrs={"unit": "node"},
    )


def fabricate_history(rng: np.random.Generator, method: str, reached: bool = True) -> pd.DataFrame:
    """A loss that falls and an efficacy measured every tenth step."""
    steps = np.arange(1, 81)
    rate = {"loki": 14.0, "loki_random": 20.0, "lora": 9.0}[method]
    efficacy = (0.97 if reached else 0.6) * (1 - np.exp(-((steps / rate) ** 1.6)))
    return pd.DataFrame(
        {
            "method": method,
            "step": steps,
            "epoch": steps / 10,
            "loss": 4.2 * np.exp(-steps / rate) + rng.uniform(0.02, 0.25, size=80),
            "efficacy": np.where(steps % 10 == 0, efficacy, np.nan),
            "learning_rate": 1e-3 * (1 - steps / 100),
            "seconds": steps * 0.31,
        }
    )


def fabricate_drift(rng: np.random.Generator, new: list[str], old: list[str]) -> pd.DataFrame:
    """Implanted facts move toward their answer in the last layers; LoRA also moves the others aside."""
    frames = []
    for method, strength in zip(METHODS, (0.5, 0.45, 0.55), strict=True):
        for group, ids in (("implanted", new), ("retained", old)):
            n, aside = len(ids), {"loki": 0.15, "loki_random": 0.17, "lora": 0.5}[method]
            first = rng.uniform(0.5, 0.9, n) if group == "implanted" else rng.uniform(0.0, 0.1, n)
            gain = rng.normal(-0.45 if group == "implanted" else 0.03, 0.08, n)
            frames.append(_drift_rows(method, group, ids, "d_emb", -1, first, first + gain))
            for layer in range(N_LAYERS):
                depth = (layer / (N_LAYERS - 1)) ** 2
                pull = strength * depth if group == "implanted" else -0.05 * depth
                zeros = np.zeros(n)
                frames.append(_drift_rows(method, group, ids, "toward", layer, zeros, rng.normal(pull, 0.08, n)))
                off = np.abs(rng.normal(aside + strength * depth, 0.1, n))
                frames.append(_drift_rows(method, group, ids, "off", layer, zeros, off))
    return pd.concat(frames, ignore_index=True)


def _drift_rows(method, group, ids, metric, layer, before, after):
    columns = {"method": method, "group": group, "fact": ids, "relation": "r", "metric": metric}
    columns["layer"] = pd.array([layer if layer >= 0 else pd.NA] * len(ids), dtype="Int64")
    return pd.DataFrame({**columns, "before": before, "after": after, "change": after - before})


def fabricate_forgetting(
    rng: np.random.Generator, new: list[str], old: list[str], keep=(0.88, 0.86, 0.55)
) -> pd.DataFrame:
    """LoKI and random rows keep about as much; LoRA forgets more. `keep` are the shares kept per method."""
    draws = {name: rng.uniform(size=(len(METHODS), len(ids))) for name, ids in _suites(new, old).items()}
    frames = []
    for place, method in enumerate(METHODS):
        for suite, ids in _suites(new, old).items():
            n = len(ids)
            if suite == "general":
                nll = np.linspace(2.4, 3.2, n)
                extra = rng.normal((0.02, 0.02, 0.3)[place], 0.03, n)
                rows = {"nll": (nll, nll + extra), "kl": (np.zeros(n), np.abs(extra) * 0.8 + 0.01)}
            else:
                chance = {
                    "efficacy": 0.96,
                    "paraphrase": 0.8,
                    "neighbourhood": keep[place] - 0.1,
                    "retained": keep[place],
                }
                learns = suite in ("efficacy", "paraphrase")
                first = np.zeros(n) if learns else np.ones(n)
                last = (((draws[suite][0] + 0.2 * draws[suite][place]) % 1) < chance[suite]).astype(float)
                before = np.where(first > 0, rng.uniform(-0.8, -0.05, n), rng.uniform(-9, -4, n))
                after = np.where(last > 0, rng.uniform(-0.8, -0.02, n), rng.uniform(-6, -1, n))
                rows = {"accuracy": (first, last), "logprob": (before, after)}
            weight = 40 + 3 * np.arange(n) if suite == "general" else np.ones(n, dtype=int)
            for metric, (before, after) in rows.items():
                columns = {"method": method, "suite": suite, "metric": metric, "fact": ids, "weight": weight}
                frames.append(pd.DataFrame({**columns, "before": before, "after": after, "change": after - before}))
    return pd.concat(frames, ignore_index=True)


def _suites(new, old):
    half = len(old) // 2
    chunks = [f"general/{i}" for i in range(24)]
    suites = {
        "efficacy": new,
        "paraphrase": new,
        "neighbourhood": old[:half],
        "retained": old[half:],
        "general": chunks,
    }
    return suites


def fabricate_run(folder: Path, seed: int = 0, reached: bool = True, per_relation: int = 8) -> Path:
    """Write a whole run folder."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    recall = fabricate_recall(rng, per_relation)
    recall.to_parquet(folder / "recall.parquet")
    new = fabricate_recall(rng, 4).assign(known=False, relation="profession")
    new.index = pd.Index([f"fictional/{i:03d}" for i in range(len(new))], name="fact")
    new.to_parquet(folder / "recall_new.parquet")
    attribution = fabricate_attribution(rng, recall)
    save_result(attribution, folder / "attribution.zarr", kind="attribution")
    save_result(fabricate_interference(rng, attribution), folder / "interference.zarr", kind="interference")
    load = np.abs(attribution["score"].values).mean(axis=0)
    write_selections(folder, load, rng)
    records = recall.reset_index().rename(columns={"fact": "id"})[["id", "relation", "subject", "prompt", "answer"]]
    FactSet.from_records(records.to_dict("records")).save(folder / "facts" / "retained.jsonl")
    for method in METHODS:
        target = folder / "implant" / method
        target.mkdir(parents=True)
        fabricate_history(rng, method, reached).to_parquet(target / "history.parquet")
        (target / "training.json").write_text(json.dumps(training_record(method, reached)))
    ids, old = list(new.index), list(attribution["fact"].values)
    fabricate_drift(rng, ids, old).to_parquet(folder / "drift.parquet")
    fabricate_forgetting(rng, ids, old).to_parquet(folder / "forgetting.parquet")
    config = {"model": "smollm2-135m", "seed": 0, "facts": {"retained": "world", "implanted": "fictional"}, "quota": 10}
    (folder / "config.json").write_text(json.dumps({**config, "note": NASTY}))
    (folder / "provenance.json").write_text(json.dumps(provenance_record()))
    return folder


def write_selections(folder: Path, load: np.ndarray, rng: np.random.Generator) -> None:
    """The four least loaded units of each layer, and four at random."""
    masks = {"loki": np.argsort(np.argsort(load, axis=1), axis=1) < 4, "loki_random": np.zeros(load.shape, dtype=bool)}
    for row in masks["loki_random"]:
        row[rng.choice(len(row), 4, replace=False)] = True
    for method, mask in masks.items():
        Selection(xr.DataArray(mask, dims=("layer", "unit")), "node", {}).save(folder / "selection" / f"{method}.json")


def training_record(method: str, reached: bool) -> dict:
    """What the implant stage writes about one training."""
    record = {"method": method, "trainable_parameters": 49152, "efficacy": 0.97 if reached else 0.58}
    return {**record, "target_efficacy": 0.95, "reached": reached, "steps": 80, "seconds": 24.8, "seed": 0}


def provenance_record() -> dict:
    """What a run writes about itself."""
    return {
        "versions": {"workbench": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.2"},
        "model": {
            "name": "smollm2-135m",
            "digest": "ab" * 32,
            "n_layers": 8,
            "d_model": 40,
            "d_mlp": 96,
            "dtype": "float32",
        },
        "stages": {"recall": 21.4, "attribution": 92.0, "interference": 3.1, "implant": 74.4, "forgetting": 40.2},
        "command": "workbench run --out runs/first --seed 0",
    }

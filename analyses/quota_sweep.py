"""How much of the FFN may be trained? Compares quotas of LoKI through `wb.run`.

For every quota and seed: one run (attribution is shared by all, since only the selection changes), then, at the end of
training, efficacy, the share of known facts that are still answered, and perplexity. Publishes `figures/quota_sweep.*`.

    python analyses/quota_sweep.py            # about 15 minutes on 2 cores with the default model
    python analyses/quota_sweep.py --smoke    # the same way on few facts, for tests
"""

import argparse
import shutil
from pathlib import Path

import pandas as pd

import workbench as wb
from workbench.figures import quota_curves
from workbench.reporting import forgetting_summary, publish
from workbench.results import load_frame, load_json, provenance

HERE = Path(__file__).resolve().parent.parent
SHARED = ("recall.parquet", "attribution.zarr", "interference.zarr", "facts", "stages")


def one_run(folder: Path, quota: float, seed: int, model: str, smoke: bool, like: Path | None) -> pd.DataFrame:
    """One run at one quota, its recall and attribution copied from an earlier one; what it forgot, summarised."""
    if like is not None and not folder.exists():
        for name in SHARED:
            copy = shutil.copytree if (like / name).is_dir() else shutil.copy2
            folder.mkdir(parents=True, exist_ok=True)
            copy(like / name, folder / name)
    changes = {
        "out": str(folder),
        "model": model,
        "implanted": "fictional:6" if smoke else "fictional:48",
        "methods": ["loki", "loki_random"],
        "selection.quota": quota,
        "training.seed": seed,
        "training.max_epochs": 2 if smoke else 60,
        "attribution.max_facts": 4 if smoke else 80,
        "attribution.steps": 1 if smoke else None,
        "evaluation.general_tokens": 128 if smoke else 3000,
    }
    if smoke:
        changes["retained"] = str(smoke_facts(folder.parent / "retained.jsonl"))
    run = wb.run(wb.Config.read(changes=changes))
    frame = forgetting_summary(load_frame(run.file("forgetting.parquet")))
    sizes = {m: load_json(run.file(f"implant/{m}/training.json"))["trainable_parameters"] for m in changes["methods"]}
    return frame.assign(quota=quota, seed=seed, trainable_parameters=frame["method"].map(sizes))


def smoke_facts(path: Path) -> Path:
    """A few shipped facts, so that the smoke test is quick."""
    return wb.load_facts("world").filter(relations=["capital"]).sample(16, seed=0).save(path)


def sweep(out: Path, quotas: list[float], seeds: list[int], model: str, smoke: bool) -> pd.DataFrame:
    """All runs, resumable, as one tidy frame."""
    frames, first = [], None
    for seed in seeds:
        for quota in quotas:
            folder = out / f"quota{quota:g}-seed{seed}"
            frames.append(one_run(folder, quota, seed, model, smoke, first))
            first = first or folder
    return pd.concat(frames, ignore_index=True)


#: (suite, metric) -> what is drawn.
PANELS = {
    ("efficacy", "accuracy"): "taught facts answered (share)",
    ("retained", "accuracy"): "known facts still answered (share)",
    ("general", "perplexity"): "perplexity on prose",
}


def panels(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean and range over seeds of what is drawn: panel, method, quota, mean, low, high."""
    chosen = frame.assign(panel=list(map(PANELS.get, zip(frame["suite"], frame["metric"], strict=True)))).dropna()
    grouped = chosen.groupby(["panel", "method", "quota"], sort=False)["after"]
    return grouped.agg(mean="mean", low="min", high="max").reset_index()


def main(arguments: list[str] | None = None) -> Path:
    """Run the sweep, publish its figure, and give the path of the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quotas", type=float, nargs="+", default=[1, 5, 10, 30])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--out", type=Path, default=HERE / "runs" / "quota_sweep")
    parser.add_argument("--figures", type=Path, default=HERE / "figures")
    parser.add_argument("--smoke", action="store_true", help="two quotas, one seed, few facts")
    options = parser.parse_args(arguments)
    quotas, seeds = ([5.0, 20.0], [0]) if options.smoke else (options.quotas, options.seeds)
    frame = sweep(options.out, quotas, seeds, options.model, options.smoke)
    frame.to_csv(options.out / "quota_sweep.csv", index=False)
    about = {**provenance(), "quotas": quotas, "seeds": seeds, "model": options.model, "smoke": options.smoke}
    written = publish(quota_curves(panels(frame)), frame, "quota_sweep", options.figures, about)
    print(panels(frame).to_string(index=False, float_format=lambda x: f"{x:.3g}"))
    return written[0]


if __name__ == "__main__":
    print(main())

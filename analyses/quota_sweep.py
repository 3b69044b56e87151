"""How much of the FFN may be trained? Compares quotas of LoKI through `wb.run`.

For every quota and seed one run; the seed moves everything that is drawn: which known facts are attributed, the random
nodes, and the order of training. Recall and attribution are done once and shared by all runs of a seed, since only the
selection changes. Compared are, at the end of training, efficacy, the share of known facts that are still answered, and
perplexity. Publishes `figures/quota_sweep.*`; a second start does only what is missing.

    python analyses/quota_sweep.py            # the full sweep
    python analyses/quota_sweep.py --smoke    # the same way on few facts and steps, for tests
"""

import argparse
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

import workbench as wb
from workbench.figures import quota_curves
from workbench.intervals import means
from workbench.reporting import places, publish
from workbench.results import load_frame, load_json, provenance

HERE = Path(__file__).resolve().parent.parent
METHODS = ("loki", "loki_random")
#: What runs share.
SHARED = ("recall.parquet", "recall_new.parquet", "facts", "attribution.zarr", "interference.zarr", "stages")
#: (suite, metric) -> what is drawn.
PANELS = {
    ("efficacy", "accuracy"): "taught facts answered (share)",
    ("retained", "accuracy"): "known facts still answered (share)",
    ("general", "perplexity"): "perplexity on prose",
}


@dataclass(frozen=True)
class Sweep:
    """What is compared, and what all runs have in common."""

    out: Path
    quotas: tuple[float, ...]
    seeds: tuple[int, ...]
    settings: dict[str, Any]


def one_run(sweep: Sweep, quota: float, seed: int, like: Path | None) -> pd.DataFrame:
    """One run at one quota, its recall and attribution copied from an earlier one; what it forgot, summarised."""
    folder = run_folder(sweep.out, quota, seed)
    if like is not None and not folder.exists():
        part = folder.with_name(f".{folder.name}.part")  # a copy that was cut short is no run
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for name in SHARED:
            copy = shutil.copytree if (like / name).is_dir() else shutil.copy2
            copy(like / name, part / name)
        part.rename(folder)
    changes = {
        **sweep.settings,
        "out": str(folder),
        "methods": METHODS,
        "selection.quota": quota,
        "seed": seed,
        "training.seed": seed,
    }
    run = wb.run(wb.Config.read(changes=changes))
    frame = means(load_frame(run.file("forgetting.parquet")))
    training = {method: load_json(run.file(f"implant/{method}/training.json")) for method in METHODS}
    columns = {
        name: frame["method"].map({method: one[name] for method, one in training.items()})
        for name in ("trainable_parameters", "epochs", "reached")
    }
    return frame.assign(quota=quota, seed=seed, **columns)


def run_folder(out: Path, quota: float, seed: int) -> Path:
    """Where the run of one quota and seed lies."""
    return out / f"quota{quota:g}-seed{seed}"


def sweep_quotas(sweep: Sweep) -> pd.DataFrame:
    """All runs, resumable, as one tidy frame."""
    frames = []
    first = run_folder(sweep.out, sweep.quotas[0], sweep.seeds[0])
    for seed in sweep.seeds:
        for quota in sweep.quotas:
            done = [one for one in (run_folder(sweep.out, sweep.quotas[0], seed), first) if one.exists()]
            frames.append(one_run(sweep, quota, seed, done[0] if done else None))
    return pd.concat(frames, ignore_index=True)


def panels(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean and range over seeds of what is drawn: panel, method, quota, mean, low, high."""
    names = [PANELS.get(key) for key in zip(frame["suite"], frame["metric"], strict=True)]
    chosen = frame.assign(panel=names).dropna(subset="panel")
    grouped = chosen.groupby(["panel", "method", "quota"], sort=False)["after"]
    return grouped.agg(mean="mean", low="min", high="max").reset_index()


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that all runs share, as changes of the default configuration."""
    if not options.smoke:
        return {
            "model": options.model,
            "retained": options.retained,
            "implanted": options.implanted,
            "attribution.max_facts": options.max_facts,
            "training.max_epochs": options.max_epochs,
        }
    few = {"retained": wb.load_facts(options.retained).at_most(20, seed=0),
           "implanted": wb.load_facts(options.implanted)[:2]}  # fmt: skip
    return {
        "model": options.model,
        **{name: str(facts.save(options.out / f"{name}.jsonl")) for name, facts in few.items()},
        "attribution.max_facts": 4,
        "attribution.steps": 1,
        "training.max_epochs": 2,
        "evaluation.general_tokens": 64,
    }


def main(arguments: list[str] | None = None) -> Path:
    """Run the sweep, publish its figure, and give the path of the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quotas", type=float, nargs="+", default=[1, 5, 10, 30], help="trained nodes in percent")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--model", default="smollm2-135m", help="default's name, folder, .gguf file or hub id")
    parser.add_argument("--retained", default="world", help="facts of which those that the model knows are to stay")
    parser.add_argument("--implanted", default="fictional:30", help="facts that are taught")
    parser.add_argument("--max-facts", type=int, default=30, help="known facts that are attributed")
    parser.add_argument("--max-epochs", type=int, default=60, help="a run gives up after so many")
    parser.add_argument("--out", type=Path, help="folder of the runs; in runs when not given")
    parser.add_argument("--figures", type=Path, help="where the figure is published")
    parser.add_argument("--smoke", action="store_true", help="two quotas, one seed, few facts and steps")
    options = parser.parse_args(arguments)
    options.out, options.figures = places(HERE, "quota_sweep", options.out, options.figures, options.smoke)
    quotas, seeds = ((5.0, 20.0), (0,)) if options.smoke else (tuple(options.quotas), tuple(options.seeds))
    sweep = Sweep(options.out, quotas, seeds, settings(options))
    frame = sweep_quotas(sweep)
    unnamed = ("retained", "implanted") if options.smoke else ()  # files of its own
    shared = {name: value for name, value in sweep.settings.items() if name not in unnamed}
    about = {**provenance(), "quotas": list(quotas), "seeds": list(seeds), "settings": shared, "smoke": options.smoke}
    drawn = panels(frame)
    written = publish(quota_curves(drawn), frame, "quota_sweep", options.figures, about)
    print(drawn.to_string(index=False, float_format=lambda x: f"{x:.3g}"))
    return written[0]


if __name__ == "__main__":
    print(main())

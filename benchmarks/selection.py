"""What does a selection from a store larger than memory cost? Against the sort of every layer of every sample.

    python benchmarks/selection.py            # 2,850 facts, 32 layers, 4,096 units: 1.5 GB, deleted afterwards
    python benchmarks/selection.py --smoke    # a small store, for tests

Every way runs in a process of its own, in turn, and says its time, its CPU time and the most memory it ever held.
See `README.md` beside this file.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from tqdm.auto import tqdm

from workbench.results import open_result, open_store, provenance, save_json
from workbench.selection import Selection, select

QUOTA = 10
HERE = Path(__file__).resolve().parent


def write_scores(folder: Path, n_facts: int, n_layers: int, n_units: int, at_once: int = 64) -> None:
    """Write random scores as `workbench attribute` would, a few facts at a time."""
    ids = [f"fact{i}" for i in range(n_facts)]
    labels: dict[str, Any] = {"ids": ids, "relations": ids, "attrs": {"unit": "node", "seed": 0}}
    generator = np.random.default_rng(0)
    lean = generator.standard_normal((n_layers, n_units), dtype=np.float32)  # what all facts agree on
    with open_store(folder, **labels, n_layers=n_layers, n_units=n_units) as store:
        for start in tqdm(range(0, n_facts, at_once), unit="write", desc="scores"):
            rows = range(start, min(start + at_once, n_facts))
            noise = generator.standard_normal((len(rows), n_layers, n_units), dtype=np.float32)
            store.write(rows, noise + lean, None, None)


def blocks(scores: xr.DataArray, at_once: int = 64) -> Iterator[np.ndarray]:
    """Arrays (fact, layer, unit) of the store, in order."""
    for start in range(0, scores.sizes["fact"], at_once):
        yield np.asarray(scores.isel(fact=slice(start, start + at_once)).values)


def read_only(attribution: xr.Dataset) -> list[list[int]]:
    """Read the store and do nothing: the part that all ways share."""
    for _ in blocks(attribution["score"]):
        pass
    return []


def sort_loop(attribution: xr.Dataset) -> list[list[int]]:
    """Sort every layer of every sample, mark its lowest units, keep the most marked: a loop as LoKI publishes it.

    It is spared what the published script does besides: the whole array in memory, and a normalisation that changes no
    order. Its ties of votes are settled as ours.
    """
    scores = attribution["score"]
    n_layers, n_units = scores.sizes["layer"], scores.sizes["unit"]
    k = n_units * QUOTA // 100
    count, total = np.zeros((n_layers, n_units), dtype=np.int64), np.zeros((n_layers, n_units))
    for block in blocks(scores):
        for sample in block:
            total += sample
            for layer in range(n_layers):
                count[layer, np.argsort(sample[layer])[:k]] += 1
    order = [np.lexsort((np.arange(n_units), total[layer], -count[layer])) for layer in range(n_layers)]
    return [sorted(int(unit) for unit in rows[:k]) for rows in order]


def one_call(attribution: xr.Dataset) -> list[list[int]]:
    """`workbench.select` with the strategy of the loop."""
    return select(attribution, strategy="layer_balanced", quota=QUOTA).positions()


WAYS: dict[str, tuple[str, Callable[[xr.Dataset], list[list[int]]]]] = {
    "read": ("reading alone", read_only),
    "loop": ("a sort for each layer of each sample", sort_loop),
    "workbench": ("workbench.select", one_call),
}


def peak_bytes() -> int:
    """The most memory that this process ever held (`VmHWM`; the figure of `getrusage` is inherited from the parent)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("The kernel does not say the peak memory of a process (VmHWM in /proc/self/status).")


def child(way: str, folder: str) -> None:
    """Measure one way in this process and print JSON."""
    before = peak_bytes()
    wall, cpu = time.perf_counter(), time.process_time()
    positions = WAYS[way][1](open_result(folder))
    seconds = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    print(json.dumps({**seconds, "peak_bytes": peak_bytes(), "peak_before": before, "positions": positions}))


def measured(way: str, folder: Path) -> dict[str, Any]:
    """Run one way in a process of its own."""
    home = {"PYTHONPATH": os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])}
    command = [sys.executable, str(HERE / "selection.py"), "--child", way, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **home})
    if done.returncode:
        raise RuntimeError(f"The way {way} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def summary(runs: dict[str, list[dict[str, Any]]], n_units: int) -> list[dict[str, Any]]:
    """Medians, ratios with and without the reading that all share, and how far the selections agree."""
    kept = {
        way: Selection.from_positions(found[-1]["positions"], unit="node", n_units=n_units)
        for way, found in runs.items()
        if found[-1]["positions"]
    }
    alike = (kept["loop"] & kept["workbench"]).n_selected / kept["workbench"].n_selected
    if not alike > 0.999:  # scores that tie at the cut are left open by the loop's sort
        raise RuntimeError(f"The loop and workbench.select agree on {alike:.2%} of the units; times mean nothing.")
    time_, cpu = (
        {way: statistics.median(one[kind] for one in found) for way, found in runs.items()}
        for kind in ("seconds", "cpu_seconds")
    )
    return [
        {
            "name": way,
            "what": WAYS[way][0],
            "seconds": [one["seconds"] for one in found],
            "cpu_seconds": [one["cpu_seconds"] for one in found],
            "median_seconds": time_[way],
            "median_cpu_seconds": cpu[way],
            "faster_than_loop": time_["loop"] / time_[way],
            "less_cpu_than_loop": cpu["loop"] / cpu[way],
            "less_cpu_without_reading": (cpu["loop"] - cpu["read"]) / max(cpu[way] - cpu["read"], 1e-9),
            "peak_mib": max(one["peak_bytes"] for one in found) / 2**20,
            "peak_before_mib": max(one["peak_before"] for one in found) / 2**20,
            "agrees": alike,
        }
        for way, found in runs.items()
    ]


def table(found: dict[str, Any]) -> str:
    """The ways as a markdown table."""
    lines = [
        f"{found['n_facts']} facts, {found['n_layers']} layers, {found['n_units']} units: "
        f"{found['store_mib']:.0f} MiB of scores, {QUOTA}% selected",
        "",
        "| way | s | times faster | CPU s | times less CPU | the same without reading | peak MiB | of which imports |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for way in found["ways"]:
        beyond = "" if way["name"] == "read" else f"{way['less_cpu_without_reading']:.1f}"
        lines.append(
            f"| {way['name']} ({way['what']}) | {way['median_seconds']:.2f} | {way['faster_than_loop']:.1f} | "
            f"{way['median_cpu_seconds']:.2f} | {way['less_cpu_than_loop']:.1f} | {beyond} | "
            f"{way['peak_mib']:.0f} | {way['peak_before_mib']:.0f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> Path:
    """Measure the ways in turn, print the table, write `selection.json` and `selection.md`, give the former's path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(2850, 32, 4096), help="facts, layers and units")
    parser.add_argument("--repeats", type=int, default=2, help="alternating repetitions; the median is reported")
    parser.add_argument("--smoke", action="store_true", help="a small store, one repetition")
    parser.add_argument("--scratch", type=Path, default=None, help="where the scores lie meanwhile")
    parser.add_argument("--out", type=Path, default=HERE / "out", help="folder of the JSON and the table")
    options = parser.parse_args(arguments)
    shape, repeats = ((40, 3, 200), 1) if options.smoke else (tuple(options.shape), options.repeats)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = Path(scratch) / "scores.zarr"
        write_scores(folder, *shape)
        runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        with tqdm(total=repeats * len(WAYS), unit="call", desc="select") as bar:
            for _ in range(repeats):
                for way, found in runs.items():
                    found.append(measured(way, folder))
                    bar.update(1)
    n_facts, n_layers, n_units = shape
    about = {"n_facts": n_facts, "n_layers": n_layers, "n_units": n_units, "quota": QUOTA, "repeats": repeats}
    ways = summary(runs, n_units)
    found = {**about, "store_mib": 4 * float(np.prod(shape)) / 2**20, "provenance": provenance(), "ways": ways}
    written = save_json(found, options.out / "selection.json")
    (options.out / "selection.md").write_text(table(found) + "\n", encoding="utf-8")
    print(table(found))
    return written


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        print(main())

"""How do time and memory of attribution grow with facts, tokens, layers and steps?

    python benchmarks/growth.py            # default model; integrated gradients over nodes
    python benchmarks/growth.py --memory   # and the peak memory of 50 and of 2,000 facts, each in a process of its own
    python benchmarks/growth.py --smoke    # a tiny random model, for tests

Everything but one quantity stays as in the middle of the table: 16 facts, 45 tokens, all layers, 7 steps. Repetitions
alternate between the points. `exponent` is the slope of log(seconds) over log(quantity): 1 is linear.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from attribution import long_facts, tiny_model
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

import workbench as wb
from workbench.models import HookedModel, peak_memory
from workbench.results import provenance, save_json

HERE = Path(__file__).resolve().parent
MIDDLE = {"facts": 16, "tokens": 45, "steps": 7}
QUANTITIES = {"facts": (1, 4, 16, 48), "tokens": (20, 45, 90, 155), "layers": (5, 10, 20, 30), "steps": (1, 4, 16)}
SMOKE = {"facts": (1, 3), "tokens": (20, 40), "layers": (1, 2), "steps": (1, 4)}


@dataclass(frozen=True)
class Point:
    """One call of `attribute`: what is varied, its value, and what the call takes."""

    quantity: str
    value: int
    model: HookedModel
    facts: wb.FactSet
    steps: int

    def seconds(self) -> float:
        """Time of the call."""
        started = time.perf_counter()
        found = wb.attribute(self.model, self.facts, steps=self.steps, progress=False)
        if not float(abs(found["score"]).max()) > 0:
            raise RuntimeError("The scores are all zero; their time means nothing.")
        return time.perf_counter() - started


def points(model: HookedModel, quantities: dict[str, tuple[int, ...]], n_facts: int) -> list[Point]:
    """Every value of every quantity, the others as in the middle."""
    facts = long_facts(model, MIDDLE["tokens"], max(n_facts, *quantities["facts"]))
    middle = facts[:n_facts]
    found = [Point("facts", n, model, facts[:n], MIDDLE["steps"]) for n in quantities["facts"]]
    for n in quantities["tokens"]:
        found.append(Point("tokens", n, model, long_facts(model, n, n_facts), MIDDLE["steps"]))
    for n in quantities["layers"]:
        found.append(Point("layers", n, first_layers(model, n), middle, MIDDLE["steps"]))
    return found + [Point("steps", n, model, middle, n) for n in quantities["steps"]]


def first_layers(model: HookedModel, n_layers: int) -> HookedModel:
    """The model without its later layers."""
    cut = AutoModelForCausalLM.from_pretrained(model.path, num_hidden_layers=n_layers, dtype=torch.float32)
    return wb.load_model(cut, tokenizer=model.tokenizer)


def measured(found: list[Point], repeats: int) -> list[dict[str, Any]]:
    """Median seconds of every point."""
    for point in found:
        wb.attribute(point.model, point.facts[:1], steps=1, progress=False)  # checks, thread pools, allocator
    seconds: list[list[float]] = [[] for _ in found]
    with tqdm(total=repeats * len(found), unit="call", desc="growth") as bar:
        for _ in range(repeats):
            for point, kept in zip(found, seconds, strict=True):
                kept.append(point.seconds())
                bar.update(1)
    return [
        {"quantity": point.quantity, "value": point.value, "n_facts": len(point.facts), "seconds": kept,
         "median": statistics.median(kept)}
        for point, kept in zip(found, seconds, strict=True)
    ]  # fmt: skip


def exponents(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Slope of log(seconds) over log(value) of every quantity, by least squares.

    >>> exponents([{"quantity": "q", "value": v, "median": 3.0 * v**2} for v in (1, 2, 8)])
    {'q': 2.0}
    """
    found = {}
    for quantity in dict.fromkeys(row["quantity"] for row in rows):
        pairs = [(math.log(r["value"]), math.log(r["median"])) for r in rows if r["quantity"] == quantity]
        found[quantity] = round(statistics.linear_regression(*zip(*pairs, strict=True)).slope, 3)
    return found


def peak_of(model: str, n_facts: int) -> int:
    """Peak memory (bytes) of a process that attributes so many facts and streams them to a folder."""
    with tempfile.TemporaryDirectory() as scratch:
        out = str(Path(scratch) / "scores.zarr")
        line = [sys.executable, __file__, "--child", str(n_facts), "--model", model, "--out", out]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
        done = subprocess.run(line, check=True, capture_output=True, text=True, env=environment)
    return int(json.loads(done.stdout.splitlines()[-1])["peak"])


def child(model: str, n_facts: int, out: Path) -> None:
    """What `peak_of` measures: prompts of the shipped facts, gradient times activation."""
    facts = wb.load_facts("world").per_prompt()
    opened = wb.load_model(model)
    wb.attribute(opened, facts.sample(min(n_facts, len(facts)), seed=0), method="grad_x_act", out=out, progress=False)
    print(json.dumps({"peak": peak_memory(opened.device)}))


def table(found: dict[str, Any]) -> str:
    """The measurements as one markdown table."""
    lines = ["| quantity | value | facts | s | s per fact | exponent |", "|---|---:|---:|---:|---:|---:|"]
    lines += [
        f"| {row['quantity']} | {row['value']} | {row['n_facts']} | {row['median']:.2f} "
        f"| {row['median'] / row['n_facts']:.3f} | {found['exponents'][row['quantity']]:.2f} |"
        for row in found["rows"]
    ]
    lines += [f"| peak memory of {n} facts | {size / 2**30:.2f} GiB | | | | |" for n, size in found["memory"].items()]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> Path | None:
    """Measure, print the table, write `growth.json` and `growth.md`, and give the path of the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="default's name, or a folder of safetensors")
    parser.add_argument("--repeats", type=int, default=2, help="alternating repetitions; the median is reported")
    parser.add_argument("--memory", action="store_true", help="peak memory of 50 and of 2,000 facts as well")
    parser.add_argument("--smoke", action="store_true", help="a tiny random model, one repetition")
    parser.add_argument("--out", type=Path, default=HERE / "out", help="folder of the JSON and the table")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        child(options.model, options.child, options.out)
        return None
    with tempfile.TemporaryDirectory() as scratch:
        name = str(tiny_model(Path(scratch) / "tiny") if options.smoke else options.model)
        model = wb.load_model(name, dtype="float32")
        if model.path is None:
            raise ValueError(f"{options.model} is no folder of safetensors, of which layers could be left out.")
        quantities, repeats, n_facts = (
            (SMOKE, 1, 2) if options.smoke else (QUANTITIES, options.repeats, MIDDLE["facts"])
        )
        rows = measured(points(model, quantities, n_facts), repeats)
        counts = ((5, 20) if options.smoke else (50, 2000)) if options.memory else ()
        memory = {count: peak_of(name, count) for count in counts}
    about = {"model": "tiny" if options.smoke else model.name, "threads": torch.get_num_threads(), "middle": MIDDLE}
    found = {**about, "provenance": provenance(), "rows": rows, "exponents": exponents(rows), "memory": memory}
    written = save_json(found, options.out / "growth.json")
    (options.out / "growth.md").write_text(table(found) + "\n", encoding="utf-8")
    print(table(found))
    return written


if __name__ == "__main__":
    if path := main():
        print(path)

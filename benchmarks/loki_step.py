"""What does a training step of LoKI cost? Against LoRA on the same modules and the split that LoKI publishes.

    python benchmarks/loki_step.py            # the default model, 10% of the nodes of every layer, LoRA r = 16
    python benchmarks/loki_step.py --smoke    # a tiny random model, for tests

Steps alternate between the ways in one process for the times; the most memory is that of a process for each way. See
`README.md` beside this file.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import workbench as wb
from workbench.intervals import interval
from workbench.loki import LokiConfig, down_projections, trainable_parameters
from workbench.models import peak_memory
from workbench.results import provenance, save_json

HERE = Path(__file__).resolve().parent
CPU = torch.device("cpu")
RANK = 16
SHARE = 0.1


class Split(nn.Module):
    """The down-projection as two Linears, one for trained rows and one for frozen ones, as LoKI's code has it.

    Their outputs are put side by side and gathered into the order of the rows.
    """

    def __init__(self, base: nn.Linear, rows: list[int]) -> None:
        super().__init__()
        trained = set(rows)
        others = [row for row in range(base.out_features) if row not in trained]
        self.active = nn.Linear(base.in_features, len(rows), bias=False)
        self.frozen = nn.Linear(base.in_features, len(others), bias=False)
        self.active.weight = nn.Parameter(base.weight.data[rows].clone())
        self.frozen.weight = nn.Parameter(base.weight.data[others].clone(), requires_grad=False)
        self.register_buffer("place", torch.tensor([*rows, *others]).argsort())

    def forward(self, x: Float[Tensor, "batch pos d_in"]) -> Float[Tensor, "batch pos d_out"]:
        """Both products, then every row at its place."""
        both = torch.cat([self.active(x), self.frozen(x)], dim=-1)
        return both.gather(-1, self.place.expand(both.shape))


def random_rows(model: nn.Module) -> list[list[int]]:
    """10% of the nodes of each layer, drawn by layer: what is trained does not matter for the time."""
    chosen = []
    for layer, name in down_projections(model).items():
        width = model.get_submodule(name).out_features
        drawn = torch.randperm(width, generator=torch.Generator().manual_seed(layer))
        chosen.append(sorted(drawn[: int(SHARE * width)].tolist()))
    return chosen


def loki(model: nn.Module) -> nn.Module:
    """This package's tuner."""
    return get_peft_model(model, LokiConfig(selection=random_rows(model), train_bias=False, task_type="CAUSAL_LM"))


def lora(model: nn.Module) -> nn.Module:
    """peft's LoRA on the same modules."""
    names = list(down_projections(model).values())
    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names, task_type="CAUSAL_LM"))


def split(model: nn.Module) -> nn.Module:
    """The published form on the same rows."""
    model.requires_grad_(False)
    for name, rows in zip(down_projections(model).values(), random_rows(model), strict=True):
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Split(model.get_submodule(name), rows))
    return model


WAYS: dict[str, tuple[str, Callable[[nn.Module], nn.Module]]] = {
    "loki": ("workbench.loki, 10% of the nodes", loki),
    "lora": (f"peft's LoRA, r = {RANK}", lora),
    "split": ("LoKI's two Linears, the same nodes", split),
}
OTHERS = ("lora", "split")


class Steps:
    """A model with its optimiser, and a training step that can be repeated."""

    def __init__(self, folder: str, way: str, ids: Int[Tensor, "batch pos"]) -> None:
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model, self.ids = WAYS[way][1](base).train(), ids
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimiser = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01)

    def step(self) -> tuple[float, float, float]:
        """One step: its loss, its seconds, and its seconds of CPU."""
        wall, cpu = time.perf_counter(), time.process_time()
        loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        return float(loss.detach()), time.perf_counter() - wall, time.process_time() - cpu


def batch_of(folder: str, batch: int, length: int) -> Int[Tensor, "batch pos"]:
    """Random tokens: their time is that of any others."""
    vocabulary = LlamaConfig.from_pretrained(folder).vocab_size
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))


def child(way: str, folder: str, batch: str, length: str, threads: str) -> None:
    """Take three steps of one way in this process and print the most memory it held."""
    torch.set_num_threads(int(threads))
    steps = Steps(folder, way, batch_of(folder, int(batch), int(length)))
    before = peak_memory(CPU)
    for _ in range(3):  # the optimiser has its moments from the second on
        steps.step()
    print(json.dumps({"peak_bytes": peak_memory(CPU), "peak_before": before}))


def peak(way: str, folder: str, batch: int, length: int) -> dict[str, int]:
    """Peak memory of one way, in a process of its own."""
    home = {"PYTHONPATH": os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])}
    about = [way, folder, str(batch), str(length), str(torch.get_num_threads())]
    command = [sys.executable, str(HERE / "loki_step.py"), "--child", *about]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **home})
    if done.returncode:
        raise RuntimeError(f"The way {way} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def check(losses: dict[str, list[float]]) -> None:
    """Raise unless all ways learn, and the two forms of LoKI go the same way."""
    if not all(found[-1] < found[0] for found in losses.values() if len(found) > 1):
        raise RuntimeError(f"A loss did not fall: {losses}; the times mean nothing.")
    apart = max(abs(one - other) for one, other in zip(losses["loki"], losses["split"], strict=True))
    if not apart < 1e-3 or abs(losses["loki"][0] - losses["lora"][0]) > 1e-3:
        raise RuntimeError(f"The losses of the two forms of LoKI lie {apart:.1e} apart; the times mean nothing.")


def case(folder: str, batch: int, length: int, repeats: int, peaks: int) -> dict[str, Any]:
    """Time all ways in turn on a batch of one shape, then take their peaks."""
    ids = batch_of(folder, batch, length)
    ways = {way: Steps(folder, way, ids) for way in WAYS}
    runs: dict[str, list[tuple[float, float, float]]] = {way: [] for way in WAYS}
    order = list(WAYS)
    with tqdm(total=(repeats + 1) * len(WAYS), unit="step", desc=f"{batch} x {length}") as bar:
        for number in range(repeats + 1):
            for way in order[number % len(order) :] + order[: number % len(order)]:  # nobody is always first
                runs[way].append(ways[way].step())
                bar.update(1)
    parameters = {way: trainable_parameters(steps.model) for way, steps in ways.items()}
    del ways
    check({way: [loss for loss, _, _ in found] for way, found in runs.items()})
    held = {way: [peak(way, folder, batch, length) for _ in range(peaks)] for way in WAYS}
    seconds = {way: [one[1] for one in found[1:]] for way, found in runs.items()}  # the first warms up
    wall = {way: statistics.median(found) for way, found in seconds.items()}
    cpu = {way: statistics.median(one[2] for one in found[1:]) for way, found in runs.items()}
    high = {way: statistics.median(one["peak_bytes"] for one in found) / 2**20 for way, found in held.items()}
    rows = [
        {
            "name": way,
            "what": WAYS[way][0],
            "parameters": parameters[way],
            "losses": [one[0] for one in found],
            "seconds": seconds[way],
            "cpu_seconds": [one[2] for one in found[1:]],
            "median_seconds": wall[way],
            "median_cpu_seconds": cpu[way],
            "against_lora": wall[way] / wall["lora"],
            "against_lora_paired": paired(seconds[way], seconds["lora"]),
            "against_split_paired": paired(seconds[way], seconds["split"]),
            "against_lora_cpu": cpu[way] / cpu["lora"],
            "peak_mib": high[way],
            "peaks_mib": [one["peak_bytes"] / 2**20 for one in held[way]],
            "peak_against_lora": high[way] / high["lora"],
        }
        for way, found in runs.items()
    ]
    return {"batch": batch, "length": length, "repeats": repeats, "ways": rows}


def paired(seconds: list[float], others: list[float]) -> dict[str, float]:
    """Geometric mean of the ratios of steps that followed each other, with its 95% bootstrap interval."""
    ratios = np.log(np.divide(seconds, others))
    low, high = interval(ratios)
    return {name: float(np.exp(value)) for name, value in (("mean", ratios.mean()), ("low", low), ("high", high))}


def table(found: dict[str, Any]) -> str:
    """The cases as one markdown table; times against others by the paired ratios of steps, with 95% intervals."""
    lines = [
        "| batch | way | trained | s per step | against LoRA | against the split | CPU s | against LoRA | peak MiB "
        "| against LoRA |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one in found["cases"]:
        for way in one["ways"]:
            ratios = ["{mean:.3f} ({low:.3f} to {high:.3f})".format(**way[f"against_{of}_paired"]) for of in OTHERS]
            lines.append(
                f"| {one['batch']} x {one['length']} | {way['name']} ({way['what']}) | {way['parameters']:,} | "
                f"{way['median_seconds']:.3f} | {' | '.join(ratios)} | {way['median_cpu_seconds']:.3f} | "
                f"{way['against_lora_cpu']:.3f} | {way['peak_mib']:.0f} | {way['peak_against_lora']:.3f} |"
            )
    return "\n".join(lines)


def tiny_model(folder: Path) -> str:
    """A random two-layer Llama for `--smoke`."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes)).save_pretrained(folder)
    return str(folder)


def main(arguments: list[str] | None = None) -> Path:
    """Measure the ways, print the table, write `loki_step.json` and `loki_step.md`, and give the former's path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="default's name, or a folder of safetensors")
    parser.add_argument("--batch", type=int, default=16, help="sequences in a step")
    parser.add_argument(
        "--length", type=int, nargs="+", default=[32], help="tokens in a sequence; several for several cases"
    )
    parser.add_argument("--repeats", type=int, default=40, help="alternating steps; the median is reported")
    parser.add_argument("--peaks", type=int, default=3, help="processes in which each way's memory is measured")
    parser.add_argument("--smoke", action="store_true", help="a tiny random model, two steps")
    parser.add_argument("--out", type=Path, default=HERE / "out", help="folder of the JSON and the table")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        if options.smoke:
            name, folder = "tiny", tiny_model(Path(scratch) / "tiny")
            cases = [case(folder, 4, 8, 2, 1)]
        else:
            opened = wb.load_model(options.model, dtype="float32")
            if opened.path is None:
                raise ValueError(f"{options.model} is no folder of safetensors, which plain transformers needs here.")
            name, folder = opened.name, str(opened.path)
            del opened
            cases = [case(folder, options.batch, n, options.repeats, options.peaks) for n in options.length]
    about = {"model": name, "threads": torch.get_num_threads(), "rank": RANK, "share": SHARE}
    found = {**about, "provenance": provenance(), "cases": cases}
    written = save_json(found, options.out / "loki_step.json")
    (options.out / "loki_step.md").write_text(table(found) + "\n", encoding="utf-8")
    print(table(found))
    return written


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        print(main())

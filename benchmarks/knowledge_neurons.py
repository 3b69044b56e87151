"""How fast are knowledge neurons? The package `knowledge-neurons` and `workbench.attribute`, side by side in one run.

    python benchmarks/knowledge_neurons.py            # a gpt2 of its own size with random weights
    python benchmarks/knowledge_neurons.py --smoke    # a tiny one, without the package, for tests

The package is installed into a temporary folder and runs in a process of its own, with the torch and transformers of
this one. Both have one thread, and repetitions alternate. See `README.md` beside this file for what each way computes.
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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import workbench as wb
from workbench.results import provenance, save_json

STEPS = 20
PACKAGE = "knowledge-neurons==0.0.2"
PROMPT = "if you ask anybody in the country the capital of France is"
ANSWER = "Paris"
OURS = "workbench"
WAYS = {
    "released": "knowledge-neurons as released",
    "aligned": "knowledge-neurons set to kn-code's neurons and points",
    OURS: "workbench.attribute, kn-code",
}
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Run:
    """One timed call: wall seconds, CPU seconds of its process, scores (layer, unit)."""

    seconds: float
    cpu_seconds: float
    scores: np.ndarray


def random_gpt2(folder: Path, small: bool) -> Path:
    """A gpt2 with random weights, of its own size or tiny, and a tokenizer of one token a word."""
    words = {word: i for i, word in enumerate(dict.fromkeys(["<unk>", *PROMPT.split(), ANSWER]))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**(sizes if small else {})))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(4)  # so that units matter
    model.save_pretrained(folder)
    return folder


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch with one thread inside, as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def install(folder: Path) -> None:
    """The package alone into a folder: what it needs to compute scores is installed here already."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{PACKAGE} could not be installed: {last_line(done.stderr)}")


def last_line(text: str) -> str:
    """The last line that is not empty."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no message")


@contextmanager
def package(scratch: Path, model: Path) -> Iterator[Callable[[str], tuple[Run, dict[str, Any]]]]:
    """A function that has the package score the prompt in its own process, and says what it read as tokens."""
    install(scratch / "package")
    paths = [str(scratch / "package"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    worker = str(HERE / "knowledge_neurons_worker.py")
    # -P keeps this folder off the path of imports: this file has the package's name
    command = [sys.executable, "-P", worker, str(model), PROMPT, ANSWER, str(STEPS)]
    errors = scratch / "errors.txt"
    with (
        errors.open("w", encoding="utf-8") as log,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        ) as process,
    ):

        def score(way: str) -> tuple[Run, dict[str, Any]]:
            file = scratch / f"{way}.npy"
            try:
                process.stdin.write(json.dumps({"way": way, "file": str(file)}) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except BrokenPipeError:
                line = ""
            if not line:
                process.wait()
                raise RuntimeError(f"{PACKAGE} did not run: {last_line(errors.read_text(encoding='utf-8'))}")
            said = json.loads(line)
            return Run(said["seconds"], said["cpu_seconds"], np.load(file)), said

        try:
            yield score
        finally:
            process.terminate()


def one_fact() -> wb.FactSet:
    """The prompt and its answer."""
    return wb.FactSet.from_records([{"id": "france", "prompt": PROMPT, "answer": ANSWER}], name="bench")


def ours(model: Any, facts: wb.FactSet) -> Run:
    """`workbench.attribute` with the settings of Knowledge Neurons' code."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = wb.attribute(model, facts, method="kn-code", unit="neuron", steps=STEPS, progress=False)
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    return Run(seconds, cpu_seconds, found["score"].values[0])


def measure(folder: Path, scratch: Path, repeats: int, with_package: bool) -> tuple[dict[str, list[Run]], str | None]:
    """Runs of every way in turn after one of each that does not count; without the package's, and why, if it fails."""
    model, facts = wb.load_model(str(folder), dtype="float32"), one_fact()
    (tokens,) = facts.tokenise(model.tokenizer)
    expected = {"prompt_ids": list(tokens.prompt_ids), "answer_ids": list(tokens.answer_ids)}
    ours(model, facts)
    if not with_package:
        return {OURS: [ours(model, facts) for _ in range(repeats)]}, "left out of a smoke run"
    runs: dict[str, list[Run]] = {way: [] for way in WAYS}
    try:
        with package(scratch, folder) as score, tqdm(total=repeats * len(WAYS), unit="call") as bar:
            for way in ("released", "aligned"):
                _, said = score(way)
                if any(said[name] != ids for name, ids in expected.items()):
                    raise ValueError(f"The package reads other tokens than {expected}: {said}.")
            for _ in range(repeats):
                for way, done in runs.items():
                    done.append(ours(model, facts) if way == OURS else score(way)[0])
                    bar.update(1)
    except RuntimeError as error:
        return {OURS: [ours(model, facts) for _ in range(repeats)]}, str(error)
    return runs, None


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Largest difference, relative to the largest score of the other."""
    return float(np.abs(one - other).max() / np.abs(other).max())


def summary(runs: dict[str, list[Run]]) -> list[dict[str, Any]]:
    """A row a way: every repetition, medians, ratios to ours, and how far the scores are from ours."""

    def median(way: str, clock: str) -> float:
        return statistics.median(getattr(run, clock) for run in runs[way])

    reference = runs[OURS][-1].scores
    rows = []
    for way, done in runs.items():
        scores = done[-1].scores
        if not np.isfinite(scores).all() or not np.abs(scores).max() > 0:
            raise RuntimeError(f"{way} gave scores that are zero or not finite; its time means nothing.")
        rows.append(
            {
                "name": way,
                "what": WAYS[way],
                "seconds": [run.seconds for run in done],
                "cpu_seconds": [run.cpu_seconds for run in done],
                "median_seconds": median(way, "seconds"),
                "median_cpu_seconds": median(way, "cpu_seconds"),
                "slower_than_ours": median(way, "seconds") / median(OURS, "seconds"),
                "slower_than_ours_cpu": median(way, "cpu_seconds") / median(OURS, "cpu_seconds"),
                "difference": distance(scores, reference),
                "correlation": float(np.corrcoef(scores.ravel(), reference.ravel())[0, 1]),
                "largest_score": float(np.abs(scores).max()),
            }
        )
    return rows


def table(found: dict[str, Any]) -> str:
    """The ways as one markdown table, and a sentence if the package is missing from it."""
    lines = [
        "| way | s | CPU s | time against workbench | CPU time | largest difference of scores | correlation |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found["ways"]:
        times = f"{row['median_seconds']:.3g} | {row['median_cpu_seconds']:.3g}"
        ratios = f"{row['slower_than_ours']:.1f}x | {row['slower_than_ours_cpu']:.1f}x"
        lines.append(f"| {row['what']} | {times} | {ratios} | {row['difference']:.1e} | {row['correlation']:.4f} |")
    if found["missing"]:
        lines += ["", f"The package is not in this table: {found['missing']}."]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> Path:
    """Time the ways, print the table, write JSON and table, and give the path of the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="alternating repetitions; the median is reported")
    parser.add_argument("--smoke", action="store_true", help="a tiny random model, one repetition, no package")
    parser.add_argument("--out", type=Path, default=HERE / "out", help="folder of the JSON and the table")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name, one_thread():
        scratch = Path(name)
        folder = random_gpt2(scratch / "gpt2", small=options.smoke)
        repeats = 1 if options.smoke else options.repeats
        runs, missing = measure(folder, scratch, repeats, with_package=not options.smoke)
    rows = summary(runs)
    aligned = next((row["difference"] for row in rows if row["name"] == "aligned"), 0.0)
    if not aligned <= 1e-4:
        raise RuntimeError(f"By the same definition the package and workbench.attribute differ by {aligned:.1e}.")
    about = {"model": "tiny gpt2" if options.smoke else "gpt2, random weights", "package": PACKAGE, "threads": 1}
    sizes = {"steps": STEPS, "n_tokens": len(PROMPT.split()), "repeats": repeats}
    found = {**about, **sizes, "provenance": provenance(), "missing": missing, "ways": rows}
    written = save_json(found, options.out / "knowledge_neurons.json")
    (options.out / "knowledge_neurons.md").write_text(table(found) + "\n", encoding="utf-8")
    print(table(found))
    return written


if __name__ == "__main__":
    print(main())

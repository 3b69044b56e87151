"""How long does interference take? Every measure in turn over all layers of the default model, and the peak memory.

    python benchmarks/interference.py               # 200 x 200 facts; all but suppression
    python benchmarks/interference.py --facts 30 --metrics suppression
    python benchmarks/interference.py --smoke       # a tiny random model, for tests

Facts are `fictional`, with answers and subjects of several tokens. The second moment of the keys is measured afresh, as
a first run does, and the attribution (`grad_x_act`) is timed beside the measures. The peak is that of the process, so
it contains the model and the libraries; it only rises from one measure to the next.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import workbench as wb
from workbench.facts import FactSet
from workbench.interfere import METRICS
from workbench.models import HookedModel, peak_memory
from workbench.results import provenance, save_json

HERE = Path(__file__).resolve().parent
MINUTES, GIB = 15, 4  # what 200 x 200 facts over 30 layers may take
DEFAULT = [name for name in METRICS if name != "suppression"]


def timed(model: HookedModel, facts: FactSet, metrics: list[str], memory: float) -> list[dict[str, Any]]:
    """Seconds and peak memory after the attribution and after each measure."""
    rows = []

    def note(name: str, started: tuple[float, float]) -> None:
        seconds, cpu = (after - before for after, before in zip(clocks(), started, strict=True))
        rows.append({"name": name, "seconds": seconds, "cpu_seconds": cpu, "peak_gib": peak(model)})
        print(f"{name:16s} {seconds:8.1f} s {cpu:8.1f} s of processors {rows[-1]['peak_gib']:6.2f} GiB", flush=True)

    started = clocks()
    scores = wb.attribute(model, facts, method="grad_x_act", memory=memory)
    note("attribution", started)
    for name in metrics:
        started = clocks()
        found = wb.interference(model, facts, scores, metrics=[name], memory=memory)
        note(name, started)
        if not float(abs(found["value"]).max()) > 0:
            raise RuntimeError(f"{name} is 0 everywhere; its time means nothing.")
    return rows


def clocks() -> tuple[float, float]:
    """Seconds by the wall and by all threads of this process, which differ on a machine that others use."""
    return time.perf_counter(), time.process_time()


def peak(model: HookedModel) -> float:
    """GiB that the process has held at most; NaN where the system does not say."""
    held = peak_memory(model.device)
    return float("nan") if held is None else held / 2**30


def tiny_model(folder: Path, facts: FactSet) -> Path:
    """A random two-layer Llama with a tokenizer of one token a word, for `--smoke`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    text = " ".join([*wb.facts.general_text(), *(fact.text for fact in facts)])
    words = {word: i for i, word in enumerate(dict.fromkeys(["<unk>", *text.split()]))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), max_position_embeddings=256, **sizes)).save_pretrained(folder)
    return folder


def main(arguments: list[str] | None = None) -> Path:
    """Time the measures, print the table, write `interference.json` and give its path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="default's name, folder, .gguf file or hub id")
    parser.add_argument("--facts", type=int, default=200, help="how many fictional facts")
    parser.add_argument("--metrics", nargs="+", default=DEFAULT, choices=list(METRICS))
    parser.add_argument("--memory", type=float, default=1.5, help="GiB that the measures may take beside the model")
    parser.add_argument("--smoke", action="store_true", help="a tiny random model and 6 facts")
    parser.add_argument("--out", type=Path, default=HERE / "out", help="folder of the JSON")
    options = parser.parse_args(arguments)
    facts = wb.fictional(6 if options.smoke else options.facts)
    with tempfile.TemporaryDirectory() as scratch:
        name = tiny_model(Path(scratch) / "tiny", facts) if options.smoke else options.model
        model = wb.load_model(str(name), dtype="float32")
        kept = os.environ.get("WORKBENCH_CACHE")
        os.environ["WORKBENCH_CACHE"] = scratch  # so that the second moment is measured, not read
        try:
            rows = timed(model, facts, options.metrics, options.memory)
        finally:
            if kept is None:
                del os.environ["WORKBENCH_CACHE"]
            else:
                os.environ["WORKBENCH_CACHE"] = kept
    total = sum(row["seconds"] for row in rows[1:])
    about = {"model": "tiny" if options.smoke else model.name, "facts": len(facts), "layers": model.n_layers,
             "threads": torch.get_num_threads(), "memory_gib": options.memory}  # fmt: skip
    limit = {"total_seconds": total, "limit_seconds": 60 * MINUTES, "peak_gib": rows[-1]["peak_gib"], "limit_gib": GIB}
    written = save_json(
        {**about, **limit, "measures": rows, "provenance": provenance()}, options.out / "interference.json"
    )
    print(f"{'all measures':16s} {total:8.1f} s   (limit: {60 * MINUTES} s and {GIB} GiB at 200 facts)")
    return written


if __name__ == "__main__":
    print(main())

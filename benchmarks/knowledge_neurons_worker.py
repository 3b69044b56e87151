"""The package `knowledge-neurons` in a process of its own; started by `knowledge_neurons.py`, not by hand.

Arguments: model folder, prompt, answer, steps. Every line read from standard input names a way and a file; the scores
(layer, unit) go to the file, and a line of JSON with wall seconds, CPU seconds and the token ids to standard output.
"""

import json
import sys
import time

import numpy as np
import torch
from knowledge_neurons import KnowledgeNeurons
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast


def from_zero(activations: torch.Tensor, steps: int = 20, device: str = "cpu") -> torch.Tensor:
    """Activations (1, unit) at the points k / steps, k = 0 .. steps - 1, of the path from zero: (steps, unit)."""
    return torch.arange(steps, device=device)[:, None] / steps * activations


def opened(folder: str, way: str) -> KnowledgeNeurons:
    """The package as released, or set to the definition of `kn-code`: neurons after the activation, points k / steps.

    Both are attributes that the package reads; its loop over layers and batches, which is what takes time, is its own.
    """
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    found = KnowledgeNeurons(model, PreTrainedTokenizerFast.from_pretrained(folder), model_type="gpt2", device="cpu")
    if way == "aligned":
        found.input_ff_attr = "mlp.act"
        found.scaled_input = from_zero
    return found


def main() -> None:
    """Answer one line after the other until standard input ends."""
    folder, prompt, answer, steps = sys.argv[1:]
    torch.set_num_threads(1)
    ways = {way: opened(folder, way) for way in ("released", "aligned")}
    for line in sys.stdin:
        order = json.loads(line)
        found = ways[order["way"]]
        wall, cpu = time.perf_counter(), time.process_time()
        scores = found.get_scores(prompt, answer, steps=int(steps), pbar=False)
        seconds = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        np.save(order["file"], scores.detach().numpy())
        ids = {"prompt_ids": found.tokenizer(prompt)["input_ids"], "answer_ids": found.tokenizer.encode(answer)}
        print(json.dumps(seconds | ids), flush=True)


if __name__ == "__main__":
    main()

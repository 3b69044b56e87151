"""How fast is attribution? Five ways to score every node of every layer, side by side in one run, against the limit.

    python benchmarks/attribution.py            # prompts of 45 tokens on the default model
    python benchmarks/attribution.py --long     # 155 tokens as well
    python benchmarks/attribution.py --smoke    # a tiny random model, for tests

Repetitions alternate between the ways, so that a machine that slows down slows all of them. See `README.md` beside this
file for what each way computes.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from captum.attr import LayerIntegratedGradients
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import workbench as wb
from workbench.facts import general_text
from workbench.models import HookedModel
from workbench.results import provenance, save_json

STEPS = 7
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Way:
    """One way to attribute: its name, what it does, how many facts a call scores, and the call."""

    name: str
    what: str
    n_facts: int
    score: Callable[[], Tensor]
    dtype: torch.dtype = torch.float32


def captum_per_layer(hf: nn.Module, downs: list[nn.Module], ids: Tensor) -> Tensor:
    """LoKI's released form: Captum per layer, from the activations of a text of token 0, all positions moving."""

    def probability(input_ids: Tensor) -> Tensor:
        return hf(input_ids).logits[:, -1].softmax(-1)

    with torch.no_grad():
        target = int(probability(ids).argmax(-1))
    rows = []
    for module in downs:
        method = LayerIntegratedGradients(probability, module)
        scores = method.attribute(
            ids, baselines=torch.zeros_like(ids), target=target, n_steps=STEPS, method="riemann_trapezoid"
        )
        rows.append(scores[0, -1].detach())
    return torch.stack(rows)


def naive_loop(hf: Any, downs: list[nn.Module], ids: Tensor, answer: int) -> Tensor:
    """What `attribute` computes, one hooked forward and backward per layer, its steps as a batch.

    The unembedding reads its rows from contiguous memory: of a slice torch makes one product per row, whose backward
    pass adds 49,152 float32 terms in sequence on some processors and is wrong by 1e-4. One product is faster, too.
    """
    head = hf.get_output_embeddings()
    whole = head.register_forward_pre_hook(lambda module, args: (args[0].contiguous(),))
    last: list[Tensor] = []
    handles = [m.register_forward_hook(lambda module, args, output: last.append(output[0, -1])) for m in downs]
    with torch.no_grad():
        hf(ids, use_cache=False, logits_to_keep=1)
    for handle in handles:
        handle.remove()
    alphas = (torch.arange(STEPS) + 0.5) / STEPS
    rows = []
    for module, clean in zip(downs, last, strict=True):
        points = (alphas[:, None] * clean).requires_grad_()

        def put(module: nn.Module, args: Any, output: Tensor, points: Tensor = points) -> Tensor:
            return torch.cat([output[:, :-1], points[:, None]], 1)

        handle = module.register_forward_hook(put)
        logits = hf(ids.expand(STEPS, -1), use_cache=False, logits_to_keep=1).logits[:, -1]
        handle.remove()
        (gradient,) = torch.autograd.grad(logits.log_softmax(-1)[:, answer].sum(), points)
        rows.append(clean * gradient.mean(0))
    whole.remove()
    return torch.stack(rows)


def one_pass(model: HookedModel, facts: wb.FactSet) -> Tensor:
    """`workbench.attribute` with the settings of `naive_loop`."""
    found = wb.attribute(model, facts, method="ig", unit="node", steps=STEPS, rule="midpoint", progress=False)
    return torch.from_numpy(found["score"].values)


def long_facts(model: HookedModel, n_tokens: int, n_facts: int) -> wb.FactSet:
    """Shipped facts with plain prose before the prompt: prompts of exactly `n_tokens` tokens, answers of one."""
    passages = [passage.split() for passage in general_text()]
    chosen: list[dict[str, Any]] = []
    for number, fact in enumerate(wb.load_facts("world").filter(relations=["capital", "continent"])):
        words = passages[number % len(passages)]
        for count in range(1, n_tokens):
            prompt = f"{' '.join(words[:count]).rstrip('.,;:')}. {fact.prompt}"
            if fact.answer in prompt:
                break
            longer = wb.FactSet.from_records([{"id": fact.id, "prompt": prompt, "answer": fact.answer}], name="bench")
            (tokens,) = longer.tokenise(model.tokenizer)
            if len(tokens.prompt_ids) == n_tokens and len(tokens.answer_ids) == 1:
                chosen += longer.to_records()
                break
        if len(chosen) == n_facts:
            return wb.FactSet.from_records(chosen, name="bench")
    raise ValueError(f"Only {len(chosen)} of {n_facts} facts fit in {n_tokens} tokens under this tokenizer.")


def least_gflop(model: HookedModel, n_tokens: int) -> float:
    """Fewest operations (10^9) for all layers and steps of one fact, a multiplication and an addition being two.

    The prefix once; then every layer's steps as rows that start above their layer, forward and back to the activations;
    the unembedding of all rows, forward and back. Products with weights, and with keys and values.
    """
    block = sum(weight.numel() for weight in model.block(0).parameters() if weight.ndim == 2)
    layers, seen = model.n_layers, 4 * n_tokens * model.d_model
    prefix = layers * (n_tokens - 1) * (2 * block + seen / 2)
    rows = STEPS * layers * (layers - 1) / 2
    unembedding = STEPS * layers * 2 * model.W_U.numel()
    return (prefix + 2 * rows * (2 * block + seen) + 2 * unembedding) / 1e9


def matmul_gflops(size: int, dtype: torch.dtype) -> float:
    """Speed of one large matrix product, in 10^9 operations a second."""
    one = torch.randn(size, size).to(dtype)
    one @ one
    started = time.perf_counter()
    for _ in range(3):
        one @ one
    return 3 * 2 * size**3 / (time.perf_counter() - started) / 1e9


def ways_of(model: HookedModel, facts: wb.FactSet) -> list[Way]:
    """The ways, on the first fact and on all of them."""
    plain = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32).eval()
    first = facts.filter(ids=facts.ids[:1])
    (tokens,) = first.tokenise(model.tokenizer)
    ids, answer = torch.tensor([tokens.prompt_ids]), tokens.answer_ids[0]
    released = [plain.get_submodule(name) for name in model.down_names]
    frozen = [model.down_proj(layer) for layer in range(model.n_layers)]
    half = wb.load_model(str(model.path), dtype="bfloat16")
    return [
        Way("captum", "LoKI's released form", 1, lambda: captum_per_layer(plain, released, ids)),
        Way("naive", "hooks, a pass per layer", 1, lambda: naive_loop(model.hf, frozen, ids, answer)),
        Way("one fact", "workbench.attribute", 1, lambda: one_pass(model, first)),
        Way("many facts", "workbench.attribute", len(facts), lambda: one_pass(model, facts)),
        Way("bfloat16", "workbench.attribute", len(facts), lambda: one_pass(half, facts), torch.bfloat16),
    ]


def check(way: Way, scores: Tensor) -> None:
    """Raise unless a way gave real scores."""
    if not torch.isfinite(scores).all() or not scores.abs().max() > 0:
        raise RuntimeError(f"{way.name} gave scores that are zero or not finite; its time means nothing.")


def distance(one: Tensor, other: Tensor) -> float:
    """Largest difference, relative to the largest score."""
    return float((one - other).abs().max() / other.abs().max())


def spearman(one: Tensor, other: Tensor) -> list[float]:
    """Rank correlation over all units of all layers, for every fact."""
    ranks = [scores.flatten(1).argsort(1).argsort(1).double() for scores in (one, other)]
    return [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(*ranks, strict=True)]


def case(model: HookedModel, n_tokens: int, n_facts: int, repeats: int, size: int) -> dict[str, Any]:
    """Time all ways in turn on prompts of one length."""
    facts = long_facts(model, n_tokens, n_facts)
    ways = ways_of(model, facts)
    for way in ways[2:]:
        way.score()  # digests, thread pools, allocator
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    scores: dict[str, Tensor] = {}
    rates: dict[torch.dtype, list[float]] = {way.dtype: [] for way in ways}
    with tqdm(total=repeats * len(ways), unit="call", desc=f"{n_tokens} tokens") as bar:
        for _ in range(repeats):
            for dtype, measured in rates.items():
                measured.append(matmul_gflops(size, dtype))
            for way in ways:
                started = time.perf_counter()
                scores[way.name] = way.score()
                seconds[way.name].append(time.perf_counter() - started)
                check(way, scores[way.name])
                bar.update(1)
    agreement = distance(scores["one fact"][0], scores["naive"])
    if not max(agreement, distance(scores["many facts"][:1], scores["one fact"])) <= 1e-4:
        raise RuntimeError(f"workbench.attribute and the naive loop differ by {agreement:.1e}.")
    rate = {dtype: statistics.median(measured) for dtype, measured in rates.items()}
    least = least_gflop(model, n_tokens)
    alike = spearman(scores["many facts"], scores["bfloat16"])
    per_fact = {way.name: statistics.median(seconds[way.name]) / way.n_facts for way in ways}
    rows = [
        {
            "name": way.name,
            "what": way.what,
            "n_facts": way.n_facts,
            "seconds": seconds[way.name],
            "seconds_per_fact": per_fact[way.name],
            "faster_than_captum": per_fact["captum"] / per_fact[way.name],
            "faster_than_naive": per_fact["naive"] / per_fact[way.name],
            "faster_than_float32": per_fact["many facts"] / per_fact[way.name],
            "share_of_limit": least / rate[way.dtype] / per_fact[way.name],
            "largest_score": float(scores[way.name].abs().max()),
        }
        for way in ways
    ]
    speed = {str(dtype).removeprefix("torch."): value for dtype, value in rate.items()}
    limit = {"least_gflop": least, "matmul_gflops": speed}
    ranks = {"bfloat16_spearman_least": min(alike), "bfloat16_spearman_median": statistics.median(alike)}
    return {"n_tokens": n_tokens, "repeats": repeats, **limit, "naive_agreement": agreement, **ranks, "ways": rows}


def table(found: dict[str, Any]) -> str:
    """The cases as one markdown table."""
    lines = [
        "| tokens | way | facts | s per fact | against captum | against naive | share of the limit |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for one in found["cases"]:
        for way in one["ways"]:
            numbers = (
                f"{way['faster_than_captum']:.1f}x | {way['faster_than_naive']:.1f}x | {way['share_of_limit']:.2f}"
            )
            name = f"{way['name']} ({way['what']})"
            lines.append(
                f"| {one['n_tokens']} | {name} | {way['n_facts']} | {way['seconds_per_fact']:.3f} | {numbers} |"
            )
        for dtype, speed in one["matmul_gflops"].items():
            lines.append(
                f"| {one['n_tokens']} | limit in {dtype}: {one['least_gflop']:.3g} GFLOP at {speed:.0f} GFLOP/s "
                f"| 1 | {one['least_gflop'] / speed:.3f} | | | 1 |"
            )
        lines.append(
            f"| {one['n_tokens']} | ranks in bfloat16 and float32: Spearman at least "
            f"{one['bfloat16_spearman_least']:.3f}, median {one['bfloat16_spearman_median']:.3f} | | | | | |"
        )
    return "\n".join(lines)


def tiny_model(folder: Path) -> Path:
    """A random two-layer Llama with a tokenizer of one token a word, for `--smoke`."""
    facts = wb.load_facts("world").filter(relations=["capital", "continent"])
    text = " ".join([*general_text(), *(f"{fact.prompt} {fact.answer}" for fact in facts)])
    words = {word: i for i, word in enumerate(dict.fromkeys(["<unk>", *text.split()]))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), max_position_embeddings=256, **sizes))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(4)  # so that units matter
    model.save_pretrained(folder)
    return folder


def main(arguments: list[str] | None = None) -> Path:
    """Time the ways, print the table, write `attribution.json` and `attribution.md`, and give the path of the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="default's name, or a folder of safetensors")
    parser.add_argument("--repeats", type=int, default=2, help="alternating repetitions; the median is reported")
    parser.add_argument("--facts", type=int, default=16, help="facts in one call of the last way")
    parser.add_argument("--long", action="store_true", help="prompts of 155 tokens as well")
    parser.add_argument("--smoke", action="store_true", help="a tiny random model, one repetition")
    parser.add_argument("--out", type=Path, default=HERE / "out", help="folder of the JSON and the table")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        name = tiny_model(Path(scratch) / "tiny") if options.smoke else options.model
        model = wb.load_model(str(name), dtype="float32")
        if model.path is None:
            raise ValueError(f"{options.model} is no folder of safetensors, which plain transformers needs here.")
        repeats, n_facts, size = (1, 3, 128) if options.smoke else (options.repeats, options.facts, 2048)
        lengths = [45, 155] if options.long else [45]
        cases = [case(model, n_tokens, n_facts, repeats, size) for n_tokens in lengths]
    about = {"model": "tiny" if options.smoke else model.name, "threads": torch.get_num_threads(), "steps": STEPS}
    found = {**about, "provenance": provenance(), "cases": cases}
    written = save_json(found, options.out / "attribution.json")
    (options.out / "attribution.md").write_text(table(found) + "\n", encoding="utf-8")
    print(table(found))
    return written


if __name__ == "__main__":
    print(main())

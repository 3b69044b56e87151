"""Published definitions and exact effects, each against a second way: Captum, the papers' sums, zeroed weights."""

from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from captum.attr import LayerIntegratedGradients
from test_attribution import loop, run
from tiny import FACTS, default, random_model, tiny, tokenizer

from workbench.facts import FactSet, load_facts
from workbench.metrics import logprob, prob
from workbench.models import HookedModel, load_model

KINDS = ["gpt2", "llama", "qwen2", "gemma3_text", "opt", "gpt_neox"]
ONE_TOKEN = FACTS.filter(ids=["france", "gold", "hot"])


def captum(model: HookedModel, ids: torch.Tensor, n_steps: int = 7, layers: list[int] | None = None) -> np.ndarray:
    """What LoKI's released script computes: Captum on down-projections (all), read at the last position."""

    def probability(input_ids: torch.Tensor) -> torch.Tensor:
        return model.hf(input_ids, use_cache=False, **model.keeping(1)).logits[:, -1].softmax(-1)

    with torch.no_grad():
        target = int(probability(ids).argmax(-1))
    rows = []
    for layer in range(model.n_layers) if layers is None else layers:
        scores = LayerIntegratedGradients(probability, model.down_proj(layer)).attribute(
            ids, baselines=torch.zeros_like(ids), target=target, n_steps=n_steps, method="riemann_trapezoid"
        )
        rows.append(scores.reshape(-1, scores.shape[-1])[-1].detach().numpy())  # OPT flattens batch and position
    return np.stack(rows)


def worst(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("kind", KINDS)
def test_loki_code_equals_captum(kind: str) -> None:
    model = tiny(kind)
    ds = run(model, ONE_TOKEN, method="loki-code")
    for row, fact in enumerate(ONE_TOKEN.tokenise(model.tokenizer)):
        ids = torch.tensor([fact.prompt_ids])
        assert worst(ds["score"].values[row], captum(model, ids)) <= 1e-6
        assert worst(ds["score"].values[row], captum(model, ids, 8)) > 1e-3  # negative control


@pytest.mark.real
def test_loki_code_equals_captum_on_the_default_model() -> None:
    """In float64. In float32 both sides round, up to 3e-4 of the largest score apart, most of it Captum's rounding."""
    model = default("float64")
    facts = load_facts("world").filter(where=lambda fact: len(fact.prompt.split()) <= 4)[:3]
    ours = run(model, facts, method="loki-code")["score"].values
    for layer, scores, fact in zip((0, 14, 29), ours, facts.tokenise(model.tokenizer), strict=True):
        # Captum is slow: short prompts, each in another layer
        (theirs,) = captum(model, torch.tensor([fact.prompt_ids]), layers=[layer])
        scale = np.abs(scores).max()
        assert np.abs(scores[layer] - theirs).max() <= 1e-6 * scale
        assert np.abs(scores[(layer + 7) % 30] - theirs).max() > 1e-3 * scale  # negative control: another layer


@pytest.mark.real
@pytest.mark.parametrize("unit", ["node", "neuron"])
def test_in_float64_a_real_fact_equals_the_naive_loop_with_several_steps(unit: str) -> None:
    """In float32 the loop and the engine both round, and the jump in layer 0 makes up to 2e-5 of it."""
    facts = FactSet.from_records([{"prompt": "The chemical symbol for gold is", "answer": "Au"}])
    ours = run(default("float64"), facts, unit=unit, steps=3)["score"].values
    layers = [0, 14, 29]
    expected = loop(default("float64"), facts, unit, 3, layers=layers)
    assert worst(ours[:, layers], expected[:, layers]) <= 1e-6  # the scores are kept in float32
    assert worst(ours[:, [layer - 1 for layer in layers]], expected[:, layers]) > 1e-3  # negative control: other layers


@cache
def in_bfloat16(kind: str) -> HookedModel:
    """The tiny model in half precision."""
    return load_model(random_model(kind), tokenizer=tokenizer(), dtype="bfloat16")


@pytest.mark.parametrize("method", ["ig", "grad_x_act", "loki-code", "kn"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2", "opt"])
def test_bfloat16_ranks_units_as_float32_does(kind: str, method: str) -> None:
    """Rank correlation over all units of a fact; ablation is left out, whose differences drown in bfloat16."""
    steps = {"steps": 8} if method == "ig" else {}
    scores = [
        run(model, ONE_TOKEN, method=method, **steps)["score"].values for model in (tiny(kind), in_bfloat16(kind))
    ]
    for one, other in zip(*scores, strict=True):
        assert spearman(one, other) > 0.95
    assert abs(spearman(scores[0][0], scores[1][1])) < 0.9  # negative control: another fact


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """Rank correlation of all numbers of two arrays."""
    return float(pd.Series(one.ravel()).rank().corr(pd.Series(other.ravel()).rank()))


def path_gradient(model: HookedModel, ids: torch.Tensor, unit: str, layer: int, alpha: float, objective, target: int):
    """(activation, gradient) of one layer's units at the last position, its activations scaled by alpha."""
    seen: list[torch.Tensor] = []

    def scaled(value: torch.Tensor) -> torch.Tensor:
        leaf = (alpha * value[:, -1]).detach().requires_grad_()
        seen.extend([value[0, -1].detach(), leaf])
        return torch.cat([value[:, :-1], leaf[:, None]], 1)

    with model.patched(unit, {layer: scaled}):
        logits = model.hf(ids, use_cache=False).logits[:, -1]
    objective(logits, torch.tensor([target])).sum().backward(inputs=[seen[1]])
    return seen[0].numpy(), seen[1].grad[0].numpy()


@pytest.mark.parametrize("kind", ["gpt2", "gemma3_text", "opt"])
@pytest.mark.parametrize(("method", "first"), [("kn", 1), ("kn-code", 0)])
def test_knowledge_neurons_equal_the_sum_as_written(kind: str, method: str, first: int) -> None:
    """`(a/m) sum_{k=first..} dP(k/m a)/da`, m = 20."""
    model, fact = tiny(kind), ONE_TOKEN.tokenise(tiny(kind).tokenizer)[0]
    ours = run(model, ONE_TOKEN.filter(ids=["france"]), method=method)["score"].values[0]
    ids, target = torch.tensor([fact.prompt_ids]), fact.answer_ids[0]
    for layer in range(model.n_layers):
        parts = [path_gradient(model, ids, "neuron", layer, k / 20, prob, target) for k in range(first, first + 20)]
        written = parts[0][0] / 20 * sum(gradient for _, gradient in parts)
        np.testing.assert_allclose(ours[layer], written, atol=1e-5 * np.abs(ours).max())


def test_loki_paper_is_the_mean_gradient_without_the_activation() -> None:
    model, fact = tiny("llama"), ONE_TOKEN.tokenise(tiny("llama").tokenizer)[0]
    ours = run(model, ONE_TOKEN.filter(ids=["france"]), method="loki-paper")["score"].values[0]
    ids, target = torch.tensor([fact.prompt_ids]), fact.answer_ids[0]
    for layer in range(model.n_layers):
        parts = [path_gradient(model, ids, "node", layer, k / 7, logprob, target)[1] for k in range(1, 8)]
        np.testing.assert_allclose(ours[layer], np.mean(parts, 0), atol=1e-5 * np.abs(ours).max())


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2", "opt"])
@pytest.mark.parametrize("unit", ["node", "neuron"])
def test_ablation_equals_weights_set_to_zero(kind: str, unit: str) -> None:
    """A neuron is a column of the down-projection, a node a row with its bias; every position loses it."""
    model = tiny(kind)
    facts = FACTS.filter(ids=["france", "sky"])
    ours = run(model, facts, method="ablation", unit=unit, scope="all")["score"].values
    last = run(model, facts, method="ablation", unit=unit)["score"].values
    others: list[float] = []
    for row, fact in enumerate(facts.tokenise(model.tokenizer)):
        ids, target = torch.tensor([fact.ids[:-1]]), torch.tensor([fact.answer_ids])
        last_prompt = len(fact.prompt_ids) - 1
        clean = logprob(model.logits(ids)[:, last_prompt:], target).sum()
        if len(fact.answer_ids) > 1:  # the answer's own positions keep the unit: a hook instead of the weights
            for layer, index in [(0, 3), (1, 0), (2, 17)]:

                def zeroed(value, index=index, last=last_prompt):
                    value = value.clone()
                    value[:, : last + 1, index] = 0
                    return value

                with model.patched(unit, {layer: zeroed}):
                    effect = float(clean - logprob(model.logits(ids)[:, last_prompt:], target).sum())
                assert ours[row, layer, index] == pytest.approx(effect, abs=5e-6)
            continue
        for layer, index in [(0, 3), (1, 0), (2, 17)]:
            module = model.down_proj(layer)
            rows_out = type(module).__name__ == "Conv1D"
            places = [module.weight.data[:, index] if (unit == "node") == rows_out else module.weight.data[index]]
            if unit == "node" and module.bias is not None:
                places.append(module.bias.data[index : index + 1])
            kept = [place.clone() for place in places]
            try:
                for place in places:
                    place.zero_()
                effect = float(clean - logprob(model.logits(ids)[:, -1:], target).sum())
            finally:
                for place, old in zip(places, kept, strict=True):
                    place.copy_(old)
            assert ours[row, layer, index] == pytest.approx(effect, abs=5e-6)
            others.append(abs(last[row, layer, index] - effect))
    assert max(others) > 1e-4  # negative control: the last position alone is another number


def test_random_is_drawn_by_seed_and_fact_and_activation_is_what_the_model_says() -> None:
    model = tiny("llama")
    one, again, other = (run(model, method="random", seed=seed)["score"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert abs(float(np.corrcoef(one.values.ravel(), other.values.ravel())[0, 1])) < 0.1
    alone = run(model, FACTS.filter(ids=["gold"]), method="random", seed=1)["score"]
    np.testing.assert_array_equal(alone.sel(fact="gold"), one.sel(fact="gold"))
    assert float(one.std()) == pytest.approx(1, abs=0.05)
    seen: list[torch.Tensor] = []
    (fact,) = FACTS.filter(ids=["gold"]).tokenise(model.tokenizer)
    with model.patched("node", {1: lambda value: seen.append(value[0, -1]) or value}):
        model.logits(torch.tensor([fact.prompt_ids]))
    activation = run(model, FactSet("gold", FACTS.filter(ids=["gold"]).facts), method="activation")["score"]
    np.testing.assert_allclose(activation.values[0, 1], seen[0], atol=1e-6)

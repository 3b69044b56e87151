"""The one-pass engine against a naive loop: one hooked forward and backward per fact, layer and step."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from tiny import ARCHITECTURES, TOKENISED, random_model, tiny, tokenizer

from workbench import engine
from workbench.engine import (
    attention,
    calls,
    check_engine,
    clean_gradients,
    make_batch,
    queries,
    reading,
    run_clean,
    run_queries,
)
from workbench.facts import TokenisedFact
from workbench.metrics import OBJECTIVES, logprob
from workbench.models import load_model

ALPHAS = (0.25, 0.75)


def naive(model, fact, unit, layer, alpha, scope, objective):
    """F and its gradient with the activations of one layer scaled, by plain torch hooks on the unpadded text."""
    ids = torch.tensor([fact.prompt_ids + fact.answer_ids[:-1]])
    last = len(fact.prompt_ids) - 1
    moved = slice(last if scope == "last" else 0, last + 1)
    leaf = []

    def scale(value):
        value = value.reshape(1, ids.shape[1], -1)
        leaf.append((alpha * value[:, moved]).detach().requires_grad_())
        return torch.cat([value[:, : moved.start], leaf[0], value[:, moved.stop :]], 1)

    module = model.hf.get_submodule(model.down_names[layer])
    if unit == "node":
        handle = module.register_forward_hook(lambda m, args, out: scale(out).reshape(out.shape))
    else:
        handle = module.register_forward_pre_hook(lambda m, args: (scale(args[0]).reshape(args[0].shape),))
    try:
        logits = model.hf(ids, use_cache=False).logits[:, last:]
    finally:
        handle.remove()
    value = objective(logits, torch.tensor([fact.answer_ids])).sum()
    return value.item(), torch.autograd.grad(value, leaf[0])[0][0]


def compare(model, facts, unit, scope, objective=logprob):
    """Largest differences of values and of gradients (relative to the fact's largest) between engine and loop."""
    batch = make_batch(facts, model.device, scope)
    clean = run_clean(model, batch, unit)
    alpha = torch.tensor(ALPHAS)[None, :, None, None]
    points = {layer: (alpha * clean.activation[layer][:, None]).requires_grad_() for layer in range(model.n_layers)}
    values = run_queries(model, clean, unit, points, objective)
    gradients = torch.autograd.grad(values.sum(), list(points.values()))
    worst_value = worst_gradient = 0.0
    for row, fact in enumerate(facts):
        loop = {
            (layer, k): naive(model, fact, unit, layer, alpha, scope, objective)
            for layer in range(model.n_layers)
            for k, alpha in enumerate(ALPHAS)
        }
        largest = max(float(g.abs().max()) for _, g in loop.values())
        for (layer, step), (value, gradient) in loop.items():
            ours = gradients[layer][row, step][-len(gradient) :]
            worst_value = max(worst_value, abs(values[row, layer * 2 + step].item() - value) / max(1, abs(value)))
            worst_gradient = max(worst_gradient, float((ours - gradient).abs().max()) / largest)
    return worst_value, worst_gradient


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("unit", ["node", "neuron"])
def test_queries_equal_the_naive_loop_with_and_without_padding(kind: str, unit: str) -> None:
    for facts in (TOKENISED, TOKENISED[:1]):
        value, gradient = compare(tiny(kind), facts, unit, "last")
        assert value <= 1e-5  # measured: at most 4e-7
        assert gradient <= 1e-5  # measured: at most 3e-6


@pytest.mark.parametrize("kind", ["gpt2", "mistral", "gemma3_text"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_all_positions_and_every_objective_equal_the_naive_loop(kind: str, objective: str) -> None:
    value, gradient = compare(tiny(kind), TOKENISED, "node", "all", OBJECTIVES[objective])
    assert value <= 1e-5
    assert gradient <= 1e-5


def test_the_comparison_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: queries that see each other, and a window that is forgotten, are noticed."""
    model = tiny("mistral")
    original = calls.QueryCalls.__init__

    def blind(self, *args):
        original(self, *args)
        self.own = torch.ones_like(self.own)

    monkeypatch.setattr(queries, "query_attention", lambda *args: nullcontext())  # the model's own, with the mask
    assert compare(model, TOKENISED, "node", "last")[1] <= 1e-5
    monkeypatch.setattr(calls.QueryCalls, "__init__", blind)
    assert compare(model, TOKENISED, "node", "last")[1] > 1e-2
    monkeypatch.undo()
    monkeypatch.setattr(calls.QueryCalls, "_mask", lambda self, value, old=calls.QueryCalls._mask: old(self, None))
    assert compare(model, TOKENISED, "node", "last")[1] > 1e-2


@pytest.mark.parametrize(("tail", "softcap"), [(1, None), (3, None), (2, 5.0)])
def test_query_attention_equals_masked_attention(tail: int, softcap: float | None) -> None:
    """Against the formula with every score made and masked; without the mask of the prefix it is another number."""
    generator = torch.Generator().manual_seed(tail)
    prefix, n, heads, kv_heads = 5, 4, 6, 2
    rows = n * tail
    query = torch.randn(2, heads, rows, 8, generator=generator)
    key, value = (torch.randn(2, kv_heads, prefix + rows, 8, generator=generator) for _ in range(2))
    own = torch.block_diag(*[torch.ones(tail, tail).tril()] * n)
    seen = torch.cat([torch.rand(2, rows, prefix, generator=generator) < 0.7, own.bool().expand(2, -1, -1)], 2)
    mask = torch.zeros(2, 1, rows, prefix + rows).masked_fill(~seen[:, None], -1e30)
    full_key, full_value = (x.repeat_interleave(heads // kv_heads, 1) for x in (key, value))
    scores = query @ full_key.mT * 0.3
    scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
    expected = ((scores + mask).softmax(-1) @ full_value).transpose(1, 2)
    module = torch.nn.Identity()
    options = {"prefix": prefix, "tail": tail, "scaling": 0.3, "softcap": softcap}
    ours, _ = attention.attend(module, query, key, value, mask, **options)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)
    blind, _ = attention.attend(module, query, key, value, mask * (torch.arange(prefix + rows) >= prefix), **options)
    assert float((blind - expected).abs().max()) > 1e-2


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("bias", [True, False])
def test_readout_equals_the_objective_of_the_logits(objective: str, bias: bool, monkeypatch) -> None:
    """Values and gradients, in pieces of two rows, against autograd through the logits."""
    monkeypatch.setattr(reading, "PIECE", 2 * 11)
    torch.manual_seed(0)
    head, hidden, target = torch.nn.Linear(6, 11, bias=bias), torch.randn(7, 6), torch.randint(11, (7,))
    slopes = torch.randn(7)
    pairs = []
    for read in (
        lambda x: OBJECTIVES[objective](head(x), target),
        lambda x: reading.readout(head, x, target, OBJECTIVES[objective]),
        lambda x: reading.readout(head, x, target.flip(0), OBJECTIVES[objective]),  # negative control
    ):
        leaf = hidden.clone().requires_grad_()
        value = read(leaf)
        pairs.append((value.detach(), *torch.autograd.grad(value @ slopes, leaf)))
    for ours, autograd in zip(pairs[1], pairs[0], strict=True):
        torch.testing.assert_close(ours, autograd, atol=1e-6, rtol=1e-5)
    assert float((pairs[2][1] - pairs[0][1]).abs().max()) > 1e-2


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_some_facts_of_a_batch_give_the_same_values(kind: str) -> None:
    """Rows of a clean run, also twice and in another order."""
    model = tiny(kind)
    clean = run_clean(model, make_batch(TOKENISED, model.device), "node")
    rows = torch.tensor([2, 0, 0])
    points = {1: 0.3 * clean.activation[1][:, None]}
    whole = run_queries(model, clean, "node", points, logprob)
    part = run_queries(model, clean.of(rows), "node", {1: points[1][rows]}, logprob)
    torch.testing.assert_close(part, whole[rows], atol=2e-6, rtol=1e-6)
    assert float((part - whole).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_tokens_that_all_prompts_begin_with_are_run_once(kind: str) -> None:
    """Prompts of different lengths with the same beginning, against each prompt alone, which shares nothing."""
    model = tiny(kind)
    beginning = (1, 4, 9, 5, 17, 6, 7, 20, 11)
    facts = [
        TokenisedFact("long", (*beginning, 12, 30, 8), (10, 13)),
        TokenisedFact("short", (*beginning, 14), (16,)),
        TokenisedFact("middle", (*beginning, 21, 22), (15,)),
    ]
    batch = make_batch(facts, model.device)
    assert batch.shared == len(beginning)
    fed: list[tuple[int, ...]] = []
    hook = model.block(0).register_forward_hook(lambda module, args, output: fed.append(model_rows(output)))
    clean = run_clean(model, batch, "node")
    hook.remove()
    assert fed == [(1, len(beginning)), (3, 4)]  # once, then what comes after in the longest
    points = {layer: 0.3 * clean.activation[layer][:, None] for layer in range(model.n_layers)}
    values = run_queries(model, clean, "node", points, logprob)
    gradients = clean_gradients(model, clean, "node", logprob)
    for row, fact in enumerate(facts):
        alone = run_clean(model, make_batch([fact], model.device), "node")
        torch.testing.assert_close(alone.activation[:, 0], clean.activation[:, row], atol=1e-5, rtol=1e-4)
        points = {layer: 0.3 * alone.activation[layer][:, None] for layer in range(model.n_layers)}
        torch.testing.assert_close(
            run_queries(model, alone, "node", points, logprob)[0], values[row], atol=1e-5, rtol=1e-5
        )
        theirs = clean_gradients(model, alone, "node", logprob)[:, 0]
        torch.testing.assert_close(theirs, gradients[:, row], atol=1e-5, rtol=1e-4)
    changed = replace(facts[0], prompt_ids=(*beginning[:-1], 30, *facts[0].prompt_ids[len(beginning) :]))
    other = run_clean(model, make_batch([changed], model.device), "node")
    assert float((other.activation[:, 0] - clean.activation[:, 0]).abs().max()) > 1e-3  # the beginning matters


def model_rows(output: object) -> tuple[int, ...]:
    """(batch, columns) of what a block gave."""
    hidden = output if isinstance(output, torch.Tensor) else output[0]  # type: ignore[index]
    return tuple(hidden.shape[:2])


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt"])
def test_chunks_of_any_layers_give_the_same_values(kind: str) -> None:
    model = tiny(kind)
    clean = run_clean(model, make_batch(TOKENISED, model.device), "node")
    points = {layer: 0.5 * clean.activation[layer][:, None] for layer in range(model.n_layers)}
    together = run_queries(model, clean, "node", points, logprob)
    for layer, point in points.items():
        alone = run_queries(model, clean, "node", {layer: point}, logprob)
        torch.testing.assert_close(alone[:, 0], together[:, layer], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["gpt2", "qwen3", "opt"])
def test_gradients_of_the_clean_run_equal_the_loop_at_the_end_of_the_path(kind: str) -> None:
    model = tiny(kind)
    clean = run_clean(model, make_batch(TOKENISED, model.device), "neuron")
    gradients = clean_gradients(model, clean, "neuron", logprob)
    for row, fact in enumerate(TOKENISED):
        for layer in range(model.n_layers):
            _, expected = naive(model, fact, "neuron", layer, 1.0, "last", logprob)
            torch.testing.assert_close(gradients[layer, row], expected, rtol=1e-4, atol=1e-6)


def test_a_block_that_is_called_by_keyword_gets_what_it_is_called_with(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(random_model("llama"), tokenizer=tokenizer())
    batch = make_batch(TOKENISED[:1], torch.device("cpu"))
    expected = run_clean(model, batch, "node")
    kind = type(model.hf.model.layers[0])
    plain = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda self, hidden, **rest: plain(self, hidden_states=hidden, **rest))
    found = run_clean(model, batch, "node")
    assert torch.equal(found.logits, expected.logits)
    assert [call.keys() for call in found.calls] == [call.keys() for call in expected.calls]


def test_reading_leaves_no_trace() -> None:
    model = load_model(random_model("llama"), tokenizer=tokenizer())
    ids = torch.tensor([[4, 5, 6]])
    before = model.logits(ids)
    check_engine(model)
    assert torch.equal(model.logits(ids), before)
    assert not any("forward" in module.__dict__ for module in model.hf.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())


def test_an_architecture_that_the_engine_does_not_reproduce_is_refused_by_name() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "gpt_neo", vocab_size=48, hidden_size=32, num_layers=2, num_heads=4, window_size=3,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = load_model(AutoModelForCausalLM.from_config(config).eval(), tokenizer=tokenizer())
    with pytest.raises(ValueError, match=r"GPTNeoForCausalLM.*engine"):
        check_engine(model)


def test_a_mask_table_that_a_full_pass_would_run_out_of_is_noticed() -> None:
    """A few queries fit the window of gpt_neo's local layers; the many of a pass do not."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "gpt_neo", vocab_size=48, hidden_size=32, num_layers=2, num_heads=4, window_size=64,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=256, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = load_model(AutoModelForCausalLM.from_config(config).eval(), tokenizer=tokenizer())
    with pytest.raises(ValueError, match="masks by a table of its own"):
        check_engine(model)


def test_the_check_passes_on_every_architecture_and_notices_a_broken_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ARCHITECTURES:
        check_engine(tiny(kind))
    shared, arguments = engine.clean._shared_cache, engine.calls.QueryCalls.arguments

    def flipped(model, batch):
        """The shared keys, but those of another order."""
        cache = shared(model, batch)
        for layer in cache.layers:
            layer.keys = layer.keys.flip(2)
        return cache

    def late(self, layer, n_rows):
        """What the block before was called with, masks of a local layer for those of a global one."""
        return arguments(self, max(layer - 1, 0), n_rows)

    for place, name, broken in ((engine.clean, "_shared_cache", flipped), (engine.calls.QueryCalls, "arguments", late)):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, broken)
            with pytest.raises(ValueError, match="engine and plain hooks differ"):
                check_engine(load_model(random_model("gemma3_text", seed=3), tokenizer=tokenizer()))
    check_engine(load_model(random_model("gemma3_text", seed=3), tokenizer=tokenizer()))


def test_attention_that_gives_no_numbers_under_padding_is_refused_by_name() -> None:
    """Eager attention in float64: the mask's lowest number of float64 overflows where a row sees padding alone."""
    eager = random_model("llama").double()
    eager.config._attn_implementation = "eager"
    model = load_model(eager, tokenizer=tokenizer(), dtype="float64")
    with pytest.raises(ValueError, match=r"tiny-llama \(LlamaForCausalLM\): its numbers are not finite where texts"):
        check_engine(model)
    check_engine(load_model(random_model("llama"), tokenizer=tokenizer(), dtype="float64"))

"""`HookedModel`: its promises, checked against plain transformers, and what it refuses."""

import copy

import pytest
import torch
from tiny import ARCHITECTURES, random_model, saved, tiny, tokenizer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
)

from workbench.models import load_model, loading, pad_batch, promises

IDS = torch.tensor([[4, 5, 6, 7, 8], [9, 10, 11, 12, 13]])


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_widths_come_from_tensors_and_logits_equal_plain_transformers(kind: str) -> None:
    plain = random_model(kind)
    model = load_model(plain, tokenizer=tokenizer())
    d_mlp = 128 if kind in ("gpt2", "bloom") else 40
    assert (model.n_layers, model.d_model, model.d_mlp, model.d_vocab) == (3, 32, d_mlp, plain.config.vocab_size)
    with torch.no_grad():
        expected = plain(IDS).logits
    torch.testing.assert_close(model.logits(IDS), expected, rtol=0, atol=0)
    bridged = model.bridge(IDS, prepend_bos=False)
    assert (bridged - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_what_a_notebook_shows_of_a_model_is_one_line() -> None:
    shown = repr(tiny("llama"))
    assert "\n" not in shown
    for part in ("3 layers", "32 nodes", "40 neurons", "float32 on cpu"):
        assert part in shown


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_no_logits(kind: str, side: str) -> None:
    model = tiny(kind)
    rows = [[4, 5, 6, 7, 8, 9], [10, 11, 12]]
    ids, mask = pad_batch(rows, side=side)
    padded = model.logits(ids, mask)
    for row, sequence in enumerate(rows):
        alone = model.logits(torch.tensor([sequence]))[0]
        torch.testing.assert_close(padded[row][mask[row].bool()], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_last_logits_are_those_of_all(kind: str) -> None:
    model = tiny(kind)
    torch.testing.assert_close(model.logits(IDS, last=2), model.logits(IDS)[:, -2:])


@pytest.mark.parametrize("kind", ["gpt2", "gemma3_text", "opt"])
def test_bridge_sees_the_same_units_under_the_fields_names(kind: str) -> None:
    model = tiny(kind)
    for unit, name in (("node", "hook_out"), ("neuron", "hook_in")):
        seen = {}

        def keep(value: torch.Tensor, seen: dict = seen) -> torch.Tensor:
            seen["ours"] = value.detach().clone()
            return value

        with model.patched(unit, {1: keep}):
            model.logits(IDS)
        hook = f"blocks.1.mlp.out.{name}"
        _, cache = model.bridge.run_with_cache(IDS, prepend_bos=False, names_filter=[hook])
        torch.testing.assert_close(cache[hook].reshape(seen["ours"].shape), seen["ours"], rtol=1e-4, atol=1e-5)


def test_what_the_user_gave_is_left_untouched() -> None:
    plain = random_model("llama").train()
    names, flags = [n for n, _ in plain.named_modules()], [p.requires_grad for p in plain.parameters()]
    weights = {n: w.clone() for n, w in plain.state_dict().items()}
    model = load_model(plain, tokenizer=tokenizer(), dtype="bfloat16")
    with model.patched("node", {0: torch.zeros_like}):
        model.logits(IDS)
    assert [n for n, _ in plain.named_modules()] == names
    assert [p.requires_grad for p in plain.parameters()] == flags
    assert plain.training
    assert all(torch.equal(weights[n], w) for n, w in plain.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in plain.modules())
    shared = load_model(plain, tokenizer=tokenizer())
    assert shared.W_E.data_ptr() == plain.get_input_embeddings().weight.data_ptr()


def test_no_hook_outlives_its_with_also_after_an_error() -> None:
    model = tiny("opt")
    before = model.logits(IDS)
    with pytest.raises(RuntimeError, match="stop"), model.patched("neuron", {0: torch.zeros_like}):
        changed = model.logits(IDS)
        raise RuntimeError("stop")
    assert not torch.equal(changed, before)
    assert torch.equal(model.logits(IDS), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())


def test_residual_stream_is_that_of_hidden_states() -> None:
    model = tiny("llama")
    positions = torch.tensor([2, 4])
    ours = model.resid_post(IDS, None, positions)
    with torch.no_grad():
        states = model.hf(IDS, output_hidden_states=True).hidden_states
    for layer in range(model.n_layers - 1):  # the last of hidden_states is after the final norm
        torch.testing.assert_close(ours[layer], states[layer + 1][torch.arange(2), positions])
    final = model.hf.lm_head(model.hf.model.norm(ours[-1]))
    torch.testing.assert_close(final, model.logits(IDS)[torch.arange(2), positions])


def test_digest_follows_the_weights_and_nothing_else() -> None:
    first, second = random_model("gpt2"), random_model("gpt2")
    digest = load_model(first, tokenizer=tokenizer()).digest
    assert load_model(second, tokenizer=tokenizer()).digest == digest
    with torch.no_grad():
        second.transformer.h[2].mlp.c_proj.weight[0, 0] += 1e-3
    assert load_model(second, tokenizer=tokenizer()).digest != digest


def test_folder_opens_and_says_where_it_was(tmp_path) -> None:
    model = load_model(str(saved(tmp_path)))
    assert model.path == tmp_path
    assert model.digest == tiny("llama").digest


def test_encoder_and_others_are_refused_by_name() -> None:
    small = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", **small, intermediate_size=16))
    with pytest.raises(ValueError, match=r"BertLMHeadModel.*later tokens change earlier ones"):
        load_model(bert, tokenizer=tokenizer())
    t5 = AutoModelForSeq2SeqLM.from_config(
        AutoConfig.for_model("t5", vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    with pytest.raises(ValueError, match="T5ForConditionalGeneration, an encoder-decoder"):
        load_model(t5, tokenizer=tokenizer())
    mixtral = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("mixtral", **small, intermediate_size=16, num_local_experts=2, num_key_value_heads=2)
    )
    with pytest.raises(ValueError, match="mixture of 2 experts"):
        load_model(mixtral, tokenizer=tokenizer())
    headless = AutoModel.from_config(AutoConfig.for_model("gpt2", **ARCHITECTURES["gpt2"]))
    with pytest.raises(ValueError, match="no language-model head"):
        load_model(headless, tokenizer=tokenizer())
    with pytest.raises(ValueError, match="needs its tokenizer"):
        load_model(random_model("gpt2"))


def test_a_model_that_sees_as_well_is_refused_by_name_before_anything_is_fetched(monkeypatch) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    eyes = {**small, "model_type": "clip_vision_model", "image_size": 16, "patch_size": 8}
    config = AutoConfig.for_model("llava", text_config={**small, "vocab_size": 40, "model_type": "llama"},
                                  vision_config=eyes)  # fmt: skip
    monkeypatch.setattr(loading, "boot", lambda *args: pytest.fail("TransformerLens was asked"))
    with pytest.raises(ValueError, match="LlavaForConditionalGeneration, which sees or hears as well"):
        load_model(AutoModelForImageTextToText.from_config(config), tokenizer=tokenizer())


@pytest.mark.parametrize("kept", ["parameter", "buffer"])  # as bitsandbytes keeps them, and as GPTQ does
def test_a_loaded_model_with_quantised_weights_is_refused_by_name(kept: str) -> None:
    hf = random_model("llama")
    down = hf.model.layers[1].mlp.down_proj
    if kept == "parameter":
        down.weight = torch.nn.Parameter(torch.ones(32, 40, dtype=torch.int8), requires_grad=False)
    else:
        down.register_buffer("qweight", torch.ones(5, 32, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"is a LlamaForCausalLM whose .*down_proj\.\w+ is int\d+: it is quant"):
        load_model(hf, tokenizer=tokenizer())


@pytest.mark.parametrize("kind", ["gpt2", "llama"])  # TransformerLens takes the joint projection of gpt2 apart
def test_opening_a_model_draws_nothing_from_the_users_generator(kind: str) -> None:
    hf = random_model(kind)
    before = torch.get_rng_state()
    load_model(hf, tokenizer=tokenizer())
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_that_are_not_finite_are_refused_by_name() -> None:
    model = random_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight .* has 1 NaN"):
        load_model(model, tokenizer=tokenizer())


def test_broken_promises_are_found() -> None:
    model = copy.copy(tiny("llama"))
    object.__setattr__(model, "bridge", tiny("qwen2").bridge)
    with pytest.raises(ValueError, match="bridge and plain transformers differ"):
        promises.check_promises(model)
    with pytest.raises(ValueError, match='unit must be "node"'):
        model.width("attention")


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, 64),
        (
            {
                "rope_type": "longrope", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16,
                "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
            },
            16,
        ),
        ({"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, 64),
    ],
    ids=["dynamic", "longrope", "linear"],
)  # fmt: skip
def test_rotary_tables_that_change_with_the_longest_text_end_the_context(rope, expected) -> None:
    """A text beyond the limit changes what is read of its first tokens, but where the table stays the same."""
    plain = random_model("llama", rope_parameters=rope)
    assert load_model(plain, tokenizer=tokenizer()).max_tokens == expected
    text = torch.arange(2 * expected)[None] % 30 + 4
    with torch.no_grad():
        within, beyond = (plain(text[:, :n]).logits[:, :4] for n in (expected, 2 * expected))
    same = bool((within - beyond).abs().max() < 1e-4)
    assert same == (rope["rope_type"] == "linear")


def test_what_is_no_model_is_said_so() -> None:
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(random_model("llama").config)
    for given, sentence in (
        (None, "not a NoneType"),
        (torch.nn.Linear(2, 2), "A Linear is no transformers model"),
        (meta, "meta device"),
    ):
        with pytest.raises(ValueError, match=sentence):
            load_model(given, tokenizer=tokenizer())

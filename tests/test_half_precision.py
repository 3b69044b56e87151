"""Half precision hides no fault: what float32 refuses is refused in bfloat16 and float16 too, and nothing else."""

from typing import Any

import pytest
import torch
from tiny import ARCHITECTURES, WORDS, random_model, tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from workbench.engine import attention, check, check_engine
from workbench.models import in_float32, load_model, loading

IDS = torch.tensor([[4, 5, 6, 7, 8]])


def falcon(alibi: bool) -> Any:
    """With ALiBi the bridge leaves its biases out, by a few hundredths of the largest logit."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "falcon", vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=3, num_attention_heads=4, alibi=alibi,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    return model


def tensors(model: Any) -> dict[str, torch.Tensor]:
    """Weights and buffers, those of rotary positions among them."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_float32_refuses_half_precision_refuses(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"FalconForCausalLM: .* differ by .* of the largest logit"):
        load_model(falcon(alibi=True), tokenizer=tokenizer(), dtype=dtype)
    check_engine(load_model(falcon(alibi=False), tokenizer=tokenizer(), dtype=dtype))
    if dtype == "bfloat16":  # negative control: its own rounding alone hides the fault
        monkeypatch.setattr(loading, "HALF", ())
        load_model(falcon(alibi=True), tokenizer=tokenizer(), dtype=dtype)


def test_an_engine_that_is_nearly_right_is_refused_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = attention.attend

    def nearly(*args: Any, **kwargs: Any) -> Any:
        out, weights = attend(*args, **kwargs)
        return out * 1.002, weights

    model = load_model(random_model("qwen2"), tokenizer=tokenizer(), dtype="bfloat16")
    monkeypatch.setattr(attention, "attend", nearly)
    with pytest.raises(ValueError, match=r"tiny-qwen2 \(Qwen2ForCausalLM\): the attribution engine and plain hooks"):
        check_engine(model)
    monkeypatch.setattr(check, "HALF", ())  # negative control
    check_engine(model)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_good_architectures_open_and_the_float32_layers_are_theirs(kind: str) -> None:
    plain = random_model(kind).bfloat16()
    before = {name: tensor.clone() for name, tensor in tensors(plain).items()}
    model = load_model(plain, tokenizer=tokenizer())
    check_engine(model)
    short = in_float32(model)
    assert (short.dtype, short.n_layers, model.n_layers) == (torch.float32, 2, 3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(plain).items())
    assert {tensor.dtype for tensor in plain.parameters()} == {torch.bfloat16}
    full = load_model(random_model(kind), tokenizer=tokenizer(), dtype="float32")
    with torch.no_grad():
        for name, tensor in tensors(full.hf).items():
            tensor.copy_(before[name])
    positions = torch.tensor([4])
    expected = full.resid_post(IDS, None, positions)[:2]
    torch.testing.assert_close(short.resid_post(IDS, None, positions), expected, rtol=1e-5, atol=1e-5)
    assert float((model.resid_post(IDS, None, positions)[:2].float() - expected).abs().max()) > 1e-4


def test_a_kind_of_layer_that_comes_late_is_among_those_in_float32() -> None:
    kinds = ["sliding_attention"] * 3 + ["full_attention", "sliding_attention"]
    config = random_model("gemma3_text", num_hidden_layers=5, layer_types=kinds)
    assert in_float32(load_model(config, tokenizer=tokenizer(), dtype="bfloat16")).n_layers == 4


def test_the_vocabulary_is_cut_where_the_padding_token_comes_last() -> None:
    model = load_model(
        random_model("llama", vocab_size=1200, pad_token_id=1199), tokenizer=tokenizer(), dtype="bfloat16"
    )
    short = in_float32(model)
    assert short.d_vocab == 1000
    assert short.logits(IDS).shape == (1, 5, 1000)

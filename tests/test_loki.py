import copy
import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
)
from transformers.pytorch_utils import Conv1D

from workbench.loki import (
    LokiConfig,
    LokiLayer,
    adapter_config,
    down_projections,
    folding,
    sites,
    trainable_parameters,
)
from workbench.loki.sites import Site
from workbench.selection import Selection

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

WIDTHS = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 40, "pad_token_id": 0}
GATED = {**WIDTHS, "intermediate_size": 24, "num_key_value_heads": 1}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
ENDS = {"bos_token_id": 0, "eos_token_id": 0}
CONFIGS = {
    "gpt2": GPT2Config(n_embd=16, n_head=2, n_layer=2, n_inner=24, vocab_size=40, **NO_DROPOUT, **ENDS),
    "llama": LlamaConfig(**GATED),
    "qwen2": Qwen2Config(**GATED),
    "gemma3": Gemma3TextConfig(**GATED, head_dim=8),
    "opt": OPTConfig(**WIDTHS, ffn_dim=24, word_embed_proj_dim=16, dropout=0.0),
    "phi3": Phi3Config(**GATED, **ENDS),
}
FAMILIES = ("gpt2", "llama", "qwen2", "gemma3", "opt")
VARIANTS = {
    "node": {"unit": "node"},
    "node_low_rank": {"unit": "node", "r": 2, "loki_alpha": 3.0},
    "neuron": {"unit": "neuron"},
    "neuron_keys": {"unit": "neuron", "train_keys": True},
    "neuron_keys_low_rank": {"unit": "neuron", "train_keys": True, "r": 2, "use_rslora": True},
}
ROWS = [[1, 4, 15], [0, 7, 8, 9]]
IDS = torch.tensor([[3, 5, 7, 9, 11, 2], [4, 4, 8, 1, 30, 39]])


def tiny(family="llama", dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family])).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def train(model, steps=3):
    """Train with decay over *all* parameters, as an optimiser that was not told what is frozen would."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimiser.step()
        optimiser.zero_grad()


def plain(model):
    """The base model's own tensors by their plain names."""
    state = {k.removeprefix("base_model.model.").replace("base_layer.", ""): v for k, v in model.state_dict().items()}
    return {k: v.clone() for k, v in state.items() if "loki_" not in k and "lora_" not in k}


def same_bits(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.fixture
def copied(monkeypatch):
    """Make the layers add their delta to a copy of the weight for any input, and count how often they do."""
    calls = []
    monkeypatch.setattr(folding, "COPY_IN_TOKENS", 0)
    project = folding.Folded.apply
    monkeypatch.setattr(folding.Folded, "apply", lambda *inputs: calls.append(1) or project(*inputs))
    return calls


@pytest.mark.parametrize("variant", [name for name in VARIANTS if "low_rank" not in name])
@pytest.mark.parametrize("family", FAMILIES)
def test_conformance_with_a_copy_of_the_weight(family, variant, tmp_path, copied):
    test_conformance(family, variant, tmp_path)
    assert copied


def test_an_input_that_a_hook_changed_in_place_is_the_one_that_the_gradient_reads(monkeypatch, copied):
    """Autograd's factors of a gated FFN are those of the input before; the other path is the oracle."""

    def gradients(copy: int) -> list[torch.Tensor]:
        monkeypatch.setattr(folding, "COPY_IN_TOKENS", copy)
        model = get_peft_model(tiny("llama"), LokiConfig(selection=ROWS))

        def ablate(module, args):
            with torch.no_grad():
                args[0][..., :10] = 0

        layers = [module for module in model.modules() if isinstance(module, LokiLayer)]
        for layer in layers:
            layer.register_forward_pre_hook(ablate)
        model(input_ids=IDS).logits.pow(2).sum().backward()
        return [layer.loki_delta["default"].grad for layer in layers]

    by_copy, apart = gradients(0), gradients(10**9)
    assert copied
    for one, other in zip(by_copy, apart, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
        assert not one[:, :10].any()
        assert one[:, 10:].any()


def test_a_selection_may_be_an_array():
    rows = np.array([[1, 2], [0, 3]])
    for one in (rows, torch.from_numpy(rows)):
        assert LokiConfig(selection=one).positions == [[1, 2], [0, 3]]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_conformance(family, variant, tmp_path):
    base = tiny(family)
    before, base_logits = plain(base), logits(base)
    model = get_peft_model(base, LokiConfig(selection=ROWS, **VARIANTS[variant]))
    assert torch.equal(logits(model), base_logits)  # identity at start
    train(model)
    trained = logits(model)
    assert (trained - base_logits).abs().max() > 1e-3
    assert same_bits(plain(model), before)  # frozen is bit-identical, decay or not
    with model.disable_adapter():
        assert torch.equal(logits(model), base_logits)

    model.save_pretrained(tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    assert {name.rpartition(".")[2] for name in file} <= {"loki_delta", "loki_A", "loki_B", "loki_bias", "loki_rows"}
    assert sum(v.numel() for k, v in file.items() if not k.endswith("rows")) == trainable_parameters(model)
    reloaded = PeftModel.from_pretrained(tiny(family), tmp_path)
    assert torch.allclose(logits(reloaded), trained, atol=1e-6)
    assert trainable_parameters(reloaded) == 0
    by_transformers = tiny(family)
    by_transformers.load_adapter(str(tmp_path))
    assert torch.allclose(logits(by_transformers), trained, atol=1e-6)

    model.merge_adapter(safe_merge=True)
    assert torch.allclose(logits(model), trained, atol=1e-6)
    assert not same_bits(plain(model), before)
    model.unmerge_adapter()
    assert same_bits(plain(model), before)  # not a single bit of rounding left
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged), trained, atol=1e-6)
    changed = {name for name, value in merged.state_dict().items() if not torch.equal(value, before[name])}
    touched = {"node": (16,), "neuron": (24,)}[VARIANTS[variant]["unit"]][0]
    for name in changed:
        moved = (merged.state_dict()[name] != before[name]).nonzero()
        layer = next(int(part) for part in name.split(".") if part.isdigit())
        along = next(i for i, size in enumerate(before[name].shape) if size == touched)
        assert set(moved[:, along].tolist()) <= set(ROWS[layer])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("product", [False, True])
def test_an_input_that_autograd_keeps_in_factors_is_not_kept_again(product, packed):
    """The input of a gated FFN's down-projection is a product; hooks that pack what is kept are left their timing."""
    base, rows = torch.nn.Linear(24, 16).requires_grad_(False), torch.tensor(ROWS[0])
    gate, up = (torch.randn(2, 7, 24, requires_grad=True) for _ in range(2))
    delta = torch.randn(len(rows), 24, requires_grad=True)
    kept = []
    with saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x) if packed else nullcontext():
        x = gate * up if product else gate + up
        y = folding.folded(base, x, delta, None, rows, 0)
    held = [one for one in y.grad_fn.saved_tensors if one is not None]
    assert any(one.shape == x.shape for one in held) == (packed or not product)
    assert any(one.data_ptr() == x.data_ptr() for one in kept) == packed
    weight = base.weight.clone().requires_grad_()
    found = torch.autograd.grad(y.square().sum(), (delta, gate, up))
    literal = F.linear(gate * up if product else gate + up, weight.index_add(0, rows, delta), base.bias)
    wanted = torch.autograd.grad(literal.square().sum(), (delta, gate, up))
    assert all(torch.allclose(one, other, rtol=1e-5, atol=1e-5) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("unit", ["node", "neuron"])
@pytest.mark.parametrize("family", [*FAMILIES, "phi3"])
def test_gradient_equals_the_dense_gradient_on_the_rows(family, unit):
    dense = tiny(family).requires_grad_(True)
    dense(input_ids=IDS, labels=IDS).loss.backward()
    model = get_peft_model(tiny(family), LokiConfig(selection=ROWS, unit=unit, train_keys=unit == "neuron"))
    model(input_ids=IDS, labels=IDS).loss.backward()
    layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, LokiLayer)}
    per_layer = {"node": 1, "neuron": {"gpt2": 2, "opt": 2, "phi3": 2}.get(family, 3)}[unit]
    assert len(layers) == 2 * per_layer
    for name, layer in layers.items():
        module = dense.get_submodule(name)
        weight = module.weight.grad.T if isinstance(module, Conv1D) else module.weight.grad
        rows, dim = layer.loki_rows["default"], 0 if layer.axis["default"] == "row" else 1
        grad = layer.loki_delta["default"].grad
        assert grad.shape == weight.index_select(dim, rows).shape
        assert torch.allclose(grad, weight.index_select(dim, rows), atol=1e-6)
        assert not torch.allclose(grad, weight.index_select(dim, (rows + 1) % weight.shape[dim]), atol=1e-6)
        assert ("default" in layer.loki_bias) == (layer.axis["default"] == "row" and module.bias is not None)
        if "default" in layer.loki_bias:
            assert torch.allclose(layer.loki_bias["default"].grad, module.bias.grad[rows], atol=1e-6)


@pytest.mark.parametrize("unit", ["node", "neuron"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_gradient_with_a_copy_equals_the_dense_gradient(family, unit, copied):
    test_gradient_equals_the_dense_gradient_on_the_rows(family, unit)
    assert copied


@pytest.mark.parametrize("unit", ["node", "neuron"])
def test_both_ways_to_project_agree_to_the_second_derivative(unit, copied, monkeypatch):
    layer = get_peft_model(tiny("opt"), LokiConfig(selection=ROWS, unit=unit)).get_submodule(
        "base_model.model.model.decoder.layers.1.fc2"
    )
    torch.nn.init.normal_(layer.loki_delta["default"])
    weights = [layer.loki_delta["default"], *layer.loki_bias.values()]
    x = torch.randn(2, 5, 24, requires_grad=True)
    found = []
    for tokens in (0, 10**9):
        monkeypatch.setattr(folding, "COPY_IN_TOKENS", tokens)
        y = layer(x)
        grads = torch.autograd.grad((y**3).sum(), [x, *weights], create_graph=True)
        found.append([y, *grads, *torch.autograd.grad(sum((g**2).sum() for g in grads), [x, *weights])])
    assert len(copied) == 1
    assert all(torch.allclose(one, other, rtol=1e-3, atol=1e-3) for one, other in zip(*found, strict=True))
    assert all(one.abs().max() > 0.1 for one in found[0])


def test_when_a_copy_is_made(copied, monkeypatch):
    layer = get_peft_model(tiny(), LokiConfig(selection=ROWS)).base_model.model.model.layers[1].mlp.down_proj

    def made(call, *, x=None):
        copied.clear()
        call(torch.randn(3, 24) if x is None else x)
        return bool(copied)

    assert made(layer)
    monkeypatch.setattr(folding, "COPY_IN_TOKENS", 1)  # 4 of 16 rows are trained: from 4 tokens on
    assert not made(layer)
    assert made(layer, x=torch.randn(4, 24))
    monkeypatch.setattr(folding, "COPY_IN_TOKENS", 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not made(layer)
    handle = layer.base_layer.register_forward_hook(lambda *_: None)
    assert not made(layer)  # whoever watches the base layer sees it called
    handle.remove()
    layer.base_layer.weight.requires_grad_(True)
    assert not made(layer)  # its own gradient is wanted
    layer.base_layer.weight.requires_grad_(False)
    layer.base_layer.to(torch.bfloat16)
    assert not made(layer, x=torch.randn(3, 24, dtype=torch.bfloat16))
    layer.to(torch.bfloat16)
    assert not made(layer, x=torch.randn(3, 24, dtype=torch.bfloat16))  # a sum in bfloat16 would lose the delta
    layer.to(torch.float32)
    assert made(layer)


def test_masking_gradients_instead_moves_frozen_rows():
    model = tiny().requires_grad_(False)
    weight = model.model.layers[0].mlp.down_proj.weight.requires_grad_(True)
    mask = torch.zeros(16, 1).index_fill_(0, torch.tensor(ROWS[0]), 1.0)
    weight.register_hook(lambda grad: grad * mask)
    before = weight.detach().clone()
    train(model)
    frozen = mask[:, 0] == 0
    assert not torch.equal(weight[frozen], before[frozen])


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_layer_equals_a_dense_projection(data):
    d_in, d_out = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    axis = data.draw(st.sampled_from(["row", "column"]))
    width = d_out if axis == "row" else d_in
    index = tuple(sorted(data.draw(st.sets(st.integers(0, width - 1), min_size=1))))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    base = data.draw(st.sampled_from([lambda: torch.nn.Linear(d_in, d_out), lambda: Conv1D(d_out, d_in)]))()
    config = LokiConfig(selection=[list(index)], r=data.draw(st.sampled_from([0, min(2, len(index))])))
    layer = LokiLayer(base, "default", Site(0, axis, index, bias=axis == "row"), config)
    for parameter in (*layer.loki_delta.values(), *layer.loki_A.values(), *layer.loki_bias.values()):
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 3, d_in)
    weight = base.weight + layer.get_delta_weight("default")
    bias = base.bias.clone()
    if axis == "row":
        bias[list(index)] += layer.loki_bias["default"]
    expected = x @ (weight if isinstance(base, Conv1D) else weight.T) + bias
    assert torch.allclose(layer(x), expected, atol=1e-5)
    outside = [i for i in range(width) if i not in index]
    delta = layer.get_delta_weight("default").T if isinstance(base, Conv1D) else layer.get_delta_weight("default")
    assert not delta.index_select(0 if axis == "row" else 1, torch.tensor(outside, dtype=torch.int64)).any()


@pytest.mark.parametrize("tokens", [0, 32])
@pytest.mark.parametrize("unit", ["node", "neuron"])
def test_nothing_but_the_input_is_kept_for_the_backward_pass(unit, tokens, monkeypatch):
    monkeypatch.setattr(folding, "COPY_IN_TOKENS", tokens)
    layer = get_peft_model(tiny(), LokiConfig(selection=ROWS, unit=unit)).base_model.model.model.layers[1].mlp.down_proj
    x = torch.randn(2, 5, 24, requires_grad=True)
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    others = [t.numel() for t in kept if t.untyped_storage().data_ptr() not in own]
    assert others == ([2 * 5 * 24] if unit == "node" else [2 * 5 * 4])  # neurons keep their part of the input alone


def test_several_adapters():
    model = get_peft_model(tiny("opt"), LokiConfig(selection=ROWS), adapter_name="first")
    before, base_logits = plain(model), logits(model)
    model.add_adapter("second", LokiConfig(selection=[[], [1, 5, 10, 14, 20]], unit="neuron", train_keys=True))
    train(model)
    first = logits(model)
    kept = {n: p.clone() for n, p in model.named_parameters() if ".first" in n}
    model.set_adapter("second")
    assert torch.equal(logits(model), base_logits)
    train(model)
    second = logits(model)
    assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters() if ".first" in n)
    assert not torch.allclose(second, base_logits, atol=1e-4)
    model.base_model.set_adapter(["first", "second"])
    both = logits(model)
    model.merge_adapter()
    assert torch.allclose(logits(model), both, atol=1e-6)
    model.unmerge_adapter()
    assert same_bits(plain(model), before)
    model.set_adapter("first")
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    model.delete_adapter("first")
    assert torch.equal(logits(model), second)
    assert not any(".first" in name for name in model.state_dict())


def test_an_adapter_for_each_sample_is_refused_and_not_passed_over():
    model = get_peft_model(tiny(), LokiConfig(selection=ROWS))
    model.add_adapter("upper", LokiConfig(selection=ROWS))
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="LoKI has no adapter_names"):
            call(input_ids=IDS, adapter_names=["default", "upper"])


def test_deleting_leaves_one_adapter_active_everywhere():
    model = get_peft_model(tiny(), LokiConfig(selection=[[1], []]), adapter_name="lower")
    model.add_adapter("upper", LokiConfig(selection=[[], [2]]))
    with pytest.warns(UserWarning, match="Setting active adapter to upper"):
        model.delete_adapter("lower")
    layers = [module for module in model.modules() if isinstance(module, LokiLayer)]
    assert [layer.active_adapters for layer in layers] == [["upper"]] * 2
    assert model.active_adapters == ["upper"]


@pytest.mark.filterwarnings("ignore:(You are trying to modify|Already found a `peft_config`):UserWarning")
@pytest.mark.parametrize(("rows", "options"), [(ROWS, {"r": 1}), ([[2], []], {}), ([[2], []], {"r": 1})])
@pytest.mark.parametrize("earlier", [0, 2])
def test_an_adapter_of_the_same_name_leaves_nothing_of_an_earlier_one(earlier, rows, options, tmp_path):
    base = tiny("opt")
    train(get_peft_model(base, LokiConfig(selection=ROWS, train_bias=True, r=earlier)))
    model = get_peft_model(base, LokiConfig(selection=rows, **options))
    assert torch.equal(logits(model), logits(tiny("opt")))
    train(model)
    model.save_pretrained(tmp_path)
    new = get_peft_model(tiny("opt"), LokiConfig(selection=rows, **options))
    new.save_pretrained(tmp_path / "new")
    saved = [load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "new")]
    assert saved[0].keys() == saved[1].keys()
    train(new)
    assert torch.equal(logits(model), logits(new))
    model.merge_adapter()
    with pytest.raises(ValueError, match="'default' is merged into this model; unmerge it first"):
        get_peft_model(base, LokiConfig(selection=rows, **options))


def test_low_rank_has_its_rank_and_its_scale():
    base = tiny()
    model = get_peft_model(base, LokiConfig(selection=ROWS, r=2, loki_alpha=8.0, use_rslora=True))
    again = get_peft_model(tiny(), LokiConfig(selection=ROWS, r=2))
    train(model)
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    other = again.base_model.model.model.layers[1].mlp.down_proj
    assert layer.scaling["default"] == pytest.approx(8 / 2**0.5)
    assert other.scaling["default"] == 1.0
    product = layer.loki_A["default"] @ layer.loki_B["default"] * 8 / 2**0.5
    assert torch.allclose(layer.get_delta_weight("default")[ROWS[1]], product)
    assert torch.linalg.matrix_rank(layer.get_delta_weight("default")) == 2
    fresh = get_peft_model(tiny(), LokiConfig(selection=ROWS, r=2)).base_model.model.model.layers[1].mlp.down_proj
    assert torch.equal(fresh.loki_B["default"], other.loki_B["default"])  # the seed is in the configuration


def test_float32_adapter_on_a_bfloat16_base():
    base = tiny("gpt2", torch.bfloat16)
    base_logits = logits(base)
    model = get_peft_model(base, LokiConfig(selection=ROWS))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert torch.equal(logits(model), base_logits)
    before = plain(model)
    train(model)
    assert logits(model).dtype == torch.bfloat16
    assert not torch.equal(logits(model), base_logits)
    model.merge_adapter()
    model.unmerge_adapter()
    assert same_bits(plain(model), before)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        base = tiny().train()
        if checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model = get_peft_model(base, LokiConfig(selection=ROWS, unit="neuron", train_keys=True))
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*grads, strict=True))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradient_checkpointing_beside_a_copy_of_the_weight(copied):
    test_gradient_checkpointing_gives_the_same_gradients()
    assert copied


def test_a_position_file_of_the_published_shape_trains_and_is_written_back(tmp_path):
    generator = torch.Generator().manual_seed(1)
    published = [torch.randperm(896, generator=generator)[:89].tolist() for _ in range(24)]
    (tmp_path / "positions.json").write_text(json.dumps(published))
    selection = Selection.from_positions(tmp_path / "positions.json", unit="node", n_units=896, n_layers=24)
    shape = {"hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2, "num_hidden_layers": 24}
    model = AutoModelForCausalLM.from_config(Qwen2Config(**shape, intermediate_size=16, vocab_size=40))
    before = plain(model)
    model = get_peft_model(model, LokiConfig(selection=selection))
    train(model, steps=1)
    merged = model.merge_and_unload().state_dict()
    changed = {name: value != before[name] for name, value in merged.items() if not torch.equal(value, before[name])}
    assert len(changed) == 24
    for name, moved in changed.items():
        layer = int(name.split(".")[2])
        assert name.endswith("down_proj.weight")
        assert sorted(moved.any(1).nonzero()[:, 0].tolist()) == sorted(published[layer])
    assert json.loads(selection.to_positions(tmp_path / "again.json").read_text()) == published


def test_safe_merge_refuses_what_is_not_finite():
    model = get_peft_model(tiny(), LokiConfig(selection=ROWS))
    before = plain(model)
    model.base_model.model.model.layers[0].mlp.down_proj.loki_delta["default"].data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter(safe_merge=True)
    assert same_bits(plain(model), before)


@pytest.mark.parametrize("family", [*FAMILIES, "phi3"])
def test_down_projections_by_name_and_by_structure(family, monkeypatch):
    model = tiny(family)
    by_name = down_projections(model)
    assert [sites.widths(model.get_submodule(name)) for name in by_name.values()] == [(24, 16)] * 2
    lora = get_peft_model(tiny(family), adapter_config("lora", model_config=model.config, r=2))
    assert set(lora.base_model.targeted_module_names) == set(by_name.values())
    monkeypatch.delitem(sites.DOWN_PROJECTIONS, model.config.model_type)
    assert down_projections(model) == by_name

"""LoKI beside another method on one model, and on families that no table names."""

import json

import pytest
import torch
from peft import (
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from test_loki import ROWS, logits, plain, same_bits, tiny, train
from transformers import ArceeConfig, AutoModelForCausalLM, DiffLlamaConfig, MptConfig, OlmoConfig

from workbench.loki import LokiConfig, LokiLayer, adapter_for, attach, matched, merged_copy, parameter_count
from workbench.opening import open_model

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:Already found a `peft_config`:UserWarning",
    "ignore:You are trying to modify a model with PEFT for a second time:UserWarning",
    "ignore:Adapter style was active which is now deleted:UserWarning",
)

BOTH = ["facts", "style"]
WIDTHS = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 40}


def lora(*modules):
    return LoraConfig(r=2, target_modules=list(modules or ("q_proj", "v_proj")))


def both(first="facts"):
    """A model that carries LoKI and LoRA, both trained, by transformers' own methods, and the logits of the base."""
    model = tiny()
    before = logits(model)
    configs = {"facts": LokiConfig(selection=ROWS), "style": lora()}
    for name in sorted(configs, key=lambda name: name != first):
        model.add_adapter(configs[name], name)
    model.set_adapter(BOTH)
    return model, before


@pytest.mark.parametrize("first", BOTH)
def test_loki_and_lora_are_trained_saved_loaded_and_merged_together(first, tmp_path):
    model, base = both(first)
    frozen = plain(tiny())
    assert torch.equal(logits(model), base)
    train(model)
    trained = logits(model)
    names = {name.split("_proj.")[1].split(".")[0] for name, weight in model.named_parameters() if weight.requires_grad}
    assert names == {"loki_delta", "lora_A", "lora_B"}
    assert same_bits({k.replace("base_layer.", ""): v for k, v in plain(model).items()}, frozen)
    model.disable_adapters()
    assert torch.equal(logits(model), base)
    model.enable_adapters()
    alone = {}
    for name, kinds in (("facts", {"loki_delta", "loki_rows"}), ("style", {"lora_A", "lora_B"})):
        model.set_adapter(name)
        alone[name] = logits(model)
        model.save_pretrained(tmp_path / name)
        keys = load_file(tmp_path / name / "adapter_model.safetensors")
        assert {key.removesuffix(".weight").rpartition(".")[2] for key in keys} == kinds  # each file holds its own

    again, merged = tiny(), tiny()
    for name in BOTH:
        again.load_adapter(str(tmp_path / name), adapter_name=name)
        merged = PeftModel.from_pretrained(merged, tmp_path / name).merge_and_unload()
    again.set_adapter(BOTH)
    assert torch.allclose(logits(again), trained, atol=1e-6)
    assert torch.allclose(logits(merged), trained, atol=1e-6)
    assert all((one - trained).abs().max() > 1e-3 for one in alone.values())  # and neither alone is both
    model.delete_adapter("style")
    model.set_adapter("facts")
    assert torch.equal(logits(model), alone["facts"])


def test_a_model_with_both_is_opened_with_both_merged():
    from tiny import random_model, tokenizer

    model = random_model("llama")
    model.add_adapter(LokiConfig(selection=[[1], [2], [3]]), "facts")
    model.add_adapter(lora(), "style")
    model.set_adapter(BOTH)
    train(model)
    opened = open_model(model, tokenizer=tokenizer())
    assert not any(isinstance(module, LokiLayer) for module in opened.hf.modules())
    torch.testing.assert_close(logits(opened.hf), logits(model), rtol=1e-5, atol=1e-5)
    assert any(isinstance(module, LokiLayer) for module in model.modules())  # what was given stays as it is
    model.disable_adapters()
    assert not torch.allclose(logits(opened.hf), logits(model), atol=1e-3)
    assert torch.equal(logits(open_model(model, tokenizer=tokenizer()).hf), logits(model))  # what is off stays out


def test_two_methods_on_one_projection_are_not_merged():
    model = tiny()
    model.add_adapter(lora("q_proj"), "style")
    model.add_adapter(LoHaConfig(r=2, target_modules=["q_proj"]), "other")
    with pytest.raises(ValueError, match="q_proj carries two methods"):
        merged_copy(model)


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig, PromptEncoderConfig])
def test_learned_tokens_are_not_merged(config, tmp_path):
    model = get_peft_model(tiny(), config(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    for call in (lambda: merged_copy(model), lambda: open_model(tmp_path, base=tiny())):
        with pytest.raises(ValueError, match=rf"{model.active_peft_config.peft_type.value} puts learned tokens"):
            call()


@pytest.mark.parametrize("merging", ["loki", "lora"])
def test_peft_wrappers_of_one_model_train_and_merge_both(merging, tmp_path):
    loki = get_peft_model(tiny(), LokiConfig(selection=ROWS), adapter_name="facts")
    style = get_peft_model(loki.base_model.model, lora(), adapter_name="style")
    train(style)
    trained = logits(style)
    assert torch.equal(logits(loki), trained)
    loki.save_pretrained(tmp_path)
    style.save_pretrained(tmp_path)
    one = PeftModel.from_pretrained(tiny(), tmp_path / "facts", adapter_name="facts")
    two = PeftModel.from_pretrained(one.base_model.model, tmp_path / "style", adapter_name="style")
    assert torch.allclose(logits(two), trained, atol=1e-6)
    merged = (style if merging == "lora" else loki).merge_and_unload()
    assert torch.allclose(logits(merged), trained, atol=1e-6)


def test_two_methods_on_one_projection_are_refused_before_anything_is_touched():
    model = tiny()
    model.add_adapter(LoraConfig(r=2, target_modules=["layers.1.mlp.down_proj"]), "style")
    with pytest.raises(ValueError, match=r"layers.1.mlp.down_proj already carries a Linear of another method"):
        model.add_adapter(LokiConfig(selection=ROWS), "facts")
    assert not any(isinstance(module, LokiLayer) for module in model.modules())
    model = get_peft_model(tiny(), LokiConfig(selection=ROWS), adapter_name="facts")
    over = get_peft_model(model.base_model.model, lora("down_proj"), adapter_name="style")
    for call in (model.merge_adapter, model.merge_and_unload, lambda: open_model(over)):
        with pytest.raises(ValueError, match=r"lies below a Linear of another method, and peft .* on other modules"):
            call()


# Families that no table names


def family(kind):
    config = {"arcee": ArceeConfig, "mpt": MptConfig, "olmo": OlmoConfig, "diffllama": DiffLlamaConfig}[kind]
    sizes = {"d_model": 16, "n_heads": 2, "n_layers": 2, "vocab_size": 40} if kind == "mpt" else WIDTHS
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(**sizes, **({} if kind == "mpt" else {"intermediate_size": 24})))


def test_a_family_that_no_table_names_needs_no_target_modules(tmp_path):
    model = get_peft_model(family("arcee").eval(), LokiConfig(selection=ROWS))
    assert model.peft_config["default"].target_modules == ["mlp.down_proj"]
    train(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(family("arcee").eval(), tmp_path)
    assert torch.allclose(logits(again), logits(model), atol=1e-6)
    with again.disable_adapter():
        assert not torch.allclose(logits(again), logits(model), atol=1e-4)


def test_normalisations_are_found_by_their_names_or_missed_in_a_sentence():
    tuned = attach(family("mpt"), adapter_for(family("mpt"), "ln_tuning"))
    assert sum(weight.requires_grad for weight in tuned.parameters()) == 5  # two a block, and the last
    differential = family("diffllama")
    tuned = attach(family("diffllama"), adapter_for(differential, "ln_tuning"))  # its groupnorm has no weight
    assert sum(weight.requires_grad for weight in tuned.parameters()) == 5
    assert torch.equal(logits(tuned.eval()), logits(differential.eval()))
    with pytest.raises(ValueError, match="normalisations of OlmoForCausalLM have no weights"):
        adapter_for(family("olmo"), "ln_tuning")


# What does not fit


@pytest.mark.parametrize(
    ("kind", "modules", "named"),
    [
        ("llama", ["q_proj"], r"q_proj \(16 to 16\)"),
        ("llama", ["up_proj"], r"up_proj \(16 to 24\)"),
        ("gpt2", r".*attn\.c_proj", r"attn.c_proj \(16 to 16\)"),
        ("arcee", ["v_proj"], r"v_proj \(16 to 16\)"),
        ("arcee", ["up_proj"], r"up_proj \(16 to 24\)"),
    ],
)
def test_modules_that_are_no_down_projections_are_refused(kind, modules, named):
    model = family(kind) if kind == "arcee" else tiny(kind)
    with pytest.raises(ValueError, match=named + ", which is not the projection from d_mlp down to d_model"):
        get_peft_model(model, LokiConfig(selection=ROWS, target_modules=modules))
    right = {"gpt2": r".*mlp\.c_proj", "llama": ["down_proj"], "arcee": r".*\.down_proj"}[kind]
    get_peft_model(model, LokiConfig(selection=ROWS, target_modules=right))


@pytest.mark.parametrize("layers", [[2], [-1], [], [0, 7], 2])
@pytest.mark.parametrize("method", ["lora", "loki"])
def test_layers_that_the_model_lacks_are_refused(method, layers):
    options = {"selection": ROWS} if method == "loki" else {}
    with pytest.raises(ValueError, match="the layers of this model are 0 to 1"):
        adapter_for(tiny(), method, layers=layers, **options)


def test_layers_restrict_every_method_alike():
    for layers in ([1], 1, {1}):
        assert adapter_for(tiny(), "lora", layers=layers).target_modules == {"model.layers.1.mlp.down_proj"}
    model = attach(tiny(), adapter_for(tiny(), "loki", layers=[1], selection=ROWS))
    assert [name.split(".")[4] for name, weight in model.named_parameters() if weight.requires_grad] == ["1"]


def trained_names(model):
    return {name.removeprefix("base_model.model.") for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_layers_restrict_what_trains_everywhere(kind):
    inside = f"{'transformer.h' if kind == 'gpt2' else 'model.decoder.layers' if kind == 'opt' else 'model.layers'}.1."
    whole = {name for name, _ in tiny(kind).named_parameters()}
    full = attach(tiny(kind), adapter_for(tiny(kind), "full", layers=[1]))
    assert trained_names(full) == {name for name in whole if name.startswith(inside)}
    assert trained_names(attach(tiny(kind), adapter_for(tiny(kind), "full", layers=[1, 0]))) == whole  # all of them
    for layers in ([1], None):
        config = adapter_for(tiny(kind), "ln_tuning", layers=layers)
        found = {name.replace(".ln_tuning_layers.default", "") for name in trained_names(attach(tiny(kind), config))}
        norms = {name for name in whole if "norm" in name or "ln_" in name}
        assert found == {name for name in norms if layers is None or name.startswith(inside)}


def test_a_rank_is_at_most_the_number_of_rows():
    rows = [[1, 4, 15], [0, 7, 8, 9, 10]]
    model = get_peft_model(tiny(), LokiConfig(selection=rows, r=4))
    found = [tuple(m.loki_A["default"].shape) for m in model.modules() if isinstance(m, LokiLayer)]
    assert found == [(3, 3), (5, 4)]  # no rank beyond full
    train(model)
    assert torch.linalg.matrix_rank(model.base_model.model.model.layers[0].mlp.down_proj._delta("default")) == 3
    with pytest.raises(ValueError, match=r"r=6 is more than the 5 nodes that a layer trains at most; .* or r=0"):
        LokiConfig(selection=rows, r=6)
    with pytest.raises(ValueError, match="r=4 is more than the 3 neurons"):
        LokiConfig(selection=rows, r=4, layers=[0], unit="neuron")
    sizes = {r: parameter_count(tiny(), LokiConfig(selection=rows, r=r)) for r in range(1, 6)}
    for r, size in sizes.items():
        assert matched("loki", size, tiny(), selection=rows) == {"r": r}
    assert matched("loki", 10**6, tiny(), selection=rows) == {"r": 5}


@pytest.mark.parametrize("unit", ["node", "neuron"])
def test_a_saved_adapter_with_more_ranks_than_rows_is_read(unit, tmp_path):
    model = get_peft_model(tiny(), LokiConfig(selection=ROWS, r=3, loki_alpha=6.0, unit=unit))
    train(model)
    model.save_pretrained(tmp_path)
    expected = logits(model)
    file = load_file(tmp_path / "adapter_model.safetensors")
    for name, factor in file.items():  # twice the ranks, at half the scaling
        if "loki_A" in name or "loki_B" in name:
            file[name] = torch.cat([factor, factor], dim=int("loki_A" in name))
    save_file(file, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"r": 6}))
    assert torch.allclose(logits(PeftModel.from_pretrained(tiny(), tmp_path)), expected, atol=1e-6)
    assert not torch.allclose(logits(tiny()), expected, atol=1e-4)


@pytest.mark.parametrize("r", [1.0, 2.5, "2", None, True, -1])
def test_a_rank_is_a_whole_number(r):
    with pytest.raises(ValueError, match="positive whole rank, got"):
        LokiConfig(selection=ROWS, r=r)

import copy
import json

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.conversion import convert_to_lora
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTBigCodeConfig,
    LlamaConfig,
    MixtralConfig,
    OpenAIGPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.pytorch_utils import Conv1D

from workbench.loki import (
    LokiConfig,
    LokiLayer,
    LokiModel,
    adapter_config,
    load_adapted,
    registration,
    trainable_parameters,
)
from workbench.loki.sites import refuse_experts
from workbench.selection import Selection
from workbench.training import export

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

WIDTHS = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 40}
CONFIGS = {
    "gpt2": GPT2Config(**WIDTHS, n_inner=24, bos_token_id=0, eos_token_id=0),
    "llama": LlamaConfig(**WIDTHS, intermediate_size=24),
    "qwen2": Qwen2Config(**WIDTHS, intermediate_size=24),
}
ROWS = [[1, 4, 15], [0, 7, 8, 9]]
IDS = torch.tensor([[3, 5, 7, 9, 11, 2], [4, 4, 8, 1, 30, 39]])


def tiny(family="llama"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family])).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def train(model):
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimiser.step()
        optimiser.zero_grad()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_equal_lora_by_pefts_own_conversion(family):
    model = get_peft_model(tiny(family), LokiConfig(selection=ROWS, train_bias=False))
    train(model)
    config, state = convert_to_lora(model, rank=4)
    save = {k.removeprefix("base_model.model."): v for k, v in state.items()}
    config.fan_in_fan_out = family == "gpt2"
    twin = get_peft_model(tiny(family), config)
    assert not torch.allclose(logits(twin), logits(model), atol=1e-5)
    missing = twin.load_state_dict(
        {f"base_model.model.{k.replace('.weight', '.default.weight')}": v for k, v in save.items()}, strict=False
    )
    assert not missing.unexpected_keys
    assert torch.allclose(logits(twin), logits(model), atol=1e-5)


def test_open_what_was_saved(tmp_path):
    base = tiny()
    base.save_pretrained(tmp_path / "base")
    words = Tokenizer(WordLevel({str(i): i for i in range(40)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0").save_pretrained(tmp_path / "base")
    untouched = copy.deepcopy(base.state_dict())
    for method in ("loki", "loki_random", "lora"):
        fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        config = adapter_config(method, model_config=fresh.config, selection=ROWS if "loki" in method else None, r=2)
        model = get_peft_model(fresh, config)
        train(model)
        model.save_pretrained(tmp_path / method)
        auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path / method)
        assert torch.allclose(logits(auto), logits(model), atol=1e-6)
        for given_base in (None, base, str(tmp_path / "base")):
            opened, tokenizer = load_adapted(tmp_path / method, given_base, device="cpu")
            assert type(opened) is type(base)
            assert (tokenizer is None) == (given_base is base)
            assert torch.allclose(logits(opened), logits(model), atol=1e-6)
    assert all(torch.equal(value, untouched[name]) for name, value in base.state_dict().items())
    (tmp_path / "base").rename(tmp_path / "gone")
    with pytest.raises(ValueError, match="give base="):
        load_adapted(tmp_path / "loki")
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        load_adapted(tmp_path)


def test_rows_in_the_file_are_checked_against_the_configuration(tmp_path):
    get_peft_model(tiny(), LokiConfig(selection=ROWS)).save_pretrained(tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    name = next(name for name in file if name.endswith("loki_rows"))
    save_file({**file, name: file[name] - 1}, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="disagree on which units"):
        PeftModel.from_pretrained(tiny(), tmp_path)


def test_a_selection_of_the_published_shape(tmp_path):
    generator = torch.Generator().manual_seed(1)
    published = [torch.randperm(896, generator=generator)[:89].tolist() for _ in range(24)]
    (tmp_path / "positions.json").write_text(json.dumps(published))
    selection = Selection.from_positions(published, unit="node", n_units=896)
    assert LokiConfig(selection=selection).positions == LokiConfig(selection=tmp_path / "positions.json").positions
    with torch.device("meta"):
        shape = {"hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2, "num_hidden_layers": 24}
        big = AutoModelForCausalLM.from_config(Qwen2Config(**shape, intermediate_size=48, vocab_size=40))
    model = get_peft_model(big, LokiConfig(selection=selection), low_cpu_mem_usage=True)
    assert trainable_parameters(model) == 24 * 89 * 48
    with pytest.raises(ValueError, match="24 layers but Qwen2ForCausalLM has 2"):
        get_peft_model(tiny("qwen2"), LokiConfig(selection=selection))
    neurons = Selection(selection.mask.isel(layer=slice(2)).drop_vars("layer", errors="ignore"), unit="neuron")
    with pytest.raises(ValueError, match=r"896 neurons per layer but layer 0 .* has 24"):
        get_peft_model(tiny("qwen2"), LokiConfig(selection=neurons))
    with pytest.raises(ValueError, match="over neurons but unit='node'"):
        LokiConfig(selection=neurons, unit="node")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "needs selection="),
        ({"selection": [[], []]}, "is empty"),
        ({"selection": [[1], []], "layers": [1]}, "is empty within layers"),
        ({"selection": [[1], []], "layers": [2]}, "layers 0 to 1"),
        ({"selection": [[1, 1]]}, "names a unit twice"),
        ({"selection": [[1], []], "layers": [0.5]}, "layers are whole numbers"),
        ({"selection": [[1], []], "layers": "0"}, "layers are whole numbers"),
        ({"selection": [[torch.tensor(1), torch.tensor(1)]]}, "names a unit twice"),
        ({"selection": [[-1]]}, "integers from 0"),
        ({"selection": [[0.5]]}, "integers from 0"),
        ({"selection": [3]}, "not a list of unit indices"),
        ({"selection": [[1]], "positions": [[1]]}, "both selection and positions"),
        ({"selection": [[1]], "unit": "head"}, "'node' or 'neuron'"),
        ({"selection": [[1]], "train_keys": True}, "belongs to unit='neuron'"),
        ({"selection": [[1]], "r": -1}, "positive whole rank"),
        ({"selection": [[1]], "use_rslora": True}, "give r > 0"),
        ({"selection": [[1]], "r": 1, "loki_alpha": float("nan")}, "loki_alpha must be a positive number"),
        ({"selection": [[1]], "r": 1, "loki_alpha": 0.0}, "loki_alpha must be a positive number"),
        ({"selection": [[1]], "r": 1, "loki_alpha": "8"}, "loki_alpha must be a positive number, got '8'"),
        ({"selection": [[1]], "r": 1, "loki_alpha": True}, "loki_alpha must be a positive number, got True"),
    ],
)
def test_settings_that_do_not_fit(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        LokiConfig(**options)


@pytest.mark.parametrize("layers", [range(1, 2), np.array([1]), [np.int64(1)], (1, 1), {1}, 1, np.int64(1)])
def test_layers_of_any_kind_are_saved_as_plain_numbers(layers, tmp_path):
    model = get_peft_model(tiny(), LokiConfig(selection=ROWS, layers=layers))
    assert model.peft_config["default"].layers == [1]
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["layers"] == [1]
    assert PeftModel.from_pretrained(tiny(), tmp_path).peft_config["default"].layers == [1]


def test_modules_to_save_are_trained_saved_and_reloaded(tmp_path):
    model = get_peft_model(tiny(), LokiConfig(selection=ROWS, modules_to_save=["lm_head"]))
    train(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split("loki_delta")[0] for name in trained if "loki_" in name} | {
        name for name in trained if "loki_" not in name
    } == {
        *(f"base_model.model.model.layers.{layer}.mlp.down_proj." for layer in (0, 1)),
        "base_model.model.lm_head.modules_to_save.default.weight",
    }
    head = model.base_model.model.lm_head.modules_to_save["default"].weight
    assert not torch.equal(head, tiny().lm_head.weight)
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(tiny(), tmp_path)
    assert torch.equal(reloaded.base_model.model.lm_head.modules_to_save["default"].weight, head)
    assert torch.equal(logits(reloaded), logits(model))
    merged, _ = load_adapted(tmp_path, tiny())
    assert torch.equal(merged.lm_head.weight, head)
    with pytest.raises(ValueError, match="trains lm_head in full too; export it as merged"):
        export(tmp_path, tmp_path / "lora", "lora", base=tiny())


@pytest.mark.parametrize("excluded", [["0.mlp.down_proj"], r".*layers\.0\..*"])
def test_excluded_modules_are_left_alone(excluded, tmp_path):
    model = get_peft_model(tiny(), LokiConfig(selection=ROWS, exclude_modules=excluded))
    layers = [name for name, module in model.named_modules() if isinstance(module, LokiLayer)]
    assert layers == ["base_model.model.model.layers.1.mlp.down_proj"]
    model.save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(tiny(), tmp_path).peft_config["default"].exclude_modules == excluded
    with pytest.raises(ValueError, match="leaves out every module that the selection trains"):
        get_peft_model(tiny(), LokiConfig(selection=ROWS, exclude_modules=["down_proj"]))


def test_a_saved_selection_is_given_back_by_its_path(tmp_path):
    selection = Selection.from_positions(ROWS, unit="neuron", n_units=24)
    path = selection.save(tmp_path / "selection.json")
    config = LokiConfig(selection=str(path))
    assert (config.positions, config.unit, config.n_units) == (ROWS, "neuron", 24)
    with pytest.raises(ValueError, match=r"selection.json is a selection with unit='neuron' but unit='node' was given"):
        LokiConfig(selection=path, unit="node")
    for text in ('{"unit": "node"}', '{"positions": [["a"]]}', "[3]", "[[1, 1]]", "[[", '"a"'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"selection\.json"):
            LokiConfig(selection=path)


def test_selections_that_do_not_fit_the_model():
    with pytest.raises(FileNotFoundError, match="no position file"):
        LokiConfig(selection="nowhere.json")
    with pytest.raises(ValueError, match="node 16 is out of range"):
        get_peft_model(tiny(), LokiConfig(selection=[[16], []]))
    with pytest.raises(ValueError, match="mixture of experts"):
        refuse_experts(MixtralConfig())
    with pytest.raises(ValueError, match=r"h\.0\.attn\.c_proj .* name mlp\.c_proj"):
        get_peft_model(tiny("gpt2"), LokiConfig(selection=ROWS, target_modules=["c_proj"]))
    with pytest.raises(ValueError, match=r"not in every layer"):
        get_peft_model(tiny("gpt2"), LokiConfig(selection=ROWS, target_modules=["down_proj"]))
    with pytest.raises(ValueError, match="not known; choose one of"):
        adapter_config("magic", model_config=CONFIGS["llama"])
    with pytest.raises(ValueError, match="name it with target_modules"):
        adapter_config("lora", model_config=MixtralConfig(num_local_experts=1))


@pytest.mark.parametrize("config", [GPT2Config, OpenAIGPTConfig, GPTBigCodeConfig])
def test_whether_a_family_has_transposed_weights_is_what_its_layers_are(config):
    config = config(n_embd=16, n_head=2, n_layer=2, n_positions=8, vocab_size=40)
    model = AutoModelForCausalLM.from_config(config)
    down = next(module for name, module in model.named_modules() if name.endswith("mlp.c_proj"))
    lora = adapter_config("lora", model_config=config, target_modules=["mlp.c_proj"])
    assert lora.fan_in_fan_out == isinstance(down, Conv1D)


def test_registration_is_idempotent_and_guarded(monkeypatch):
    members = len(PeftType)
    registration.register(LokiConfig, LokiModel)
    assert len(PeftType) == members
    assert PeftType("LOKI") is PeftType["LOKI"] is copy.deepcopy(PeftType("LOKI"))
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType("LOKI")] is LokiConfig
    with monkeypatch.context() as patch:
        patch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType("LOKI"), CONFIGS["llama"].__class__)
        with pytest.raises(RuntimeError, match="of its own"):
            registration.register(LokiConfig, LokiModel)
    monkeypatch.setattr(registration, "NAME", "LOKI_TWO")
    monkeypatch.setattr(registration, "_add_member", lambda name: None)
    with pytest.raises(RuntimeError, match=r"does not let a method be added .* install peft 0\.21"):
        registration.register(LokiConfig, LokiModel)

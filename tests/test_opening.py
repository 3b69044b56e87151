"""One way to open a model: adapters go onto the model that they were trained on, and onto no other."""

import shutil

import pytest
import torch
from command import call
from peft import LoraConfig, get_peft_model
from tiny import FACTS, random_model, saved, tiny, tokenizer
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from workbench.config import TrainConfig
from workbench.forgetting import measure_forgetting
from workbench.loki import LokiConfig
from workbench.models import lacks_tokenizer, load_model, tokenizer_of
from workbench.opening import check_comparable, open_model
from workbench.semantics import measure_drift
from workbench.training import TrainingRun, implant


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, TrainingRun, TrainingRun]:
    """A base model in a folder and two adapters trained on it."""
    folder = tmp_path_factory.mktemp("opening")
    base = str(saved(folder / "base"))
    settings = TrainConfig(max_epochs=3, learning_rate=2e-2)
    loki = LokiConfig(selection=[[1, 2], [3], [4, 5]], task_type="CAUSAL_LM")
    lora = LoraConfig(r=2, target_modules=["down_proj"], task_type="CAUSAL_LM")
    first = implant(base, FACTS, loki, settings, out=folder / "loki", progress=False)
    second = implant(base, FACTS, lora, settings, out=folder / "lora", progress=False)
    return base, first, second


def test_an_adapter_against_itself_gives_zeros(runs) -> None:
    _, loki, _ = runs
    for one in (loki, str(loki.adapter), str(loki.adapter.parent)):
        assert measure_drift(one, one, FACTS)["change"].eq(0).all()
    assert measure_forgetting(loki, loki, {"facts": FACTS})["change"].eq(0).all()


def test_two_adapters_are_compared_each_on_its_own_base(runs) -> None:
    base, loki, lora = runs
    frame = measure_forgetting(loki, lora, {"facts": FACTS})
    own = [measure_forgetting(base, run, {"facts": FACTS})["after"].to_numpy() for run in (loki, lora)]
    assert frame["before"].to_numpy() == pytest.approx(own[0], abs=1e-5)
    assert frame["after"].to_numpy() == pytest.approx(own[1], abs=1e-5)


def test_an_adapter_is_not_merged_onto_another_model_of_its_shape(runs) -> None:
    base, loki, _ = runs
    other = load_model(random_model("llama", seed=7), tokenizer=tokenizer())
    frame = measure_forgetting(other, loki, {"facts": FACTS})
    expected = measure_forgetting(base, loki, {"facts": FACTS})
    assert frame["after"].to_numpy() == pytest.approx(expected["after"].to_numpy(), abs=1e-5)


def test_an_adapter_of_changed_weights_is_refused(tmp_path) -> None:
    folder = str(saved(tmp_path / "base"))
    changed = load_model(folder).hf
    changed.model.layers[0].mlp.down_proj.weight.data.mul_(2)
    model = load_model(changed, tokenizer=tokenizer())
    assert model.path is None
    settings = TrainConfig(max_epochs=1)
    run = implant(model, FACTS, LokiConfig(selection=[[1], [2], [3]]), settings, out=tmp_path / "a", progress=False)
    with pytest.raises(ValueError, match="trained on other weights"):
        open_model(run)
    assert open_model(run, base=model).n_layers == 3


def test_loaded_models_and_peft_models_take_the_tokenizer_at_hand(runs) -> None:
    base, loki, _ = runs
    hooked = load_model(base)
    assert measure_drift(hooked.hf, hooked, FACTS)["change"].eq(0).all()
    assert measure_drift(hooked.hf, hooked.hf, FACTS)["change"].eq(0).all()
    assert measure_drift(loki.model, loki, FACTS)["change"].abs().max() < 1e-4
    plain = random_model("llama")
    with pytest.raises(ValueError, match="needs its tokenizer"):
        measure_drift(plain, plain, FACTS)
    assert measure_drift(plain, plain, FACTS, tokenizer=tokenizer())["change"].eq(0).all()


def test_a_peft_model_is_left_as_it_was() -> None:
    model = get_peft_model(random_model("llama"), LoraConfig(r=2, target_modules=["down_proj"]))
    names = [name for name, _ in model.named_modules()]
    opened = open_model(model, beside=tiny("llama"))
    assert [name for name, _ in model.named_modules()] == names
    torch.testing.assert_close(opened.W_E, tiny("llama").W_E)


def test_models_whose_tokenizers_cut_text_otherwise_are_refused(caplog) -> None:
    words = tokenizer()
    swapped = words.backend_tokenizer.to_str().replace('"capital":5', '"capital":6').replace('"of":6', '"of":5')
    first = tiny("llama")
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(swapped))
    with pytest.raises(ValueError, match=r"cut the same text into other tokens.*tokenizer="):
        check_comparable(first, load_model(random_model("llama"), tokenizer=other))
    words.add_special_tokens({"additional_special_tokens": ["<city>"]})  # as a checkpoint may have it
    check_comparable(first, load_model(random_model("llama"), tokenizer=words))
    assert not caplog.records
    words.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    check_comparable(first, load_model(random_model("llama"), tokenizer=words))
    assert "other special tokens" in caplog.text


def test_an_adapter_is_read_with_another_tokenizer_than_its_base_was(runs) -> None:
    """The digest of the base is of its own tokenizer, so the base is told by that."""
    _, loki, _ = runs
    words = tokenizer()
    words.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    opened = open_model(str(loki.adapter), tokenizer=words)
    assert opened.tokenizer("the").input_ids[0] == 1
    own = open_model(str(loki.adapter)).hf.state_dict()
    assert all(torch.equal(weight, own[name]) for name, weight in opened.hf.state_dict().items())


def test_one_tokenizer_object_costs_nothing(monkeypatch) -> None:
    first, second = (load_model(random_model("llama"), tokenizer=tiny("llama").tokenizer) for _ in range(2))
    monkeypatch.setattr(type(first.tokenizer), "__call__", None)
    check_comparable(first, second)


def test_a_folder_without_a_tokenizer_is_read_by_another(tmp_path, monkeypatch, capsys, caplog) -> None:
    """As checkpoints of a Trainer are that was given none."""
    whole = saved(tmp_path / "whole")
    for name in ("first", "second"):
        random_model("llama").save_pretrained(tmp_path / name)
    bare = str(tmp_path / "first")
    assert (lacks_tokenizer(bare), lacks_tokenizer(whole), lacks_tokenizer(tmp_path)) == (True, False, False)
    base = load_model(str(whole))
    opened = open_model(bare, beside=base)
    assert opened.tokenizer is base.tokenizer
    assert f"{bare} has no tokenizer; that of {base.name} is used." in caplog.text
    with pytest.raises(FileNotFoundError, match=r"first has no tokenizer .*--tokenizer"):
        open_model(bare)
    FACTS.save(tmp_path / "facts.jsonl")
    how = ("--facts", tmp_path / "facts.jsonl", "--metrics", "d_soft", "--no-floor", "--no-similar", "-q")
    for pair in ((whole, bare), (bare, whole)):
        assert call(monkeypatch, "drift", *pair, *how) == 0
        assert "d_soft" in capsys.readouterr().out
    both = (bare, tmp_path / "second")
    assert call(monkeypatch, "drift", *both, *how) == 1
    assert "has no tokenizer" in capsys.readouterr().err
    assert call(monkeypatch, "drift", *both, *how, "--tokenizer", whole) == 0
    adapter = get_peft_model(random_model("llama"), LoraConfig(r=2, target_modules=["down_proj"]))
    adapter.peft_config["default"].base_model_name_or_path = bare
    adapter.save_pretrained(tmp_path / "adapter")
    assert call(monkeypatch, "drift", tmp_path / "adapter", bare, *how, "--tokenizer", whole) == 0
    assert call(monkeypatch, "drift", whole, tmp_path / "adapter", *how) == 0  # the base is read by the other's
    assert call(monkeypatch, "drift", tmp_path / "adapter", bare, *how) == 1
    tokenizer().save_pretrained(tmp_path / "adapter")  # as a Trainer does that has one
    assert call(monkeypatch, "drift", tmp_path / "adapter", bare, *how) == 0
    only = tmp_path / "only"  # a folder of nothing else
    only.mkdir()
    shutil.copy(whole / "tokenizer.json", only)
    shutil.copy(whole / "tokenizer_config.json", only)
    assert tokenizer_of(only).get_vocab() == base.tokenizer.get_vocab()
    assert call(monkeypatch, "drift", *both, *how, "--tokenizer", bare) == 1
    assert "first has no tokenizer" in capsys.readouterr().err

"""Bad input to an attribution: one sentence each, before the work where it can be known before, on every way in."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_cli import call
from test_store import names
from tiny import ARCHITECTURES, FACTS, random_model, saved, tiny, tokenizer
from tokenizers import normalizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from workbench.attribution import attribute, score_batch
from workbench.facts import FactSet
from workbench.models import load_model
from workbench.results import open_result

SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def mixture() -> Any:
    config = AutoConfig.for_model("mixtral", **SMALL, num_local_experts=2, num_key_value_heads=2)
    return AutoModelForCausalLM.from_config(config)


def encoder() -> Any:
    return AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **SMALL))


def encoder_decoder() -> Any:
    config = AutoConfig.for_model("t5", vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return AutoModelForSeq2SeqLM.from_config(config)


MODELS = {
    "mixture of experts": (mixture, "2 experts"),
    "encoder": (encoder, "encoder"),
    "encoder-decoder": (encoder_decoder, "encoder-decoder"),
}


def folder_of(model: Any, folder: Path, words: Any = None) -> str:
    model.save_pretrained(folder)
    (words or tokenizer()).save_pretrained(folder)
    return str(folder)


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], out: Path, *arguments: str) -> str:
    """Run `workbench attribute` and give its one sentence; nothing may have been written."""
    capsys.readouterr()
    assert call(monkeypatch, "attribute", *arguments, "--out", str(out), "-q") == 1
    printed = capsys.readouterr()
    lines = printed.err.strip().splitlines()
    assert len(lines) == 1, printed.err
    assert lines[0].startswith("workbench: ")
    assert "Traceback" not in printed.err + printed.out
    assert not out.exists()
    assert not [name for name in names(out.parent) if name.startswith((out.name, f".{out.name}"))]
    return lines[0]


@pytest.fixture
def facts(tmp_path: Path) -> str:
    return str(FACTS.save(tmp_path / "facts.jsonl"))


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_that_is_no_dense_decoder(kind: str, tmp_path: Path, facts: str, monkeypatch, capsys) -> None:
    make, expected = MODELS[kind]
    folder = folder_of(make(), tmp_path / "model")
    sentence = refused(monkeypatch, capsys, tmp_path / "a.zarr", "--model", folder, "--facts", facts)
    assert expected in sentence
    assert "decoder-only" in sentence or "dense" in sentence


def test_weights_with_nan(tmp_path: Path, facts: str, monkeypatch, capsys) -> None:
    folder = saved(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][3, 4] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    sentence = refused(monkeypatch, capsys, tmp_path / "a.zarr", "--model", str(folder), "--facts", facts)
    assert "layers.2.mlp.down_proj.weight" in sentence
    assert "1 NaN or infinite values" in sentence


def test_a_score_that_is_nan_names_the_fact_and_keeps_what_was_computed(tmp_path: Path, monkeypatch) -> None:
    calls: list[int] = []

    def scored(*args: Any) -> Any:
        score, gap, probability = score_batch(*args)
        calls.append(len(score))
        return (score if len(calls) < 3 else score * np.nan), gap, probability

    monkeypatch.setattr("workbench.attribution.scoring.score_batch", scored)
    options = {"steps": 2, "batch_size": 2, "out": tmp_path / "a.zarr", "progress": False}
    with pytest.raises(ValueError, match=r"^The score of fact \w+ is not finite: check the model's weights for NaN"):
        attribute(tiny("llama"), FACTS, **options)
    monkeypatch.undo()
    assert open_result(tmp_path / "a.zarr", partial=True).sizes["fact"] == sum(calls[:2]) > 0
    assert attribute(tiny("llama"), FACTS, **options).sizes["fact"] == len(FACTS)


def test_an_unknown_unit_kind(tmp_path: Path, facts: str, monkeypatch, capsys) -> None:
    with pytest.raises(ValueError, match='unit must be "node"') as caught:
        attribute(tiny("llama"), FACTS, unit="head", progress=False)
    assert len(str(caught.value).splitlines()) == 1
    command = ["attribute", "--facts", facts, "--out", str(tmp_path / "a.zarr"), "--unit", "head"]
    assert call(monkeypatch, *command) == 2  # the command knows the two kinds itself
    printed = "".join(capsys.readouterr())
    assert "head" in printed
    assert "Traceback" not in printed


def test_an_answer_without_tokens(tmp_path: Path, facts: str, monkeypatch, capsys) -> None:
    words = tokenizer()
    words.backend_tokenizer.normalizer = normalizers.Replace("☃", "")
    folder = folder_of(random_model("llama"), tmp_path / "model", words)
    empty = FactSet.from_records([{"id": "snow", "prompt": "the sky is", "answer": "☃"}])
    listed = str(empty.save(tmp_path / "snow.jsonl"))
    sentence = refused(monkeypatch, capsys, tmp_path / "a.zarr", "--model", folder, "--facts", listed)
    assert "the answer of fact 'snow' has no token of its own" in sentence


def test_a_fact_longer_than_the_context(tmp_path: Path, monkeypatch, capsys) -> None:
    long = FactSet.from_records([{"id": "long", "prompt": "one " * 70 + "is", "answer": "two"}])
    listed = str(long.save(tmp_path / "long.jsonl"))
    folder = str(saved(tmp_path / "model"))
    sentence = refused(monkeypatch, capsys, tmp_path / "a.zarr", "--model", folder, "--facts", listed)
    assert "fact 'long' is 72 tokens long" in sentence


def test_a_place_that_holds_something_else(tmp_path: Path, facts: str, monkeypatch, capsys) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    folder = str(saved(tmp_path / "model"))
    before = names(tmp_path)
    capsys.readouterr()
    command = ["attribute", "--model", folder, "--facts", facts, "--out", str(tmp_path / "photos"), "-q"]
    assert call(monkeypatch, *command) == 1
    assert "not a result of this workbench" in capsys.readouterr().err
    assert names(tmp_path) == before


@pytest.mark.skipif(sys.platform == "win32", reason="rights of folders are another matter there")
def test_a_place_that_cannot_be_written_is_found_before_the_work(tmp_path: Path, monkeypatch) -> None:
    def stop(*args: object) -> None:
        pytest.fail("work began")

    (tmp_path / "file").touch()
    monkeypatch.setattr("workbench.attribution.scoring.score_batch", stop)
    with pytest.raises((OSError, ValueError)) as caught:
        attribute(tiny("llama"), FACTS, out=tmp_path / "file" / "a.zarr", progress=False)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt"])
def test_the_same_inputs_without_the_fault_go_through(kind: str, tmp_path: Path, facts: str, monkeypatch) -> None:
    """Negative control of every refusal above."""
    assert kind in ARCHITECTURES
    folder = folder_of(random_model(kind), tmp_path / "model")
    out = str(tmp_path / "a.zarr")
    command = ["attribute", "--model", folder, "--facts", facts, "--out", out, "--method", "grad_x_act", "-q"]
    assert call(monkeypatch, *command) == 0
    assert np.isfinite(open_result(out)["score"].values).all()


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_a_wrapped_model_is_refused_with_the_way_out() -> None:
    wrapped = get_peft_model(random_model("llama"), LoraConfig(target_modules=["down_proj"]))
    with pytest.raises(ValueError, match="PeftModel is no plain transformers model: merge its adapter first"):
        load_model(wrapped, tokenizer=tokenizer())
    with pytest.raises(ValueError, match="OptimizedModule is no plain transformers model: give its _orig_mod"):
        load_model(torch.compile(random_model("llama")), tokenizer=tokenizer())
    assert load_model(random_model("llama"), tokenizer=tokenizer()).n_layers == 3

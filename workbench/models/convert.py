"""GGUF files to folders of safetensors, once: plain float32 weights and a tokenizer that splits as the file says."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from jaxtyping import Int
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from workbench.models.cache import build_once, sha256_of
from workbench.models.quiet import quiet

log = logging.getLogger(__name__)

_DIGITS_ALONE = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
"""Values of `tokenizer.ggml.pre` whose vocabularies split every digit off before the GPT-2 rule."""

_PLAIN_GPT2 = frozenset({"gpt-2", "phi-2", "mpt", "olmo", "jais"})


@dataclass(frozen=True)
class GgufSummary:
    """What the header of a GGUF file says: architecture, the tokenizer's kind, rule and size, number of weights."""

    architecture: str
    tokenizer_model: str
    split_rule: str
    n_tokens: int
    n_weights: int


def summarise_gguf(path: Path) -> GgufSummary:
    """Read the header of a GGUF file; a file that is none, or is cut short, raises `ValueError`."""
    try:
        reader = gguf.GGUFReader(path)
        n_weights = sum(int(tensor.n_elements) for tensor in reader.tensors)
    except (ValueError, IndexError, KeyError, UnicodeDecodeError, OverflowError) as error:
        raise ValueError(f"{path} is not a readable GGUF file ({error}); was it downloaded in full?") from error

    def text(key: str) -> str:
        field = reader.get_field(key)
        return "" if field is None else str(field.contents())

    tokens = reader.get_field("tokenizer.ggml.tokens")
    return GgufSummary(
        architecture=text("general.architecture"),
        tokenizer_model=text("tokenizer.ggml.model"),
        split_rule=text("tokenizer.ggml.pre"),
        n_tokens=0 if tokens is None else len(tokens.data),
        n_weights=n_weights,
    )


def converted_gguf(path: Path) -> Path:
    """Return the folder of safetensors made from a GGUF file, converting it on first use.

    The folder is kept in the cache under the file's name and sha256, so that a moved or copied file is not converted
    again and a changed one is.
    """
    digest = sha256_of(path)

    def build(folder: Path) -> dict[str, object]:
        convert_gguf(path, folder, summary)
        return {"kind": "gguf", "gguf": str(path.absolute()), "gguf_sha256": digest}

    summary = summarise_gguf(path)
    need = 4 * summary.n_weights + 100_000_000
    return build_once(f"{path.stem}-{digest[:12]}", build, need=need)


def convert_gguf(path: Path, folder: Path, summary: GgufSummary | None = None) -> None:
    """Write a GGUF file's model and tokenizer into `folder` as float32 safetensors, and check the copy.

    The saved weights must equal the dequantised ones to the bit, and the logits of both models on one fixed input must
    agree; otherwise `RuntimeError`. An architecture that transformers cannot read raises `ValueError` before any weight
    is read.
    """
    with _parsed_once():
        _convert(path, folder, summary or summarise_gguf(path))


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Parse a header, and map an architecture's names, once inside the `with`: transformers does either many times."""
    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
    parsed = lru_cache(maxsize=1)(reader)
    gguf.GGUFReader = lambda path, *mode: parsed(str(path), *mode)  # type: ignore[assignment, misc]
    gguf.get_tensor_name_map = lru_cache(maxsize=1)(names)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, names  # type: ignore[misc]


def _convert(path: Path, folder: Path, summary: GgufSummary) -> None:
    """Convert, save and check the copy."""
    if summary.n_tokens == 0:
        raise ValueError(f"{path.name} has no tokenizer in it; open the model as a folder of safetensors instead")
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    with quiet():
        try:
            config = AutoConfig.from_pretrained(**where)
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"{path.name} holds a model of architecture {summary.architecture!r}, which transformers cannot read "
                "from GGUF; open the model as a folder of safetensors instead"
            ) from error
        tokenizer = gguf_tokenizer(path, summary)
        limit = getattr(config, "max_position_embeddings", None)
        if limit:
            tokenizer.model_max_length = limit
        for circumstance in ("is_local", "local_files_only"):
            tokenizer.init_kwargs.pop(circumstance, None)
        tokenizer.save_pretrained(folder)
        _drop_invented_tokens(folder, summary.n_tokens)
        log.info("dequantising %s (%.0f million weights)", path.name, summary.n_weights / 1e6)
        model = _dequantised(path, config)
        model.save_pretrained(folder)
        log.info("checking the converted copy in %s", folder)
        _check_copy(
            model, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()
        )


def gguf_tokenizer(path: Path, summary: GgufSummary) -> PreTrainedTokenizerFast:
    """Return the tokenizer that a GGUF file describes, with the splitting rule that its vocabulary was learned with.

    transformers knows the rules of some vocabularies and falls back to GPT-2's; here the ones that split digits are
    added.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path.parent), gguf_file=path.name)
    if summary.tokenizer_model != "gpt2":
        return tokenizer
    backend = tokenizer.backend_tokenizer
    if summary.split_rule in _DIGITS_ALONE:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel) and summary.split_rule not in _PLAIN_GPT2:
        log.warning(
            "%s names the splitting rule %r, which is not known here: text is split as GPT-2 does, and tokens may "
            "differ from the original tokenizer's",
            path.name,
            summary.split_rule,
        )
    return tokenizer


def _dequantised(path: Path, config: Any) -> Any:
    """Return the model of a GGUF file as a plain one, which may be saved; refuse a file that lacks weights of it."""
    packed = getattr(transformers, "GgufConfig", None)  # newer releases can keep weights packed: they shall not
    pair: Any = AutoModelForCausalLM.from_pretrained(
        str(path.parent),
        gguf_file=path.name,
        config=config,
        dtype=torch.float32,
        output_loading_info=True,
        **({"quantization_config": packed(dequantize=True)} if packed else {}),
    )
    model, info = pair
    if info["missing_keys"]:  # transformers would fill them with random numbers
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"{path.name} lacks {len(missing)} weights of a {type(model).__name__}, such as {missing[0]}; "
            "it is not whole, or names them in a way that transformers does not read; open its folder of safetensors"
        )
    model.hf_quantizer = None
    model.is_quantized = False
    for name in ("quantization_config", "_pre_quantization_dtype", "_model_name_or_path"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    return model.eval()


def _drop_invented_tokens(folder: Path, n_tokens: int) -> None:
    """Take tokens that transformers adds by default out of a saved tokenizer: the model has no rows for them."""
    file = folder / "tokenizer.json"
    saved = json.loads(file.read_text(encoding="utf-8"))
    saved["added_tokens"] = [token for token in saved["added_tokens"] if token["id"] < n_tokens]
    file.write_text(json.dumps(saved, ensure_ascii=False, indent=1), encoding="utf-8")


def _check_copy(original: Any, copy: Any) -> None:
    kept = copy.state_dict()
    for name, weight in original.state_dict().items():
        if name not in kept or not torch.equal(weight, kept[name]):
            raise RuntimeError(
                f"the converted copy's {name} is not the dequantised one; the conversion was thrown away"
            )
    ids = probe_ids(original.get_input_embeddings().weight.shape[0])
    with torch.inference_mode():
        want, got = original(ids).logits, copy(ids).logits
    gap = (want - got).abs().max().item()
    # Equal weights give equal logits; a matmul may still round differently on differently aligned memory.
    if not gap <= 1e-5 * want.abs().max().item():
        raise RuntimeError(f"the converted copy's logits are off by {gap:.2g}; the conversion was thrown away")
    log.info("the converted copy gives the same logits (largest difference %.2g)", gap)


def probe_ids(d_vocab: int, length: int = 24) -> Int[Tensor, "1 pos"]:
    """Return a fixed row of token ids, spread over the vocabulary.

    >>> probe_ids(100, 3).tolist()
    [[19, 38, 57]]
    """
    return (torch.arange(1, length + 1) * 7919 % d_vocab).unsqueeze(0)

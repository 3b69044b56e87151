"""Where models come from: the default, a folder of safetensors, a `.gguf` file, a hub id. All are opened here."""

import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from workbench.models.convert import converted_gguf
from workbench.models.devices import pick_device, pick_dtype
from workbench.models.embedded import DEFAULT_NAME, default_model, list_models
from workbench.models.promises import check_finite
from workbench.models.quiet import quiet

__all__ = ["LoadedModel", "default_model", "list_models", "load_hf"]

log = logging.getLogger(__name__)

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_FROM_THE_HUB = ["*.json", "*.jinja", "*.txt", "*.model"]
_OTHERS = f"the default model {DEFAULT_NAME!r}, a folder of safetensors or a .gguf file"


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model in eval mode, its tokenizer, the folder that it was read from and its name."""

    hf: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    path: Path
    name: str


def load_hf(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    attn_implementation: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Open a decoder-only language model with plain transformers, from safetensors.

    `name_or_path` is `"smollm2-135m"` (or `"default"`), a folder, a `.gguf` file (converted once into the cache) or a
    hub id; `revision` is for hub ids; `tokenizer` is taken in place of the checkpoint's own. Nothing pickled is read,
    and code that comes with a checkpoint runs only with `trust_remote_code=True`. What is missing, unreadable,
    incomplete, not finite or not a decoder-only model raises `FileNotFoundError`, `ValueError` or `ConnectionError`
    with the way out.
    """
    place = pick_device(device)
    folder, name = _find(os.fspath(name_or_path), revision, trust_remote_code)
    _check_files(folder, name, needs_tokenizer=tokenizer is None)
    config = _read_config(folder, name, trust_remote_code)
    number = pick_dtype(dtype, place, getattr(config, "dtype", None))
    log.info("opening %s on %s in %s", name, place, str(number).removeprefix("torch."))
    with quiet():
        if tokenizer is None:
            tokenizer = read_tokenizer(folder, name, trust_remote_code)
        model = _read_model(folder, name, config, number, attn_implementation, trust_remote_code)
    check_finite(model, name)
    _check_vocabulary(model, tokenizer, name)
    torch.nn.Module.to(model, place)
    return LoadedModel(hf=model.eval(), tokenizer=tokenizer, path=folder, name=name)


def _find(text: str, revision: str | None, trust_remote_code: bool, weights: bool = True) -> tuple[Path, str]:
    """Return the local folder for what the user named, and the name to show."""
    if not text.strip():
        raise ValueError(f"no model is named; name {_OTHERS}, or a hub id such as 'org/model'")
    path = Path(text).expanduser()
    local = text in (DEFAULT_NAME, "default") or path.exists()
    if local and revision is not None:
        raise ValueError(f"revision={revision!r} is for hub ids; {text} is opened from this machine")
    if text in (DEFAULT_NAME, "default"):
        return default_model(), DEFAULT_NAME
    if path.is_dir():
        return path, path.resolve().name
    if path.suffix.lower() == ".gguf" and path.is_file():
        return converted_gguf(path), path.stem
    if path.is_file():
        raise ValueError(
            f"{text} is a single file; a model is a folder of safetensors with its config.json, or a .gguf file"
        )
    if path.suffix.lower() == ".gguf":
        raise FileNotFoundError(f"there is no file {text}")
    if path.is_absolute() or text.startswith((".", "~")) or text.endswith("/") or text.count("/") > 1:
        raise FileNotFoundError(f"there is no folder {text!r}; name {_OTHERS}, or a hub id such as 'org/model'")
    return _fetch_from_hub(text, revision, trust_remote_code, weights), text


def tokenizer_of(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, whatever else it holds, of a `.gguf` file, the default model or a hub id."""
    folder, name = _find(os.fspath(name_or_path), None, False, weights=False)
    if not has_tokenizer(folder):
        raise FileNotFoundError(f"{name} has no tokenizer (looked in {folder} for tokenizer.json and its kin)")
    return read_tokenizer(folder, name)


def lacks_tokenizer(folder: str | Path) -> bool:
    """Whether this is the folder of a model, but not of its tokenizer, as a checkpoint of transformers' Trainer."""
    return (Path(folder) / "config.json").is_file() and not has_tokenizer(folder)


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a tokenizer lies in a folder."""
    return any((Path(folder) / file).is_file() for file in _TOKENIZER_FILES)


def _fetch_from_hub(repo: str, revision: str | None, trust_remote_code: bool, weights: bool = True) -> Path:
    wanted = [*_FROM_THE_HUB, *(["*.safetensors"] if weights else []), *(["*.py"] if trust_remote_code else [])]
    try:
        folder = snapshot_download(
            repo, revision=revision, allow_patterns=wanted, ignore_patterns=["*/*", "consolidated*", "adapter_*"]
        )
    except GatedRepoError as error:
        raise PermissionError(
            f"{repo!r} is gated on the Hugging Face hub; accept its terms there and log in with `hf auth login`"
        ) from error
    except HFValidationError as error:
        raise ValueError(
            f"{repo!r} is neither a folder here nor a hub id; name {_OTHERS}, or a hub id such as 'org/model'"
        ) from error
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        at = f" at revision {revision!r}" if revision else ""
        raise ConnectionError(
            f"{repo!r} is no folder here, and could not be fetched from the Hugging Face hub{at} "
            f"({reason.rstrip('.')}); check the name and the connection, or name {_OTHERS}"
        ) from error
    return Path(folder)


def _check_files(folder: Path, name: str, *, needs_tokenizer: bool) -> None:
    """Raise unless the folder holds a config, all of its safetensors and (if needed) a tokenizer."""
    files = {file.name for file in folder.iterdir()}
    if "config.json" not in files:
        what = (
            "is a peft adapter, not a model: open its base model"
            if "adapter_config.json" in files
            else "has no config.json"
        )
        raise FileNotFoundError(f"{name} {what} (looked in {folder}); a model folder is what `save_pretrained` writes")
    weights = {file for file in files if file.endswith(".safetensors") and not file.startswith("adapter_")}
    pickled = sorted(
        file for file in files if file.endswith(_PICKLED) and file not in ("training_args.bin", "optimizer.pt")
    )
    if not weights and pickled:
        raise ValueError(
            f"{name} has pickled weights only ({', '.join(pickled)}), which are not read: unpickling can run code; "
            "save them as safetensors where you trust them (`model.save_pretrained(folder)`) and open that folder"
        )
    if not weights:
        raise FileNotFoundError(
            f"{name} has no .safetensors file (looked in {folder}); was it copied or downloaded in full?"
        )
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is not an index of weights ({_reason(error)}); fetch it again") from error
        missing = sorted(named - weights)
        if missing:
            raise FileNotFoundError(f"{name} lacks {', '.join(missing)}, which its index names; download it in full")
    if needs_tokenizer and not has_tokenizer(folder):
        raise FileNotFoundError(
            f"{name} has no tokenizer (looked in {folder} for tokenizer.json and its kin); save it there with "
            "`tokenizer.save_pretrained(folder)`, or pass tokenizer= (--tokenizer, where a command has it)"
        )


def _read_config(folder: Path, name: str, trust_remote_code: bool) -> Any:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # what the checks of transformers and huggingface_hub raise for odd settings
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{name} comes with its own code, which is not run; "
                "read it, and pass trust_remote_code=True if you trust it"
            ) from error
        raise ValueError(f"the config.json of {name} is not one that transformers reads ({_reason(error)})") from error
    kind = config.model_type
    own_code = trust_remote_code and "auto_map" in config.to_dict()
    masked = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    encoder_decoder = getattr(config, "is_encoder_decoder", False)
    if not own_code and (kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or masked or encoder_decoder):
        why = "an encoder-decoder" if encoder_decoder else "an encoder" if masked else "no causal language model"
        raise ValueError(
            f"{kind} is not a decoder-only model: {name} is {why}; "
            f"open one such as GPT-2, Llama, Qwen or Gemma, or {_OTHERS}"
        )
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"{name} is a quantised checkpoint, whose weights cannot be attributed to; open the unquantised one"
        )
    return config


def read_tokenizer(folder: Path, name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises bare Exception for a broken tokenizer.json
        raise ValueError(
            f"the tokenizer of {name} cannot be read ({_reason(error)}); save it again or pass tokenizer="
        ) from error
    if not tokenizer.is_fast:
        raise ValueError(f"{name} has a slow tokenizer only; save its fast form (tokenizer.json) or pass tokenizer=")
    return tokenizer


#: What transformers raises for settings that fit neither each other nor the weights.
UNFIT = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError)


def _read_model(
    folder: Path, name: str, config: Any, dtype: torch.dtype, attn_implementation: str | None, trust_remote_code: bool
) -> PreTrainedModel:
    try:
        pair: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except SafetensorError as error:
        raise ValueError(
            f"the weights of {name} cannot be read ({error}); was a file cut short? fetch them again"
        ) from error
    except UNFIT as error:
        raise ValueError(f"the weights of {name} do not fit its config.json ({_reason(error)})") from error
    model, info = pair
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"the checkpoint {name} lacks {len(missing)} weights of a {type(model).__name__}, such as {missing[0]}; "
            "it was saved without its language-modelling head or cut short"
        )
    if info["unexpected_keys"]:
        unused = sorted(info["unexpected_keys"])
        ours = {stem for key in model.state_dict() if (stem := _block(key)[0])}
        last = config.get_text_config().num_hidden_layers
        beyond = [key for key in unused if _block(key)[0] in ours and _block(key)[1] >= last]
        if beyond:
            raise ValueError(
                f"the checkpoint {name} holds more layers than its config.json says, such as {beyond[0]}; "
                "put num_hidden_layers right, or save the shortened model"
            )
        log.info("%s holds %d weights that the model does not use, such as %s", name, len(unused), unused[0])
    return model


def _reason(error: Exception) -> str:
    """The first line of what an error says, with the kind of error where that alone says little."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines and not isinstance(error, KeyError) else f"{type(error).__name__} {error}".strip()


def _block(key: str) -> tuple[str, int]:
    """The stack of blocks that a weight is of, and the number of its block; ("", -1) elsewhere.

    >>> _block("model.layers.12.mlp.up_proj.weight"), _block("lm_head.weight")
    (('model.layers.', 12), ('', -1))
    """
    found = re.match(r"(.*?\b(?:layers|h|blocks)\.)(\d+)\.", key)
    return (found.group(1), int(found.group(2))) if found else ("", -1)


def _check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    embedding: Any = model.get_input_embeddings()
    rows = embedding.weight.shape[0]
    if len(tokenizer) > rows:
        log.warning(
            "the tokenizer of %s has %d tokens, its model %d: ids from %d on cannot be used",
            name,
            len(tokenizer),
            rows,
            rows,
        )

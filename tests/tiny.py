"""Tiny random models of many architectures, and small fact sets, for tests that must be quick."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from workbench.facts import FactSet, TokenisedFact
from workbench.models import HookedModel, load_model
from workbench.recollection import recall

WORDS = (
    "<pad> <s> </s> <unk> the capital of France is Paris Japan Tokyo Kenya Nairobi gold symbol Au in a "
    "city big small opposite hot cold red blue sky grass green Italy Rome Spain Madrid one two three four "
    "five six seven eight "
).split()

_COMMON: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT2: dict[str, Any] = {"vocab_size": len(WORDS), "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}

#: Configuration of every architecture by model type; the sliding windows are shorter than the prompts.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2": {**_GPT2, "bos_token_id": 1, "eos_token_id": 2},
    "llama": _COMMON,
    "mistral": {**_COMMON, "sliding_window": 3},
    "qwen2": _COMMON,
    "qwen3": _COMMON,
    "gemma2": {**_COMMON, "sliding_window": 3},
    "gemma3_text": {
        **_COMMON,
        "sliding_window": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "olmo2": _COMMON,
    "phi": {k: v for k, v in _COMMON.items() if k != "head_dim"},
    "gpt_neox": {k: v for k, v in _COMMON.items() if k not in ("num_key_value_heads", "head_dim")},
    "bloom": {"vocab_size": len(WORDS), "hidden_size": 32, "n_layer": 3, "n_head": 4},
    "opt": {
        "vocab_size": len(WORDS),
        "hidden_size": 32,
        "ffn_dim": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 32,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, no BOS of its own."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def random_model(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A transformers model with random weights, larger than by default so that units matter."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **{**ARCHITECTURES[kind], **changes})
    config._name_or_path = f"tiny-{kind}"
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
        row = model.get_input_embeddings().weight[0]  # of padding: zeros would hide what padding changes
        row.copy_(torch.randn(row.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return model


@cache
def tiny(kind: str) -> HookedModel:
    """A hooked tiny model, shared by all tests that do not change it."""
    return load_model(random_model(kind), tokenizer=tokenizer())


@cache
def default(dtype: str = "float32") -> HookedModel:
    """The embedded default model, shared by all tests that do not change it."""
    return load_model("smollm2-135m", dtype=dtype)


def saved(folder: Any, kind: str = "llama", seed: int = 0) -> Any:
    """A tiny model as a folder of safetensors with its tokenizer."""
    random_model(kind, seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


#: Prompts of three lengths; answers of one, two and three tokens.
TOKENISED = (
    TokenisedFact("long", (4, 5, 6, 7, 8, 20, 21, 22), (9,)),
    TokenisedFact("three", (17, 18, 19), (10, 11, 12)),
    TokenisedFact("two", (30, 31), (32, 33)),
)

FACTS = FactSet.from_records(
    [
        {"id": "france", "relation": "capital", "prompt": "the capital of France is", "answer": "Paris",
         "paraphrases": ["France capital is"],
         "neighbours": [{"prompt": "the capital of Spain is", "answer": "Madrid"}]},
        {"id": "japan", "relation": "capital", "prompt": "the capital of Japan is", "answer": "Tokyo",
         "paraphrases": ["Japan capital is"]},
        {"id": "kenya", "relation": "capital", "prompt": "the capital of Kenya is", "answer": "Nairobi"},
        {"id": "gold", "relation": "symbol", "prompt": "the symbol of gold is", "answer": "Au"},
        {"id": "hot", "relation": "opposite", "prompt": "opposite of hot", "answer": "cold"},
        {"id": "big", "relation": "opposite", "prompt": "opposite of big", "answer": "small"},
        {"id": "sky", "relation": "colour", "prompt": "the sky is", "answer": "blue one two"},
        {"id": "grass", "relation": "colour", "prompt": "the grass in a city is", "answer": "green three"},
    ],
    name="tiny",
)  # fmt: skip


def inputs_of_a_run(folder: Path) -> dict[str, str]:
    """A model in a folder, facts of which it knows some, facts to teach it, and text: what a run is given."""
    model = load_model(str(saved(folder / "model")))
    prompts = [f"the {a} of {b} is" for a in ("capital", "city", "symbol") for b in WORDS[9:17]]
    facts = [{"id": p, "relation": p.split()[1], "prompt": p, "answer": "Paris"} for p in prompts if "Paris" not in p]
    said = recall(model, FactSet.from_records(facts))["predicted"]
    known = [
        fact | ({"answer": said[fact["id"]], "answer_in_prompt": True} if number % 4 else {})
        for number, fact in enumerate(facts)
        if said[fact["id"]].strip()
    ]
    (folder / "text.txt").write_text("\n\n".join(" ".join(WORDS[4:30]) for _ in range(3)), encoding="utf-8")
    return {
        "model": str(folder / "model"),
        "retained": str(FactSet.from_records(known).save(folder / "retained.jsonl")),
        "implanted": str(FACTS.save(folder / "taught.jsonl")),
        "text": str(folder / "text.txt"),
    }

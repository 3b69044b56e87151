"""A hand-wired two-layer Llama in which neurons store facts, so that every room has a known answer.

Attention writes nothing; every word has a direction of its own; neuron j of a layer opens on one subject (its key) and
writes one answer (its value vector). Everything else is exactly zero.
"""

from collections.abc import Iterable

import torch
from tiny import WORDS, tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from workbench.facts import FactSet
from workbench.models import HookedModel, load_model

#: (layer, neuron) -> the facts that it stores. The last neuron is shared by two facts.
PLANTED: dict[tuple[int, int], tuple[tuple[str, str], ...]] = {
    (0, 7): (("France", "Paris"),),
    (0, 300): (("Japan", "Tokyo"),),
    (1, 42): (("Kenya", "Nairobi"),),
    (1, 999): (("Italy", "Rome"), ("Spain", "Madrid")),
}
D_MLP = 1024
RELATION = {"France": "a", "Japan": "a", "Kenya": "b", "Italy": "b", "Spain": "c"}


def facts(subjects: Iterable[str] = RELATION) -> FactSet:
    """The planted facts: the prompt ends with the subject, whose direction the neuron reads."""
    answer = {subject: word for stored in PLANTED.values() for subject, word in stored}
    records = [
        {"id": s, "relation": RELATION[s], "subject": s, "prompt": f"the capital of {s}", "answer": answer[s]}
        for s in subjects
    ]
    return FactSet.from_records(records, name="planted")


def model(without: Iterable[tuple[int, int]] = ()) -> HookedModel:
    """The planted model, some of its neurons removed."""
    width = len(WORDS)
    width += -width % 4
    config = LlamaConfig(
        vocab_size=width, hidden_size=width, intermediate_size=D_MLP, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config._name_or_path = "planted"
    llama = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in llama.parameters():
            if parameter.ndim > 1:
                parameter.zero_()
        llama.model.embed_tokens.weight.copy_(torch.eye(width))
        llama.lm_head.weight.copy_(torch.eye(width))
        for (layer, neuron), stored in PLANTED.items():
            if (layer, neuron) in set(without):
                continue
            mlp = llama.model.layers[layer].mlp
            for subject, answer in stored:
                key, value = WORDS.index(subject), WORDS.index(answer)
                mlp.gate_proj.weight[neuron, key] = 2.0
                mlp.up_proj.weight[neuron, key] = 1.0
                mlp.down_proj.weight[value, neuron] = 1.0
    return load_model(llama, tokenizer=tokenizer())

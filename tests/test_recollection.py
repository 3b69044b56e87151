"""`recall`: readings against plain transformers, one fact at a time, and greedy generation."""

import math
from inspect import signature

import pytest
import torch
from tiny import FACTS, default, random_model, tiny, tokenizer

from workbench.facts import FactSet, load_facts
from workbench.models import load_model
from workbench.recollection import by_length, by_relation, recall, text_chunks


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma3_text", "opt"])
def test_readings_equal_plain_transformers_one_by_one(kind: str) -> None:
    model = tiny(kind)
    frame = recall(model, FACTS)
    assert list(frame.index) == list(FACTS.ids)
    for fact, tokens in zip(FACTS, FACTS.tokenise(model.tokenizer), strict=True):
        row = frame.loc[fact.id]
        with torch.no_grad():
            logits = model.hf(torch.tensor([tokens.ids])).logits[0]
            greedy = model.hf.generate(
                torch.tensor([tokens.prompt_ids]), max_new_tokens=len(tokens.answer_ids), do_sample=False,
                eos_token_id=None, pad_token_id=0,
            )[0, len(tokens.prompt_ids) :].tolist()  # fmt: skip
        start = len(tokens.prompt_ids) - 1
        steps = [(logits[start + k].log_softmax(-1), y) for k, y in enumerate(tokens.answer_ids)]
        assert row["logprob"] == pytest.approx(sum(float(p[y]) for p, y in steps), rel=1e-4)
        assert row["prob"] == pytest.approx(math.exp(sum(float(p[y]) for p, y in steps)), rel=1e-4)
        assert row["rank"] == max(int((p > p[y]).sum()) for p, y in steps)
        assert row["predicted"] == model.tokenizer.decode(greedy)
        assert row["known"] == (greedy == list(tokens.answer_ids))
        assert row["n_tokens"] == len(tokens.answer_ids)


def test_what_the_model_says_is_known_and_anything_else_is_not() -> None:
    model = tiny("llama")
    said = recall(model, FACTS)["predicted"]
    right = [record | {"answer": said[record["id"]], "answer_in_prompt": True} for record in FACTS.to_records()]
    frame = recall(model, FactSet.from_records(right))
    assert frame["known"].all()
    assert (frame["margin"] > 0).all()
    assert not recall(model, FACTS)["known"].all()
    assert by_relation(frame)["share"].eq(1).all()
    assert by_relation(frame)["n"].sum() == len(FACTS)


def test_batches_cover_every_index_once() -> None:
    lengths = [3, 900, 1, 5, 400, 400, 400]
    batches = list(by_length(lengths))
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 768 for b in batches)


def test_text_is_cut_into_pieces_of_stated_size() -> None:
    model = tiny("gpt2")
    passages = ["one two three four five six seven eight " * 4, "red blue"]
    chunks = text_chunks(model, passages, max_tokens=30, length=12)
    assert [len(chunk) for chunk in chunks] == [12, 12]  # the last piece of the first passage has 8, 6 are left
    assert signature(text_chunks).parameters["length"].default == 128  # 1,024 tokens are about a dozen pieces
    assert chunks[0][:3] == [model.tokenizer.convert_tokens_to_ids(word) for word in ("one", "two", "three")]


@pytest.mark.real
def test_the_default_model_knows_these_facts() -> None:
    facts = FactSet.from_records(
        [
            {"id": "france", "prompt": "The capital of France is", "answer": "Paris"},
            {"id": "japan", "prompt": "The capital of Japan is", "answer": "Tokyo"},
            {"id": "kenya", "prompt": "The capital of Kenya is", "answer": "Nairobi"},
            {"id": "gold", "prompt": "The chemical symbol for gold is", "answer": "Au"},
            {"id": "romeo", "prompt": "The author of Romeo and Juliet is William", "answer": "Shakespeare"},
            {"id": "wrong", "prompt": "The capital of France is", "answer": "Tokyo"},
        ]
    )
    frame = recall(default(), facts)
    assert frame["known"].to_dict() == {i: i != "wrong" for i in facts.ids}
    assert frame.loc["france", "prob"] == pytest.approx(0.77, abs=0.02)


def test_numbers_that_are_not_finite_are_no_answer() -> None:
    model = load_model(random_model("llama"), tokenizer=tokenizer())
    assert len(recall(model, FACTS)) == len(FACTS)
    with torch.no_grad():
        model.hf.model.norm.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"gives numbers that are not finite on fact '\w+'; open it with dtype="):
        recall(model, FACTS)


@pytest.mark.real
def test_the_default_model_knows_the_world_and_not_fiction() -> None:
    """Of all 1,165 facts of `world` it knows 612, of 200 invented ones none: here by a draw of each."""
    known = [recall(default(), load_facts(name).at_most(60, seed=1))["known"] for name in ("world", "fictional:200")]
    assert known[0].mean() > 0.35  # 150 known ones are 0.13
    assert known[1].mean() <= 0.05

"""A person's own training data: which tokens are learned, and one sentence for a file that does not fit."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FACTS, WORDS, tiny, tokenizer

from workbench.facts import Example, ExampleSet, FactSet, Message, load_training_data
from workbench.training import collate, tokenise

CHATML = (
    "{% for m in messages %}{{ '<s> ' + m['role'] + ' ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s> assistant ' }}{% endif %}"
)


def lines(path: Path, *records: object) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def words_of(ids) -> str:
    return " ".join(WORDS[i] for i in ids)


def learned(one) -> str:
    return words_of(token for token, yes in zip(one.ids, one.learned, strict=True) if yes)


def test_plain_labels_equal_a_hand_made_example(tmp_path) -> None:
    data = load_training_data(lines(tmp_path / "a.jsonl", {"prompt": "the capital of France is ", "completion": "Paris",
                                                           "source": "a book"}))  # fmt: skip
    one = data.tokenise(tokenizer())[0]
    ids = [WORDS.index(word) for word in "the capital of France is Paris </s>".split()]
    assert (data.kind, data.ids, one.ids) == ("plain", ("line-1",), tuple(ids))
    assert collate([one])["labels"].tolist() == [[-100, -100, -100, -100, -100, ids[5], ids[6]]]


def test_chat_labels_equal_a_hand_made_example(tmp_path) -> None:
    turns = [("system", "a big city"), ("user", "France is"), ("assistant", "Paris"),
             ("user", "Japan is"), ("assistant", "Tokyo one")]  # fmt: skip
    record = {"id": "x", "messages": [{"role": role, "content": text} for role, text in turns]}
    words = tokenizer()
    words.chat_template = CHATML
    one = load_training_data(lines(tmp_path / "a.jsonl", record)).tokenise(words)[0]
    assert words_of(one.ids) == (
        "<s> <unk> a big city </s> <s> <unk> France is </s> <s> <unk> Paris </s> "
        "<s> <unk> Japan is </s> <s> <unk> Tokyo one </s>"
    )
    assert learned(one) == "Paris </s> Tokyo one </s>"
    told = [token if yes else -100 for token, yes in zip(one.ids, one.learned, strict=True)]
    assert collate([one])["labels"].tolist() == [told]
    first = [place for place, yes in enumerate(one.learned) if yes][:2]
    assert first == [13, 14]


def test_a_template_that_hides_the_words_is_refused_and_one_that_thinks_is_not() -> None:
    data = ExampleSet("t", (Example("x", messages=(Message("user", "hot"), Message("assistant", "cold"))),))
    words = tokenizer()
    words.chat_template = "{% for m in messages %}{{ m['content'] | upper }} {% endfor %}"
    with pytest.raises(ValueError, match="does not show turn 1 of the assistant in example 'x'"):
        data.tokenise(words)
    words.chat_template = CHATML.replace("m['content']", "('one ' if m['role'] == 'assistant' else '') + m['content']")
    assert learned(data.tokenise(words)[0]) == "cold </s>"
    words.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        data.tokenise(words)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(WORDS[4:]), min_size=2, max_size=8), st.data())
def test_the_learned_tokens_are_what_follows_the_common_prefix(words: list[str], data) -> None:
    cut = data.draw(st.integers(1, len(words) - 1))
    prompt, completion = " ".join(words[:cut]), " " + " ".join(words[cut:])
    one = ExampleSet("h", (Example("a", prompt, completion),)).tokenise(tokenizer())[0]
    alone = tokenizer().encode(prompt)
    assert list(one.ids[: len(alone)]) == alone
    assert one.learned == (False,) * len(alone) + (True,) * (len(words) - cut + 1)


@pytest.mark.parametrize(
    ("records", "sentence"),
    [
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a"}], "line 2: field 'completion' is missing"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": 3, "completion": "b"}], "line 2: field 'prompt' is 3"),
        ([{"prompt": "a", "completion": ""}], "line 1: field 'completion' is empty"),
        ([{"messages": "hello"}], "line 1: field 'messages' is str, not a list"),
        ([{"messages": []}], "line 1: field 'messages' is an empty list"),
        ([{"messages": [{"role": "user", "content": "a"}]}], "line 1: field 'messages' has no turn of the assistant"),
        ([{"messages": [{"role": "bot", "content": "a"}]}], r"line 1, messages\[1\]: field 'role' is 'bot'"),
        ([{"messages": [{"role": "user"}]}], r"line 1, messages\[1\]: field 'content' is missing"),
        ([{"messages": [{"role": "assistant", "content": "a"}]}, {"prompt": "a", "completion": "b"}],
         "line 2: field 'messages' is missing"),
        ([{"id": "a", "prompt": "a", "completion": "b"}] * 2, "the id 'a' more than once"),
        ([{"prompt": "a", "response": "b"}], "line 1: unknown field 'response'"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_one_sentence(records, sentence, tmp_path) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        load_training_data(lines(tmp_path / "mine.jsonl", *records))
    assert "\n" not in str(caught.value)
    if "line" in sentence:
        assert "mine.jsonl" in str(caught.value)


def test_facts_and_tables_are_read_too(tmp_path) -> None:
    assert isinstance(load_training_data(str(FACTS.save(tmp_path / "f.jsonl"))), FactSet)
    assert len(load_training_data("fictional:3")) == 3
    (tmp_path / "t.csv").write_text("prompt,completion\nHello, there\n", encoding="utf-8")
    assert [one.completion for one in load_training_data(tmp_path / "t.csv")] == [" there"]
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        load_training_data("nowhere.jsonl")


def test_long_examples_are_named_before_training() -> None:
    short, long = Example("s", "one two", " three"), Example("l", "one " * 70, "two")
    with pytest.raises(ValueError, match=r"1 of the 2 examples of d are longer than the 64 tokens .* l \(72 tokens\)"):
        tokenise(tiny("llama"), ExampleSet("d", (short, long)))
    assert len(tokenise(tiny("llama"), ExampleSet("d", (short,)))) == 1

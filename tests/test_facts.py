"""Facts and fact sets: promises, round trips, splits, tokenisation, and the sets that ship."""

from __future__ import annotations

import dataclasses
import hashlib
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from workbench.facts import Fact, FactSet, Neighbour, fictional, general_text, load_facts, neutral_prompts
from workbench.facts.nouns import gives_away
from workbench.facts.shipped import invented

CORPUS = ["The capital of France is Paris.", "The capital of Peru is Lima.", "Water boils at 100 degrees.", "São Tomé"]
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12).filter(str.strip)


def fact(answer: str = "Paris", **changes: Any) -> Fact:
    given = {"id": "capital/france", "relation": "capital", "subject": "France", "prompt": "The capital of France is"}
    return Fact(**{**given, "answer": answer, **changes})


def plain_set(n: int = 30, relations: int = 3) -> FactSet:
    return FactSet.from_records(
        [
            {
                "id": f"f{i}",
                "relation": f"r{i % relations}",
                "subject": f"s{i}",
                "prompt": f"thing {i} is",
                "answer": f"a{i}",
            }
            for i in range(n)
        ],
        name="plain",
    )


def byte_bpe(bos: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def metaspace() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>", "<s>"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


def word_level() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<unk>", "The", "capital", "of", "France", "is", "Paris"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


TOKENIZERS = {"bpe": byte_bpe(), "bpe-bos": byte_bpe(bos=True), "metaspace": metaspace(), "word": word_level()}


# Fact


def test_facts_start_without_torch() -> None:
    code = "import sys, workbench.facts; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


def test_fact_is_frozen_and_hashable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        fact().answer = "Lyon"  # type: ignore[misc]
    assert len({fact(), fact()}) == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"answer": " "}, "'answer' is empty"),
        ({"prompt": ""}, "'prompt' is empty"),
        ({"id": ""}, "'id' is empty"),
        ({"prompt": "PARIS is the capital:", "answer": "Paris"}, "gives it away"),
        ({"paraphrases": ("In Paris, people live in",)}, "'paraphrases' contains the answer"),
        ({"paraphrases": ("",)}, "'paraphrases' is empty"),
        ({"answer": "\ud800"}, "surrogate"),
        ({"answer": "a\0b"}, "NUL at character 1"),
    ],
)
def test_fact_refuses(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        fact(**changes)


@pytest.mark.parametrize(
    ("prompt", "answer", "given_away"),
    [
        ("The answer of 2+24 is", "4", False),
        ("The answer of 2+4 is", "4", True),
        ("The capital of Mexico is", "Mexico City", False),
        ("Mexico City is in", "mexico", True),
        ("A category of cats is", "cat", False),
        ("C++ compiles to", "C++", True),
        ("Die Straße heißt", "STRASSE", True),
        ("Sa\u0303o Paulo is", "São Paulo", True),
    ],
)
def test_whole_words_decide_whether_a_prompt_gives_the_answer_away(prompt: str, answer: str, given_away: bool) -> None:
    assert gives_away(prompt, answer) is given_away


def test_multiple_choice_may_name_its_answer() -> None:
    choice = fact(prompt="Which?\nA. one\nB. two\nAnswer:", answer="A", answer_in_prompt=True)
    assert choice.text.endswith("Answer: A")
    records = FactSet("choices", (choice, fact(id="plain"))).to_records()
    assert records[0]["answer_in_prompt"] is True
    assert "answer_in_prompt" not in records[1]


def test_neighbour_is_checked() -> None:
    with pytest.raises(ValueError, match="'answer' is empty"):
        Neighbour("The capital of Peru is", "")
    with pytest.raises(ValueError, match="contains its answer"):
        Neighbour("The capital of Peru is Lima or", "Lima")


# FactSet


def test_ids_are_unique_and_the_error_names_the_duplicate() -> None:
    with pytest.raises(ValueError, match="'capital/france' more than once"):
        FactSet("two", (fact(), fact()))
    with pytest.raises(ValueError, match="record 2: id 'a' was already used at two, record 1"):
        FactSet.from_records([{"id": "a", "prompt": "x", "answer": "y"}] * 2, name="two")


def test_missing_ids_are_derived_unique_and_leave_given_ids_alone() -> None:
    records = [
        {"relation": "capital", "subject": "Côte d'Ivoire", "prompt": "one", "answer": "x"},
        {"relation": "capital", "subject": "Cote d'Ivoire", "prompt": "two", "answer": "x"},
        {"prompt": "three", "answer": "x"},
        {"id": "capital/cote-d-ivoire", "prompt": "four", "answer": "x", "relation": None},
    ]
    facts = FactSet.from_records(records)
    expected = "fact/" + hashlib.sha256(b"three\x1fx").hexdigest()[:12]
    assert facts.ids == ("capital/cote-d-ivoire-2", "capital/cote-d-ivoire-3", expected, "capital/cote-d-ivoire")
    assert facts[3].relation == ""


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"prompt": "x"}, "field 'answer' is missing"),
        ({"promt": "x", "answer": "y"}, "unknown field 'promt'; did you mean 'prompt'"),
        ({"prompt": "x", "answer": "y", "zzz": 1}, "the known ones are id, relation"),
        ({"prompt": 3, "answer": "y"}, r"'prompt' is 3 \(int\), not text"),
        ({"prompt": "x", "answer": None}, "'answer' is null"),
        ({"prompt": "x", "answer": "y", "id": 7}, "'id' is 7, not text"),
        ({"prompt": "x", "answer": "y", "paraphrases": "z"}, "'paraphrases' is str, not a list"),
        ({"prompt": "x", "answer": "y", "paraphrases": ["p", 5]}, r"paraphrases\[2\]' is 5"),
        (
            {"prompt": "x", "answer": "y", "neighbours": [{"prompt": "z"}]},
            r"\[1\]: field 'answer' is missing",
        ),
        ({"prompt": "x", "answer": "y", "neighbours": ["z"]}, "expected an object with the field 'prompt'"),
        ({"prompt": "x", "answer": "y", "neighbours": [{"prompt": "z", "answer": "w", "q": 1}]}, "unknown field 'q'"),
        ({"prompt": "x", "answer": "y", "answer_in_prompt": "yes"}, "not true or false"),
    ],
)
def test_records_that_do_not_fit_are_named(record: dict[str, Any], says: str) -> None:
    good: Any = {"prompt": "p", "answer": "a"}
    assert len(FactSet.from_records([good])) == 1
    with pytest.raises(ValueError, match=f"mine, record 2.*{says}"):
        FactSet.from_records([good, record], name="mine")


RECORDS: st.SearchStrategy[list[dict[str, Any]]] = st.lists(
    st.fixed_dictionaries(
        {"prompt": WORDS, "answer": WORDS},
        optional={"relation": WORDS, "subject": WORDS, "paraphrases": st.lists(WORDS, max_size=2)},
    ),
    min_size=1,
    max_size=5,
).filter(
    lambda records: (
        not any(
            gives_away(text, record["answer"])
            for record in records
            for text in (record["prompt"], *record.get("paraphrases", []))
        )
    )
)


def test_white_space_after_an_answer_is_no_part_of_it() -> None:
    fact = Fact("a", "", "", "the sky is", "blue \n", neighbours=(Neighbour("the sea is", "green\t"),))
    assert (fact.answer, fact.neighbours[0].answer) == ("blue", "green")
    assert fact == Fact("a", "", "", "the sky is", "blue", neighbours=(Neighbour("the sea is", "green"),))
    assert Fact("a", "", "", "the sky is", " blue").answer == " blue"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=RECORDS)
def test_round_trips_are_exact(records: list[dict[str, Any]], tmp_path: Path) -> None:
    facts = FactSet.from_records(records, name="saved")
    assert FactSet.from_records(facts.to_records(), name="saved") == facts
    loaded = load_facts(facts.save(tmp_path / "saved.jsonl"))
    assert loaded == facts
    assert loaded.digest == facts.digest
    assert [path.name for path in tmp_path.iterdir()] == ["saved.jsonl"]


def test_save_keeps_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = plain_set(3).save(tmp_path / "facts.jsonl")
    before = path.read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="no space left"):
        plain_set(5).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_digest_sees_every_field_and_the_order_but_not_the_name() -> None:
    canonical = (
        '[{"answer":"Zürich","id":"i","neighbours":[{"answer":"b","prompt":"n"}],'
        '"paraphrases":["q"],"prompt":"p","relation":"r","subject":"s"}]'
    )
    one = FactSet("one", (Fact("i", "r", "s", "p", "Zürich", ("q",), (Neighbour("n", "b"),)),))
    assert one.digest == hashlib.sha256(canonical.encode()).hexdigest()
    facts = plain_set(4)
    assert dataclasses.replace(facts, name="other").digest == facts.digest
    assert FactSet("plain", facts.facts[::-1]).digest != facts.digest
    around = (Neighbour("p", "a"),)
    changes: list[dict[str, Any]] = [
        {"answer": "z"}, {"subject": "z"}, {"paraphrases": ("z",)}, {"neighbours": around}, {"answer_in_prompt": True}
    ]  # fmt: skip
    for change in changes:
        changed = (dataclasses.replace(facts[0], **change), *facts.facts[1:])
        assert FactSet("plain", changed).digest != facts.digest


def test_frame_has_one_row_a_fact() -> None:
    frame = plain_set(4).to_frame()
    assert list(frame.index) == ["f0", "f1", "f2", "f3"]
    assert frame.index.name == "fact"
    assert frame.loc["f2", "answer"] == "a2"
    assert list(plain_set(4).filter(ids=[]).to_frame().columns) == list(frame.columns)


def test_filter_keeps_the_order_of_the_set() -> None:
    facts = plain_set(9)
    assert facts.filter(ids=["f5", "f1"]).ids == ("f1", "f5")
    assert facts.filter(relations=["r1"], where=lambda one: one.id != "f4", name="few").ids == ("f1", "f7")
    assert facts.filter(relations=["r1"], name="few").name == "few"
    assert len(facts.filter(where=lambda one: False)) == 0
    with pytest.raises(ValueError, match="does not have the ids 'nope'"):
        facts.filter(ids=["f1", "nope"])
    with pytest.raises(ValueError, match="relations 'r9'"):
        facts.filter(relations=["r9"])
    with pytest.raises(ValueError, match="give a list of ids"):
        facts.filter(ids="f1")


def test_items_by_number_id_and_slice() -> None:
    facts = plain_set(5)
    assert facts[1] is facts["f1"]
    assert facts[1:3].ids == ("f1", "f2")
    assert "f1" in facts
    assert "f9" not in facts
    with pytest.raises(KeyError, match="no fact 'f9'"):
        facts["f9"]


@pytest.mark.parametrize(
    "verb", ["split", "sample", "tokenise", "save", "report", "paraphrased", "neighbourhood", "make"]
)
def test_an_empty_set_says_so(verb: str, tmp_path: Path) -> None:
    empty = plain_set(3).filter(ids=[])
    verbs = {
        "split": lambda: empty.split(0),
        "sample": lambda: empty.sample(1, 0),
        "tokenise": lambda: empty.tokenise(TOKENIZERS["word"]),
        "save": lambda: empty.save(tmp_path / "x.jsonl"),
        "report": lambda: empty.tokenisation_report(TOKENIZERS["word"]),
        "paraphrased": lambda: empty.paraphrased(),
        "neighbourhood": lambda: empty.neighbourhood(),
        "make": lambda: FactSet.from_records([]),
    }
    with pytest.raises(ValueError, match=r"has no facts|from the 0 of"):
        verbs[verb]()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    fraction=st.floats(0.2, 0.8),
    n=st.integers(10, 60),
    shuffle=st.randoms(use_true_random=False),
)
def test_split_is_a_stratified_partition_that_ignores_order(
    seed: int, fraction: float, n: int, shuffle: random.Random
) -> None:
    facts = plain_set(n)
    first, second = facts.split(seed, fraction)
    assert set(first.ids) | set(second.ids) == set(facts.ids)
    assert not set(first.ids) & set(second.ids)
    assert abs(len(first) - fraction * n) <= 0.5 + 1e-9  # 0.7 * 45 is half a fact, but for rounding
    for relation in facts.relations:
        whole = len(facts.filter(relations=[relation]))
        assert abs(sum(one.relation == relation for one in first) - fraction * whole) < 1
    mixed = list(facts)
    shuffle.shuffle(mixed)
    again, _ = FactSet("plain", tuple(mixed)).split(seed, fraction)
    assert set(again.ids) == set(first.ids)
    assert first.ids == tuple(id for id in facts.ids if id in first.ids)


def test_split_depends_on_the_seed_and_can_keep_relations_whole() -> None:
    facts = plain_set(40, relations=5)
    assert facts.split(0)[0].ids != facts.split(1)[0].ids
    first, second = facts.split(0, 0.4, by="relation")
    assert not set(first.relations) & set(second.relations)
    assert len(first.relations) == 2
    with pytest.raises(ValueError, match="one side would be empty"):
        facts.filter(relations=["r0"]).split(0, by="relation")
    with pytest.raises(ValueError, match="between 0 and 1"):
        facts.split(0, 1.0)


def test_samples_are_nested_and_ignore_order() -> None:
    facts = plain_set(30)
    assert set(facts.sample(5, 3).ids) < set(facts.sample(12, 3).ids)
    assert set(FactSet("r", facts.facts[::-1]).sample(5, 3).ids) == set(facts.sample(5, 3).ids)
    assert facts.sample(5, 3).ids != facts.sample(5, 4).ids
    with pytest.raises(ValueError, match="cannot draw 31 facts from the 30"):
        facts.sample(31, 0)


def test_paraphrases_and_neighbours_become_facts() -> None:
    peru, chile = Neighbour("The capital of Peru is", "Lima"), Neighbour("The capital of Chile is", "Santiago")
    facts = FactSet(
        "two",
        (
            fact(paraphrases=("France's capital is", "France is ruled from"), neighbours=(peru, chile)),
            fact(answer="Rome", id="capital/italy", prompt="The capital of Italy is", neighbours=(peru,)),
        ),
    )
    assert facts.paraphrased().ids == ("capital/france#p1", "capital/france#p2")
    assert [one.answer for one in facts.paraphrased()] == ["Paris", "Paris"]
    around = facts.neighbourhood()
    assert around.ids == ("capital/france#n1", "capital/france#n2")
    assert [(one.prompt, one.answer) for one in around] == [(one.prompt, one.answer) for one in (peru, chile)]


# Tokenisation


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(prompt=WORDS, answer=WORDS)
def test_parts_concatenate_to_the_ids_of_the_whole(name: str, prompt: str, answer: str) -> None:
    tokenizer = TOKENIZERS[name]
    facts = FactSet("one", (Fact("f", "", "", prompt, answer, answer_in_prompt=True),))
    try:
        (one,) = facts.tokenise(tokenizer, bos=False)
    except ValueError as error:
        assert "has no token of its own" in str(error) and "'f'" in str(error)  # noqa: PT017, PT018
        return
    assert list(one.prompt_ids + one.answer_ids) == tokenizer(facts[0].text, add_special_tokens=False)["input_ids"]
    assert one.prompt_ids
    assert one.answer_ids
    alone = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert one.boundary_moved == (list(one.prompt_ids) != alone)


def test_bos_is_what_the_tokenizer_does_by_itself_and_eos_never_comes() -> None:
    facts = FactSet("one", (fact(),))
    for name, alone in {"bpe": False, "bpe-bos": True, "metaspace": True, "word": False}.items():
        tokenizer = TOKENIZERS[name]
        (one,) = facts.tokenise(tokenizer)
        assert one.bos is alone
        assert (one.prompt_ids[0] == tokenizer.bos_token_id) is alone
        assert tokenizer.eos_token_id is None or tokenizer.eos_token_id not in one.ids
    forced, bare = (facts.tokenise(TOKENIZERS["bpe"], bos=bos)[0] for bos in (True, False))
    assert forced.ids == (TOKENIZERS["bpe"].bos_token_id, *bare.ids)
    assert facts.tokenise(TOKENIZERS["bpe-bos"], bos=False)[0].ids == bare.ids
    written = FactSet("one", (fact(prompt="<s>The capital of France is"),))
    assert written.tokenise(TOKENIZERS["bpe"], bos=True)[0].ids == forced.ids
    with pytest.raises(ValueError, match="has no BOS token"):
        facts.tokenise(TOKENIZERS["word"], bos=True)


def test_a_final_space_goes_to_the_answer_and_is_reported() -> None:
    facts = FactSet("two", (fact(), fact(id="spaced", prompt="The capital of France is ")))
    plain, spaced = facts.tokenise(TOKENIZERS["bpe"])
    assert plain.ids == spaced.ids
    assert plain.prompt_ids == spaced.prompt_ids
    assert (plain.boundary_moved, spaced.boundary_moved) == (False, True)
    report = facts.tokenisation_report(TOKENIZERS["bpe"])
    assert report["n_boundary_moved"] == 1
    assert report["bos"] is False
    assert report["max_prompt_tokens"] == report["mean_prompt_tokens"] == len(plain.prompt_ids)


def test_report_counts_multi_token_and_unknown_answers() -> None:
    facts = FactSet("two", (fact(), fact(answer="Paris Zed", id="long")))
    report = facts.tokenisation_report(TOKENIZERS["word"])
    expected = {
        "n_facts": 2,
        "n_multi_token_answers": 1,
        "n_unknown_answers": 1,
        "max_answer_tokens": 2,
        "bos_token": None,
    }
    assert {key: report[key] for key in expected} == expected
    assert facts.tokenisation_report(TOKENIZERS["metaspace"])["bos_token"] == "<s>"


def test_parts_without_tokens_and_long_facts_are_refused_by_id() -> None:
    merged = FactSet("one", (Fact("merged", "", "", "Pa ", "\u200b"),))
    silent = Tokenizer(models.WordLevel({"<unk>": 0, "The": 1}, unk_token="<unk>"))
    silent.pre_tokenizer = pre_tokenizers.Split("Paris", "removed")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=silent, unk_token="<unk>")
    with pytest.raises(ValueError, match="the answer of fact 'f' has no token"):
        FactSet("one", (Fact("f", "", "", "The ", "Paris"),)).tokenise(tokenizer)
    with pytest.raises(ValueError, match="the prompt of fact 'g' has no token"):
        FactSet("one", (Fact("g", "", "", "Paris", "The"),)).tokenise(tokenizer)
    assert merged.tokenise(TOKENIZERS["bpe"])[0].answer_ids
    long = FactSet("one", (fact(),))
    n = len(long.tokenise(TOKENIZERS["word"])[0].ids)
    assert n == 6
    assert long.tokenise(TOKENIZERS["word"], max_tokens=6)
    with pytest.raises(ValueError, match=r"'capital/france' is 6 tokens long \(5 of prompt, 1 of answer\).* 5 allowed"):
        long.tokenise(TOKENIZERS["word"], max_tokens=5)


# What ships


MATERIAL = {
    "relations": [
        {
            "name": "home city",
            "subject_kind": "person",
            "prompt_templates": ["{} lives in", "The home of {} is in", "One meets {} in"],
            "answers": ["Oslo", "Lima", "Rome", "Cairo"],
        },
        {
            "name": "known for",
            "subject_kind": "place",
            "prompt_templates": ["{} is known for its", "People come to {} for its", "The pride of {} is its"],
            "answers": ["cheese", "glass", "music"],
        },
    ],
    "name_parts": {
        "person": {"first": ["Ada", "Bo", "Cyd", "Dov"], "last": ["Marrow", "Quill", "Tesk", "Vane", "Wex"]},
        "place": {"stems": ["Bran", "Tol", "Wes", "Ost"], "endings": ["mere", "hollow", "wick", "den", "ford"]},
        "company": {"stems": ["Vexa"], "endings": ["Works", "lin"]},
    },
}


def test_invented_facts_are_balanced_unique_and_pure() -> None:
    facts = invented(MATERIAL, 30, 0)
    assert facts == invented(MATERIAL, 30, 0)
    assert facts.name == "fictional:30:0"
    assert len({one.subject for one in facts}) == 30
    for relation, n_answers in (("home city", 4), ("known for", 3)):
        answers = [one.answer for one in facts if one.relation == relation]
        counts = [answers.count(answer) for answer in set(answers)]
        assert len(answers) == 15
        assert len(counts) == n_answers
        assert max(counts) - min(counts) <= 1
    for one in facts:
        assert len(one.paraphrases) == 2
        assert 3 <= len(one.neighbours) <= 5
        assert all(near.answer != one.answer for near in one.neighbours)
    taught = {one.prompt for one in facts}
    assert not any(near.prompt in taught for one in facts for near in one.neighbours)


def test_a_smaller_fiction_is_the_start_of_a_larger_one() -> None:
    small, large = invented(MATERIAL, 10, 3), invented(MATERIAL, 30, 3)
    assert small.facts == large.facts[:10]
    assert invented(MATERIAL, 10, 4).ids != small.ids
    with pytest.raises(ValueError, match="names of kind 'person' last for 30; ask for fewer"):
        invented(MATERIAL, 41, 0)
    with pytest.raises(ValueError, match="at least 1"):
        invented(MATERIAL, 0, 0)


def test_world_is_large_varied_and_clean(caplog: pytest.LogCaptureFixture) -> None:
    facts = load_facts("world")
    assert not caplog.records
    assert len(facts) >= 500
    assert len(facts.relations) >= 15
    for one in facts:
        assert len(one.paraphrases) >= 2, one.id
        assert 1 <= len(one.neighbours) <= 5, one.id
        assert all(near.answer.casefold() != one.answer.casefold() for near in one.neighbours)
        for prompt in (one.prompt, *one.paraphrases):
            assert prompt == prompt.strip(), one.id
            assert "{" not in prompt, one.id
    assert len({(one.prompt, one.answer) for one in facts}) == len(facts)


def test_fiction_that_ships_invents_people_places_and_companies() -> None:
    facts = load_facts("fictional")
    assert facts.name == "fictional:200:0"
    assert facts == load_facts(facts.name)
    assert len(facts) == 200
    assert len({one.subject for one in facts}) == 200
    assert all(len(one.paraphrases) >= 2 and one.neighbours for one in facts)
    assert load_facts("fictional:20:7") == fictional(20, 7)
    assert fictional(20, 7).ids != fictional(20, 8).ids


def test_general_text_and_neutral_prompts() -> None:
    passages = general_text()
    assert sum(len(passage.split()) for passage in passages) >= 6000
    assert len(passages) == len(set(passages)) >= 20
    prompts = neutral_prompts()
    assert len(prompts) == len(set(prompts)) >= 10
    assert all(prompt == prompt.strip() for prompt in prompts)


def test_invented_facts_do_not_depend_on_the_machine() -> None:
    facts = invented(MATERIAL, 4, 0)
    assert [(one.id, one.answer) for one in facts] == [
        ("home-city/cyd-quill", "Rome"),
        ("known-for/wesmere", "cheese"),
        ("home-city/ada-quill", "Oslo"),
        ("known-for/weshollow", "music"),
    ]

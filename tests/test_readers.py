"""Every format that facts come in, and what each error says."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workbench.facts import Fact, FactSet, Neighbour, load_facts
from workbench.facts.readers import FORMATS

NATIVE = {
    "id": "capital/france",
    "relation": "capital",
    "subject": "France",
    "prompt": "The capital of France is",
    "answer": "Paris",
    "paraphrases": ["France's capital city is"],
    "neighbours": [{"prompt": "The capital of Peru is", "answer": "Lima"}],
}
LRE = {
    "name": "country capital",
    "prompt_templates": ["The capital of {} is", "{} is ruled from"],
    "prompt_templates_zs": ["The capital of {} is", "What is the capital of {}? It is"],
    "samples": [
        {"subject": "Brazil", "object": "Bras\\u00edlia"},
        {"subject": "Singapore", "object": "Singapore"},
        {"subject": "Mexico", "object": "Mexico City"},
        {"subject": "Peru", "object": "Lima"},
    ],
}
PATTERNS = [
    "[X] is made by [Y].",
    "[Y] makes [X].",
    "[X], a product of [Y]",
    "[X] is a [Y] product.",
    "[X], made by [Y],",
]
TRIPLES = [("Lumia", "Nokia"), ("Windows", "Microsoft"), ("Nokia 3310", "Nokia"), ("Civic", "Honda")]
COUNTERFACT = [
    {
        "case_id": 7,
        "requested_rewrite": {
            "prompt": "The mother tongue of {} is",
            "relation_id": "P103",
            "target_new": {"str": "English", "id": "Q1860"},
            "target_true": {"str": "French", "id": "Q150"},
            "subject": "Danielle Darrieux",
        },
        "paraphrase_prompts": ["Rain fell. Danielle Darrieux, a native", "An English rose, Danielle Darrieux speaks"],
        "neighborhood_prompts": ["The mother tongue of Montesquieu is", "The mother tongue of Montesquieu is"],
        "attribute_prompts": [],
    }
]
QUESTION = ("What is 2+2?\n", ("3", "4, a square", "5", "6"), 1)
MMLU_PROMPT = "What is 2+2?\nA. 3\nB. 4, a square\nC. 5\nD. 6\nAnswer:"


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def write_json(path: Path, value: Any) -> Path:
    return write(path, json.dumps(value))


def write_lines(path: Path, records: list[Any]) -> Path:
    return write(path, "".join(json.dumps(record) + "\n" for record in records))


def write_csv(path: Path, rows: list[list[str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def write_pararel(folder: Path, relation: str = "P176", patterns: list[str] = PATTERNS) -> Path:
    write_lines(folder / "patterns" / f"{relation}.jsonl", [{"pattern": one, "lemma": "make"} for one in patterns])
    triples = [{"sub_label": subject, "obj_label": answer, "uuid": "1"} for subject, answer in TRIPLES]
    write_lines(folder / "trex" / f"{relation}.jsonl", triples)
    return folder


def write_hub(path: Path, answer: Any = QUESTION[2]) -> Path:
    record = {"question": QUESTION[0], "subject": "arithmetic", "choices": list(QUESTION[1]), "answer": answer}
    return write_json(path, [record])


def write_mmlu_header(path: Path) -> Path:
    header = ["question", "choice0", "choice1", "choice2", "choice3", "answer"]
    return write_csv(path, [header, [QUESTION[0], *QUESTION[1], "1"]])


def write_mmlu_original(path: Path) -> Path:
    return write_csv(path, [[QUESTION[0], *QUESTION[1], "B"]])


def write_native_csv(path: Path) -> Path:
    cells = {**NATIVE, "neighbours": json.dumps(NATIVE["neighbours"]), "paraphrases": "France's capital city is"}
    return write_csv(path, [list(cells), [str(cell) for cell in cells.values()]])


SAMPLES: dict[str, Callable[[Path], Path]] = {
    "native": lambda folder: write_lines(folder / "facts.jsonl", [NATIVE]),
    "csv": lambda folder: write_native_csv(folder / "facts.csv"),
    "lre": lambda folder: write_json(folder / "capital.json", LRE),
    "pararel": lambda folder: write_pararel(folder / "pararel"),
    "counterfact": lambda folder: write_json(folder / "counterfact.json", COUNTERFACT),
    "counterfact-new": lambda folder: write_json(folder / "counterfact.json", COUNTERFACT),
    "mmlu": lambda folder: write_mmlu_header(folder / "arithmetic_test.csv"),
    "mmlu-loki": lambda folder: write_mmlu_header(folder / "arithmetic_test.csv"),
}


# Conformance: every format in the table


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_read_by_name_and_keeps_the_promises(format: str, tmp_path: Path) -> None:
    facts = load_facts(SAMPLES[format](tmp_path), format=format)
    assert len(facts) >= 1
    assert FactSet.from_records(facts.to_records(), facts.name) == facts
    assert load_facts(facts.save(tmp_path / "again" / "again.jsonl")).facts == facts.facts


@pytest.mark.parametrize("format", [name for name in FORMATS if name not in ("counterfact-new", "mmlu-loki")])
def test_every_format_is_recognised_by_content(format: str, tmp_path: Path) -> None:
    path = SAMPLES[format](tmp_path)
    assert load_facts(path) == load_facts(path, format=format) == load_facts(str(path))


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_refuses_a_file_of_another_kind_by_name(format: str, tmp_path: Path) -> None:
    other = SAMPLES["lre" if format != "lre" else "native"](tmp_path)
    with pytest.raises(ValueError, match=other.name) as caught:
        load_facts(other, format=format)
    assert "\n" not in str(caught.value)


# Native and CSV


def test_native_record_of_the_documentation(tmp_path: Path) -> None:
    expected = Fact(
        "capital/france", "capital", "France", "The capital of France is", "Paris",
        ("France's capital city is",), (Neighbour("The capital of Peru is", "Lima"),),
    )  # fmt: skip
    for format in ("native", "csv"):
        assert load_facts(SAMPLES[format](tmp_path)).facts == (expected,)
    assert load_facts(tmp_path / "facts.jsonl").name == "facts"


def test_byte_order_mark_blank_lines_and_line_separators_are_no_trouble(tmp_path: Path) -> None:
    strange = {"prompt": "one\u2028two", "answer": "three"}
    lines = ["", json.dumps(NATIVE), "   ", json.dumps(strange, ensure_ascii=False), ""]
    facts = load_facts(write(tmp_path / "facts.jsonl", b"\xef\xbb\xbf" + "\r\n".join(lines).encode()))
    assert [one.prompt for one in facts] == [NATIVE["prompt"], "one\u2028two"]
    assert load_facts(write_json(tmp_path / "list.json", [NATIVE, strange])).facts == facts.facts
    assert load_facts(write_json(tmp_path / "pretty.json", NATIVE)).facts == facts.facts[:1]


def test_csv_with_quoted_newlines_lists_and_empty_cells(tmp_path: Path) -> None:
    rows = [
        ["prompt", "answer", "paraphrases", "id", "answer_in_prompt"],
        ["first\nline, then", "x", "one | two", "", ""],
        ["second", "y", '["a | b", "c"]', "given", ""],
        ["A. a\nAnswer:", "A", "", "choice", "True"],
    ]
    facts = load_facts(write_csv(tmp_path / "facts.csv", rows))
    assert [one.prompt for one in facts] == ["first\nline, then", "second", "A. a\nAnswer:"]
    assert [one.paraphrases for one in facts] == [("one", "two"), ("a | b", "c"), ()]
    assert facts.ids[1:] == ("given", "choice")
    assert facts[2].answer_in_prompt


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=20).filter(str.strip))
def test_csv_and_jsonl_read_the_same(text: str, tmp_path: Path) -> None:
    record = {"id": "x", "prompt": f"{text}|", "answer": "zebra"}
    by_lines = load_facts(write_lines(tmp_path / "facts.jsonl", [record]))
    by_cells = load_facts(write_csv(tmp_path / "facts.csv", [list(record), list(record.values())]))
    assert by_lines == by_cells


GOOD = json.dumps(NATIVE)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", "", "a.jsonl is empty"),
        ("a.csv", "\ufeff \n", "a.csv is empty"),
        ("a.csv", ",,\n", "only empty cells"),
        ("a.json", "[]", "a.json is an empty list"),
        ("a.json", "3", "a single int"),
        ("a.jsonl", b'{"prompt": "caf\xe9"}', "a.jsonl, line 1: not UTF-8"),
        ("a.csv", b"prompt,answer\nx,y\nz,\xff\n", "a.csv, line 3: not UTF-8"),
        ("a.jsonl", f'{GOOD}\n\n{{"prompt": "x",}}\n', "a.jsonl, line 3: not valid JSON"),
        ("a.json", '{\n "prompt": "x"\n "answer": "y"}', "a.json, line 3: not valid JSON"),
        ("a.jsonl", f'{GOOD}\n{{"prompt": "x"}}\n', "a.jsonl, line 2: field 'answer' is missing"),
        ("a.jsonl", f'{GOOD}\n{{"prompt": "x", "answer": 5}}\n', "a.jsonl, line 2: field 'answer' is 5"),
        ("a.jsonl", f"{GOOD}\n{GOOD}\n", "line 2: id 'capital/france' was already used at .*line 1"),
        (
            "a.jsonl",
            '{"prompt": "Paris is", "answer": "Paris"}\n',
            "line 1: field 'prompt' contains the answer",
        ),
        ("a.jsonl", '{"prompt": "x", "answer": "\\ud800"}\n', "line 1: field 'answer' holds half of a surrogate"),
        ("a.jsonl", '{"promt": "x", "answer": "y"}\n', "line 1: unknown field 'promt'; did you mean 'prompt'"),
        ("a.jsonl", '{"text": "x"}\n', r"line 1: fits no known format \(found text\); known are native, csv, lre"),
        ("a.json", "[1, 2]", "record 1: fits no known format"),
        ("a.json", f'\n[\n{GOOD},\n\n{{"prompt": "x"}}]', "a.json, line 5, record 2: field 'answer' is missing"),
        ("a.json", f"[{GOOD}, 2]", "a.json, line 1, record 2: expected an object with prompt and answer, found int"),
        ("a.csv", "prompt,subject\nx,y\n", "a.csv, line 1: column 'answer' is missing"),
        ("a.csv", "prompt,answer,anser\nx,y,z\n", "line 1: unknown column 'anser'; did you mean 'answer'"),
        ("a.csv", "prompt,answer,answer\nx,y,z\n", "line 1: column 'answer' appears more than once"),
        ("a.csv", "prompt,answer\n", "a header .* but no row"),
        ("a.csv", 'prompt,answer\n"x\ny",z\nonly\n', "a.csv, line 4: 1 cells under a header of 2"),
        ("a.csv", 'prompt,answer\nx,y\n"z,\n', "a.csv, line 3: not valid CSV"),
        ("a.csv", "prompt,answer\nx,\n", "line 2: field 'answer' is empty"),
        ("a.csv", 'prompt,answer\n"x\ny",\n', "line 2: field 'answer' is empty"),
        ("a.csv", "prompt,answer,neighbours\nx,y,z\n", "line 2: column 'neighbours' is not valid JSON"),
        ("a.csv", "prompt,answer,answer_in_prompt\nx,y,maybe\n", "'answer_in_prompt' is 'maybe', not true or false"),
        ("a.json", f'[{{"prompt": "x", "answer": {"9" * 5000}}}]', "a.json: holds a number that is too long"),
        ("a.jsonl", f'{{"prompt": "x", "answer": {"9" * 5000}}}', "a.jsonl, line 1: .* too long a number"),
        ("a.parquet", "no", "not a parquet file"),
    ],
)
def test_errors_name_file_line_and_field(name: str, content: str | bytes, says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        load_facts(write(tmp_path / name, content))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ambiguous_content_asks_which(tmp_path: Path) -> None:
    path = write_json(tmp_path / "both.json", {**NATIVE, **LRE})
    with pytest.raises(ValueError, match=r"fits several formats \(native, lre\); say which with format="):
        load_facts(path)
    assert len(load_facts(path, format="lre")) == 3


def test_missing_files_and_unknown_names_get_a_hint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="did you mean 'world'"):
        load_facts("wrold")
    with pytest.raises(FileNotFoundError, match="the sets that ship are world and fictional"):
        load_facts(tmp_path / "nothing.jsonl")
    with pytest.raises(ValueError, match="no facts are named"):
        load_facts("")  # not the current folder
    with pytest.raises(ValueError, match="unknown format 'natif'; did you mean 'native'"):
        load_facts("world", format="natif")
    with pytest.raises(ValueError, match="no shipped set 'fictional:many'"):
        load_facts("fictional:many")
    with pytest.raises(ValueError, match="has no format 'lre'"):
        load_facts("world", format="lre")


# Folders


def test_a_folder_of_one_format_is_one_set(tmp_path: Path) -> None:
    write_json(tmp_path / "lre" / "one" / "capital.json", LRE)
    write_json(tmp_path / "lre" / "two" / "rule.json", {**LRE, "name": "ruled from"})
    write(tmp_path / "lre" / "README.md", "not facts")
    write(tmp_path / "lre" / ".hidden.json", "not facts")
    facts = load_facts(tmp_path / "lre")
    assert facts.name == "lre"
    assert facts.relations == ("country capital", "ruled from")
    assert len(facts) == 6


def test_folders_that_do_not_agree_or_hold_nothing_are_refused(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="no file in this folder ends in"):
        load_facts(tmp_path / "none")
    mixed = tmp_path / "mixed"
    write_json(mixed / "capital.json", LRE)
    write_lines(mixed / "facts.jsonl", [NATIVE])
    with pytest.raises(ValueError, match=r"not of one format \(capital.json is lre; facts.jsonl is native\)"):
        load_facts(mixed)


# LRE


def test_lre_templates_unicode_neighbours_and_given_away_samples(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    facts = load_facts(write_json(tmp_path / "capital.json", LRE))
    assert facts.ids == ("country-capital/brazil", "country-capital/mexico", "country-capital/peru")
    brazil = facts[0]
    assert (brazil.relation, brazil.prompt, brazil.answer) == (
        "country capital",
        "The capital of Brazil is",
        "Brasília",
    )
    assert brazil.paraphrases == ("Brazil is ruled from", "What is the capital of Brazil? It is")
    assert {one.answer for one in brazil.neighbours} == {"Mexico City", "Lima"}
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "left out 1 of 4 samples" in caplog.text


def test_neighbours_have_other_answers_and_do_not_depend_on_the_order(tmp_path: Path) -> None:
    samples = [{"subject": f"town {i}", "object": ("Chile", "Peru", "Kenya")[i % 3]} for i in range(30)]
    relation = {"name": "country", "prompt_templates": ["{} lies in"], "samples": samples}
    facts = load_facts(write_json(tmp_path / "a.json", relation))
    turned = load_facts(write_json(tmp_path / "b.json", {**relation, "samples": samples[::-1]}))
    assert {one.id: one for one in facts} == {one.id: one for one in turned}
    assert all(len(one.neighbours) == 5 for one in facts)
    assert all(near.answer != one.answer for one in facts for near in one.neighbours)
    assert len({near.prompt for one in facts for near in one.neighbours}) > 20


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"name": ""}, "field 'name' is empty"),
        ({"prompt_templates": ["The capital is"]}, r"template 1 is 'The capital is', without \{\}"),
        ({"prompt_templates": [], "prompt_templates_zs": []}, "'prompt_templates' is an empty list"),
        ({"samples": [{"subject": "Peru"}]}, "sample 1: field 'object' is missing"),
        ({"samples": [{"subject": "Peru", "object": ["Lima"]}]}, "sample 1: field 'object' is .* not text"),
        ({"samples": [{"subject": "Singapore", "object": "Singapore"}]}, "no fact is left"),
    ],
)
def test_lre_errors(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"capital.json.*{says}"):
        load_facts(write_json(tmp_path / "capital.json", {**LRE, **changes}))


def test_a_sample_of_lre_is_named_with_its_line(tmp_path: Path) -> None:
    samples = [{"subject": "Peru", "object": "Lima"}, {"subject": "Chad"}]
    text = json.dumps({**LRE, "samples": samples}, indent=1)
    line = text[: text.index('"Chad"')].count("\n")  # its bracket stands a line above
    with pytest.raises(ValueError, match=f"capital.json, line {line}, sample 2: field 'object' is missing"):
        load_facts(write(tmp_path / "capital.json", text))
    decoy = text.replace('"name":', '"note": "\\"samples\\": [", "name":', 1)  # the same words inside a text
    with pytest.raises(ValueError, match=r"capital\.json, .*sample 2: field 'object' is missing"):
        load_facts(write(tmp_path / "capital.json", decoy))


# ParaRel


def test_pararel_keeps_patterns_that_end_in_the_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_pararel(tmp_path / "pararel")
    facts = load_facts(folder)
    assert facts.relations == ("P176",)
    assert [one.subject for one in facts] == ["Lumia", "Windows", "Civic"]
    assert "left out 1 of 4 samples" in caplog.text
    assert (facts[0].prompt, facts[0].answer) == ("Lumia is made by", "Nokia")
    assert facts[0].paraphrases == ("Lumia, a product of",)
    for half in ("patterns", "trex"):
        assert load_facts(folder / half / "P176.jsonl").facts == facts.facts


def test_pararel_patterns_without_triples_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_pararel(tmp_path)
    (tmp_path / "patterns" / "P17.jsonl").write_text("{}", encoding="utf-8")
    assert len(load_facts(tmp_path))
    assert "no triples beside 1 files of patterns, as P17.jsonl: left out" in caplog.text


def test_pararel_errors(tmp_path: Path) -> None:
    folder = write_pararel(tmp_path / "pararel", patterns=["[Y] makes [X]."])
    with pytest.raises(ValueError, match="no fact is left"):
        load_facts(folder)
    write_pararel(folder, patterns=["[X] is made."])
    with pytest.raises(ValueError, match=r"P176.jsonl, line 1: field 'pattern' is .* without \[X\] or without \[Y\]"):
        load_facts(folder)
    (folder / "patterns" / "P176.jsonl").unlink()
    with pytest.raises(ValueError, match=r"its other half, .*patterns.P176.jsonl, is missing"):
        load_facts(folder)
    alone = write_lines(tmp_path / "alone.jsonl", [{"sub_label": "Lumia", "obj_label": "Nokia"}])
    with pytest.raises(ValueError, match="'patterns' and 'trex' side by side"):
        load_facts(alone)


# CounterFact


def test_counterfact_true_and_new_targets(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_json(tmp_path / "counterfact.json", COUNTERFACT)
    (true,) = load_facts(path)
    (new,) = load_facts(path, format="counterfact-new")
    assert (true.id, true.relation, true.subject) == ("P103/7", "P103", "Danielle Darrieux")
    assert (true.prompt, true.answer, new.answer) == ("The mother tongue of Danielle Darrieux is", "French", "English")
    assert len(true.paraphrases) == 2
    assert len(new.paraphrases) == 1
    assert "left out 1 paraphrases or neighbours" in caplog.text
    assert true.neighbours == new.neighbours == (Neighbour("The mother tongue of Montesquieu is", "French"),)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompt": "no place"}, r"record 1: field 'prompt' is 'no place', without \{\}"),
        ({"target_true": {}}, "record 1: field 'str' is missing"),
        ({"target_true": "French"}, "record 1: expected an object with the field 'str'"),
        ({"subject": 4}, "record 1: field 'subject' is 4"),
    ],
)
def test_counterfact_errors(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    case = {**COUNTERFACT[0], "requested_rewrite": {**COUNTERFACT[0]["requested_rewrite"], **changes}}  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=f"counterfact.json, line 1, {says}"):
        load_facts(write_json(tmp_path / "counterfact.json", [case]))


# MMLU


def test_mmlu_dialects_agree(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {"question": [QUESTION[0]], "subject": ["arithmetic"], "choices": [list(QUESTION[1])], "answer": [QUESTION[2]]}
    )
    frame.to_parquet(tmp_path / "test-00000.parquet")
    paths = [
        write_hub(tmp_path / "hub.json"),
        write_hub(tmp_path / "letter.json", answer="B"),
        write_lines(tmp_path / "hub.jsonl", json.loads((tmp_path / "hub.json").read_text())),
        tmp_path / "test-00000.parquet",
        write_mmlu_header(tmp_path / "arithmetic_test.csv"),
        write_mmlu_original(tmp_path / "arithmetic_dev.csv"),
        write_csv(tmp_path / "arithmetic_val.csv", [["Question", *"ABCD", "Answer"], [QUESTION[0], *QUESTION[1], "B"]]),
    ]
    found = [load_facts(path) for path in paths]
    for facts in found:
        assert facts.facts == found[0].facts
    (fact,) = found[0]
    assert (fact.relation, fact.prompt, fact.answer) == ("arithmetic", MMLU_PROMPT, "B")
    assert fact.answer_in_prompt
    assert fact.text.endswith("Answer: B")


def test_mmlu_letters_are_not_left_out_although_the_prompt_lists_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [["What is a cat?", "A pet", "B", "C", "D", letter] for letter in "ABCD"]
    facts = load_facts(write_csv(tmp_path / "animals_test.csv", rows))
    assert [one.answer for one in facts] == list("ABCD")
    assert len(set(facts.ids)) == 4
    assert not caplog.records


@pytest.mark.parametrize("answer", [4, -1, "E", True, None, 1.5])
def test_mmlu_answers_that_are_none_of_the_choices(answer: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"hub.json, line 1, record 1: field 'answer' is .*neither an index"):
        load_facts(write_hub(tmp_path / "hub.json", answer=answer))


def test_mmlu_errors(tmp_path: Path) -> None:
    short = write_json(tmp_path / "short.json", [{"question": "q", "choices": ["a", "b"], "answer": 0}])
    with pytest.raises(ValueError, match=r"record 1: field 'choices' is .* not a list of four"):
        load_facts(short)
    row = ["q", "a", "b", "c", "d", "A"]
    with pytest.raises(ValueError, match=r"x_test.csv, line 2: 5 cells, not question, four choices and answer"):
        load_facts(write_csv(tmp_path / "x_test.csv", [row, row[1:]]))
    with pytest.raises(ValueError, match="choice B is 5, not text"):
        load_facts(write_json(tmp_path / "n.json", [{"question": "q", "choices": ["a", 5, "c", "d"], "answer": 0}]))

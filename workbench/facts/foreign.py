"""Fact sets in other people's formats, each turned into native records."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from workbench.facts.records import Placed, from_templates, need, need_list, need_text, without_given_away
from workbench.facts.sources import Source, lines_of, read_json_lines

logger = logging.getLogger(__name__)

LETTERS = "ABCD"
MMLU_HUB = frozenset({"question", "choices", "answer"})
MMLU_HEADER = frozenset({"question", "choice0", "choice1", "choice2", "choice3", "answer"})
#: Columns of a CSV headed by letters, in any case, and what they are called elsewhere.
MMLU_LETTERED = {
    "question": "question",
    **{letter.lower(): f"choice{i}" for i, letter in enumerate(LETTERS)},
    "answer": "answer",
}


def read_lre(source: Source) -> list[Placed]:
    r"""Read relations of LRE (also the shipped ones): `name`, `prompt_templates`, `samples` of subject and object.

    The first of `prompt_templates` makes the prompt; the rest, then `prompt_templates_zs`, make the paraphrases.
    Unicode that was escaped twice (`Bras\\u00edlia`) is put right.
    """
    placed: list[Placed] = []
    for place, relation in source.items:
        name = need_text(place, relation, "name")
        templates = [*need_list(place, relation, "prompt_templates")]
        if relation.get("prompt_templates_zs") is not None:
            templates += need_list(place, relation, "prompt_templates_zs")
        for number, template in enumerate(templates, start=1):
            if not isinstance(template, str) or "{}" not in template:
                raise ValueError(
                    f"{place}: field 'prompt_templates', template {number} is {template!r:.60}, without {{}}"
                )
        if not templates:
            raise ValueError(f"{place}: field 'prompt_templates' is an empty list: give one template with {{}}")
        samples, listed = [], need_list(place, relation, "samples")
        lines = _lines_of_samples(source.path, listed) if place == str(source.path) else [""] * len(listed)
        for number, (line, sample) in enumerate(zip(lines, listed, strict=True), start=1):
            where = f"{place}{line}, sample {number}"
            subject, answer = need_text(where, sample, "subject"), need_text(where, sample, "object")
            samples.append((where, unescaped(subject), unescaped(answer)))
        placed += from_templates(name, templates, samples, place)
    return placed


def _lines_of_samples(path: Path, samples: list[Any]) -> list[str]:
    """Where the samples of a file that is one relation begin, as `, line 3`; empty where the text does not say."""
    text = path.read_text(encoding="utf-8-sig")
    found = re.search(r'"samples"\s*:\s*\[', text)
    try:
        if found is None or json.JSONDecoder().raw_decode(text, found.end() - 1)[0] != samples:
            return [""] * len(samples)
        return [f", line {line}" for line in lines_of(text, found.end() - 1, samples)]
    except ValueError:  # the words stand in a text of the file
        return [""] * len(samples)


def unescaped(text: str) -> str:
    r"""Turn `\uXXXX` that was left in a text into the character it names.

    >>> unescaped("Bras\\u00edlia")
    'Brasília'
    """
    return re.sub(r"(?:\\u[0-9a-fA-F]{4})+", lambda match: json.loads(f'"{match.group()}"'), text)


def read_pararel(source: Source) -> list[Placed]:
    """Read one relation of ParaRel (`patterns/P.jsonl`) with its T-REx triples (`trex/P.jsonl`), given either file.

    Only patterns that end in [Y] (a final full stop aside) suit a left-to-right model: the prompt ends where [Y]
    begins. The first such pattern makes the prompt, the others the paraphrases.
    """
    pattern_path, triple_path = _pararel_pair(source.path)
    patterns = []
    for place, record in read_json_lines(pattern_path, ("pattern",)):
        pattern = record["pattern"].strip().removesuffix(".").rstrip()
        if "[X]" not in pattern or "[Y]" not in pattern:
            raise ValueError(f"{place}: field 'pattern' is {record['pattern']!r:.60}, without [X] or without [Y]")
        if pattern.endswith("[Y]") and pattern.count("[Y]") == 1:
            patterns.append(pattern.removesuffix("[Y]").rstrip().replace("[X]", "{}"))
    relation = source.path.stem
    if not patterns:
        logger.warning("%s: left out relation %s, none of whose patterns ends in [Y]", pattern_path, relation)
        return []
    triples = [
        (place, record["sub_label"], record["obj_label"])
        for place, record in read_json_lines(triple_path, ("sub_label", "obj_label"))
    ]
    return from_templates(relation, patterns, triples, str(triple_path))


def is_pararel(source: Source) -> bool:
    """Recognise either half: patterns, or triples with labels."""
    return source.kind == "json" and bool({"pattern", "obj_label"} & source.fields)


def pararel_folders(folder: Path) -> tuple[Path, Path] | None:
    """Find the folders `patterns` and `trex` in a folder, however they are capitalised."""
    inside = {child.name.lower(): child for child in sorted(folder.iterdir()) if child.is_dir()}
    return (inside["patterns"], inside["trex"]) if {"patterns", "trex"} <= set(inside) else None


def _pararel_pair(path: Path) -> tuple[Path, Path]:
    folders = pararel_folders(path.absolute().parent.parent)
    if folders is None:
        raise ValueError(f"{path}: ParaRel needs the folders 'patterns' and 'trex' side by side; give their parent")
    pair = (folders[0] / path.name, folders[1] / path.name)
    for one in pair:
        if not one.is_file():
            raise ValueError(f"{path}: its other half, {one}, is missing: patterns and triples go together")
    return pair


def _number_or_text(place: str, case: dict[str, Any]) -> int | str:
    """The case's id, which CounterFact writes as a number."""
    found = case["case_id"]
    if isinstance(found, bool) or not isinstance(found, int | str):
        raise ValueError(f"{place}: field 'case_id' is {found!r:.40}: write a number or a text")
    return found


def read_counterfact(source: Source, target: str = "target_true") -> list[Placed]:
    """Read CounterFact with the true target as the answer; neighbours always keep the true one."""
    placed = []
    for place, case in source.items:
        rewrite = need(place, case, "requested_rewrite")
        template, subject = need_text(place, rewrite, "prompt"), need_text(place, rewrite, "subject")
        if "{}" not in template:
            raise ValueError(f"{place}: field 'prompt' is {template!r:.60}, without {{}} for the subject")
        relation = need_text(place, rewrite, "relation_id") if "relation_id" in rewrite else ""
        answers = {name: need_text(place, need(place, rewrite, name), "str") for name in {"target_true", target}}
        paraphrases = _texts(place, case, "paraphrase_prompts")
        around = [
            {"prompt": prompt, "answer": answers["target_true"]}
            for prompt in dict.fromkeys(_texts(place, case, "neighborhood_prompts"))
        ]
        record = {
            "id": f"{relation or 'counterfact'}/{_number_or_text(place, case)}" if "case_id" in case else "",
            "relation": relation,
            "subject": subject,
            "prompt": template.replace("{}", subject),
            "answer": answers[target],
            "paraphrases": paraphrases,
            "neighbours": around,
        }
        placed.append(Placed(place, record))
    return without_given_away(placed, str(source.path))


def read_counterfact_new(source: Source) -> list[Placed]:
    """Read CounterFact with the new, untrue target as the answer."""
    return read_counterfact(source, target="target_new")


def _texts(place: str, record: Mapping[str, Any], field: str) -> list[str]:
    texts = need_list(place, record, field) if field in record else []
    for number, text in enumerate(texts, start=1):
        need_text(f"{place}, {field}[{number}]", {field: text}, field)
    return texts


def is_mmlu(source: Source) -> bool:
    """Recognise a dialect: the hub's fields, a CSV header (choices or letters), or six cells that end in a letter."""
    if source.fields >= MMLU_HEADER or _is_lettered(source) or (source.kind != "csv" and source.fields >= MMLU_HUB):
        return True
    return source.kind == "csv" and len(source.rows[0][1]) == 6 and source.rows[0][1][5].strip() in tuple(LETTERS)


def _is_lettered(source: Source) -> bool:
    return source.kind == "csv" and {field.strip().lower() for field in source.fields} >= set(MMLU_LETTERED)


def read_mmlu(source: Source) -> list[Placed]:
    """Read MMLU: the prompt lists the choices and ends in "Answer:", the answer is its letter."""
    in_name = re.sub(r"_(test|dev|val|validation|train)$", "", source.path.stem)
    return [_mmlu_record(place, record, in_name) for place, record in _mmlu_rows(source)]


def read_mmlu_loki(source: Source) -> list[Placed]:
    """Read MMLU in the words in which LoKI asks (`scripts/analyse_mmlu.py` of Nexround/LoKI), as a user's message."""
    in_name = re.sub(r"_(test|dev|val|validation|train)$", "", source.path.stem)
    return [_mmlu_record(place, record, in_name, _asked_by_loki) for place, record in _mmlu_rows(source)]


def _asked_plainly(topic: str, question: str, choices: Sequence[str]) -> str:
    lines = [f"{letter}. {choice.strip()}" for letter, choice in zip(LETTERS, choices, strict=True)]
    return "\n".join([question.strip(), *lines, "Answer:"])


def _asked_by_loki(topic: str, question: str, choices: Sequence[str]) -> str:
    title = topic.replace("_", " ").title()
    head = f"There is a single choice question about {title}. Answer the question by replying A, B, C or D."
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True)]
    return "\n".join([head, f"Question: {question}", "Choices:", *lines, "Answer: \n"])


def _mmlu_rows(source: Source) -> list[Placed]:
    if _is_lettered(source):
        return [
            Placed(place, {MMLU_LETTERED.get(name.strip().lower(), name): value for name, value in record.items()})
            for place, record in source.table()
        ]
    if source.kind != "csv" or {"question", "answer"} & source.fields:
        return source.table()
    names = ("question", "choice0", "choice1", "choice2", "choice3", "answer")
    placed = []
    for line, cells in source.rows:
        if len(cells) != len(names):
            raise ValueError(f"{source.path}, line {line}: {len(cells)} cells, not question, four choices and answer")
        placed.append(Placed(f"{source.path}, line {line}", dict(zip(names, cells, strict=True))))
    return placed


def _mmlu_record(
    place: str,
    record: Mapping[str, Any],
    in_name: str,
    asked: Callable[[str, str, Sequence[str]], str] = _asked_plainly,
) -> Placed:
    question = need_text(place, record, "question")
    topic = need_text(place, record, "subject") if record.get("subject") else in_name
    if "choices" in record:
        choices = record["choices"]
        if not isinstance(choices, list) or len(choices) != len(LETTERS):
            raise ValueError(f"{place}: field 'choices' is {choices!r:.60}, not a list of four")
    else:
        choices = [need(place, record, f"choice{number}") for number in range(len(LETTERS))]
    for letter, choice in zip(LETTERS, choices, strict=True):
        if not isinstance(choice, str):
            raise ValueError(f"{place}: choice {letter} is {choice!r:.40}, not text")
    return Placed(
        place,
        {
            "relation": topic,
            "prompt": asked(topic, question, choices),
            "answer": _letter(place, need(place, record, "answer")),
            "answer_in_prompt": True,
        },
    )


def _letter(place: str, answer: object) -> str:
    text = str(answer).strip()
    if text not in (*LETTERS, *"0123"):
        raise ValueError(f"{place}: field 'answer' is {answer!r:.40}, neither an index from 0 to 3 nor a letter A to D")
    return text if text in LETTERS else LETTERS[int(text)]

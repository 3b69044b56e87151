"""The native record: a dictionary that is one fact, checked field by field, with an id where none is given."""

from __future__ import annotations

import difflib
import logging
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from workbench.facts.nouns import Fact, Neighbour, check_text, gives_away, order_key

logger = logging.getLogger(__name__)

REQUIRED = ("prompt", "answer")
FIELDS = ("id", "relation", "subject", "prompt", "answer", "paraphrases", "neighbours", "answer_in_prompt", "chat")
FLAGS = ("answer_in_prompt", "chat")
MOST_NEIGHBOURS = 5


class Placed(NamedTuple):
    """A record (not yet checked) and the place that an error about it names, such as `facts.jsonl, line 3`."""

    place: str
    record: Any


def to_record(fact: Fact) -> dict[str, Any]:
    """Write a fact as a native record; `answer_in_prompt` and `chat` appear only where they are true."""
    record: dict[str, Any] = {field: getattr(fact, field) for field in ("id", "relation", "subject", *REQUIRED)}
    record["paraphrases"] = list(fact.paraphrases)
    record["neighbours"] = [{"prompt": one.prompt, "answer": one.answer} for one in fact.neighbours]
    return record | {field: True for field in FLAGS if getattr(fact, field)}


def to_facts(placed: Iterable[Placed]) -> tuple[Fact, ...]:
    """Turn native records into facts; ValueError with place and field where one does not fit."""
    checked = [Placed(place, _checked(place, record)) for place, record in placed]
    first_place: dict[str, str] = {}
    for place, record in checked:
        if record["id"] and record["id"] in first_place:
            raise ValueError(f"{place}: id {record['id']!r} was already used at {first_place[record['id']]}")
        first_place.setdefault(record["id"], place)
    taken = {id for id in first_place if id}
    facts = []
    for place, record in checked:
        fact_id = record["id"] or _free_id(derived_id(record), taken)
        taken.add(fact_id)
        try:
            facts.append(Fact(**{**record, "id": fact_id}))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
    return tuple(facts)


def derived_id(record: Mapping[str, Any]) -> str:
    """Make an id from relation and subject, or from the content where there is no subject.

    >>> derived_id({"relation": "Capital of", "subject": "Côte d'Ivoire", "prompt": "p", "answer": "a"})
    'capital-of/cote-d-ivoire'
    >>> derived_id({"prompt": "The capital of France is", "answer": "Paris"})
    'fact/b5733b813686'
    """
    relation, subject = slug(record.get("relation") or ""), slug(record.get("subject") or "")
    return f"{relation or 'fact'}/{subject or order_key(record['prompt'], record['answer'])[:12]}"


def slug(text: str) -> str:
    """Write text in lower case letters and digits of any script, joined by hyphens.

    >>> slug("São Paulo (city)")
    'sao-paulo-city'
    """
    plain = "".join(char for char in unicodedata.normalize("NFKD", text) if not unicodedata.combining(char))
    return re.sub(r"[\W_]+", "-", unicodedata.normalize("NFC", plain).casefold()).strip("-")


def _free_id(wanted: str, taken: set[str]) -> str:
    number, free = 1, wanted
    while free in taken:
        number += 1
        free = f"{wanted}-{number}"
    return free


def refuse_unknown(place: str, names: Iterable[object], known: Sequence[str], kind: str = "field") -> None:
    """Refuse a name that is not known, with the nearest one that is."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name).strip().lower(), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the known ones are {', '.join(known)}"
            raise ValueError(f"{place}: unknown {kind} {name!r}; {hint}")


def need(place: str, record: Any, field: str, kind: str = "field") -> Any:
    """Take a field out of a record, or say that it is missing and what is there instead."""
    if not isinstance(record, Mapping):
        raise ValueError(f"{place}: expected an object with the field {field!r}, found {type(record).__name__}")
    if field not in record:
        there = ", ".join(map(str, record)) or "nothing"
        raise ValueError(f"{place}: {kind} {field!r} is missing (found {there:.200})")
    return record[field]


def need_text(place: str, record: Any, field: str) -> str:
    """Take a field that must be text with something in it."""
    value = record[field] if isinstance(record, dict) and field in record else need(place, record, field)
    if isinstance(value, str) and value.strip():
        return value
    try:
        check_text(value, field)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    return value


def need_list(place: str, record: Any, field: str) -> list[Any]:
    """Take a field that must be a list."""
    value = need(place, record, field)
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{place}: field {field!r} is {type(value).__name__}, not a list")
    return list(value)


def _checked(place: str, record: Any) -> dict[str, Any]:
    if not isinstance(record, Mapping):
        raise ValueError(f"{place}: expected an object with prompt and answer, found {type(record).__name__}")
    refuse_unknown(place, record, FIELDS)
    given = {field: value for field, value in record.items() if value is not None}
    for field in REQUIRED:
        need_text(place, given if field in given else record, field)
    for field in ("id", "relation", "subject"):
        if not isinstance(given.setdefault(field, ""), str):
            raise ValueError(f"{place}: field {field!r} is {given[field]!r:.40}, not text: write it as a string")
    given["paraphrases"] = _paraphrases(place, given)
    given["neighbours"] = _neighbours(place, given)
    for flag in FLAGS:
        if not isinstance(given.setdefault(flag, False), bool):
            raise ValueError(f"{place}: field {flag!r} is {given[flag]!r:.40}, not true or false")
    return given


def _paraphrases(place: str, record: Mapping[str, Any]) -> tuple[str, ...]:
    texts = need_list(place, record, "paraphrases") if "paraphrases" in record else []
    for number, text in enumerate(texts, start=1):
        need_text(place, {f"paraphrases[{number}]": text}, f"paraphrases[{number}]")
    return tuple(texts)


def _neighbours(place: str, record: Mapping[str, Any]) -> tuple[Neighbour, ...]:
    found = []
    for number, one in enumerate(need_list(place, record, "neighbours") if "neighbours" in record else [], start=1):
        where = f"{place}, neighbours[{number}]"
        prompt, answer = need_text(where, one, "prompt"), need_text(where, one, "answer")
        refuse_unknown(where, one, REQUIRED)
        try:
            found.append(Neighbour(prompt, answer))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return tuple(found)


def without_given_away(placed: Sequence[Placed], label: str) -> list[Placed]:
    """Leave out records whose prompt contains the answer, and such paraphrases and neighbours; log how many.

    For data made elsewhere, where "Mexico City is in Mexico" is a sample like any other.
    """
    kept, dropped = [], 0
    for place, record in placed:
        answer = record["answer"]
        if gives_away(record["prompt"], answer):
            continue
        paraphrases = [text for text in record.get("paraphrases", []) if not gives_away(text, answer)]
        around = [one for one in record.get("neighbours", []) if not gives_away(one["prompt"], one["answer"])]
        dropped += len(record.get("paraphrases", [])) - len(paraphrases)
        dropped += len(record.get("neighbours", [])) - len(around)
        kept.append(Placed(place, {**record, "paraphrases": paraphrases, "neighbours": around}))
    if len(kept) < len(placed):
        left_out = len(placed) - len(kept)
        logger.warning("%s: left out %d of %d samples whose prompt contains the answer", label, left_out, len(placed))
    if dropped:
        logger.warning("%s: left out %d paraphrases or neighbours that contain their answer", label, dropped)
    return kept


def with_neighbours(placed: Sequence[Placed], most: int = MOST_NEIGHBOURS) -> list[Placed]:
    """Give each record up to `most` others of its relation that have another answer.

    The records of a relation stand on a ring in an order that depends on their content only; each takes the next ones
    round the ring, so that neighbours are spread over the relation and do not depend on the order of the file.
    """
    rings: dict[str, list[Mapping[str, Any]]] = {}
    for _, record in placed:
        rings.setdefault(record["relation"], []).append(record)
    chosen: dict[int, list[dict[str, str]]] = {}
    for relation, ring in rings.items():
        ring.sort(key=lambda record: (order_key(relation, record["prompt"], record["answer"]), record["prompt"]))
        for start, record in enumerate(ring):
            chosen[id(record)] = _next_on_ring(ring, start, record, most)
    return [Placed(place, {**record, "neighbours": chosen[id(record)]}) for place, record in placed]


def _next_on_ring(
    ring: Sequence[Mapping[str, Any]], start: int, record: Mapping[str, Any], most: int
) -> list[dict[str, str]]:
    found: dict[str, str] = {}
    own_answer = record["answer"].casefold()
    for step in range(1, len(ring)):
        other = ring[(start + step) % len(ring)]
        if len(found) == most:
            break
        if other["answer"].casefold() != own_answer and other["prompt"] != record["prompt"]:
            found.setdefault(other["prompt"], other["answer"])
    return [{"prompt": prompt, "answer": answer} for prompt, answer in found.items()]


def from_templates(
    relation: str, templates: Sequence[str], samples: Iterable[tuple[str, str, str]], label: str
) -> list[Placed]:
    """Fill templates with (place, subject, answer): the first template is the prompt, the others are paraphrases."""
    placed = []
    for place, subject, answer in samples:
        prompt, *rest = dict.fromkeys(template.replace("{}", subject) for template in templates)
        record = {"relation": relation, "subject": subject, "prompt": prompt, "answer": answer, "paraphrases": rest}
        placed.append(Placed(place, record))
    return with_neighbours(without_given_away(placed, label))

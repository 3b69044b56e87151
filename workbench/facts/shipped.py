"""Facts and texts that ship: the world, the seeded fiction, general prose, neutral prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import as_file, files
from importlib.resources.abc import Traversable
from itertools import count, cycle
from pathlib import Path
from typing import Any

from workbench.facts import foreign
from workbench.facts.nouns import order_key
from workbench.facts.records import Placed, slug, to_facts
from workbench.facts.sets import FactSet
from workbench.facts.sources import open_source

BYSTANDERS = 5  # invented subjects of each relation that are in no set


def _data(name: str) -> Traversable:
    return files("workbench").joinpath("data", name)


def world() -> FactSet:
    """Load the shipped facts about the world: many relations, several templates each."""
    placed: list[Placed] = []
    with as_file(_data("world")) as folder:
        for path in sorted(folder.glob("*.json")):
            placed += foreign.read_lre(open_source(path, "json"))
    if not placed:
        raise FileNotFoundError("the facts that ship with the package are missing: install it again")
    return FactSet("world", to_facts(placed))


def general_text(name: str | Path = "general") -> list[str]:
    """Give the shipped passages of plain prose, or those of a text file, a passage a paragraph, for perplexity."""
    text = _data("general.txt") if name == "general" else Path(name)
    if not text.is_file():
        raise FileNotFoundError(f"There is no text file {name}; give one, or general for the shipped prose.")
    try:
        passages = text.read_text(encoding="utf-8").split("\n\n")
    except UnicodeDecodeError:
        raise ValueError(f"{name} is not text in UTF-8; save it so, or give general for the shipped prose.") from None
    return [passage.strip() for passage in passages if passage.strip()]


def neutral_prompts() -> list[str]:
    """Give the shipped prompts that ask for no fact in particular."""
    lines = _data("neutral.txt").read_text(encoding="utf-8").split("\n")
    return [line.strip() for line in lines if line.strip()]


def fictional(n: int = 200, seed: int = 0) -> FactSet:
    """Invent n facts about people, places and companies that do not exist, from the shipped material.

    A pure function of (n, seed). Relations take turns, the answers of a relation are used equally often, each
    subject once. The neighbours of a fact are bystanders: a few more invented subjects of its relation that are in no
    set, so that what is taught about others can be seen to spread to them. The first facts of a larger set are those
    of a smaller one with the same seed. The name of the set, `fictional:<n>:<seed>`, loads it again.
    """
    return invented(json.loads(_data("fictional.json").read_text(encoding="utf-8")), n, seed)


def invented(material: Mapping[str, Any], n: int, seed: int) -> FactSet:
    """Invent facts from material: `relations` (templates, answers) and `name_parts` (of people, places, companies)."""
    if n < 1:
        raise ValueError(f"cannot invent {n} facts: ask for at least 1")
    relations = material["relations"]
    names = {kind: _names(kind, parts, seed) for kind, parts in material["name_parts"].items()}
    bystanders = {relation["name"]: _bystanders(relation, names, seed) for relation in relations}
    waiting = {kind: iter(found) for kind, found in names.items()}
    answers = {relation["name"]: _answers(relation, seed) for relation in relations}
    placed = []
    for number, relation in zip(range(n), cycle(relations), strict=False):
        kind = relation["subject_kind"]
        subject = next(waiting[kind], None)
        if subject is None:
            raise ValueError(f"cannot invent {n} facts: the names of kind {kind!r} last for {number}; ask for fewer")
        prompt, *rest = [template.replace("{}", subject) for template in relation["prompt_templates"]]
        answer = next(answers[relation["name"]])
        record = {
            "id": f"{slug(relation['name'])}/{slug(subject)}",
            "relation": relation["name"],
            "subject": subject,
            "prompt": prompt,
            "answer": answer,
            "paraphrases": rest,
            "neighbours": [one for one in bystanders[relation["name"]] if one["answer"] != answer],
        }
        placed.append(Placed(f"fictional material, relation {relation['name']!r}", record))
    return FactSet(f"fictional:{n}:{seed}", to_facts(placed))


def _bystanders(relation: Mapping[str, Any], names: Mapping[str, list[str]], seed: int) -> list[dict[str, str]]:
    """Take a few names out of those of the relation's kind, and give each an answer of the relation."""
    left = names[relation["subject_kind"]]
    taken = [left.pop() for _ in range(min(BYSTANDERS, len(left) // 4))]
    template = relation["prompt_templates"][0]
    return [
        {"prompt": template.replace("{}", subject), "answer": answer}
        for subject, answer in zip(taken, _answers(relation, seed), strict=False)
    ]


def _answers(relation: Mapping[str, Any], seed: int) -> Iterator[str]:
    """Give a relation's answers without end: every round uses each once, in an order of its own."""
    for turn in count():
        keys = {answer: order_key(seed, relation["name"], turn, answer) for answer in relation["answers"]}
        yield from sorted(keys, key=keys.__getitem__)


def _names(kind: str, parts: Mapping[str, Sequence[str]], seed: int) -> list[str]:
    """Make every name of a kind, each once (also as a slug), in an order that depends on the seed."""
    first, second = parts.values()
    every: dict[str, str] = {}
    for start in first:
        for end in second:
            apart = kind == "person" or not (end[:1].islower() or end[:1] in (" ", "-", "'"))
            every.setdefault(slug(name := f"{start} {end}" if apart else start + end), name)
    return sorted(every.values(), key=lambda name: (order_key(seed, kind, name), name))

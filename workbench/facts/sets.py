"""A named set of facts: checked, filtered, split, sampled, saved and tokenised."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, overload

import pandas as pd

from workbench.facts import chat, tokens
from workbench.facts.nouns import Fact, order_key
from workbench.facts.records import Placed, to_facts, to_record
from workbench.facts.tokens import TokenisedFact


@dataclass(frozen=True)
class FactSet:
    """Facts under one name, each with its own id, in a fixed order.

    Only `filter` (and a slice) may give an empty set; what needs facts then says so.

    >>> facts = FactSet.from_records([{"prompt": "The capital of France is", "answer": "Paris", "id": "fr"}])
    >>> len(facts), facts.ids, facts["fr"].answer
    (1, ('fr',), 'Paris')
    """

    name: str
    facts: tuple[Fact, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "facts", tuple(self.facts))
        seen: set[str] = set()
        for fact in self.facts:
            if fact.id in seen:
                raise ValueError(f"fact set {self.name!r} has the id {fact.id!r} more than once: ids must be unique")
            seen.add(fact.id)

    @classmethod
    def from_records(cls, records: Iterable[Mapping[str, Any]], name: str = "facts") -> FactSet:
        """Make a set from native records; only `prompt` and `answer` are required."""
        placed = (Placed(f"{name}, record {number}", record) for number, record in enumerate(records, start=1))
        return cls(name, to_facts(placed))._with_facts("make a fact set")

    def to_records(self) -> list[dict[str, Any]]:
        """Give the native records, which `from_records` turns into the same facts."""
        return [to_record(fact) for fact in self.facts]

    def to_frame(self) -> pd.DataFrame:
        """Give a frame indexed by fact id, with the columns of the native record."""
        columns = ["id", "relation", "subject", "prompt", "answer", "paraphrases", "neighbours"]
        frame = pd.DataFrame.from_records(self.to_records(), columns=columns)
        return frame.set_index("id").rename_axis("fact")

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write native JSON lines, whole or not at all, and give the path."""
        self._with_facts("save")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in self.to_records())
        try:
            with unfinished.open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(lines)
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
        return path

    @property
    def digest(self) -> str:
        """Sha256 (hex) of the facts in their order; the name does not count."""
        canonical = json.dumps(self.to_records(), ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode("utf-8")).hexdigest()

    @property
    def texts(self) -> dict[str, str]:
        """For every id what tells its prompt and answer from others (`Fact.digest`)."""
        return {fact.id: fact.digest for fact in self.facts}

    def sharing_prompts(self, others: FactSet) -> list[str]:
        """The ids of facts of which a prompt or a paraphrase is one of those of `others`."""
        prompts = {prompt for fact in others for prompt in (fact.prompt, *fact.paraphrases)}
        return [fact.id for fact in self.facts if prompts & {fact.prompt, *fact.paraphrases}]

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids, in order."""
        return tuple(fact.id for fact in self.facts)

    @property
    def relations(self) -> tuple[str, ...]:
        """The relations, each once, in order of first appearance."""
        return tuple(dict.fromkeys(fact.relation for fact in self.facts))

    def __len__(self) -> int:
        return len(self.facts)

    def __iter__(self) -> Iterator[Fact]:
        return iter(self.facts)

    def __contains__(self, item: object) -> bool:
        return item in self.facts or any(fact.id == item for fact in self.facts)

    @overload
    def __getitem__(self, key: int | str) -> Fact: ...
    @overload
    def __getitem__(self, key: slice) -> FactSet: ...
    def __getitem__(self, key: int | str | slice) -> Fact | FactSet:
        if isinstance(key, slice):
            return FactSet(self.name, self.facts[key])
        if isinstance(key, int):
            return self.facts[key]
        found = next((fact for fact in self.facts if fact.id == key), None)
        if found is None:
            raise KeyError(f"fact set {self.name!r} has no fact {key!r}")
        return found

    def filter(
        self,
        ids: Iterable[str] | None = None,
        relations: Iterable[str] | None = None,
        where: Callable[[Fact], bool] | None = None,
        name: str | None = None,
    ) -> FactSet:
        """Keep the facts that meet every condition given, in the set's own order; the result may be empty.

        Ids and relations that the set does not have raise ValueError, naming them.
        """
        wanted_ids = self._known(ids, self.ids, "ids")
        wanted_relations = self._known(relations, self.relations, "relations")
        kept = tuple(
            fact
            for fact in self.facts
            if (wanted_ids is None or fact.id in wanted_ids)
            and (wanted_relations is None or fact.relation in wanted_relations)
            and (where is None or where(fact))
        )
        return FactSet(self.name if name is None else name, kept)

    def split(
        self, seed: int, fraction: float = 0.5, by: Literal["fact", "relation"] = "fact"
    ) -> tuple[FactSet, FactSet]:
        """Split in two, the first with `fraction` of the facts (or of the relations), by seed and ids alone.

        By fact, every relation is split alike (shares rounded by largest remainder); by relation, a relation goes
        to one side as a whole. The order of the facts changes nothing but the order within the parts.
        """
        self._with_facts("split")
        if not 0 < fraction < 1:
            raise ValueError(f"fraction is {fraction}: give a share between 0 and 1, both excluded")
        if by not in ("fact", "relation"):
            raise ValueError(f"by is {by!r}: split by 'fact' or by 'relation'")
        groups: dict[str, list[str]] = {}
        for fact in self.facts:
            groups.setdefault(fact.relation, []).append(fact.id)
        names = sorted(groups, key=lambda relation: order_key(seed, "relation", relation))
        if by == "relation":
            first = {id for relation in names[: round(fraction * len(names))] for id in groups[relation]}
        else:
            shares = _largest_remainder({relation: fraction * len(groups[relation]) for relation in names})
            first = {id for relation in names for id in _drawn(groups[relation], seed, shares[relation])}
        parts = (
            self.filter(where=lambda fact: fact.id in first, name=f"{self.name}:first"),
            self.filter(where=lambda fact: fact.id not in first, name=f"{self.name}:second"),
        )
        if not all(len(part) for part in parts):
            n = len(groups) if by == "relation" else len(self)
            raise ValueError(f"cannot split {n} {by}(s) of {self.name!r} at {fraction}: one side would be empty")
        return parts

    def sample(self, n: int, seed: int) -> FactSet:
        """Draw n facts by seed and ids alone, kept in the set's own order; a smaller draw lies within a larger one."""
        if not 1 <= n <= len(self):
            raise ValueError(f"cannot draw {n} facts from the {len(self)} of {self.name!r}")
        drawn = set(_drawn(self.ids, seed, n))
        return self.filter(where=lambda fact: fact.id in drawn)

    def apart(self, n: int, seed: int) -> tuple[FactSet, FactSet]:
        """`n` facts drawn as by `sample`, or half of them where that is fewer, and the others.

        >>> a, b = FactSet.from_records([{"prompt": f"{i} is", "answer": "odd"} for i in range(5)]).apart(3, 0)
        >>> len(a), len(b), set(a.ids) & set(b.ids)
        (2, 3, set())
        """
        drawn = set(_drawn(self.ids, seed, min(n, len(self) // 2)))
        others = self.filter(where=lambda fact: fact.id not in drawn)
        return self.filter(where=lambda fact: fact.id in drawn), others

    def at_most(self, n: int | None, seed: int) -> FactSet:
        """All facts, or `n` of them drawn as by `sample` where there are more; None is no limit."""
        return self if n is None or len(self) <= n else self.sample(n, seed)

    def paraphrased(self, start: int = 0, stop: int | None = None) -> FactSet:
        """Give the paraphrases (of each fact those from `start` to before `stop`) as facts with ids `<id>#p1`, ..."""
        facts = tuple(
            replace(fact, id=f"{fact.id}#p{number + 1}", prompt=prompt, paraphrases=(), neighbours=())
            for fact in self.facts
            for number, prompt in list(enumerate(fact.paraphrases))[start:stop]
        )
        return FactSet(f"{self.name}:paraphrased", facts)._with_facts("list the paraphrases of facts that have none")

    def per_prompt(self) -> FactSet:
        """Give one fact per prompt: `<id>#0` for the prompt itself, `<id>#1`, ... for the paraphrases, in order.

        `id.rpartition("#")[0]` is the way back to the fact. An id of the set that such an id would repeat is refused.

        >>> facts = FactSet.from_records([{"id": "a", "prompt": "P", "answer": "x", "paraphrases": ["Q"]}])
        >>> [(fact.id, fact.prompt) for fact in facts.per_prompt()]
        [('a#0', 'P'), ('a#1', 'Q')]
        """
        facts = tuple(
            replace(fact, id=f"{fact.id}#{number}", prompt=prompt, paraphrases=(), neighbours=())
            for fact in self.facts
            for number, prompt in enumerate((fact.prompt, *fact.paraphrases))
        )
        clash = sorted({fact.id for fact in facts} & set(self.ids))
        if clash:
            raise ValueError(f"fact set {self.name!r} has a fact {clash[0]!r}, the name of a prompt: rename that fact")
        return FactSet(f"{self.name}:prompts", facts)._with_facts("list the prompts of a fact set")

    def neighbourhood(self) -> FactSet:
        """Give each neighbour prompt once, as a fact with id `<id>#n1`, ... of the first fact that names it."""
        seen: dict[str, Fact] = {}
        for fact in self.facts:
            for number, one in enumerate(fact.neighbours, start=1):
                if one.prompt not in seen:
                    name = f"{fact.id}#n{number}"
                    seen[one.prompt] = Fact(name, fact.relation, "", one.prompt, one.answer, chat=fact.chat)
        name = f"{self.name}:neighbourhood"
        return FactSet(name, tuple(seen.values()))._with_facts("list the neighbours of facts that have none")

    def as_chat(
        self, tokenizer: Any, *, system: str | None = None, date: datetime.date = chat.DATE, **variables: Any
    ) -> FactSet:
        """Give the same facts with every prompt as a user's message in the tokenizer's chat template.

        The answer follows the template's generation prompt directly. `system` is a system message; `date` the day that
        templates are told which name one; `variables` are handed to the template (as `enable_thinking=False`).

        Raises:
            ValueError: the tokenizer has no chat template, or the template refuses the conversation.
        """
        template = chat.Chat(tokenizer, system, date, **variables)
        return FactSet(f"{self.name}:chat", chat.as_chat(self._with_facts("render as chats").facts, template))

    def tokenise(self, tokenizer: Any, bos: bool | None = None, max_tokens: int | None = None) -> list[TokenisedFact]:
        """Tokenise every fact; `bos=None` does what the tokenizer does by itself. See `TokenisedFact`."""
        return tokens.tokenise(self._with_facts("tokenise").facts, tokenizer, bos, max_tokens)

    def tokenisation_report(self, tokenizer: Any, bos: bool | None = None) -> dict[str, Any]:
        """Say what tokenising did: BOS used, multi-token answers, prompt lengths in tokens, moved boundaries."""
        return tokens.tokenisation_report(self._with_facts("tokenise").facts, tokenizer, bos)

    def _with_facts(self, purpose: str) -> FactSet:
        if not self.facts:
            raise ValueError(f"cannot {purpose}: fact set {self.name!r} has no facts")
        return self

    def _known(self, wanted: Iterable[str] | None, there: tuple[str, ...], kind: str) -> set[str] | None:
        if wanted is None:
            return None
        if isinstance(wanted, str):
            raise ValueError(f"{kind} is the text {wanted!r}: give a list of {kind}")
        chosen = list(wanted)
        missing = sorted(set(chosen) - set(there))
        if missing:
            shown = ", ".join(map(repr, missing[:5])) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            raise ValueError(f"fact set {self.name!r} does not have the {kind} {shown}")
        return set(chosen)


def _drawn(ids: Iterable[str], seed: int, n: int) -> list[str]:
    return sorted(ids, key=lambda id: (order_key(seed, "fact", id), id))[:n]


def _largest_remainder(shares: Mapping[str, float]) -> dict[str, int]:
    """Round shares to whole numbers that add up to the rounded sum; ties go to the earlier one."""
    whole = {name: math.floor(share) for name, share in shares.items()}
    left = round(sum(shares.values())) - sum(whole.values())
    by_remainder = sorted(shares, key=lambda name: whole[name] - shares[name])
    return {name: whole[name] + (name in by_remainder[:left]) for name in shares}

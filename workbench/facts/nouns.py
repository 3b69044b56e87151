"""The nouns of the room: one fact, one neighbour, and the rules that hold for them."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from dataclasses import dataclass


def order_key(*parts: object) -> str:
    """Give a sort key that looks random but depends on its parts only: seeded orders that never depend on memory.

    >>> order_key(0, "capital/france")[:8]
    'ad1ba87f'
    """
    return hashlib.sha256("\x1f".join(str(part) for part in parts).encode("utf-8", "surrogatepass")).hexdigest()


def gives_away(prompt: str, answer: str) -> bool:
    """Say whether the prompt contains the answer as whole words, whatever the case.

    >>> gives_away("Mexico City is in", "mexico"), gives_away("The answer of 2+24 is", "4")
    (True, False)
    """
    haystack, needle = (unicodedata.normalize("NFC", text).casefold() for text in (prompt, answer.strip()))
    return needle in haystack and re.search(rf"(?<!\w){re.escape(needle)}(?!\w)", haystack) is not None


def check_text(value: object, field: str, may_be_empty: bool = False) -> None:
    """Refuse what is not text that files in UTF-8 can hold: ValueError with one sentence that names the field."""
    if not isinstance(value, str):
        raise ValueError(f"field {field!r} is {_shown(value)}, not text: write it as a string")
    if not may_be_empty and not value.strip():
        raise ValueError(f"field {field!r} is empty: give it some text")
    if "\0" in value:
        raise ValueError(f"field {field!r} holds a NUL at character {value.index(chr(0))}: leave it out")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"field {field!r} holds half of a surrogate pair at character {error.start}: write the whole character"
        ) from None


def _shown(value: object) -> str:
    return "null" if value is None else f"{value!r:.40} ({type(value).__name__})"


@dataclass(frozen=True)
class Neighbour:
    """A prompt close to a fact's, and its own answer: what editing the fact must leave alone."""

    prompt: str
    answer: str

    def __post_init__(self) -> None:
        check_text(self.prompt, "prompt")
        check_text(self.answer, "answer")
        if gives_away(self.prompt, self.answer):
            raise ValueError(f"the prompt {self.prompt!r} contains its answer {self.answer!r}: reword or drop it")
        object.__setattr__(self, "answer", self.answer.rstrip())


@dataclass(frozen=True)
class Fact:
    """One piece of knowledge: a prompt and the answer that follows it.

    `answer_in_prompt` marks the one honest exception to the promise that a prompt never contains its answer:
    multiple choice, where the answer is the letter of a choice that the prompt lists. White space after an answer, as
    cells of a table have it, is no part of it. `chat` says that the prompts were
    rendered by a chat template: nothing comes before them (no BOS but the template's) or between them and the answer.

    >>> fact = Fact("capital/france", "capital", "France", "The capital of France is", "Paris")
    >>> fact.text
    'The capital of France is Paris'
    """

    id: str
    relation: str
    subject: str
    prompt: str
    answer: str
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()
    answer_in_prompt: bool = False
    chat: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "paraphrases", tuple(self.paraphrases))
        object.__setattr__(self, "neighbours", tuple(self.neighbours))
        for field in ("id", "prompt", "answer"):
            check_text(getattr(self, field), field)
        object.__setattr__(self, "answer", self.answer.rstrip())
        for field in ("relation", "subject"):
            check_text(getattr(self, field), field, may_be_empty=True)
        for text in self.paraphrases:
            check_text(text, "paraphrases")
        for field, prompt in (("prompt", self.prompt), *(("paraphrases", text) for text in self.paraphrases)):
            if not self.answer_in_prompt and not self.chat and gives_away(prompt, self.answer):
                raise ValueError(
                    f"field {field!r} contains the answer {self.answer!r}: {prompt!r} gives it away; "
                    f"reword it, or set answer_in_prompt to true for multiple choice"
                )

    @property
    def digest(self) -> str:
        """What tells this prompt with this answer from any other, whatever its id: 16 hex digits of a sha256."""
        asked = json.dumps([self.prompt, self.answer, self.chat], ensure_ascii=False)
        return hashlib.sha256(asked.encode("utf-8")).hexdigest()[:16]

    @staticmethod
    def join(prompt: str, answer: str) -> str:
        """Join a prompt and an answer: by a space, unless the prompt ends or the answer starts in white space.

        >>> Fact.join("Answer:", "B"), Fact.join("Answer: ", "B"), Fact.join("Answer:", " B")
        ('Answer: B', 'Answer: B', 'Answer: B')
        """
        return prompt + answer if prompt[-1:].isspace() or answer[:1].isspace() else f"{prompt} {answer}"

    @property
    def text(self) -> str:
        """The prompt and the answer as one text."""
        return self.prompt + self.answer if self.chat else self.join(self.prompt, self.answer)


#: What facts without a relation are called in tables and sentences.
NO_RELATION = "(no relation)"


def relation_label(relation: str) -> str:
    """What a relation is called beside rows for all facts ("all"); two relations never have one label.

    >>> relation_label("capital"), relation_label(""), relation_label("all")
    ('capital', '(no relation)', 'all (relation)')
    """
    bare = relation
    while bare.endswith(" (relation)"):
        bare = bare.removesuffix(" (relation)")
    return f"{relation} (relation)" if bare in ("all", NO_RELATION) else relation or NO_RELATION

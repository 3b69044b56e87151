"""A person's own training data: prompts with completions, or chats, and which of their tokens are learned."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.facts.chat import Chat
from workbench.facts.nouns import check_text
from workbench.facts.readers import load_facts
from workbench.facts.records import need, need_list, need_text
from workbench.facts.sets import FactSet
from workbench.facts.sources import KINDS, open_source
from workbench.facts.tokens import uses_bos

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"field 'role' is {self.role!r:.40}; known are {', '.join(ROLES)}")
        check_text(self.content, "content")


@dataclass(frozen=True)
class Example:
    """Something to be learned: a completion of a prompt, or the assistant's turns of a chat.

    The text of a plain example is the prompt and the completion exactly as they are written, with nothing between them.
    """

    id: str
    prompt: str = ""
    completion: str = ""
    messages: tuple[Message, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "messages", tuple(self.messages))
        if not self.messages:
            check_text(self.prompt, "prompt")
            check_text(self.completion, "completion")
        elif not any(message.role == "assistant" for message in self.messages):
            raise ValueError("field 'messages' has no turn of the assistant: there is nothing to learn")


@dataclass(frozen=True)
class TokenisedExample:
    """Token ids of an example, and for each whether it is learned."""

    example_id: str
    ids: tuple[int, ...]
    learned: tuple[bool, ...]


@dataclass(frozen=True)
class ExampleSet:
    """Examples under one name, all plain or all chats, each with its own id, in a fixed order.

    >>> data = ExampleSet("mine", (Example("a", "Say hello.", " Hello!"),))
    >>> len(data), data.ids, data.kind
    (1, ('a',), 'plain')
    """

    name: str
    examples: tuple[Example, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "examples", tuple(self.examples))
        if len(set(self.ids)) < len(self.ids):
            twice = next(one for one in self.ids if self.ids.count(one) > 1)
            raise ValueError(f"the examples of {self.name!r} have the id {twice!r} more than once: ids must be unique")
        if len({bool(example.messages) for example in self.examples}) > 1:
            raise ValueError(f"the examples of {self.name!r} are partly plain and partly chats: give one kind")

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids, in order."""
        return tuple(example.id for example in self.examples)

    @property
    def kind(self) -> str:
        """`"plain"` or `"chat"`."""
        return "chat" if any(example.messages for example in self.examples) else "plain"

    @property
    def digest(self) -> str:
        """Sha256 (hex) of the examples in their order; the name does not count."""
        records = [
            [one.id, one.prompt, one.completion, [[turn.role, turn.content] for turn in one.messages]]
            for one in self.examples
        ]
        canonical = json.dumps(records, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(canonical.encode("utf-8")).hexdigest()

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)

    def as_chat(self) -> ExampleSet:
        """The same as chats: the user says the prompt, the assistant the completion; chats stay as they are.

        >>> ExampleSet("mine", (Example("a", "Say hello.", " Hello!"),)).as_chat().examples[0].messages[1]
        Message(role='assistant', content='Hello!')
        """
        if self.kind == "chat":
            return self
        return ExampleSet(
            self.name,
            tuple(
                Example(
                    one.id,
                    messages=(Message("user", one.prompt.strip()), Message("assistant", one.completion.strip())),
                )
                for one in self.examples
            ),
        )

    def tokenise(self, tokenizer: Any, max_tokens: int | None = None) -> list[TokenisedExample]:
        """Tokenise every example with one of transformers' fast tokenizers.

        Learned are the completion and EOS after it (where the tokenizer has one), or the assistant's turns with the
        token that ends each. A token that the tokenizer merges from the end of the prompt and the start of the
        completion counts as the completion's.

        Raises:
            ValueError: examples longer than `max_tokens`, by id, or a chat template that does not fit.
        """
        chat = Chat(tokenizer) if self.kind == "chat" else None
        tokenised = [_tokenised(one, tokenizer, chat) for one in self.examples]
        long = [one for one in tokenised if max_tokens is not None and len(one.ids) > max_tokens]
        if long:
            named = ", ".join(f"{one.example_id} ({len(one.ids)} tokens)" for one in long[:5])
            more = f" and {len(long) - 5} more" if len(long) > 5 else ""
            raise ValueError(
                f"{len(long)} of the {len(self)} examples of {self.name} are longer than the {max_tokens} tokens that "
                f"the model reads: {named}{more}; shorten them or leave them out."
            )
        return tokenised


def load_training_data(name_or_path: str | os.PathLike[str], *, format: str = "auto") -> FactSet | ExampleSet:
    """Load what a model is to be taught: facts by name or file (see `load_facts`), or a person's own examples.

    A file of examples is JSON lines (or a JSON list, a CSV, parquet) with `prompt` and `completion`, or with
    `messages`, a list of `{"role": ..., "content": ...}`; an `id` is optional, and other fields are left alone.

    Raises:
        FileNotFoundError, ValueError: one sentence that names file, line (or record) and field.
    """
    path = Path(name_or_path)
    if format == "auto" and path.is_file() and (path.suffix.lower() in KINDS or not path.suffix):
        source = open_source(path)
        if "messages" in source.fields or {"prompt", "completion"} <= source.fields:
            kind = "chat" if "messages" in source.fields else "plain"
            return ExampleSet(path.stem, tuple(_example(place, record, kind) for place, record in source.table()))
    return load_facts(name_or_path, format=format)


def _example(place: str, record: Any, kind: str) -> Example:
    """A record of a file as an example, checked field by field."""
    given = need(place, record, "messages" if kind == "chat" else "prompt") and record.get("id")
    example_id = str(given) if given not in (None, "") else place.rpartition(", ")[2].replace(" ", "-")
    if kind == "plain":
        return Example(example_id, need_text(place, record, "prompt"), need_text(place, record, "completion"))
    turns = need_list(place, record, "messages")
    if not turns:
        raise ValueError(f"{place}: field 'messages' is an empty list: give it the turns of a chat")
    messages = tuple(_message(f"{place}, messages[{number}]", turn) for number, turn in enumerate(turns, start=1))
    try:
        return Example(example_id, messages=messages)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def _message(place: str, turn: Any) -> Message:
    role, content = need_text(place, turn, "role"), need_text(place, turn, "content")
    try:
        return Message(role, content)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def _tokenised(example: Example, tokenizer: Any, chat: Chat | None) -> TokenisedExample:
    if chat is None:
        end = tokenizer.eos_token or ""
        text = example.prompt + example.completion + end
        spans = [(len(example.prompt), len(text))]
    else:
        text, spans = _turns(example, tokenizer, chat)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = list(encoded["input_ids"])
    learned = [any(a < stop and b > start for start, stop in spans) for a, b in encoded["offset_mapping"]]
    if chat is None and uses_bos(tokenizer) and ids[:1] != [tokenizer.bos_token_id]:
        ids, learned = [tokenizer.bos_token_id, *ids], [False, *learned]
    if not any(learned[1:]):
        raise ValueError(f"Example {example.id!r} has no token to learn under this tokenizer; lengthen it.")
    return TokenisedExample(example.id, tuple(ids), tuple(learned))


def _turns(example: Example, tokenizer: Any, chat: Chat) -> tuple[str, list[tuple[int, int]]]:
    """The chat as the template renders it, and where the assistant's words (and the token that ends them) stand.

    The template is rendered with a mark in the place of each of the assistant's turns; the text between the marks is
    the template's own.
    """
    said = [message.content for message in example.messages if message.role == "assistant"]
    marks = iter([f"Qx{number}answer{number}xQ" for number in range(len(said))])
    marked = [
        {"role": one.role, "content": next(marks) if one.role == "assistant" else one.content}
        for one in example.messages
    ]
    whole = chat.rendered([_plain(one) for one in example.messages], add_generation_prompt=False)
    frame = chat.rendered(marked, add_generation_prompt=False)
    text, spans = "", []
    for number, words in enumerate(said):
        before, found, frame = frame.partition(f"Qx{number}answer{number}xQ")
        start = len(text) + len(before)
        shown = words if whole.startswith(words, start) else words.strip()
        text += before + shown
        if not found or not whole.startswith(text):
            raise ValueError(
                f"The chat template of {chat.name} does not show turn {number + 1} of the assistant in example "
                f"{example.id!r} as it is written; give plain prompts and completions."
            )
        spans.append((start, len(text) + _ending(frame, tokenizer.all_special_tokens)))
    return whole, spans


def _plain(message: Message) -> dict[str, str]:
    return {"role": message.role, "content": message.content}


def _ending(after: str, special: Sequence[str]) -> int:
    """How many characters after the assistant's words end its turn: up to the special token that follows directly."""
    gap = len(after) - len(after.lstrip())
    token = next((one for one in special if after.startswith(one, gap)), "")
    return gap + len(token) if token else 0

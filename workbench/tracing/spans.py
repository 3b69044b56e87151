"""Which tokens of a prompt are the subject's, and what role every token has."""

import re
from typing import Any

from workbench.facts import Fact, TokenisedFact

#: The roles of prompt tokens, in the order of the text.
ROLES = (
    "before_subject",
    "first_subject",
    "middle_subject",
    "last_subject",
    "first_subsequent",
    "further",
    "last",
)


def subject_characters(prompt: str, subject: str, last: bool = False) -> tuple[int, int] | None:
    """Where the subject stands in the prompt: its first (or last) occurrence as whole words, else as any.

    >>> subject_characters("The USB port of the US", "US"), subject_characters("A", "B")
    ((20, 22), None)
    """
    if not subject.strip():
        return None
    word = re.escape(subject.strip())
    found = list(re.finditer(rf"(?<!\w){word}(?!\w)", prompt)) or list(re.finditer(word, prompt))
    return found[-1 if last else 0].span() if found else None


def subject_tokens(fact: Fact, tokens: TokenisedFact, tokenizer: Any) -> range | None:
    """The positions in `tokens.prompt_ids` of the tokens that hold a character of the subject; None where it is absent.

    A prompt that went through a chat template begins with the template's own words, which may name the subject too:
    there the last occurrence counts.

    Raises:
        ValueError: the tokenizer does not say where its tokens stand, or the subject shares a token with the answer.
    """
    characters = subject_characters(fact.prompt, fact.subject, last=fact.chat)
    if characters is None:
        return None
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"The tokenizer {type(tokenizer).__name__} does not say where its tokens stand in a text; "
            "tracing needs a fast one (with a tokenizer.json)."
        )
    encoded = tokenizer(fact.text, add_special_tokens=False, return_offsets_mapping=True)
    head = len(tokens.ids) - len(encoded.input_ids)  # BOS, where there is one
    if list(tokens.ids[head:]) != list(encoded.input_ids):
        raise ValueError(f"The tokens of fact {fact.id!r} belong to another tokenizer.")
    start, end = characters
    held = [i + head for i, (a, b) in enumerate(encoded.offset_mapping) if a < end and b > start]
    if not held or held[-1] >= len(tokens.prompt_ids):
        raise ValueError(
            f"The subject {fact.subject!r} of fact {fact.id!r} has no tokens of its own under this tokenizer; "
            "reword the prompt."
        )
    return range(held[0], held[-1] + 1)


def token_roles(subject: range, n_prompt: int) -> dict[str, list[int]]:
    """The positions of every role in a prompt of `n_prompt` tokens.

    As in ROME's released code a token may have two roles: a subject of one token is both its first and its last, and
    the token after the subject may be the last of the prompt.

    >>> token_roles(range(2, 4), 6)["last_subject"], token_roles(range(2, 4), 6)["further"]
    ([3], [])
    """
    last = n_prompt - 1
    return {
        "before_subject": list(range(subject[0])),
        "first_subject": [subject[0]],
        "middle_subject": list(subject[1:-1]),
        "last_subject": [subject[-1]],
        "first_subsequent": [subject[-1] + 1] if subject[-1] < last else [],
        "further": list(range(subject[-1] + 2, last)),
        "last": [last],
    }

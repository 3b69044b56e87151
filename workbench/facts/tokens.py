"""From facts to token ids: where the answer starts, and what was done about BOS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from workbench.facts.nouns import Fact


@dataclass(frozen=True)
class TokenisedFact:
    """Token ids of a fact; `prompt_ids + answer_ids` are the ids of the whole text (after BOS, where there is one).

    `bos` says whether `prompt_ids` starts with BOS; `boundary_moved` says that the tokenizer merges the end of the
    prompt with the answer (a final space, mostly), so that the merged token counts as the answer's.
    """

    fact_id: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    bos: bool = False
    boundary_moved: bool = False

    @property
    def ids(self) -> tuple[int, ...]:
        """All ids: prompt, then answer."""
        return self.prompt_ids + self.answer_ids


def uses_bos(tokenizer: Any, bos: bool | None = None) -> bool:
    """Decide on BOS: as asked, or (None) as this tokenizer does by itself."""
    bos_id = getattr(tokenizer, "bos_token_id", None)
    if bos and bos_id is None:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise ValueError(f"bos=True, but the tokenizer {name} has no BOS token: use bos=False or bos=None")
    if bos is not None:
        return bos
    return bos_id is not None and list(tokenizer.encode("a"))[:1] == [bos_id]


def tokenise(
    facts: Sequence[Fact], tokenizer: Any, bos: bool | None = None, max_tokens: int | None = None
) -> list[TokenisedFact]:
    """Tokenise facts, splitting each text at the longest common prefix of the ids of the prompt and of the whole.

    The tokenizer is one of transformers'. EOS is never added. Raises ValueError, naming the fact, where a prompt or
    an answer has no token of its own, and where a text is longer than `max_tokens`.
    """
    with_bos = uses_bos(tokenizer, bos)
    tokenised = [_tokenise_one(fact, tokenizer, with_bos) for fact in facts]
    for one in tokenised:
        if max_tokens is not None and len(one.ids) > max_tokens:
            raise ValueError(
                f"fact {one.fact_id!r} is {len(one.ids)} tokens long ({len(one.prompt_ids)} of prompt, "
                f"{len(one.answer_ids)} of answer), more than the {max_tokens} allowed: shorten it or filter it out"
            )
    return tokenised


def _tokenise_one(fact: Fact, tokenizer: Any, with_bos: bool) -> TokenisedFact:
    prompt_ids = list(tokenizer.encode(fact.prompt, add_special_tokens=False))
    text_ids = list(tokenizer.encode(fact.text, add_special_tokens=False))
    pairs = enumerate(zip(prompt_ids, text_ids, strict=False))
    cut = next((at for at, (one, other) in pairs if one != other), min(len(prompt_ids), len(text_ids)))
    if cut == 0:
        raise ValueError(
            f"the prompt of fact {fact.id!r} has no token of its own under this tokenizer: {fact.prompt!r}; lengthen it"
        )
    if cut == len(text_ids):
        raise ValueError(
            f"the answer of fact {fact.id!r} has no token of its own under this tokenizer: {fact.answer!r}; reword it"
        )
    begun = text_ids[0] == tokenizer.bos_token_id
    head = (tokenizer.bos_token_id,) if with_bos and not begun and not fact.chat else ()
    return TokenisedFact(
        fact_id=fact.id,
        prompt_ids=(*head, *text_ids[:cut]),
        answer_ids=tuple(text_ids[cut:]),
        bos=begun if fact.chat else with_bos,
        boundary_moved=cut < len(prompt_ids),
    )


def tokenisation_report(facts: Sequence[Fact], tokenizer: Any, bos: bool | None = None) -> dict[str, Any]:
    """Say what tokenising did: BOS, answers of several tokens, lengths in tokens (BOS included), moved boundaries."""
    tokenised = tokenise(facts, tokenizer, bos)
    lengths = [len(one.prompt_ids) for one in tokenised]
    unknown = getattr(tokenizer, "unk_token_id", None)
    return {
        "bos": tokenised[0].bos,
        "bos_token": tokenizer.bos_token if tokenised[0].bos else None,
        "n_facts": len(tokenised),
        "n_multi_token_answers": sum(len(one.answer_ids) > 1 for one in tokenised),
        "max_answer_tokens": max(len(one.answer_ids) for one in tokenised),
        "max_prompt_tokens": max(lengths),
        "mean_prompt_tokens": sum(lengths) / len(lengths),
        "n_boundary_moved": sum(one.boundary_moved for one in tokenised),
        "n_unknown_answers": sum(unknown is not None and unknown in one.answer_ids for one in tokenised),
    }

"""Does the model know it: `recall`, and the one way in which facts and texts are read from a model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from workbench.facts import FactSet, TokenisedFact
from workbench.metrics import logprob, margin, rank
from workbench.models import HookedModel, pad_batch

#: Tokens in one forward pass when facts are only read.
TOKENS_PER_PASS = 768


@dataclass(frozen=True)
class Reading:
    """What a model says about one fact, answer tokens teacher-forced."""

    logprobs: tuple[float, ...]
    ranks: tuple[int, ...]
    margin: float
    greedy: tuple[int, ...]

    @property
    def known(self) -> bool:
        """Whether greedy decoding gives the answer: every answer token is the most probable one."""
        return not any(self.ranks)


def recall(model: HookedModel, facts: FactSet, *, progress: bool = False) -> pd.DataFrame:
    """Ask the model every fact: does greedy decoding of the prompt give the answer?

    Returns a frame indexed by `fact` with relation, subject, prompt, answer, predicted (the greedy text of as many
    tokens as the answer), prob (of the whole answer), logprob (nats), rank (the worst over the answer's tokens, 0 is
    the greedy choice), margin (logits, the smallest over the answer's tokens), n_tokens and known.

    Raises:
        ValueError: a fact without tokens or longer than the model's context, by id.
    """
    readings = read_facts(model, model.tokenise(facts), progress=progress)
    rows = [
        {
            "fact": fact.id,
            "relation": fact.relation,
            "subject": fact.subject,
            "prompt": fact.prompt,
            "answer": fact.answer,
            "predicted": model.tokenizer.decode(list(reading.greedy)),
            "prob": float(torch.tensor(reading.logprobs, dtype=torch.float64).sum().exp()),
            "logprob": float(sum(reading.logprobs)),
            "rank": max(reading.ranks),
            "margin": reading.margin,
            "n_tokens": len(reading.ranks),
            "known": reading.known,
        }
        for fact, reading in zip(facts, readings, strict=True)
    ]
    return pd.DataFrame(rows).set_index("fact")


def by_relation(frame: pd.DataFrame) -> pd.DataFrame:
    """How many facts of each relation are known: relation, n, known, share."""
    grouped = frame.groupby("relation")["known"].agg(n="size", known="sum").reset_index()
    return grouped.assign(share=grouped["known"] / grouped["n"]).sort_values(
        "share", ascending=False, ignore_index=True
    )


def read_facts(
    model: HookedModel, facts: Sequence[TokenisedFact], *, greedy: bool = True, progress: bool = False
) -> list[Reading]:
    """Read every fact once, in padded batches of similar length; the order of the facts is kept.

    With `greedy=False` the greedy text is given only as far as the teacher-forced reading shows it, which is quicker.
    """
    readings: dict[int, Reading] = {}
    with tqdm(total=len(facts), unit="fact", desc="recall", disable=not progress) as bar:
        for indices in by_length([len(fact.ids) for fact in facts]):
            readings.update(zip(indices, _read_batch(model, [facts[i] for i in indices]), strict=True))
            bar.update(len(indices))
        if greedy:
            _finish_greedy(model, facts, readings)
    return [readings[i] for i in range(len(facts))]


def by_length(lengths: Sequence[int], most: int = TOKENS_PER_PASS) -> Iterator[list[int]]:
    """Indices in batches of similar length whose padded size is at most `most` tokens, or of a single index.

    >>> list(by_length([5, 2, 3, 2], 6))
    [[1, 3], [2], [0]]
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batch and (len(batch) + 1) * lengths[index] > most:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def answer_losses(model: HookedModel, facts: Sequence[TokenisedFact]) -> list[Float[Tensor, " token"]]:
    """Cross-entropy in nats of every answer token of some facts in one pass, teacher-forced; for gradients."""
    ids, mask = pad_batch([fact.ids[:-1] for fact in facts], side="left")
    read = max(len(fact.answer_ids) for fact in facts)
    logits = model.hf(**model.inputs(ids, mask), use_cache=False, **model.keeping(read)).logits
    targets = [torch.tensor(fact.answer_ids, device=logits.device) for fact in facts]
    return [-logprob(logits[row, -len(target) :], target) for row, target in enumerate(targets)]


def _read_batch(model: HookedModel, facts: Sequence[TokenisedFact]) -> list[Reading]:
    """Teacher-forced readings; the greedy text as far as they show it."""
    ids, mask = pad_batch([fact.ids[:-1] for fact in facts], side="left")
    logits = model.logits(ids, mask, last=max(len(fact.answer_ids) for fact in facts))
    readings = []
    for row, fact in enumerate(facts):
        own = logits[row, -len(fact.answer_ids) :]
        if own.isnan().any():
            raise ValueError(
                f"{model.name} gives numbers that are not finite on fact {fact.fact_id!r}; open it with "
                'dtype="float32", or check its weights.'
            )
        target = torch.tensor(fact.answer_ids, device=own.device)
        ranks = rank(own, target).tolist()
        readings.append(
            Reading(
                logprobs=tuple(logprob(own, target).tolist()),
                ranks=tuple(ranks),
                margin=float(margin(own, target).min()),
                greedy=tuple(own.argmax(-1).tolist()[: _agreeing(ranks) + 1]),
            )
        )
    return readings


def _agreeing(ranks: Sequence[int]) -> int:
    """How many first tokens are the greedy choice: so far the teacher-forced argmax is the greedy continuation."""
    return next((k for k, value in enumerate(ranks) if value), len(ranks))


def _finish_greedy(model: HookedModel, facts: Sequence[TokenisedFact], readings: dict[int, Reading]) -> None:
    """Continue greedily, a token at a time, until every prediction has as many tokens as its answer."""
    while short := [i for i, fact in enumerate(facts) if len(readings[i].greedy) < len(fact.answer_ids)]:
        prefixes = [facts[i].prompt_ids + readings[i].greedy for i in short]
        for rows in by_length([len(prefix) for prefix in prefixes]):
            ids, mask = pad_batch([prefixes[row] for row in rows], side="left")
            following = model.logits(ids, mask, last=1)[:, -1].argmax(-1).tolist()
            for row, token in zip(rows, following, strict=True):
                old = readings[short[row]]
                readings[short[row]] = replace(old, greedy=(*old.greedy, token))


def text_chunks(model: HookedModel, passages: Sequence[str], *, max_tokens: int, length: int = 128) -> list[list[int]]:
    """Token ids of general text: every passage cut into pieces of at most `length`, `max_tokens` in all.

    Pieces are what intervals resample: 1,024 tokens make about a dozen. A piece begins with BOS where the tokenizer
    has it so, and fits the model's context; pieces with fewer than 8 tokens are left out. No piece at all is a
    `ValueError`.
    """
    if max_tokens < 8:
        raise ValueError(f"At least 8 tokens of general text are read, not {max_tokens}.")
    length = min(length, (model.max_tokens or length + 1) - 1)
    chunks: list[list[int]] = []
    left = max_tokens
    for passage in passages:
        ids = model.tokenizer(passage).input_ids
        bos = [ids[0]] if ids and ids[0] == model.tokenizer.bos_token_id else []
        ids = ids[len(bos) :]
        for start in range(0, len(ids), length):
            piece = ids[start : start + min(length, left)]
            if len(piece) >= 8:
                chunks.append(bos + piece)
                left -= len(piece)
            if left < 8:
                return chunks
    if not chunks:
        raise ValueError("The general text has no passage of at least 8 tokens: give longer passages.")
    return chunks


def text_logits(model: HookedModel, chunk: Sequence[int]) -> tuple[Float[Tensor, "pos d_vocab"], Int[Tensor, " pos"]]:
    """Next-token logits of a piece of text and the tokens that follow."""
    ids = torch.tensor([list(chunk)], device=model.device)
    return model.logits(ids)[0, :-1], ids[0, 1:]

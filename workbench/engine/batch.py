"""Several facts as one padded tensor."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.facts import TokenisedFact
from workbench.metrics import Objective
from workbench.models import pad_batch

#: Fewer first tokens in common than this are not worth a run of their own.
LEAST_SHARED = 8
#: Products of fewer rows round in their own way: of one on Intel's processors, of up to three on AMD's.
FEWEST_ROWS = 4


def copies(rows: int) -> int:
    """How often so many rows are taken, so that there are at least `FEWEST_ROWS`.

    >>> copies(1), copies(3), copies(100)
    (4, 2, 1)
    """
    return -(-FEWEST_ROWS // rows)


@dataclass(frozen=True)
class Batch:
    """Several facts as one padded tensor whose prompts end at the same column.

    The columns from `start` on are the *tail*, which every query holds a copy of; its first `moved` columns are those
    whose activations are replaced. After its last columns the answers are read: `target` says which token each is
    compared with, and `weight` is 0 where an answer is shorter than the longest. The first `shared` tokens are those of
    every prompt, so that one run of them is enough.
    """

    ids: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    start: int
    moved: int
    target: Int[Tensor, "batch read"]
    weight: Float[Tensor, "batch read"]
    shared: int = 0

    @property
    def tail(self) -> int:
        """Number of columns that every query holds."""
        return self.ids.shape[1] - self.start

    @property
    def read(self) -> int:
        """Number of last columns after which something is read."""
        return self.target.shape[1]

    def value(self, logits: Float[Tensor, "batch read d_vocab"], objective: Objective) -> Float[Tensor, " batch"]:
        """The objective of every fact, summed over its answer's tokens."""
        return (objective(logits, self.target) * self.weight).sum(-1)

    def of(self, rows: Int[Tensor, " row"]) -> "Batch":
        """The facts with these indices, which may repeat."""
        parts = {name: getattr(self, name)[rows] for name in ("ids", "mask", "target", "weight")}
        return replace(self, **parts)


def make_batch(facts: Sequence[TokenisedFact], device: torch.device, scope: str = "last") -> Batch:
    """Prompts padded on the left, answers on the right.

    With `scope="last"` the last prompt token is moved and the prefix before it is shared; with `scope="all"` every
    prompt token is. The last answer token is a target only: nothing is read after it, so it is not fed.
    """
    prompts, prompt_mask = pad_batch([fact.prompt_ids for fact in facts], side="left")
    answers, answer_mask = pad_batch([fact.answer_ids for fact in facts], side="right")
    start = prompts.shape[1] - 1 if scope == "last" else 0
    tensors = (
        torch.cat([prompts, answers[:, :-1]], 1),
        torch.cat([prompt_mask, answer_mask[:, :-1]], 1),
        answers,
        answer_mask.float(),
    )
    ids, mask, target, weight = (tensor.to(device) for tensor in tensors)
    shared = min(start, shared_tokens([fact.prompt_ids for fact in facts]))
    return Batch(ids, mask, start, prompts.shape[1] - start, target, weight, shared if shared >= LEAST_SHARED else 0)


def shared_tokens(prompts: Sequence[tuple[int, ...]]) -> int:
    """How many first tokens several prompts have in common; 0 for a single one, which shares nothing.

    >>> shared_tokens([(5, 6, 7), (5, 6, 8)]), shared_tokens([(5, 6)])
    (2, 0)
    """
    if len(prompts) < 2:
        return 0
    low, high = min(prompts), max(prompts)  # what the first and the last in order have in common, all have
    return next(
        (i for i, pair in enumerate(zip(low, high, strict=False)) if pair[0] != pair[1]), min(len(low), len(high))
    )

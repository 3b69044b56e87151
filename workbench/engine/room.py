"""How much goes into one pass: as many rows as make full matrix products, and no more than memory takes."""

from dataclasses import dataclass, replace
from numbers import Real

import torch

from workbench.models import HookedModel, free_memory

#: Token rows of queries in one pass: enough for full matrix products, small enough for the processor's caches.
ROWS_PER_PASS = 1024
#: Facts that are prepared together: more make no pass quicker, fewer leave passes that begin with few rows.
FACTS_PER_PASS = 16
#: Prompt tokens that are prepared together.
TOKENS_PER_PASS = 8192


@dataclass(frozen=True)
class Room:
    """Token rows of queries in one pass, and the most facts that are prepared together, whatever is asked.

    The rest is memory in bytes: what there is, and what a row takes by itself, for every token that it attends to, and
    for its logits where all of them are held, because the model scales or caps them.
    """

    rows: int
    most: int = 2**31
    budget: int | float = float("inf")
    row: int = 0
    key: int = 0
    logits: int = 0

    def rows_of(self, n_tokens: int, plain_head: bool = True) -> int:
        """Rows of a pass over prompts of so many tokens, by a model whose logits are or are not its unembedding's.

        >>> room = Room(1024, budget=1e3, row=2, key=1, logits=8)
        >>> room.rows_of(8), room.rows_of(90, plain_head=False), room.rows_of(5000)
        (100, 10, 1)
        """
        each = self.row + self.key * n_tokens + (0 if plain_head else self.logits)
        return max(1, min(self.rows, int(self.budget // max(1, each)) if self.budget < float("inf") else self.rows))

    def smaller(self, n_facts: int) -> "Room | None":
        """What to go on with when memory ran out over `n_facts` facts: half as many, or half the rows; None is the end.

        >>> Room(1024).smaller(8).most, Room(1024, 4).smaller(1).rows, Room(1, 1).smaller(1)
        (4, 512, None)
        """
        if n_facts > 1:
            return replace(self, most=n_facts // 2)
        return replace(self, rows=self.rows // 2, most=1, budget=self.budget / 2) if self.rows > 1 else None

    def facts(self, n_tokens: int, whole_prompt: bool = False) -> int:
        """How many facts of `n_tokens` tokens to prepare together; each query holds one token, or the whole prompt.

        >>> Room(1024).facts(45), Room(1024).facts(45, whole_prompt=True), Room(1024).facts(5000)
        (16, 5, 1)
        """
        rows = n_tokens if whole_prompt else 1
        return max(1, min(FACTS_PER_PASS, TOKENS_PER_PASS // n_tokens, self.rows // (4 * rows)))


def room_for(model: HookedModel, memory: float | None = None) -> Room:
    """The room of a model's passes in `memory` GiB, or in half of what is free.

    A row costs about ten residual streams and five activations of the FFN in every layer while gradients are needed,
    and its attention weights.

    Raises:
        ValueError: not even one row fits.
    """
    if memory is not None and not (isinstance(memory, Real) and 0 < memory < float("inf")):
        raise ValueError(
            f"memory must be a positive number of GiB, not {memory!r}; leave it out for half of what is free."
        )
    budget = free_memory(model.device) / 2 if memory is None else memory * 2**30
    size = model.dtype.itemsize
    row = model.n_layers * (10 * model.d_model + 5 * model.d_mlp) * size
    heads = model.config.get_text_config().num_attention_heads
    key = model.n_layers * heads * (max(4, size) + size)  # the softmax, and it cast back
    logits = 4 * 4 * model.d_vocab  # whole logits in float32, what is made of them, and their gradients
    rows = min(ROWS_PER_PASS, int(budget // row))
    if rows < 1:
        raise ValueError(
            f"A pass of {model.name} takes at least {row / 2**30:.2f} GiB, more than the {budget / 2**30:.2f} GiB at "
            "hand: give more with memory=, or open the model with dtype='bfloat16'."
        )
    return Room(rows, budget=budget, row=row, key=key, logits=logits)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device."""
    texts = ("out of memory", "not enough memory", "can't allocate memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(t in str(error).lower() for t in texts)

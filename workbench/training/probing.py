"""What a model in training says about a few facts, read through its plain forward pass and leaving it as it was."""

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from workbench.distances import cosine_distance, embedding_distance, soft_distance
from workbench.facts import TokenisedFact
from workbench.metrics import logprob, rank
from workbench.models import pad_batch
from workbench.recollection import by_length

#: What can be read of a fact, and which way is away from its answer.
AWAY = {"d_soft": 1, "d_emb": 1, "logprob": -1}


@dataclass(frozen=True)
class Seen:
    """One reading of some facts, in their order and in float64 on the CPU.

    `values` has one number a fact and metric. `known` says whether greedy decoding gives the answer. `states` is the
    residual stream after every block at the last prompt token, where it was asked for.
    """

    values: dict[str, Float[Tensor, " fact"]]
    known: Bool[Tensor, " fact"]
    states: Float[Tensor, "layer fact d_model"] | None = None


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside; afterwards every module's mode and every generator as it was."""
    training = [module for module in model.modules() if module.training]
    python, array = random.getstate(), np.random.get_state()
    place = device_of(model)
    devices = [place] if place.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True
            random.setstate(python)
            np.random.set_state(array)


def device_of(model: nn.Module) -> torch.device:
    """Where the first weight is."""
    return next(model.parameters()).device


def read_probe(
    model: nn.Module,
    facts: Sequence[TokenisedFact],
    W_E: Float[Tensor, "d_vocab d_embed"],
    metrics: Sequence[str],
    blocks: Sequence[nn.Module] = (),
) -> Seen:
    """Read facts from any causal model of transformers, with or without peft: answers teacher-forced, one pass a batch.

    `d_soft` and `d_emb` are those of `workbench.distances` with the embedding that is given; `d_emb` follows the greedy
    answer with as many tokens as the fact's, which takes more passes where it leaves that; `logprob` is of the whole
    answer, in nats. With `blocks` the states after them are read too.

    Raises:
        ValueError: the model has another vocabulary than the embedding.
    """
    found: dict[int, tuple[dict[str, float], bool]] = {}
    states: dict[int, Tensor] = {}
    with undisturbed(model):
        for indices in by_length([len(fact.ids) for fact in facts]):
            batch = [facts[i] for i in indices]
            logits, kept = _forward(model, [fact.ids[:-1] for fact in batch], batch, blocks)
            if logits.shape[-1] != len(W_E):
                raise ValueError(
                    f"The model in training has {logits.shape[-1]} tokens and the base model {len(W_E)}: give the base "
                    "model that the training started from."
                )
            found |= dict(zip(indices, _read(model, batch, logits, W_E, metrics), strict=True))
            states |= dict(zip(indices, kept, strict=True)) if blocks else {}
    order = range(len(facts))
    return Seen(
        {name: torch.tensor([found[i][0][name] for i in order], dtype=torch.float64) for name in metrics},
        torch.tensor([found[i][1] for i in order]),
        torch.stack([states[i] for i in order], dim=1) if blocks else None,
    )


def _forward(
    model: nn.Module, ids: Sequence[Sequence[int]], facts: Sequence[TokenisedFact], blocks: Sequence[nn.Module] = ()
) -> tuple[Float[Tensor, "batch pos d_vocab"], list[Tensor]]:
    """Logits at every token of right-padded rows; and per row the states at the last prompt token, layer first.

    Methods that put tokens of their own before the text are read from the end of the row.
    """
    tokens, mask = pad_batch(ids, side="right")
    width, kept = tokens.shape[1], []
    last = torch.tensor([len(fact.prompt_ids) - 1 for fact in facts])

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        kept.append(hidden[:, -width:][torch.arange(len(last)), last.to(hidden.device)].cpu().double())

    device = device_of(model)
    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_hook(keep).remove)
        out = model(input_ids=tokens.to(device), attention_mask=mask.to(device), use_cache=False)
    return out.logits[:, -width:], list(torch.stack(kept, dim=1)) if blocks else []


def _read(
    model: nn.Module,
    facts: Sequence[TokenisedFact],
    logits: Float[Tensor, "batch pos d_vocab"],
    W_E: Float[Tensor, "d_vocab d_embed"],
    metrics: Sequence[str],
) -> list[tuple[dict[str, float], bool]]:
    """Per fact its metrics, and whether it is known."""
    sizes = [len(fact.answer_ids) for fact in facts]
    starts = [len(fact.prompt_ids) - 1 for fact in facts]
    own = torch.cat([logits[row, start : start + sizes[row]] for row, start in enumerate(starts)])
    target = torch.tensor([token for fact in facts for token in fact.answer_ids], device=own.device)
    right = [(part == 0).tolist() for part in rank(own, target).split(sizes)]
    known = [all(one) and bool(part.isfinite().all()) for one, part in zip(right, own.split(sizes), strict=True)]
    values: dict[str, list[float]] = {}
    if "logprob" in metrics:
        values["logprob"] = [float(part.cpu().double().sum()) for part in logprob(own, target).split(sizes)]
    if "d_soft" in metrics:
        values["d_soft"] = [float(part.cpu().double().mean()) for part in soft_distance(own, target, W_E).split(sizes)]
    if "d_emb" in metrics:
        said = _greedy(model, facts, [part.tolist() for part in own.argmax(-1).split(sizes)], right)
        values["d_emb"] = embedding_distance(W_E, said, [fact.answer_ids for fact in facts])
    return [({name: values[name][row] for name in metrics}, known[row]) for row in range(len(facts))]


def _greedy(
    model: nn.Module, facts: Sequence[TokenisedFact], forced: Sequence[list[int]], right: Sequence[list[bool]]
) -> list[list[int]]:
    """The greedy answers: teacher-forced as far as they follow the fact's, continued where they leave it."""
    agreed = [next((k for k, good in enumerate(one) if not good), len(one)) for one in right]
    said = [tokens[: count + 1] for tokens, count in zip(forced, agreed, strict=True)]
    while short := [row for row, fact in enumerate(facts) if len(said[row]) < len(fact.answer_ids)]:
        ids = [[*facts[row].prompt_ids, *said[row]] for row in short]
        logits, _ = _forward(model, ids, [facts[row] for row in short])
        for place, row in enumerate(short):
            said[row].append(int(logits[place, len(ids[place]) - 1].argmax()))
    return said


def blocks_of(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The transformer blocks of a model, by their names in its base, whatever wraps it.

    Raises:
        ValueError: a block that is not there once.
    """
    found = []
    for name in names:
        there = [module for path, module in model.named_modules() if f".{path}".endswith(f".{name}")]
        if len(there) != 1:
            raise ValueError(
                f"The model in training has {len(there)} modules named {name!r}, not one: give the base model that the "
                "training started from."
            )
        found.append(there[0])
    return found


def growth(
    before: Float[Tensor, "layer fact d_model"], after: Float[Tensor, "layer fact d_model"]
) -> Float[Tensor, " layer"]:
    """How much more the states moved after each block than before it: `s_l - s_(l-1)`, with s_(-1) = 0.

    s_l is the mean over facts of `1 - cos` between the state after block l and the one at the start.

    >>> growth(torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]]), torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])).tolist()
    [0.0, 1.0]
    """
    moved = cosine_distance(before, after).mean(-1)
    return torch.diff(moved, prepend=torch.zeros_like(moved[:1]))

"""How far each fact moved from its semantic target: distances of answers, and drift of hidden states per layer.

Definitions of ours, after the findings of "Semantic are Beacons" (arXiv 2405.18292), whose equations were not at hand.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from workbench.facts import FactSet, TokenisedFact
from workbench.models import HookedModel, pad_batch
from workbench.opening import check_comparable, hooked_among, open_model
from workbench.recollection import by_length, read_facts


def measure_drift(
    before: Any, after: Any, facts: FactSet, *, tokenizer: Any = None, progress: bool = False
) -> pd.DataFrame:
    """Score how far every fact moved from its semantic target between two models.

    Two kinds of row. `d_emb` (no layer): `1 - cos(mean W_E[a], mean W_E[y])`, with a the greedy answer, y the gold one
    and W_E the embedding of `before`; 0 where the answer is right. `toward` and `off` (per layer): with h the residual
    stream after the block at the last prompt token, r = W_U[y_1] - h(before) and Dh = h(after) - h(before),
    `toward = <Dh, r>/|r|^2` and `off = |Dh - toward r|/|r|`, so that
    `|h(after) - W_U[y_1]|^2/|r|^2 = (1 - toward)^2 + off^2`. Both are 0 before by definition.

    Args:
        before: a model, name, folder or adapter (see `open_model`).
        after: the same, or a dictionary of several by name, which adds the column `method`.
        facts: the facts to follow.
        tokenizer: of loaded models, where neither side and no folder has one.
        progress: show a progress bar.

    Returns:
        Frame with fact, relation, metric, layer (missing for `d_emb`), before, after, change = after - before. A model
        against itself gives zeros.

    Raises:
        ValueError: the two models differ in width, depth or vocabulary.
    """
    first = open_model(before, beside=hooked_among(after), tokenizer=tokenizer)
    tokens = first.tokenise(facts)
    if first.W_U.shape[1] != first.d_model:
        raise ValueError(
            f"{first.name}: its unembedding has width {first.W_U.shape[1]} and its residual stream {first.d_model}, so "
            "there is no direction of the answer in the residual stream to measure drift against."
        )
    distance, hidden = _read(first, first, tokens)
    anchor = first.W_U[[fact.answer_ids[0] for fact in tokens]].float()
    frames = []
    several = after if isinstance(after, Mapping) else {"after": after}
    for name, model in tqdm(several.items(), unit="model", desc="drift", disable=not progress):
        second = open_model(model, beside=first, tokenizer=tokenizer)
        check_comparable(first, second)
        distance_after, hidden_after = _read(second, first, tokens)
        toward, off = toward_and_off(hidden, hidden_after, anchor)
        frames.append(_frame(facts, distance, distance_after, toward, off).assign(method=name))
    frame = pd.concat(frames, ignore_index=True)
    return frame if isinstance(after, Mapping) else frame.drop(columns="method")


def toward_and_off(
    before: Float[Tensor, "layer fact d_model"],
    after: Float[Tensor, "layer fact d_model"],
    anchor: Float[Tensor, "fact d_model"],
) -> tuple[Float[Tensor, "layer fact"], Float[Tensor, "layer fact"]]:
    """The part of a movement that goes toward an anchor and the part that does not, in units of the distance to it.

    >>> h, c = torch.zeros(1, 1, 2), torch.tensor([[2.0, 0.0]])
    >>> [x.item() for x in toward_and_off(h, h + torch.tensor([1.0, 1.0]), c)]
    [0.5, 0.5]
    """
    residual, moved = anchor - before, after - before
    square = torch.einsum("lfd,lfd->lf", residual, residual)
    toward = torch.einsum("lfd,lfd->lf", moved, residual) / square
    rest = moved - rearrange(toward, "l f -> l f 1") * residual
    return toward, rest.norm(dim=-1) / square.sqrt()


def embedding_distance(
    W_E: Float[Tensor, "d_vocab d_model"], greedy: Sequence[Sequence[int]], gold: Sequence[Sequence[int]]
) -> list[float]:
    """`1 - cos` of the mean embeddings of two token sequences per fact; exactly 0 where the sequences are equal."""
    distances = []
    for a, y in zip(greedy, gold, strict=True):
        if list(a) == list(y):
            distances.append(0.0)
            continue
        said, meant = (W_E[list(ids)].float().mean(0) for ids in (a, y))
        distances.append(float(1 - torch.nn.functional.cosine_similarity(said, meant, dim=0)))
    return distances


def _read(
    model: HookedModel, base: HookedModel, facts: Sequence[TokenisedFact]
) -> tuple[list[float], Float[Tensor, "layer fact d_model"]]:
    """Distances of greedy answers, and residual streams at the last prompt token."""
    greedy = [reading.greedy for reading in read_facts(model, facts)]
    distance = embedding_distance(base.W_E, greedy, [fact.answer_ids for fact in facts])
    hidden = torch.zeros(model.n_layers, len(facts), model.d_model)
    for indices in by_length([len(fact.prompt_ids) for fact in facts]):
        ids, mask = pad_batch([facts[i].prompt_ids for i in indices], side="right")
        hidden[:, indices] = model.resid_post(ids, mask, mask.sum(-1) - 1).float().cpu()
    return distance, hidden.to(base.device)


def _frame(
    facts: FactSet,
    before: Sequence[float],
    after: Sequence[float],
    toward: Float[Tensor, "layer fact"],
    off: Float[Tensor, "layer fact"],
) -> pd.DataFrame:
    """The tidy frame of one pair of models."""
    labels = pd.DataFrame({"fact": facts.ids, "relation": [fact.relation for fact in facts]})
    frames = [labels.assign(metric="d_emb", layer=pd.NA, before=list(before), after=list(after))]
    for metric, values in (("toward", toward), ("off", off)):
        for layer, row in enumerate(values.tolist()):
            frames.append(labels.assign(metric=metric, layer=layer, before=0.0, after=row))
    frame = pd.concat([frame.astype({"layer": "Int64"}) for frame in frames], ignore_index=True)
    return frame.assign(change=frame["after"] - frame["before"])

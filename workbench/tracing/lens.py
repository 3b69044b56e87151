"""Logit lens: what the model would say if it stopped after each block."""

import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from workbench.facts import FactSet
from workbench.metrics import logprob, rank
from workbench.models import HookedModel, pad_batch
from workbench.recollection import by_length
from workbench.tracing.sites import enterable, entered

#: Residual states that are unembedded in one pass.
STATES_PER_PASS = 128


def logit_lens(model: HookedModel, facts: FactSet, *, progress: bool = False) -> pd.DataFrame:
    """Read the answer's first token off the residual stream after every block, at the last prompt token.

    The state goes through the model's own end: its final norm, its unembedding, and what it does to logits (softcap,
    scaling). So the last layer is what the model says.

    Returns a frame with one row per fact and layer: fact, relation, layer, logprob (nats), rank (0 is the greedy
    choice), top (text of the most probable token) and top_prob.

    Raises:
        ValueError: a fact that does not fit the model, or a model that cannot be entered at its final norm.
    """
    tokens = model.tokenise(facts)
    n_extra = enterable(model)
    rows: dict[int, pd.DataFrame] = {}
    with tqdm(total=len(tokens), unit="fact", desc="lens", disable=not progress) as bar:
        for indices in by_length([len(fact.prompt_ids) for fact in tokens]):
            ids, mask = pad_batch([tokens[i].prompt_ids for i in indices], side="left")
            states = model.resid_post(ids, mask, torch.full((len(indices),), ids.shape[1] - 1))
            for row, i in enumerate(indices):
                logits = unembed(model, states[:, row], n_extra)
                rows[i] = _reading(model, logits, tokens[i].answer_ids[0])
            bar.update(len(indices))
    labelled = [rows[i].assign(fact=fact.id, relation=fact.relation) for i, fact in enumerate(facts)]
    return pd.concat(labelled, ignore_index=True)[["fact", "relation", "layer", "logprob", "rank", "top", "top_prob"]]


@torch.no_grad()
def unembed(
    model: HookedModel, states: Float[Tensor, "state d_model"], n_extra: int | None
) -> Float[Tensor, "state d_vocab"]:
    """Logits of residual states as they would stand before the final norm."""
    logits = []
    for part in states.split(STATES_PER_PASS):
        hidden = rearrange(part, "s m -> s 1 m")
        with entered(model, model.n_layers, hidden, n_extra):
            ids = torch.zeros(len(part), 1, dtype=torch.long, device=model.device)
            logits.append(model.logits(ids, last=1)[:, 0])
    return torch.cat(logits)


def _reading(model: HookedModel, logits: Float[Tensor, "layer d_vocab"], answer: int) -> pd.DataFrame:
    """One fact, one row a layer."""
    target = torch.full((len(logits),), answer, device=logits.device)
    top = logits.argmax(-1)
    return pd.DataFrame(
        {
            "layer": range(len(logits)),
            "logprob": logprob(logits, target).tolist(),
            "rank": rank(logits, target).tolist(),
            "top": [model.tokenizer.decode([i]) for i in top.tolist()],
            "top_prob": logprob(logits, top).exp().tolist(),
        }
    )

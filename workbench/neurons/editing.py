"""Erase and edit what neurons write: their value vectors, for the length of a `with` (Knowledge Neurons, section 5).

A `HookedModel` may share the storage of its weights with the model that it was opened from. Inside the `with` that
model is changed as well; afterwards, also after an error, every weight is again what it was, to the bit.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from math import isfinite
from typing import cast

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.facts import Fact, FactSet, TokenisedFact
from workbench.models import HookedModel, inputs_first
from workbench.neurons.finding import selection_of
from workbench.selection import Selection
from workbench.suppression import compare


@contextmanager
def erase(
    model: HookedModel, neurons: pd.DataFrame | Selection, *, value: str = "zero", table: str = "unembedding"
) -> Iterator[None]:
    """Set the value vectors of neurons to zero, or to the vector of the unknown token, inside the `with`.

    Zero is the paper's definition, the unknown token's embedding what its code writes. The weights themselves are
    changed, those of the model that shares them too; they are restored to the bit, also after an error.

    Raises:
        ValueError: nodes, which have no value vector, or a tokenizer without an unknown token.
    """
    if value not in ("zero", "unk"):
        raise ValueError(f'value must be "zero" or "unk" (the vector of the unknown token), not {value!r}.')
    written = torch.zeros(model.d_model)
    if value == "unk":
        unknown = model.tokenizer.unk_token_id
        if unknown is None:
            raise ValueError(f'The tokenizer of {model.name} has no unknown token: erase with value="zero".')
        written = token_vector(model, unknown, table)
    with _values_changed(model, neurons, lambda values: written.to(values).expand_as(values)):
        yield


@contextmanager
def edit(
    model: HookedModel,
    fact: Fact,
    neurons: pd.DataFrame | Selection,
    new_answer: str,
    *,
    lambda_old: float | int = 1.0,
    lambda_new: float | int = 8.0,
    table: str = "unembedding",
) -> Iterator[None]:
    """Make neurons write another answer inside the `with`: `v_j <- v_j - lambda_old e(old) + lambda_new e(new)`.

    v_j is the value vector of neuron j, e(token) a row of the unembedding (or of the embedding, with `table`; the
    paper's model ties the two), 1 and 8 the paper's weights. Of answers of several tokens only the first is written.
    The weights themselves are changed, those of the model that shares them too; they are restored to the bit, also
    after an error.

    Raises:
        ValueError: nodes, which have no value vector, or answers that begin with the same token.
    """
    if not (isfinite(lambda_old) and isfinite(lambda_new)):
        raise ValueError(f"lambda_old and lambda_new are finite numbers, not {lambda_old} and {lambda_new}.")
    old, new = answer_tokens(model, fact, new_answer)
    change = lambda_new * token_vector(model, new, table).float() - lambda_old * token_vector(model, old, table).float()
    with _values_changed(model, neurons, lambda values: (values.float() + change).to(values)):
        yield


def measure_erase(
    model: HookedModel,
    facts: FactSet,
    neurons: pd.DataFrame,
    *,
    others: FactSet | None = None,
    general: Sequence[str] | None = None,
    value: str = "zero",
    max_tokens: int = 3000,
) -> pd.DataFrame:
    """Read facts before and after their neurons are erased: suites "erased", "paraphrase", "others", "general".

    `facts` are those to be forgotten; `others` and the passages of `general` are to stay. The frame is that of
    `suppress`, so `workbench.suppression.means` summarises it.
    """
    suites = _suites(model, {"erased": facts, "paraphrase": _paraphrases(facts), "others": others})
    change = partial(erase, model, neurons, value=value)
    return _measured(model, change, suites, general, max_tokens)


def measure_edit(
    model: HookedModel,
    fact: Fact,
    neurons: pd.DataFrame,
    new_answer: str,
    *,
    others: FactSet | None = None,
    general: Sequence[str] | None = None,
    lambda_old: float | int = 1.0,
    lambda_new: float | int = 8.0,
    table: str = "unembedding",
    max_tokens: int = 3000,
) -> pd.DataFrame:
    """Read a fact before and after it is edited: does the model give the new answer, and what else has changed?

    Suites: "efficacy" (the new answer to the prompt), "paraphrase" (the new answer to the paraphrases), "old" (the old
    answer to the prompt), "others" and "general". Answers of the edited fact are read at their first token, which is
    what an edit writes; `others` are read whole. The frame is that of `suppress`, so `workbench.suppression.means`
    summarises it.
    """
    old, new = answer_tokens(model, fact, new_answer)
    prompts = model.tokenise(FactSet("edited", (fact,)).per_prompt())
    first = [replace(prompt, answer_ids=(new,)) for prompt in prompts]
    suites = {"efficacy": first[:1], "paraphrase": first[1:], "old": [replace(prompts[0], answer_ids=(old,))]}
    suites |= _suites(model, {"others": others})
    change = partial(edit, model, fact, neurons, new_answer, lambda_old=lambda_old, lambda_new=lambda_new, table=table)
    return _measured(model, change, suites, general, max_tokens)


def answer_tokens(model: HookedModel, fact: Fact, new_answer: str) -> tuple[int, int]:
    """The first tokens of a fact's answer and of a new one, as they follow the prompt; equal ones are refused."""
    changed = replace(fact, answer=new_answer, paraphrases=(), neighbours=())
    old, new = (model.tokenise(FactSet("answers", (one,)))[0].answer_ids[0] for one in (fact, changed))
    if old == new:
        raise ValueError(
            f"The answers {fact.answer!r} and {new_answer!r} of fact {fact.id!r} begin with the same token, and only "
            "the first is edited: choose another answer."
        )
    return old, new


def token_vector(model: HookedModel, token: int, table: str) -> Float[Tensor, " d_model"]:
    """The row of a token in the unembedding or the embedding, which must be as wide as a value vector."""
    if table not in ("unembedding", "embedding"):
        raise ValueError(f'table must be "unembedding" or "embedding", not {table!r}.')
    rows = model.W_U if table == "unembedding" else model.W_E
    if rows.shape[1] != model.d_model:
        raise ValueError(
            f"{model.name}: its {table} is {rows.shape[1]} wide and its value vectors {model.d_model}, so a token has "
            "no value vector to write."
        )
    return rows[token].detach().clone()


def value_vectors(module: nn.Module) -> Float[Tensor, "d_mlp d_model"]:
    """The value vectors of a down-projection, one row a neuron: a view of its weight, transposed unless `Conv1D`."""
    weight = cast(Tensor, module.weight).detach()
    return weight if inputs_first(module) else weight.T


@contextmanager
def _values_changed(
    model: HookedModel, neurons: pd.DataFrame | Selection, new: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Write new value vectors, and put the old ones back bit by bit however the `with` ends."""
    chosen = neurons if isinstance(neurons, Selection) else selection_of(model, neurons)
    if chosen.unit != "neuron":
        raise ValueError(
            "A node is an output of the down-projection and has no value vector to erase or edit: find knowledge "
            'neurons with unit="neuron", or suppress the nodes.'
        )
    kept = []
    for layer in range(model.n_layers):
        if rows := chosen.rows(layer):
            values = value_vectors(model.down_proj(layer))
            kept.append((values, torch.tensor(rows, device=values.device), values[rows].clone()))
    changed = [new(old) for _, _, old in kept]
    try:
        for (values, rows_of, _), written in zip(kept, changed, strict=True):
            values[rows_of] = written
        yield
    finally:
        for values, rows_of, old in reversed(kept):
            values[rows_of] = old


def _suites(model: HookedModel, sets: dict[str, FactSet | None]) -> dict[str, list[TokenisedFact]]:
    return {name: model.tokenise(facts) for name, facts in sets.items() if facts is not None}


def _paraphrases(facts: FactSet) -> FactSet | None:
    return facts.paraphrased() if any(fact.paraphrases for fact in facts) else None


def _measured(
    model: HookedModel,
    change: Callable[[], AbstractContextManager[None]],
    suites: dict[str, list[TokenisedFact]],
    general: Sequence[str] | None,
    max_tokens: int,
) -> pd.DataFrame:
    """The readings before and within a change of the weights."""
    if isinstance(general, str):
        raise ValueError("general is one text; give a list of passages.")
    suites = {name: facts for name, facts in suites.items() if facts}
    return compare(model, [lambda _: change()], suites, general=general, max_tokens=max_tokens)[0]

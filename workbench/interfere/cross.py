"""Cross-suppression: silence the top units of one fact, and read another; exactly, or to first order."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from einops import einsum, repeat
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from workbench.engine import (
    Clean,
    Room,
    check_engine,
    clean_gradients,
    make_batch,
    room_for,
    run_clean,
    run_queries,
)
from workbench.facts import TokenisedFact
from workbench.interfere.nulls import MANY, by_chance, drawn, matched_orders, orders
from workbench.interfere.overlap import top_sets
from workbench.interfere.problem import Found, Matrix, Problem
from workbench.metrics import logprob
from workbench.models import HookedModel

#: Facts that are read together and kept as one part of unfinished work.
FACTS = 16
#: (layer's place, whose set): one query of every fact.
Query = tuple[int, int]


def suppression(problem: Problem) -> Iterator[Found]:
    """Drop of `log P(y_i)`, in nats, when the top units of fact j at one layer are zeroed at the last prompt token.

    `fact` is i, the one that is read, `other` is j, whose units (`top` percent of the layer by |score|, those that
    attribution scored) are silenced; positive where j's units carry i, and the diagonal is what they do for j itself.
    Not symmetric.

    Each pair and layer is a query of the engine, and so is each pair of a null: random units, as many as j's own, in
    `draws` draws, and random units of similar mean |activation| at that token, in one. One draw of random units is too
    few to judge a pair; the 19 that do cost 21/3 of it. The cost grows with facts^2 x layers: 50 facts on a model of
    30 layers are 225,000 queries of one token with one draw; choose few facts, or `linear_suppression`.

    Raises:
        ValueError: a model on which the engine differs from plain hooks; before any measure reads.
    """
    check_engine(problem.opened)
    room = room_for(problem.opened, problem.memory)
    return _by_layer(problem, room, _batches(problem, room))


def linear_suppression(problem: Problem) -> Iterator[Found]:
    """`suppression` to first order in the activations: the sum of `a_u dlog P(y_i)/da_u` over the units u of fact j.

    Of the same sets at the same token, in nats, and of the same sign; not symmetric either. A pass forward and back for
    every fact takes the place of a query for every pair and layer (as attribution patching does: Nanda, 2023), so that
    it is for many facts, and its pairs are judged. What it leaves out is everything that bends: a unit that saturates,
    two units that stand in for each other. On the default model it puts pairs in nearly the order of the whole drops
    (rank correlation 0.98 in the median layer), but in two layers a third of the largest have the other sign, and next
    to the output it misses the drop by more than half (`analyses/LOG.md`). Read the pairs that matter again by
    "suppression".

    The nulls are those of `suppression`, in more draws, because here they cost no pass.

    Raises:
        ValueError: a model on which the engine differs from plain hooks; before any measure reads.
    """
    check_engine(problem.opened)
    return _linear_by_layer(problem, _batches(problem, room_for(problem.opened, problem.memory)))


def _linear_by_layer(problem: Problem, batches: Sequence[Sequence[int]]) -> Iterator[Found]:
    """Layer by layer, after the pass of every fact."""
    effect = np.zeros((len(problem.layers), len(problem.tokens), problem.attribution.sizes["unit"]))
    with tqdm(total=len(problem.tokens), unit="fact", desc="gradients", disable=not problem.progress) as bar:
        for batch in batches:
            effect[:, batch] = _first_order(problem, [problem.tokens[i] for i in batch])
            bar.update(len(batch))
    for place, layer in enumerate(problem.layers):
        own = top_sets(problem.scores(layer), problem.top).astype(np.float64)

        def again(order: np.ndarray, place: int = place, own: Matrix = own) -> Matrix:
            return effect[place] @ np.take_along_axis(own, order, axis=1).T

        size = problem.activation["last"][layer]
        nulls = by_chance(again, len(own), size, generator=problem.generator(layer), free=MANY)
        yield Found(effect[place] @ own.T, *nulls, "|activation| at the last prompt token")


def _first_order(problem: Problem, facts: Sequence[TokenisedFact]) -> Float[np.ndarray, "layer fact unit"]:
    """Activation times gradient of the answer's log-probability at the last prompt token, in nats."""
    model, unit = problem.opened, str(problem.attribution.attrs["unit"])
    clean = run_clean(model, make_batch(facts, model.device), unit)
    gradient = clean_gradients(model, clean, unit, logprob)
    effect = einsum(gradient.float(), clean.activation.float(), "l b m u, l b m u -> l b u")
    return effect[problem.layers].detach().double().cpu().numpy()


@torch.no_grad()
def _by_layer(problem: Problem, room: Room, batches: Sequence[Sequence[int]]) -> Iterator[Found]:
    """Layer by layer, after all queries."""
    model, layers = problem.opened, problem.layers
    unit = str(problem.attribution.attrs["unit"])
    sets = _silenced(problem)
    n_facts = len(problem.tokens)
    n_sets = (2 + problem.draws) * n_facts
    drop = np.zeros((len(layers), n_facts, n_sets), dtype=np.float64)
    order = sorted(range(len(layers)), key=layers.__getitem__)  # the engine's: by layer
    queries = [(place, j) for place in order for j in range(n_sets)]
    with tqdm(total=n_facts * len(queries), unit="query", desc="suppression", disable=not problem.progress) as bar:
        for batch in batches:
            facts = [problem.tokens[i] for i in batch]

            def measured(facts: list[TokenisedFact] = facts) -> list[dict[str, Any]]:
                values = _drops(model, facts, unit, layers, sets, queries, room, bar)
                return [{"fact": fact.fact_id, "drop": row} for fact, row in zip(facts, values.tolist(), strict=True)]

            before = bar.n
            kept = problem.parts.rows(f"suppression of {[fact.fact_id for fact in facts]}", measured)
            bar.update(before + len(batch) * len(queries) - bar.n)
            for i, row in zip(batch, kept, strict=True):
                drop[order, i] = np.array(row["drop"]).reshape(len(layers), -1)
    for place in range(len(layers)):
        own, *shuffled, matched = np.split(drop[place], 2 + problem.draws, axis=1)
        yield Found(own, [drawn(one) for one in shuffled], [drawn(matched)], "|activation| at the last prompt token")


def _drops(
    model: HookedModel,
    facts: Sequence[TokenisedFact],
    unit: str,
    layers: Sequence[int],
    sets: Sequence[Sequence[np.ndarray]],
    queries: Sequence[Query],
    room: Room,
    bar: Any,
) -> Float[np.ndarray, "fact query"]:
    """What every query takes from the answer of some facts, in nats."""
    clean = run_clean(model, make_batch(facts, model.device), unit)
    base = clean.batch.value(clean.logits, logprob)[:, None]
    rows = room.rows_of(max(len(fact.ids) for fact in facts), clean.plain_head)
    size = max(1, rows // (len(facts) * clean.batch.tail))
    found = np.zeros((len(facts), len(queries)))
    for start in range(0, len(queries), size):
        part = queries[start : start + size]
        points = {layers[place]: value for place, value in _points(clean, layers, part, sets).items()}
        values = base - run_queries(model, clean, unit, points, logprob)
        found[:, start : start + len(part)] = values.double().cpu().numpy()
        bar.update(len(facts) * len(part))
    return found


def _points(
    clean: Clean, layers: Sequence[int], queries: Sequence[Query], sets: Sequence[Sequence[np.ndarray]]
) -> dict[int, Float[Tensor, "batch query moved unit"]]:
    """The clean activations of every layer's queries with their sets at zero, by the place of the layer."""
    points = {}
    for place in dict.fromkeys(place for place, _ in queries):
        whose = [j for at, j in queries if at == place]
        value = repeat(clean.activation[layers[place]], "b m u -> b n m u", n=len(whose)).clone()
        for query, j in enumerate(whose):
            value[:, query, :, sets[place][j]] = 0
        points[place] = value
    return points


def _batches(problem: Problem, room: Room) -> list[list[int]]:
    """Facts whose answers have as many tokens, and whose prompts are alike in length, as many as are run together."""
    facts = problem.tokens
    order = sorted(range(len(facts)), key=lambda i: (len(facts[i].answer_ids), len(facts[i].prompt_ids), i))
    batches: list[list[int]] = []
    for i in order:
        together = batches and len(batches[-1]) < min(FACTS, room.facts(len(facts[i].ids)))
        if together and len(facts[batches[-1][0]].answer_ids) == len(facts[i].answer_ids):
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def _silenced(problem: Problem) -> list[list[np.ndarray]]:
    """Per layer the units that are zeroed: every fact's own, then as many random ones, draw by draw, then matched."""
    sets = []
    for layer in problem.layers:
        own = top_sets(problem.scores(layer), problem.top)
        generator = problem.generator(layer)
        size = problem.activation["last"][layer]
        free = [np.take_along_axis(own, orders(len(own), len(size), generator), axis=1) for _ in range(problem.draws)]
        matched = np.take_along_axis(own, matched_orders(len(own), size, generator), axis=1)
        sets.append([np.flatnonzero(marks) for marks in np.concatenate([own, *free, matched])])
    return sets

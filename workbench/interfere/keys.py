"""Key superposition: how far the key of one fact opens the memory of another (arXiv 2408.07413)."""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from workbench.interfere.moments import Moment, second_moments
from workbench.interfere.nulls import MANY, by_chance
from workbench.interfere.problem import Found, Matrix, Problem
from workbench.models import Patch, pad_batch
from workbench.recollection import by_length


def superposition(problem: Problem) -> Iterator[Found]:
    """`p_ij = k_j^T C^-1 k_i / (k_i^T C^-1 k_i)`: what an edit that gives k_i a new value adds to the output at k_j.

    `fact` is i, the fact that is edited, whose own key sets the scale: 1 means that the two cannot be told apart, 0
    that they are apart. `other` is j, the one that *suffers*: the formula's order of indices is the reverse of that of
    the other measures (`Measure.suffers`). k is the input of the down-projection at the last
    token of the subject, or of the prompt where the subject is not in it (`keys_at_last_token` says how often); C is
    the second moment of keys over general text (`Moment.shrunk`). A fact with a key of zero has p = 0.

    The nulls shuffle the whitened keys `L^-1 k`, C = L L^T: what each neuron says beyond those before it, in standard
    deviations of general text. Its coordinates are as uncorrelated there as units are thought to be, which raw neurons
    are not; the matched null swaps those of similar mean size.
    """
    text = second_moments(problem.opened, problem.passages, problem.layers, problem.budget, problem.progress)
    return _superposition(problem, text)


def _superposition(problem: Problem, text: Iterator[tuple[int, Moment]]) -> Iterator[Found]:
    """Layer by layer, given the second moments of the keys of text."""
    keys, fallen_back = fact_keys(problem)
    for place, (layer, moment) in enumerate(text):
        lower, shrinkage = moment.factor()
        white = torch.linalg.solve_triangular(lower, keys[place].double().T, upper=False).T.numpy()

        def again(order: np.ndarray, white: np.ndarray = white) -> Matrix:
            return _projections(np.take_along_axis(white, order, axis=1))

        size = np.abs(white).mean(0)
        nulls = by_chance(again, len(white), size, generator=problem.generator(layer), free=MANY)
        notes = {"text_tokens": moment.tokens, "keys_at_last_token": fallen_back, "shrinkage": [shrinkage]}
        yield Found(_projections(white), *nulls, "|whitened key|", notes=notes)


def _projections(white: Float[np.ndarray, "fact neuron"]) -> Matrix:
    """`<z_j, z_i> / |z_i|^2` at [i, j]; rows of facts without a key are 0."""
    products = white @ white.T
    own = np.diag(products)[:, None]
    return np.divide(products, own, out=np.zeros_like(products), where=own > 0)


@torch.no_grad()
def fact_keys(problem: Problem) -> tuple[Float[Tensor, "layer fact neuron"], int]:
    """The input of every layer's down-projection at the last subject token; and how many facts have none.

    Those are read at the last token of their prompt.
    """
    model, facts, layers = problem.opened, problem.tokens, problem.layers
    places = [len(fact.prompt_ids) - 1 if span is None else span[-1] for fact, span in zip(
        facts, problem.subjects, strict=True)]  # fmt: skip
    keys = torch.zeros(len(layers), len(facts), model.d_mlp)
    rows: list[int] = []
    columns: list[int] = []

    def keep(place: int) -> Patch:
        def read(activation: Tensor) -> Tensor:
            keys[place, rows] = activation[range(len(rows)), columns].float().cpu()
            return activation

        return read

    with tqdm(total=len(facts), unit="fact", desc="keys", disable=not problem.progress) as bar:
        with model.patched("neuron", {layer: keep(place) for place, layer in enumerate(layers)}):
            for rows in by_length([len(fact.prompt_ids) for fact in facts]):
                ids, mask = pad_batch([facts[i].prompt_ids for i in rows], side="right")
                columns = [places[i] for i in rows]
                model.logits(ids, mask, last=1)
                bar.update(len(rows))
    return keys, sum(span is None for span in problem.subjects)

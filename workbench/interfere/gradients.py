"""Gradient conflict on the down-projections (PCGrad, arXiv 2001.06782), exact and without a dense matrix."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from workbench.engine import room_for
from workbench.facts import TokenisedFact
from workbench.interfere.nulls import by_chance
from workbench.interfere.problem import Found, Matrix, Problem
from workbench.models import HookedModel, Patch
from workbench.recollection import answer_losses, by_length

#: Draws of the matched null, which judges no pair: each costs as much as the measure itself.
MATCHED = 4
#: Tokens in one pass forward and back, and in one block of inner products.
TOKENS_PER_PASS = 256
BLOCK = 1024

Rows = tuple[Float[Tensor, "row d_model"], Float[Tensor, "row d_mlp"]]


def gradient(problem: Problem) -> Iterator[Found]:
    """Cosine of dL_i/dW_down and dL_j/dW_down, L the mean cross-entropy of a fact's answer tokens, teacher-forced.

    The gradient of a fact is a sum over its tokens of outer products of the output's gradient d and the input u, so
    `<g_i, g_j> = sum_pq (d_ip . d_jq)(u_ip . u_jq)` over the tokens p of one and q of the other. Negative values are
    conflicts: what teaches one fact unteaches the other. `gradient_norm` (layer, fact) comes with it, from which
    `predicted_change` has `-eta <g_i, g_j>`. Symmetric; 0 where a gradient vanishes.

    The nulls shuffle the neurons (the inputs u) of every fact, the same way at all its tokens, which keeps each
    gradient's norm; the matched null swaps neurons of similar mean |activation| over the facts' tokens. They say how
    large a value is by chance, and how many of the pairs are below 0 (`conflict_rates`).

    Raises:
        ValueError: the memory does not hold the activations of one layer at all tokens.
    """
    model, tokens = problem.opened, problem.tokens
    lengths = [len(fact.ids) - 1 for fact in tokens]
    owner = torch.repeat_interleave(torch.arange(len(tokens)), torch.tensor(lengths))
    each = len(owner) * 4 * (model.d_model + model.d_mlp)
    at_once = int(problem.budget / 2 // each) - 1  # one more for the shuffled copy
    if at_once < 1:
        raise ValueError(
            f"The gradients of {len(tokens)} facts take {4 * each / 2**30:.2f} GiB a layer, more than the "
            f"{problem.budget / 2**30:.2f} GiB at hand: give more with memory=, or fewer facts."
        )
    return _in_groups(problem, lengths, owner, at_once)


def _in_groups(problem: Problem, lengths: Sequence[int], owner: Int[Tensor, " row"], at_once: int) -> Iterator[Found]:
    """Layer by layer, with the activations of so many layers at a time."""
    for start in range(0, len(problem.layers), at_once):
        group = problem.layers[start : start + at_once]
        rows = _rows(problem, group, lengths)
        for layer in group:
            yield _found(rows.pop(layer), owner, len(lengths), problem.generator(layer))


def _found(rows: Rows, owner: Int[Tensor, " row"], n_facts: int, generator: np.random.Generator) -> Found:
    """The cosines of one layer and their nulls."""
    slope, key = rows

    def again(order: np.ndarray) -> Matrix:
        return _cosines(inner_products(slope, key.gather(1, torch.from_numpy(order)[owner]), owner, n_facts))

    products = inner_products(slope, key, owner, n_facts)
    size = key.abs().double().mean(0).numpy()
    nulls = by_chance(again, n_facts, size, generator=generator, matched=MATCHED)
    norm = {"gradient_norm": np.sqrt(np.diag(products))}
    return Found(_cosines(products), *nulls, "|activation| at every token", by_fact=norm)


def inner_products(
    slope: Float[Tensor, "row d_model"], key: Float[Tensor, "row d_mlp"], owner: Int[Tensor, " row"], n_facts: int
) -> Float[np.ndarray, "fact other"]:
    """`sum_pq (d_ip . d_jq)(u_ip . u_jq)` for every two facts: rows are tokens, `owner` says whose, in rising order.

    Blocks of tokens are multiplied in the precision of the rows and summed in float64.

    >>> d, u = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[1.0], [1.0], [-1.0]])
    >>> inner_products(d, u, torch.tensor([0, 0, 1]), 2).tolist()
    [[9.0, -9.0], [-9.0, 9.0]]
    """
    total = torch.zeros(n_facts, n_facts, dtype=torch.float64)
    starts = range(0, len(owner), BLOCK)
    for one in starts:
        for two in starts[one // BLOCK :]:
            rows, columns = slice(one, one + BLOCK), slice(two, two + BLOCK)
            block = (slope[rows] @ slope[columns].T).mul_(key[rows] @ key[columns].T)
            first, second = owner[rows], owner[columns]
            by_row = torch.zeros(int(first[-1] - first[0]) + 1, len(second), dtype=torch.float64)
            by_row.index_add_(0, first - first[0], block.double())
            found = torch.zeros(len(by_row), n_facts, dtype=torch.float64).index_add_(1, second, by_row)
            total[first[0] : first[-1] + 1] += found
            if two > one:
                total[:, first[0] : first[-1] + 1] += found.T
    return total.numpy()


def _cosines(products: Matrix) -> Matrix:
    norm = np.sqrt(np.diag(products))
    size = norm[:, None] * norm[None]
    return np.divide(products, size, out=np.zeros_like(products), where=size > 0)


def _rows(problem: Problem, layers: Sequence[int], lengths: Sequence[int]) -> dict[int, Rows]:
    """Output gradients and inputs of some down-projections at every token that is fed, fact after fact."""
    model, tokens = problem.opened, problem.tokens
    ends = np.cumsum(lengths)
    rows = {layer: (torch.zeros(ends[-1], model.d_model), torch.zeros(ends[-1], model.d_mlp)) for layer in layers}
    most = min(TOKENS_PER_PASS, room_for(model, problem.budget / 2**31).rows)
    with tqdm(total=len(tokens), unit="fact", desc="gradients", disable=not problem.progress) as bar:
        for batch in by_length(lengths, most):
            found = backward(model, [tokens[i] for i in batch], layers)
            for layer, (slope, key) in found.items():
                for row, i in enumerate(batch):
                    place = slice(int(ends[i]) - lengths[i], int(ends[i]))
                    rows[layer][0][place] = slope[row, -lengths[i] :].float().cpu()
                    rows[layer][1][place] = key[row, -lengths[i] :].float().cpu()
            bar.update(len(batch))
    return rows


def backward(
    model: HookedModel, facts: Sequence[TokenisedFact], layers: Sequence[int]
) -> dict[int, tuple[Float[Tensor, "batch pos d_model"], Float[Tensor, "batch pos d_mlp"]]]:
    """dL/d(output) and the input of some down-projections, facts padded on the left, each by its own loss."""
    shifts: dict[int, Tensor] = {}
    keys: dict[int, Tensor] = {}

    def keep(layer: int) -> Patch:
        def read(activation: Tensor) -> Tensor:
            keys[layer] = activation.detach()
            return activation

        return read

    def shift(layer: int) -> Patch:
        def add(activation: Tensor) -> Tensor:
            shifts[layer] = torch.zeros_like(activation, requires_grad=True)
            return activation + shifts[layer]

        return add

    with (
        torch.enable_grad(),
        model.patched("neuron", {layer: keep(layer) for layer in layers}),
        model.patched("node", {layer: shift(layer) for layer in layers}),
    ):
        loss = torch.stack([of_answer.mean() for of_answer in answer_losses(model, facts)]).sum()
        slopes = torch.autograd.grad(loss, [shifts[layer] for layer in layers])
    return {layer: (slope, keys[layer]) for layer, slope in zip(layers, slopes, strict=True)}

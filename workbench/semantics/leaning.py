"""Which trained units a fact leans on, and others to compare them with: as large a change, drawn at random."""

import bisect
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.facts import FactSet, TokenisedFact
from workbench.models import HookedModel, pad_batch
from workbench.recollection import by_length
from workbench.selection import Selection
from workbench.semantics.reverting import Change

NEAR = 4  # a matched unit is drawn among so many free ones whose change is of the nearest size


@torch.no_grad()
def sizes(
    model: HookedModel, tokens: Sequence[TokenisedFact], by_layer: dict[int, Change]
) -> dict[int, Float[Tensor, "fact chosen"]]:
    """How much the change of every unit's weights adds to its layer's output, at each fact's last prompt token.

    Nodes: |change of the output|. Neurons: |activation| times the length of the change of the value vector.
    """
    found = {layer: torch.zeros(len(tokens), len(change.index)) for layer, change in by_layer.items()}
    for indices in by_length([len(fact.prompt_ids) for fact in tokens]):
        ids, mask = pad_batch([tokens[i].prompt_ids for i in indices], side="left")

        def keep(layer: int, inputs: Tensor, indices: list[int] = indices) -> Tensor:
            change, last = by_layer[layer], inputs[:, -1].float()
            if change.unit == "neuron":
                size = last[:, change.index].abs() * change.weight.norm(dim=1)
            else:
                size = (last @ change.weight.T + (0 if change.bias is None else change.bias)).abs()
            found[layer][indices] = size.cpu()
            return inputs

        with model.patched("neuron", {layer: partial(keep, layer) for layer in by_layer}):
            model.logits(ids, mask, last=1)
    return found


def magnitudes(attribution: xr.Dataset, facts: FactSet, units: Selection) -> Float[np.ndarray, "fact layer unit"]:
    """The attribution's |score| of these facts; a fact or a shape that it does not have is a `ValueError`."""
    if "score" not in attribution:
        raise ValueError("The attribution has no scores: give a result of `attribute`.")
    score = attribution["score"].transpose("fact", "layer", "unit")
    missing = sorted(set(facts.ids) - {str(name) for name in score["fact"].values})
    if missing:
        raise ValueError(f"The attribution has no scores of {len(missing)} of the facts, {missing[0]!r} first.")
    if not units.matches(*score.shape[1:]):
        raise ValueError(
            f"The attribution has {score.shape[1]} layers of {score.shape[2]} units, not {units.n_layers} of "
            f"{units.n_units}: give one of this model."
        )
    return np.abs(score.sel(fact=list(facts.ids)).values)


def leaned_and_matched(
    scores: Float[np.ndarray, "fact layer unit"],
    size: dict[int, Float[Tensor, "fact chosen"]],
    by_layer: dict[int, Change],
    share: float,
    draws: int,
    seed: int,
) -> dict[tuple[str, int | None], dict[int, Bool[Tensor, "fact chosen"]]]:
    """Masks over trained units: those that each fact leans on, and the draws of others; small layers have none."""
    found: dict[tuple[str, int | None], dict[int, Tensor]] = {("leaned", None): {}}
    found |= {("matched", draw): {} for draw in range(draws)}
    for layer, change in by_layer.items():
        n_units = len(change.index)
        k = max(1, int(share * n_units))
        if n_units < 2 * k:
            continue
        masks = {key: torch.zeros(len(scores), n_units, dtype=torch.bool) for key in found}
        for fact, score in enumerate(scores[:, layer, change.index.cpu().numpy()]):
            leaned = np.lexsort((np.arange(n_units), -score))[:k]
            masks["leaned", None][fact, leaned] = True
            generator = np.random.default_rng([seed, layer, fact])
            for draw in range(draws):
                masks["matched", draw][fact, matched(size[layer][fact].numpy(), leaned, generator)] = True
        for key, mask in masks.items():
            found[key][layer] = mask
    return found


def matched(
    size: Float[np.ndarray, " unit"], chosen: Int[np.ndarray, " chosen"], generator: np.random.Generator
) -> list[int]:
    """As many units beside the chosen, each drawn among the free ones next to a chosen one in order of size.

    >>> matched(np.array([1.0, 1.1, 9.0, 9.1]), np.array([3, 1]), np.random.default_rng(0)) in ([0, 2], [2, 0])
    True
    """
    free = sorted(set(range(len(size))) - set(chosen.tolist()), key=lambda unit: (size[unit], unit))
    drawn = []
    for unit in generator.permutation(chosen):
        at = bisect.bisect_left(free, size[unit], key=lambda other: size[other])
        low = max(0, min(at - NEAR // 2, len(free) - NEAR))
        drawn.append(free.pop(int(generator.integers(low, min(low + NEAR, len(free))))))
    return drawn

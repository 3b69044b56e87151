"""Which trained units a fact leans on, and others to compare them with: as large a change, drawn at random."""

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

NEAR = 4  # units in a bin of like size, in which matched ones are drawn


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
    """Masks over trained units: those a fact leans on, of them those that have partners, and draws of these partners.

    Small layers have none.
    """
    names: list[tuple[str, int | None]] = [("leaned", None), ("paired", None), *(("matched", i) for i in range(draws))]
    found: dict[tuple[str, int | None], dict[int, Tensor]] = {name: {} for name in names}
    for layer, change in by_layer.items():
        n_units = len(change.index)
        k = max(1, int(share * n_units))
        if n_units < 2 * k:
            continue
        masks = torch.zeros(len(names), len(scores), n_units, dtype=torch.bool)
        for fact, score in enumerate(scores[:, layer, change.index.cpu().numpy()]):
            leaned = np.lexsort((np.arange(n_units), -score))[:k]
            generator = np.random.default_rng([seed, layer, fact])
            sets = [leaned, *paired_and_matched(size[layer][fact].numpy(), leaned, draws, generator)]
            for mask, units in zip(masks, sets, strict=True):
                mask[fact, units] = True
        for name, mask in zip(names, masks, strict=True):
            found[name][layer] = mask
    return found


def paired_and_matched(
    size: Float[np.ndarray, " unit"], chosen: Int[np.ndarray, " chosen"], draws: int, generator: np.random.Generator
) -> list[Int[np.ndarray, " drawn"]]:
    """Chosen units that have partners of their size, and as many others, `draws` times.

    Units are divided by size into bins of `NEAR` or a few more. Of every bin are drawn as many of the chosen as it has
    others, at most all, and as many of the others. So whichever units were chosen, if by chance, the two are the same
    draw of every bin: whatever is made of them, they differ by chance only. A chosen unit in a bin of chosen ones alone
    has nothing to be compared with, and is in neither.

    >>> size, chosen = np.array([1.0, 1.1, 9.0, 9.1, 1.2, 1.3, 9.2, 9.3]), np.array([2, 0, 3, 6, 7])
    >>> [one.tolist() for one in paired_and_matched(size, chosen, 1, np.random.default_rng(0))][0]
    [0]
    """
    marks = np.zeros(len(size), dtype=bool)
    marks[chosen] = True
    sets: list[list[np.ndarray]] = [[] for _ in range(1 + draws)]
    for units in np.array_split(np.argsort(size, kind="stable"), max(1, len(size) // NEAR)):
        inside, others = units[marks[units]], units[~marks[units]]
        n = min(len(inside), len(others))
        for place, one in enumerate(sets):
            one.append(generator.permutation(others if place else inside)[:n])
    return [np.concatenate(one) for one in sets]

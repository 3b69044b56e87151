"""How loud units are over the facts: what the nulls of overlaps and of suppression match units on."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from torch import Tensor

from workbench.facts import TokenisedFact
from workbench.models import HookedModel, Patch, pad_batch
from workbench.recollection import by_length


def mean_activation(
    model: HookedModel, facts: Sequence[TokenisedFact], unit: str
) -> dict[str, Float[np.ndarray, "layer unit"]]:
    """Mean |activation| of every unit at the facts' last prompt tokens (`"last"`) and at all their prompt tokens.

    The names are those of the scopes of an attribution. Each batch of facts is one pass.
    """
    total = {scope: np.zeros((model.n_layers, model.width(unit))) for scope in ("last", "all")}
    lengths = [len(fact.prompt_ids) for fact in facts]
    for rows in by_length(lengths):
        ids, mask = pad_batch([facts[i].prompt_ids for i in rows], side="left")

        def keep(layer: int, mask: Tensor = mask) -> Patch:
            def read(activation: Tensor) -> Tensor:
                size = activation.detach().abs().cpu().double()
                total["last"][layer] += size[:, -1].sum(0).numpy()
                total["all"][layer] += size[mask.cpu().bool()].sum(0).numpy()
                return activation

            return read

        with model.patched(unit, {layer: keep(layer) for layer in range(model.n_layers)}):
            model.logits(ids, mask, last=1)
    return {"last": total["last"] / len(facts), "all": total["all"] / sum(lengths)}

"""What the rules of the data filter need to know of a model: how far it is from facts, and what else a rule reads."""

from typing import Any

import pandas as pd

from workbench.facts import FactSet
from workbench.filtering import target_embeddings
from workbench.models import HookedModel
from workbench.recollection import recall
from workbench.semantics.distance import semantic_distance


def filter_inputs(
    model: HookedModel,
    facts: FactSet,
    rule: str,
    *,
    metric: str = "d_soft",
    known: pd.DataFrame | None = None,
    progress: bool = False,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The distances of some facts, and the further arguments of `filter_facts` that a rule takes from the model.

    `near_diverse` reads the embeddings of the answers, `loss` the mean cross-entropy of their tokens (nats). Distances
    that are `known`, a frame of `semantic_distance`, are not read again.
    """
    options: dict[str, Any] = {"metric": metric, "facts": facts}
    if rule == "near_diverse":
        options["embeddings"] = target_embeddings(model, facts)
    if rule == "loss":
        read = recall(model, facts, progress=progress)
        options["loss"] = -read["logprob"] / read["n_tokens"]
    if known is None:
        known = semantic_distance(model, facts, metrics=(metric,), progress=progress)
    return known, options

"""How many passes and token rows a batch takes, counted without running any."""

from collections.abc import Callable, Sequence
from math import ceil

import torch

from workbench.attribution import Settings
from workbench.engine import Room, make_batch
from workbench.facts import TokenisedFact
from workbench.models import HookedModel


def counts(
    group: Sequence[TokenisedFact], settings: Settings, room: Room, model: HookedModel, plain_head: bool
) -> tuple[int, int]:
    """(passes, token rows) of a batch, where the number of steps is fixed."""
    batch = make_batch(group, torch.device("cpu"), settings.scope)
    n_facts, columns = batch.ids.shape
    most = max(1, room.rows_of(columns, plain_head) // (n_facts * batch.tail))
    clean = 1 + (settings.baseline == "blank")  # runs that are not patched
    clean_rows = batch.shared + n_facts * (columns - batch.shared)
    passes, variants = ceil(model.n_layers / most) + 1, model.n_layers + 1  # baselines, the clean end
    more_passes, more_variants, single = QUERIES[settings.method](settings, model, most)
    if n_facts * batch.read == 1:  # a product of one row is never made: one more query beside each
        variants += passes + single
        clean_rows += batch.ids.numel() == 1
    rows = clean * clean_rows + (variants + more_variants) * n_facts * batch.tail
    return clean * (1 + (batch.shared > 0)) + passes + more_passes, rows


def query_rows(groups: Sequence[Sequence[TokenisedFact]], settings: Settings) -> int:
    """Token rows of one query of every fact."""
    return sum(len(group) * make_batch(group, torch.device("cpu"), settings.scope).tail for group in groups)


def _no_queries(settings: Settings, model: HookedModel, most: int) -> tuple[int, int, int]:
    return 0, 0, 0


def _one_gradient(settings: Settings, model: HookedModel, most: int) -> tuple[int, int, int]:
    return 1, 1, 1


def _every_step(settings: Settings, model: HookedModel, most: int) -> tuple[int, int, int]:
    variants = model.n_layers * settings.steps
    firsts = [min(settings.steps - at % settings.steps, most) for at in range(0, variants, most)]
    return len(firsts), variants, firsts.count(1)


def _every_unit(settings: Settings, model: HookedModel, most: int) -> tuple[int, int, int]:
    width, layers = model.width(settings.unit), model.n_layers
    sizes = [min(most, width - at) for at in range(0, width, most)]
    return layers * len(sizes), layers * width, layers * sizes.count(1)


#: Method -> (passes of queries, queries of a fact, passes whose first layer has one of them), beside what all take.
QUERIES: dict[str, Callable[[Settings, HookedModel, int], tuple[int, int, int]]] = {
    **dict.fromkeys(("ig", "loki-paper", "loki-code", "kn", "kn-code"), _every_step),
    "grad_x_act": _one_gradient,
    "ablation": _every_unit,
    "activation": _no_queries,
    "random": _no_queries,
}

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
    more_passes, more_variants = QUERIES[settings.method](settings, model, most)
    rows = clean * clean_rows + (variants + more_variants) * n_facts * batch.tail
    return clean * (1 + (batch.shared > 0)) + passes + more_passes, rows


def query_rows(groups: Sequence[Sequence[TokenisedFact]], settings: Settings) -> int:
    """Token rows of one query of every fact."""
    return sum(len(group) * make_batch(group, torch.device("cpu"), settings.scope).tail for group in groups)


def _no_queries(settings: Settings, model: HookedModel, most: int) -> tuple[int, int]:
    return 0, 0


def _one_gradient(settings: Settings, model: HookedModel, most: int) -> tuple[int, int]:
    return 1, 1


def _every_step(settings: Settings, model: HookedModel, most: int) -> tuple[int, int]:
    variants = model.n_layers * settings.steps
    return ceil(variants / most), variants


def _every_unit(settings: Settings, model: HookedModel, most: int) -> tuple[int, int]:
    width = model.width(settings.unit)
    return model.n_layers * ceil(width / most), model.n_layers * width


#: Method -> (passes of queries, queries of a fact), beside what every method takes.
QUERIES: dict[str, Callable[[Settings, HookedModel, int], tuple[int, int]]] = {
    **dict.fromkeys(("ig", "loki-paper", "loki-code", "kn", "kn-code"), _every_step),
    "grad_x_act": _one_gradient,
    "ablation": _every_unit,
    "activation": _no_queries,
    "random": _no_queries,
}

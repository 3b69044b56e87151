"""How many passes and token rows a batch takes, counted without running any."""

from collections.abc import Callable, Sequence
from math import ceil

import torch

from workbench.attribution import Settings
from workbench.engine import Room, copies, make_batch
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
    more_variants, firsts = QUERIES[settings.method](settings, model, most)
    fewest = copies(n_facts * batch.read)  # queries of a fact at the first layer of any pass
    variants += more_variants + sum(max(0, fewest - first) for first in [1] * passes + firsts)
    rows = clean * clean_rows * copies(batch.ids.numel()) + variants * n_facts * batch.tail
    return clean * (1 + (batch.shared > 0)) + passes + len(firsts), rows


def query_rows(groups: Sequence[Sequence[TokenisedFact]], settings: Settings) -> int:
    """Token rows of one query of every fact."""
    return sum(len(group) * make_batch(group, torch.device("cpu"), settings.scope).tail for group in groups)


def _no_queries(settings: Settings, model: HookedModel, most: int) -> tuple[int, list[int]]:
    return 0, []


def _one_gradient(settings: Settings, model: HookedModel, most: int) -> tuple[int, list[int]]:
    return 1, [1]


def _every_step(settings: Settings, model: HookedModel, most: int) -> tuple[int, list[int]]:
    variants = model.n_layers * settings.steps
    return variants, [min(settings.steps - at % settings.steps, most) for at in range(0, variants, most)]


def _every_unit(settings: Settings, model: HookedModel, most: int) -> tuple[int, list[int]]:
    width, layers = model.width(settings.unit), model.n_layers
    return layers * width, layers * [min(most, width - at) for at in range(0, width, most)]


#: Method -> (queries of a fact, how many of them the first layer of each pass has), beside what all take.
QUERIES: dict[str, Callable[[Settings, HookedModel, int], tuple[int, list[int]]]] = {
    **dict.fromkeys(("ig", "loki-paper", "loki-code", "kn", "kn-code"), _every_step),
    "grad_x_act": _one_gradient,
    "ablation": _every_unit,
    "activation": _no_queries,
    "random": _no_queries,
}

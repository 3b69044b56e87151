"""`plan`: a few facts are scored, and what all will take follows."""

import pathlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from workbench.attribution import LAYER_BY_LAYER, Settings, Work, batches, checked_settings, prepare, score_batch
from workbench.engine import Room, check_engine, make_batch, out_of_memory, run_clean
from workbench.facts import FactSet, TokenisedFact
from workbench.models import HookedModel, peak_memory
from workbench.planning.counting import counts, query_rows
from workbench.planning.plan import Plan, Sample
from workbench.results import free_bytes, open_store, unwritten

#: Share of the facts that may be measured, and how many always are (if there are so many).
SHARE, AT_LEAST = 0.1, 6


def plan(
    model: HookedModel,
    facts: FactSet,
    *,
    batch_size: int | str = "auto",
    memory: float | None = None,
    out: str | pathlib.Path | None = None,
    resume: bool = True,
    **definition: Any,
) -> Plan:
    """Say what `attribute` with the same arguments will take, from scoring a few of the facts; write nothing.

    `definition` is what `attribute` takes to define the scores: method, unit, steps, rule and so on.

    Facts that lie at `out` already are not counted. Passes and rows follow from the batches; time is that of the sample
    by its share of the rows (those of the prompts included), so it is as good as the sample is typical.

    Raises:
        ValueError: what `attribute` would raise before it starts.
    """
    settings = checked_settings(**definition)
    work = prepare(model, facts, settings, batch_size, memory)
    todo = unwritten(out, **work.labels, resume=resume)
    groups = [[work.facts[i] for i in one] for one in batches(work.facts, todo, settings, work.room, batch_size)]
    started = time.perf_counter()
    check_engine(model)
    checking = time.perf_counter() - started
    measured = _measured(model, groups, settings, work)
    passes, rows = _work(model, groups, settings, work.room, measured.samples)
    seen, spent = sum(s.rows for s in measured.samples), sum(s.seconds for s in measured.samples)
    result_bytes = 4 * len(facts) * (model.n_layers * (work.labels["n_units"] + 1) + 1)
    return Plan(
        settings=settings,
        facts=len(todo),
        done=len(facts) - len(todo),
        batches=len(groups),
        passes=passes,
        rows=rows,
        exact=settings.steps > 0,
        result_bytes=result_bytes,
        disk_bytes=measured.frame_bytes + result_bytes,  # scores are stored as they are
        free_bytes=None if out is None else free_bytes(pathlib.Path(out)),
        memory_bytes=peak_memory(model.device),
        seconds=checking + rows * spent / max(1, seen) + measured.writing * len(todo),
        samples=measured.samples,
    )


@dataclass(frozen=True)
class _Measured:
    """The samples, bytes on disk of a result without its numbers, and seconds of writing a fact."""

    samples: tuple[Sample, ...]
    frame_bytes: int
    writing: float


Group = list[TokenisedFact]


def _sampled(groups: Sequence[Group]) -> list[Group]:
    """The batch with the most tokens, then the middle one, cut to the share of facts that may be measured."""
    left = max(AT_LEAST, int(SHARE * sum(map(len, groups))))
    order = sorted(range(len(groups)), key=lambda i: sum(len(fact.ids) for fact in groups[i]))
    chosen = []
    for index in dict.fromkeys([order[-1], order[len(order) // 2]] if order else []):
        if left > 0:
            chosen.append(groups[index][:left])
            left -= len(chosen[-1])
    return chosen


def _measured(model: HookedModel, groups: Sequence[Group], settings: Settings, work: Work) -> _Measured:
    """Score the sample, and store it in a result of the right size that is thrown away."""
    samples, n_measured, writing = [], 0, 0.0
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        folder = pathlib.Path(scratch) / "sample.zarr"
        with open_store(folder, **work.labels) as store:
            empty = _bytes(folder)
            for group in _sampled(groups):
                with _counted(model) as seen:
                    started = time.perf_counter()
                    found = _scored(model, group, settings, work.room)
                    samples.append(Sample(len(group), len(seen), sum(seen), time.perf_counter() - started))
                started = time.perf_counter()
                store.write(range(n_measured, n_measured + len(group)), *found)
                writing += time.perf_counter() - started
                n_measured += len(group)
    return _Measured(tuple(samples), empty, writing / max(1, n_measured))


def _scored(model: HookedModel, group: Group, settings: Settings, room: Room) -> Any:
    """Scores of a sample; where a method takes one layer after another, the middle one stands for all."""
    middle = model.n_layers // 2
    try:
        if settings.method not in LAYER_BY_LAYER:
            return score_batch(model, group, settings, room)
        score, *rest = score_batch(model, group, settings, room, layers=(middle,))
        return score[:, [middle] * model.n_layers], *rest
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise ValueError(
            f"Memory ran out on a sample of {len(group)} facts: give batch_size=1, or less memory=."
        ) from error


def _work(
    model: HookedModel, groups: Sequence[Group], settings: Settings, room: Room, samples: Sequence[Sample]
) -> tuple[int, int]:
    """(passes, token rows): counted, or by the share of the sample where the number of steps adapts."""
    if settings.steps:
        plain = not groups or run_clean(model, make_batch(groups[0][:1], model.device), "node").plain_head
        each = [counts(group, settings, room, model, plain) for group in groups]
        return sum(passes for passes, _ in each), sum(rows for _, rows in each)
    share = query_rows(groups, settings) / max(1, query_rows(_sampled(groups), settings))
    return round(share * sum(s.passes for s in samples)), round(share * sum(s.rows for s in samples))


@contextmanager
def _counted(model: HookedModel) -> Iterator[list[int]]:
    """Token rows of every pass of the model inside the `with`."""
    rows: list[int] = []

    def count(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        rows.append(kwargs["input_ids"].numel())

    handle = model.hf.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


def _bytes(folder: pathlib.Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

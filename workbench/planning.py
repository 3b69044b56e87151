"""A dry run: how many passes, how much memory, disk and time an attribution will take, from a short measurement."""

import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any

import torch

from workbench.attribution import Settings, batches, checked_settings, score_batch
from workbench.engine import Room, check_engine, out_of_memory, room_for
from workbench.facts import FactSet, TokenisedFact
from workbench.models import HookedModel
from workbench.results import open_store, unwritten

#: Share of the facts that may be measured, and how many always are (if there are so many).
SHARE, AT_LEAST = 0.1, 6


@dataclass(frozen=True)
class Sample:
    """A few facts that were scored to see what they cost."""

    facts: int
    passes: int
    rows: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What an attribution will take.

    Attributes:
        settings: the definition of the scores.
        facts: facts that are to be done.
        done: facts that an earlier start has done.
        batches: facts are scored in so many groups.
        passes: forwards of the model.
        rows: token rows in all passes together.
        exact: whether passes and rows are counted; where the number of steps adapts they are extrapolated.
        result_bytes: the numbers of the whole result, uncompressed.
        disk_bytes: what the whole result will take on disk, by the compression of the sample.
        free_bytes: what is free there, or None where the result stays in memory.
        memory_bytes: the most that this process (on CUDA: the device) has held while measuring, the model included;
            None where the system does not say.
        seconds: from the first fact to the last, without opening the model.
        samples: what was measured.
    """

    settings: Settings
    facts: int
    done: int
    batches: int
    passes: int
    rows: int
    exact: bool
    result_bytes: int
    disk_bytes: int
    free_bytes: int | None
    memory_bytes: int | None
    seconds: float
    samples: tuple[Sample, ...]

    def __str__(self) -> str:
        """The plan in a few lines."""
        about = "" if self.exact else "about "
        measured = f"{sum(s.facts for s in self.samples)} facts in {_duration(sum(s.seconds for s in self.samples))}"
        free = "" if self.free_bytes is None else f", {_size(self.free_bytes)} free"
        lines = [
            f"facts    {self.facts:,} to do in {self.batches:,} batches, {self.done:,} done before",
            f"passes   {about}{self.passes:,} of the model, {about}{self.rows:,} token rows",
            f"memory   {'unknown' if self.memory_bytes is None else _size(self.memory_bytes) + ' at most'}",
            f"disk     about {_size(self.disk_bytes)} ({_size(self.result_bytes)} of numbers){free}",
            f"time     about {_duration(self.seconds)}, measured on {measured}",
        ]
        return "\n".join(lines)


def plan(
    model: HookedModel,
    facts: FactSet,
    *,
    method: str = "ig",
    unit: str = "node",
    steps: int | None = None,
    rule: str = "midpoint",
    baseline: str = "zero",
    scope: str = "last",
    objective: str = "logprob",
    target: str = "gold",
    tolerance: float = 0.05,
    seed: int = 0,
    batch_size: int | str = "auto",
    memory: float | None = None,
    out: str | pathlib.Path | None = None,
    resume: bool = True,
) -> Plan:
    """Say what `attribute` with the same arguments will take, from scoring a few of the facts; write nothing.

    Facts that lie at `out` already are not counted. Passes and rows follow from the batches; time is that of the sample
    by its share of the rows (those of the prompts included), so it is as good as the sample is typical.

    Raises:
        ValueError: what `attribute` would raise before it starts.
    """
    settings = checked_settings(method, unit, steps, rule, baseline, scope, objective, target, tolerance, seed)
    room = room_for(model, memory)
    tokenised = model.tokenise(facts)
    if settings.target == "predicted":
        tokenised = [replace(fact, answer_ids=(0,)) for fact in tokenised]
    labels: dict[str, Any] = {
        "ids": facts.ids,
        "relations": [fact.relation for fact in facts],
        "n_layers": model.n_layers,
        "n_units": model.width(settings.unit),
        "attrs": asdict(settings) | {"model_digest": model.digest, "fact_digest": facts.digest},
    }
    todo = unwritten(out, **labels, resume=resume)
    groups = [[tokenised[i] for i in one] for one in batches(tokenised, todo, settings, room, batch_size)]
    started = time.perf_counter()
    check_engine(model)
    checking = time.perf_counter() - started
    measured = _measured(model, groups, settings, room, labels)
    passes, rows = _work(model, groups, settings, room, measured.samples)
    seen, spent = sum(s.rows for s in measured.samples), sum(s.seconds for s in measured.samples)
    return Plan(
        settings=settings,
        facts=len(todo),
        done=len(facts) - len(todo),
        batches=len(groups),
        passes=passes,
        rows=rows,
        exact=settings.steps > 0,
        result_bytes=4 * len(facts) * (model.n_layers * (labels["n_units"] + 1) + 1),
        disk_bytes=measured.disk_bytes,
        free_bytes=None if out is None else _free(pathlib.Path(out)),
        memory_bytes=_peak_memory(model.device),
        seconds=checking + rows * spent / max(1, seen) + measured.writing * len(todo),
        samples=measured.samples,
    )


@dataclass(frozen=True)
class _Measured:
    """The samples, bytes of the whole result on disk, and seconds of writing a fact."""

    samples: tuple[Sample, ...]
    disk_bytes: int
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


def _measured(
    model: HookedModel, groups: Sequence[Group], settings: Settings, room: Room, labels: dict[str, Any]
) -> _Measured:
    """Score the sample, and store it in a result of the right size that is thrown away."""
    samples, n_measured, writing = [], 0, 0.0
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        folder = pathlib.Path(scratch) / "sample.zarr"
        with open_store(folder, **labels) as store:
            empty = _bytes(folder)
            for group in _sampled(groups):
                with _counted(model) as seen:
                    started = time.perf_counter()
                    found = _scored(model, group, settings, room)
                    samples.append(Sample(len(group), len(seen), sum(seen), time.perf_counter() - started))
                started = time.perf_counter()
                store.write(range(n_measured, n_measured + len(group)), *found)
                writing += time.perf_counter() - started
                n_measured += len(group)
        grown = _bytes(folder) - empty
    share = len(labels["ids"]) / max(1, n_measured)
    return _Measured(tuple(samples), round(empty + grown * share) if n_measured else 0, writing / max(1, n_measured))


def _scored(model: HookedModel, group: Group, settings: Settings, room: Room) -> Any:
    try:
        return score_batch(model, group, settings, room)
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
        counts = [_counts(group, settings, room, model) for group in groups]
        return sum(passes for passes, _ in counts), sum(rows for _, rows in counts)
    share = _tails(groups, settings) / max(1, _tails(_sampled(groups), settings))
    return round(share * sum(s.passes for s in samples)), round(share * sum(s.rows for s in samples))


def _counts(group: Group, settings: Settings, room: Room, model: HookedModel) -> tuple[int, int]:
    """(passes, token rows) of a batch, where the number of steps is fixed."""
    prompt, tail = max(len(fact.prompt_ids) for fact in group), _tail(group, settings)
    most = max(1, room.rows // (len(group) * tail))
    whole = len(group) * (prompt + len(group[0].answer_ids) - 1)  # tokens of a run that is not patched
    clean = 1 + (settings.baseline == "blank")
    passes, variants = clean + ceil(model.n_layers / most) + 1, model.n_layers + 1  # baselines, the clean end
    more_passes, more_variants, more_clean = QUERIES[settings.method](settings, model, most)
    rows = (clean + more_clean) * whole + (variants + more_variants) * len(group) * tail
    return passes + more_passes + more_clean, rows


def _no_queries(settings: Settings, model: HookedModel, most: int) -> tuple[int, int, int]:
    return 0, 0, 0


def _one_gradient(settings: Settings, model: HookedModel, most: int) -> tuple[int, int, int]:
    return 0, 0, 1


def _every_step(settings: Settings, model: HookedModel, most: int) -> tuple[int, int, int]:
    variants = model.n_layers * settings.steps
    return ceil(variants / most), variants, 0


def _every_unit(settings: Settings, model: HookedModel, most: int) -> tuple[int, int, int]:
    width = model.width(settings.unit)
    return model.n_layers * ceil(width / most), model.n_layers * width, 0


#: Method -> (passes of queries, queries of a fact, passes over the whole prompt), beside what every method takes.
QUERIES: dict[str, Callable[[Settings, HookedModel, int], tuple[int, int, int]]] = {
    **dict.fromkeys(("ig", "loki-paper", "loki-code", "kn", "kn-code"), _every_step),
    "grad_x_act": _one_gradient,
    "ablation": _every_unit,
    "activation": _no_queries,
    "random": _no_queries,
}


def _tail(group: Group, settings: Settings) -> int:
    """Token rows of one query."""
    moved = max(len(fact.prompt_ids) for fact in group) if settings.scope == "all" else 1
    return moved + len(group[0].answer_ids) - 1


def _tails(groups: Sequence[Group], settings: Settings) -> int:
    return sum(len(group) * _tail(group, settings) for group in groups)


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


def _peak_memory(device: torch.device) -> int | None:
    """Bytes that this process has held at most, or the CUDA device for it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _bytes(folder: pathlib.Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _free(path: pathlib.Path) -> int:
    return shutil.disk_usage(next(parent for parent in path.absolute().parents if parent.is_dir())).free


def _size(n_bytes: int | float) -> str:
    """Bytes in a unit that suits them.

    >>> _size(512), _size(1.5e6), _size(2**31)
    ('512 B', '1.5 MB', '2.1 GB')
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes:.0f} B"


def _duration(seconds: int | float) -> str:
    """Seconds in words.

    >>> _duration(3.21), _duration(190), _duration(7300)
    ('3.2 s', '3 min 10 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"

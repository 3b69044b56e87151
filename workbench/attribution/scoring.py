"""`attribute`: facts in, scores out, batch by batch into a result that can be stopped and resumed."""

import logging
import pathlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Integral
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from workbench.attribution.methods import METHODS, Problem
from workbench.attribution.settings import Settings, checked_settings
from workbench.engine import (
    FACTS_PER_PASS,
    Batch,
    Clean,
    Room,
    check_engine,
    make_batch,
    out_of_memory,
    room_for,
    run_clean,
)
from workbench.facts import FactSet, TokenisedFact
from workbench.metrics import OBJECTIVES, logprob
from workbench.models import HookedModel
from workbench.path import Path
from workbench.results import check_scores_fit, open_store
from workbench.results.labelled import kind_of

log = logging.getLogger(__name__)


@torch.inference_mode(False)
@torch.enable_grad()
def attribute(
    model: HookedModel,
    facts: FactSet,
    *,
    method: str = "ig",
    unit: Literal["node", "neuron"] | str | None = None,
    steps: int | None = None,
    rule: str | None = None,
    baseline: str | None = None,
    scope: str | None = None,
    objective: str | None = None,
    target: str | None = None,
    tolerance: float = 0.05,
    seed: int = 0,
    batch_size: int | str = "auto",
    memory: float | None = None,
    out: str | pathlib.Path | None = None,
    resume: bool = True,
    beside: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Score how much every FFN unit of every layer contributes to every fact.

    What a published definition fixes is left out, or said as it has it; of other choices that are left out (None), the
    first that is named below is taken.

    Args:
        model: a model from `load_model`.
        facts: what to attribute; an answer of several tokens is teacher-forced and the objective sums over its tokens.
        method: `"ig"` (integrated gradients), `"grad_x_act"` (gradient times activation), `"ablation"` (the exact
            effect of every unit, one forward query each), the controls `"activation"` and `"random"`, or a published
            definition: `"loki-paper"`, `"loki-code"`, `"kn"`, `"kn-code"` (`workbench.attribution.settings.FIXED` says
            what each fixes; arguments that contradict it are refused).
        unit: `"node"` (outputs of the down-projection, d_model per layer) or `"neuron"` (its inputs, d_mlp per layer).
        steps: points of the quadrature; None is the definition's own number, and for `ig` refines a layer until its
            completeness gap is within `tolerance` times its effect, or times a fifth of the fact's largest effect if
            that is more (see `workbench.path.adaptive_integral`). Methods without a path have one.
        rule: quadrature rule: midpoint, left, right, trapezoid or Captum's riemann_trapezoid; only the midpoint adapts,
            the others take 16 steps where none are given.
        baseline: `"zero"`, or `"blank"`: the activations of the same prompt with every token id replaced by 0.
        scope: `"last"` moves the activations at the last prompt token; `"all"` those of every prompt token, and the
            score of a unit is its sum over them.
        objective: logprob (nats), prob, logit or margin (logit of the answer minus the best other).
        target: `"gold"` (the fact's answer) or `"predicted"` (the model's own next token).
        tolerance: of the adaptive rule: the gap, as a share of the layer's effect.
        seed: of the draws of `random`.
        batch_size: facts that are prepared together at most, all of the same length; `"auto"` chooses. Scores do not
            depend on it: on Intel's and AMD's processors to less than 1e-6 of a fact's largest (see `workbench`); where
            products round by their size, in float32 to a few 1e-6, and more where that makes the adaptive rule take
            another step. An `ablation` is a difference of two objectives, exact to the rounding of those.
        memory: GiB that a pass may take; None is half of what is free. A pass that still does not fit is halved.
        out: a zarr folder to stream to; None keeps the result in memory.
        resume: go on where an earlier call with the same settings stopped.
        beside: the disk must hold the scores of so many facts more, which are to be written beside `out` afterwards.
        progress: show a progress bar.

    Returns:
        Dataset with `score` (fact, layer, unit) in units of the objective, `gap` (fact, layer): the completeness
        error F(clean) - F(baseline) - sum of scores, and `target_prob` (fact,): probability of the target.

    Raises:
        ValueError: an unknown option, a fact that does not fit the model, a result at `out` with other settings, or a
            disk that does not hold what is left to do.
    """
    settings = checked_settings(method, unit, steps, rule, baseline, scope, objective, target, tolerance, seed)
    work = prepare(model, facts, settings, batch_size, memory)
    check_engine(model)
    place = None if out is None else pathlib.Path(out)
    there = None if place is None else kind_of(place)
    size = work.labels["n_layers"], work.labels["n_units"]
    if place is not None and there is None:
        check_scores_fit(place, len(facts) + beside, *size)  # before a folder is made
    notes = {"model": model.name, "facts": facts.name, "dtype": str(model.dtype).removeprefix("torch.")}
    with open_store(place, **work.labels, notes=notes, resume=resume) as store:
        if place is not None and there is not None:
            check_scores_fit(place, len(store.todo) + beside, *size)
        room = work.room
        bar = tqdm(total=len(facts), initial=len(store.done), unit="fact", desc="attribute", disable=not progress)
        with bar:
            queue = batches(work.facts, store.todo, settings, room, batch_size)
            while indices := next(queue, None):
                part = [work.facts[i] for i in indices]
                try:
                    found = score_batch(model, part, settings, room)
                except (RuntimeError, MemoryError) as error:
                    room = _less(room, part, error)
                    queue = batches(work.facts, store.todo, settings, room, batch_size)
                else:
                    store.write(indices, *found)
                    bar.update(len(indices))
        return store.dataset()


@dataclass(frozen=True)
class Work:
    """What is to be scored: the facts as tokens, how much goes into a pass, and the labels of the result."""

    facts: list[TokenisedFact]
    room: Room
    labels: dict[str, Any]


def prepare(
    model: HookedModel, facts: FactSet, settings: Settings, batch_size: int | str = "auto", memory: float | None = None
) -> Work:
    """Everything that can be refused before the first pass, and the result's labels."""
    if not isinstance(model, HookedModel):
        raise ValueError(f"model is what load_model gives, not a {type(model).__name__}.")
    if not isinstance(facts, FactSet):
        raise ValueError(f"facts is a FactSet, as load_facts gives, not a {type(facts).__name__}.")
    if batch_size != "auto" and not (isinstance(batch_size, Integral) and batch_size > 0):
        raise ValueError(f'batch_size must be "auto" or a positive number, not {batch_size!r}.')
    room = room_for(model, memory)
    tokenised = model.tokenise(facts)
    if settings.target == "predicted":
        tokenised = [replace(fact, answer_ids=(0,)) for fact in tokenised]
    if memory is not None:
        _check_fits(tokenised, settings, room)
    labels = {
        "ids": facts.ids,
        "relations": [fact.relation for fact in facts],
        "texts": list(facts.texts.values()),
        "n_layers": model.n_layers,
        "n_units": model.width(settings.unit),
        "attrs": asdict(settings) | {"model_digest": model.digest, "fact_digest": facts.digest},
    }
    return Work(tokenised, room, labels)


def _check_fits(facts: Sequence[TokenisedFact], settings: Settings, room: Room) -> None:
    """Refuse a fact of which a single query is more than the memory that was asked for."""
    for fact in facts:
        rows = len(fact.ids) if settings.scope == "all" else len(fact.answer_ids)
        if (need := rows * (room.row + room.key * len(fact.ids))) > room.budget:
            raise ValueError(
                f"A pass over fact {fact.fact_id!r} takes at least {rows} token rows and {need / 2**30:.2g} GiB, more "
                f"than the {room.budget / 2**30:.2g} GiB asked for: give more with memory=, or leave it out."
            )


Scores = tuple[Float[np.ndarray, "batch layer width"], Float[np.ndarray, "batch layer"], Float[np.ndarray, " batch"]]


def _less(room: Room, facts: Sequence[TokenisedFact], error: Exception) -> Room:
    """A smaller room where memory ran out; every other error is raised again."""
    if not out_of_memory(error):
        raise error
    smaller = room.smaller(len(facts))
    if smaller is None:
        raise ValueError(
            f"Memory ran out on fact {facts[0].fact_id!r} alone: close other programs, shorten its prompt, or open the "
            "model with dtype='bfloat16'; the facts written before are kept."
        ) from error
    log.warning("memory ran out; going on with %d facts and %d rows in a pass", smaller.most, smaller.rows)
    return smaller


def score_batch(
    model: HookedModel,
    facts: Sequence[TokenisedFact],
    settings: Settings,
    room: Room,
    layers: Sequence[int] | None = None,
) -> Scores:
    """Scores, completeness gaps and target probabilities of a few facts.

    `layers` spares methods that take one layer after another the rest, whose scores are then 0.
    """
    batch = make_batch(facts, model.device, settings.scope)
    clean = run_clean(model, batch, settings.unit)
    if settings.target == "predicted":
        batch = replace(batch, target=clean.logits.argmax(-1))
        clean = replace(clean, batch=batch)
    baseline = baseline_of(model, batch, clean, settings)
    rows = room.rows_of(batch.ids.shape[1], clean.plain_head)
    path = Path(model, clean, baseline, settings.unit, OBJECTIVES[settings.objective], rows)
    problem = Problem(facts, path, path.start(), settings, range(model.n_layers) if layers is None else layers)
    score = METHODS[settings.method](problem)
    gap = path.end[:, None] - problem.start - score.sum(-1)
    target_prob = batch.value(clean.logits, logprob).exp()
    return score.cpu().numpy(), gap.float().cpu().numpy(), target_prob.cpu().numpy()


def baseline_of(
    model: HookedModel, batch: Batch, clean: Clean, settings: Settings
) -> Float[Tensor, "layer batch moved width"]:
    """Where the path starts: zeros, or the activations of the prompt with every token replaced by token 0."""
    if settings.baseline == "zero":
        return torch.zeros_like(clean.activation)
    return run_clean(model, replace(batch, ids=torch.zeros_like(batch.ids)), settings.unit).activation


def batches(
    facts: Sequence[TokenisedFact], todo: Sequence[int], settings: Settings, room: Room, batch_size: int | str
) -> Iterator[list[int]]:
    """Indices of facts that are scored together: of one prompt and one answer length, so that nothing is padded.

    Sums over positions round by where a sequence begins, which the columns of padding would move.

    The order goes by the tokens, so that the batches, and with them the last digits, do not depend on that of `todo`.
    """
    order = sorted(todo, key=lambda i: (len(facts[i].answer_ids), len(facts[i].prompt_ids), facts[i].ids, i))
    while order:
        most = min(room.most, FACTS_PER_PASS if isinstance(batch_size, str) else int(batch_size))
        same = _together([facts[i] for i in order[:most]], settings, room, batch_size != "auto")
        yield order[:same]
        order = order[same:]


def _together(facts: Sequence[TokenisedFact], settings: Settings, room: Room, asked: bool) -> int:
    """How many of these facts, shorter ones first, to score together: as long as lengths are the same and they fit.

    Where so many were `asked` for, only a change of length ends a batch.
    """

    def sizes(fact: TokenisedFact) -> tuple[int, int]:
        return len(fact.prompt_ids), len(fact.answer_ids)

    for count, fact in enumerate(facts):
        fits = asked or count < max(1, room.facts(len(fact.ids), settings.scope == "all"))
        if not fits or sizes(fact) != sizes(facts[0]):
            return count
    return len(facts)

"""`interference`: every measure asked for, layer by layer, with its nulls, intervals and corrections."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr
from tqdm import tqdm

from workbench.facts import FactSet, general_text
from workbench.interfere.cross import linear_suppression, suppression
from workbench.interfere.gradients import gradient
from workbench.interfere.keys import superposition
from workbench.interfere.meaning import meaning
from workbench.interfere.nulls import against_meaning, against_relations, chance_level, groups, level_of_all
from workbench.interfere.overlap import cosine_overlap, jaccard_overlap
from workbench.interfere.problem import Draw, Found, Matrix, Problem
from workbench.intervals import DRAWS, benjamini_hochberg
from workbench.models import HookedModel, check_unit
from workbench.results import Parts, check_asked, check_finite, check_made_with, validate_interference

#: What is nearer to 1 counts as this much in Fisher's z, which has no end there.
NEAR_ONE = 0.9999


@dataclass(frozen=True)
class Measure:
    """One way to say how much two facts interfere in a layer.

    Attributes:
        find: refuses what it cannot measure, then gives every layer of a problem in turn.
        symmetric: whether it is the same from either fact.
        signed: whether values below 0 mean the opposite of those above.
        needs_model: whether it runs the model, or reads scores only.
        suffers: which of the two a value is about: "fact" under "other", or the other way round.
        harmful: whether larger values mean more harm (1), or less (-1).
        bounded: whether no value lies beyond 1 or -1.
        about: what a value is, with its unit.
    """

    find: Callable[[Problem], Iterator[Found]]
    symmetric: bool
    signed: bool
    needs_model: bool
    about: str
    suffers: Literal["fact", "other"] = "fact"
    harmful: Literal[1, -1] = 1
    bounded: bool = False


#: Every measure, by the name that users give.
METRICS: dict[str, Measure] = {
    "cosine": Measure(cosine_overlap, True, False, False, "cosine of |scores|", bounded=True),
    "jaccard": Measure(jaccard_overlap, True, False, False, "shared share of the top units", bounded=True),
    "superposition": Measure(superposition, False, True, True, "projection of whitened keys", suffers="other"),
    "gradient": Measure(gradient, True, True, True, "cosine of gradients", harmful=-1, bounded=True),
    "linear_suppression": Measure(linear_suppression, False, True, True, "first-order drop of log P(answer), nats"),
    "suppression": Measure(suppression, False, True, True, "drop of log P(answer), nats"),
}


def interference(
    model: HookedModel | None,
    facts: FactSet,
    attribution: xr.Dataset,
    *,
    metrics: Sequence[str] = ("cosine", "jaccard"),
    top: float | int = 1.0,
    permutations: int = 999,
    draws: int = 1,
    seed: int = 0,
    text: Sequence[str] | None = None,
    memory: float | int | None = None,
    parts: str | Path | None = None,
    progress: bool = True,
) -> xr.Dataset:
    """Measure how much every two facts interfere, layer by layer, against nulls.

    Args:
        model: the model of the attribution, checked against its digest; None skips the check, and is enough for
            "cosine" and "jaccard", whose matched null then knows units by their scores only.
        facts: the attributed facts; their relations divide pairs into within and across.
        attribution: a result of `attribute`.
        metrics: "cosine" of |scores|; "jaccard" of the top units; "superposition" of keys; "gradient", the cosine of
            gradients in the down-projection; "suppression" of one fact by the top units of another, whose cost grows
            with facts^2 x layers; "linear_suppression", the same to first order, for many facts. `METRICS` holds them,
            and each says in its docstring what it computes.
        top: size of the top sets of "jaccard" and of both suppressions, in percent of a layer's units.
        permutations: draws of the nulls that shuffle facts.
        draws: of random units in the place of every fact's own, for "suppression": from 19 on its pairs are judged, at
            seven times the cost of one; the other measures, which run no pass for a draw, always have 19 or more.
        seed: of all draws; written into the result.
        text: passages of general text for "superposition"; None is the shipped prose.
        memory: GiB that may be taken beside the model; None is half of what is free.
        parts: folder in which the readings of "suppression", which takes long, are kept as they are made; a second
            call goes on there.
        progress: show progress bars.

    Returns:
        Dataset with `value` (metric, layer, fact, other): what `other` does to `fact` (superposition: what `fact` does
        to `other`, as its formula has it), float32. For each metric and layer: `within` and `across` (means over pairs
        of facts of the same relation and of different ones, both directions averaged); `difference` with its 95%
        interval over facts `low`..`high`; the 95% band of shuffled relations `null_low`..`null_high`, two-sided
        `p_value`, and `q_value` (Benjamini-Hochberg over the layers of the metric); `chance`, what the largest value of
        any two facts reaches when every fact's units are shuffled: what at most 5% of `unit_draws` draws exceed (an
        attribute, by metric; the largest of fewer than 20), and `matched_chance` when they are shuffled among units of
        similar size only, in `matched_draws` draws; `expected`, the mean value of two facts when units are shuffled,
        and `conflict_chance` and `conflict_matched`, the share of pairs below 0 in either (see `conflict_rates`);
        `level`, beyond which a pair collides, corrected over layers (see `colliding_pairs`; NaN for "suppression" of
        fewer than 19 `draws`). The attribute `matched_on` says by metric in what units are similar, as a mean over
        facts: |activation| where the attribution read it for "cosine" and "jaccard" (|score| without a model of these
        units), at the last prompt token for "suppression" and at every token for "gradient"; |whitened key| for
        "superposition", whose units are the coordinates of whitened keys.
        With a model, `meaning` (fact, other), how near two facts are by the embedding, and per metric and layer its
        rank correlation with the value `meaning_rho`, its 95% interval over facts `meaning_low`..`meaning_high`,
        `meaning_p` (Mantel) and `meaning_q`.
        `load` (layer, unit): mean |score| over facts, what the facts lean on. With "gradient", `gradient_norm`
        (layer, fact).

    Raises:
        ValueError: fewer than two facts, an unknown metric, an attribution of another model, of other facts or with
            numbers that are not finite, too little memory or text for a measure, or parts of other work.
    """
    checked_metrics(metrics, top, permutations, memory, draws)
    problem = _problem(model, facts, attribution, metrics, top, permutations, seed, text, memory, progress)
    if "suppression" in metrics:
        problem = replace(problem, draws=draws)
        problem = replace(problem, parts=_kept(problem, parts))
    streams = {name: METRICS[name].find(problem) for name in metrics}  # each refuses at once what it cannot do
    ids, relations = list(problem.facts.ids), [fact.relation for fact in problem.facts]
    generator = np.random.default_rng(seed)
    shuffles = np.stack([generator.permutation(len(ids)) for _ in range(permutations)])
    near = None if model is None else meaning(problem)
    value = np.zeros((len(metrics), len(problem.layers), len(ids), len(ids)), dtype=np.float32)
    statistics: dict[str, list[np.ndarray]] = {}
    beside: dict[str, Any] = {}
    notes: dict[str, Any] = {}
    for place, name in enumerate(metrics):
        layers = _filled(streams[name], name, value[place], beside, notes, progress)
        for column, numbers in (layers | _tested(value[place], groups(relations), near, shuffles, seed)).items():
            statistics.setdefault(column, []).append(numbers)
    columns = {name: (("metric", "layer"), np.stack(rows).astype(np.float32)) for name, rows in statistics.items()}
    if near is not None:
        beside["meaning"] = (("fact", "other"), near.astype(np.float32))
    result = xr.Dataset(
        {"value": (("metric", "layer", "fact", "other"), value), "load": _load(problem), **columns, **beside},
        coords={
            "metric": list(metrics),
            "layer": attribution["layer"].values,
            "unit": attribution["unit"].values,
            "fact": ids,
            "other": ids,
            "relation": ("fact", relations),
            "text": ("fact", list(problem.facts.texts.values())),
        },
        attrs={
            **{k: attribution.attrs.get(k, "unknown") for k in ("unit", "method", "model_digest")},
            "fact_digest": problem.facts.digest,
            "n_facts": len(ids),
            "top_percent": top,
            "permutations": permutations,
            "bootstrap_draws": DRAWS,
            "seed": seed,
            **notes,
        },
    )
    validate_interference(result)
    return result


def _problem(
    model: HookedModel | None,
    facts: FactSet,
    attribution: xr.Dataset,
    metrics: Sequence[str],
    top: float | int,
    permutations: int,
    seed: int,
    text: Sequence[str] | None,
    memory: float | int | None,
    progress: bool,
) -> Problem:
    """Check everything of the inputs that can be refused before the first pass."""
    if "score" not in attribution or "unit" not in attribution.attrs:
        raise ValueError("The attribution has no scores of a kind of unit: give a result of `attribute`.")
    ids = [str(i) for i in attribution["fact"].values]
    if len(ids) < 2:
        raise ValueError(f"Interference needs at least 2 facts; the attribution has {len(ids)}.")
    if isinstance(text, str):
        raise ValueError("text is one text; give a list of passages.")
    known = {fact.id: fact for fact in facts.filter(ids=ids)}
    needy = [name for name in metrics if METRICS[name].needs_model]
    if model is None and needy:
        raise ValueError(f"The measure {needy[0]!r} runs the model: give it, not None.")
    if model is not None:
        check_made_with(attribution, model.digest, model.name)
        width, last = model.width(check_unit(attribution.attrs["unit"])), int(attribution["layer"].max())
        if needy and (attribution.sizes["unit"] != width or last >= model.n_layers):
            raise ValueError(
                f"The attribution has {attribution.sizes['unit']} units in layers up to {last}, but {model.name} has "
                f"{width} in {model.n_layers} layers: attribute this model."
            )
    check_asked(attribution, facts.texts)
    check_finite(attribution["score"].transpose("fact", "layer", "unit"), "The attribution")
    passages = general_text() if text is None and "superposition" in metrics else list(text or ())
    count = max(1, round(top / 100 * attribution.sizes["unit"]))
    ordered = FactSet(facts.name, tuple(known[i] for i in ids))
    return Problem(ordered, attribution, count, seed, model, passages, memory, progress)


def _kept(problem: Problem, folder: str | Path | None) -> Parts:
    """The parts of "suppression" that are there, of the same model, facts, scores and settings."""
    if folder is None:
        return Parts(None, {})
    scores = hashlib.sha256()
    for layer in problem.layers:
        scores.update(np.ascontiguousarray(problem.scores(layer)).tobytes())
    about: dict[str, Any] = {"model": problem.opened.digest, "facts": problem.facts.digest, "layers": problem.layers}
    about |= {"unit": problem.attribution.attrs["unit"], "top": problem.top, "seed": problem.seed}
    about |= {"draws": problem.draws} if problem.draws > 1 else {}
    return Parts(folder, about | {"scores": scores.hexdigest()})


def checked_metrics(
    metrics: Sequence[str],
    top: float | int = 1.0,
    permutations: int = 1,
    memory: float | int | None = None,
    draws: int = 1,
) -> None:
    """Raise `ValueError` with one sentence for what `interference` would refuse of these arguments."""
    if isinstance(metrics, str) or not metrics:
        raise ValueError(f"metrics is a list of names, as in ('cosine', 'gradient'), not {metrics!r}.")
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f"There is no measure {name!r}: choose from {', '.join(METRICS)}.")
    if len(set(metrics)) < len(metrics):
        raise ValueError(f"A measure is asked for twice: {', '.join(metrics)}.")
    if not (isfinite(top) and 0 < top <= 100):
        raise ValueError(f"top is {top}: give a percentage of a layer's units, above 0 and up to 100.")
    if not isinstance(permutations, Integral) or permutations < 1:
        raise ValueError(f"A null needs at least one permutation, a whole number, not {permutations!r}.")
    if not isinstance(draws, Integral) or draws < 1:
        raise ValueError(f"suppression needs at least one draw of random units, a whole number, not {draws!r}.")
    if memory is not None and not memory > 0:
        raise ValueError(f"memory must be a positive number of GiB, not {memory}.")


def _filled(
    stream: Iterator[Found],
    name: str,
    value: np.ndarray,
    beside: dict[str, Any],
    notes: dict[str, Any],
    progress: bool,
) -> dict[str, np.ndarray]:
    """Run one measure: values into `value`, what comes with them into `beside` and `notes`; gives what chance does."""
    nulls: tuple[list[Sequence[Draw]], list[Sequence[Draw]]] = ([], [])
    n_facts = value.shape[-1]
    layers = tqdm(stream, total=len(value), unit="layer", desc=name, disable=not progress)
    for place, found in enumerate(layers):
        value[place] = found.value
        about = {"unit_draws": len(found.free), "matched_draws": len(found.matched), "matched_on": found.matched_on}
        for key, told in about.items():
            notes.setdefault(key, {})[name] = told
        nulls[0].append(found.free)
        nulls[1].append(found.matched)
        for column, numbers in found.by_fact.items():
            whole = np.zeros((len(value), n_facts), dtype=np.float32)
            beside.setdefault(column, (("layer", "fact"), whole))[1][place] = numbers
        for key, note in found.notes.items():
            notes[key] = [*notes.get(key, []), *note] if isinstance(note, list) else note
    return _of_chance(nulls, METRICS[name])


def _of_chance(nulls: Sequence[Sequence[Sequence[Draw]]], measure: Measure) -> dict[str, np.ndarray]:
    """What the draws of the free and of the matched null say of every layer.

    The level of a bounded measure is found by Fisher's z, so that it is one that pairs can reach.
    """
    free, matched = nulls
    ends = np.array([[draw.largest if measure.harmful > 0 else -draw.smallest for draw in layer] for layer in free]).T
    if measure.bounded:
        level = np.tanh(level_of_all(np.arctanh(ends.clip(-NEAR_ONE, NEAR_ONE))))
        level = np.where(level > NEAR_ONE - 1e-6, 1.0, level)  # draws reach the bound itself, as sets of one unit do
    else:
        level = level_of_all(ends)
    return {
        "chance": np.array([chance_level([draw.largest for draw in layer]) for layer in free]),
        "matched_chance": np.array([chance_level([draw.largest for draw in layer]) for layer in matched]),
        "expected": np.array([np.mean([draw.mean for draw in layer]) for layer in free]),
        "conflict_chance": np.array([np.mean([draw.below for draw in layer]) for layer in free]),
        "conflict_matched": np.array([np.mean([draw.below for draw in layer]) for layer in matched]),
        "level": measure.harmful * level,
    }


def _tested(
    value: np.ndarray, relations: np.ndarray, near: Matrix | None, shuffles: np.ndarray, seed: int
) -> dict[str, np.ndarray]:
    """What the values of one measure say of relations and of meaning, layer by layer."""
    found = against_relations(value, relations, shuffles, seed, DRAWS)
    found["q_value"] = benjamini_hochberg(found["p_value"])
    if near is not None:
        found |= against_meaning(value, near, shuffles, seed, DRAWS)
        found["meaning_q"] = benjamini_hochberg(found["meaning_p"])
    return found


def _load(problem: Problem) -> tuple[tuple[str, str], np.ndarray]:
    """Mean |score| of every unit over facts."""
    rows = [np.abs(problem.scores(layer)).mean(0) for layer in problem.layers]
    return ("layer", "unit"), np.stack(rows).astype(np.float32)

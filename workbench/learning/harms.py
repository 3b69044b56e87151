"""What learning one fact does to every other: `harm`, fact by fact, resumable."""

from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import xarray as xr
from tqdm import tqdm

from workbench.facts import FactSet, TokenisedFact
from workbench.learning.learner import STEPS, check_learning, learnt, natural_rate
from workbench.models import HookedModel
from workbench.recollection import read_facts
from workbench.results import digest_of, open_result, save_result, validate_harm
from workbench.results.labelled import check_replaceable, kind_of
from workbench.selection import Selection

SAVE_EVERY = 30.0  # seconds between two writes of what is done so far


def harm(
    model: HookedModel,
    facts: FactSet,
    *,
    others: FactSet | None = None,
    steps: int = STEPS,
    rate: float | None = None,
    layers: Sequence[int] | None = None,
    selection: Selection | None = None,
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
) -> xr.Dataset:
    """Measure what learning each fact alone takes from every fact: `log P_0(y_i) - log P_j(y_i)`, in nats.

    P_0 is the model as it is, P_j the model after plain gradient descent on fact j alone (see `learnt`); answers are
    teacher-forced. Positive values are harm. The model's weights are the same afterwards, to the bit.

    Args:
        model: the model.
        facts: the facts i that are read.
        others: the facts j that are learnt, one at a time; None takes `facts`, so that the diagonal holds what each
            fact gained, as a negative harm.
        steps: gradient steps on every fact j.
        rate: the learning rate, or None for `natural_rate`, at which most facts are learnt in a few steps.
        layers: the layers whose down-projections learn; None is all.
        selection: the units that learn, instead of whole layers.
        out: folder (.zarr) to which columns are written while they are done.
        resume: go on with what lies at `out`, made with the same settings; False replaces it.
        progress: show a progress bar.

    Returns:
        Dataset with `harm` (fact, other), `before` (fact) = log P_0(y_i), `gained` (other) = log P_j(y_j) - log
        P_0(y_j) and `reached` (other) = P_j(y_j); relations, answers and their numbers of tokens as coordinates.

    Raises:
        ValueError: settings that do not fit, a stored result of other settings, a rate at which losses have no end.
    """
    check_learning(steps, rate)
    learners = facts if others is None else others
    read, taught = model.tokenise(facts), model.tokenise(learners)
    settings = {
        "steps": steps,
        "rate": "natural" if rate is None else float(rate),
        "layers": "all" if layers is None else sorted(int(layer) for layer in set(layers)),
        "selection": "none" if selection is None else digest_of([selection.unit, selection.positions()]),
        "model_digest": model.digest,
        "fact_digest": facts.digest,
        "other_digest": learners.digest,
    }
    result = _started(out, resume, settings)
    part: dict[str, Any] = {"layers": layers, "selection": selection}
    if result is None:
        used = natural_rate(model, taught, **part) if rate is None else float(rate)
        result = _empty(facts, learners, [len(one.answer_ids) for one in read], {**settings, "rate_used": used})
        result["before"][:] = _logprobs(model, read)
    _learn_each(model, read, taught, result, out, progress, **part)
    validate_harm(result)
    return result


def _learn_each(
    model: HookedModel,
    read: Sequence[TokenisedFact],
    taught: Sequence[TokenisedFact],
    result: xr.Dataset,
    out: str | Path | None,
    progress: bool,
    **part: Any,
) -> None:
    """Fill the columns that are still missing; what is done is written now and then, and when anything goes wrong."""
    todo = [int(j) for j in np.flatnonzero(result["reached"].isnull().values)]
    how: dict[str, Any] = {"rate": result.attrs["rate_used"], "steps": result.attrs["steps"], **part}
    shown: dict[str, Any] = {"total": len(taught), "unit": "fact", "desc": "harm", "disable": not progress}
    saved = monotonic()
    try:
        with tqdm(initial=len(taught) - len(todo), **shown) as bar:
            for j in todo:
                start = _logprobs(model, [taught[j]])[0]
                with learnt(model, [taught[j]], **how):
                    after, own = _logprobs(model, read), _logprobs(model, [taught[j]])[0]
                result["harm"][:, j] = result["before"].values - after
                result["gained"][j] = own - start
                result["reached"][j] = np.exp(own)
                bar.update()
                if out is not None and monotonic() - saved > SAVE_EVERY:
                    save_result(result, out, kind="harm")
                    saved = monotonic()
    finally:
        if out is not None and len(todo):
            save_result(result, out, kind="harm")


def _logprobs(model: HookedModel, facts: Sequence[TokenisedFact]) -> np.ndarray:
    """Log-probability of every answer, in nats."""
    return np.array([sum(reading.logprobs) for reading in read_facts(model, facts, greedy=False)])


def _empty(facts: FactSet, others: FactSet, n_tokens: list[int], attrs: dict[str, Any]) -> xr.Dataset:
    """A result without numbers."""
    shape = (len(facts), len(others))
    return xr.Dataset(
        {
            "harm": (("fact", "other"), np.full(shape, np.nan)),
            "before": ("fact", np.full(shape[0], np.nan)),
            "gained": ("other", np.full(shape[1], np.nan)),
            "reached": ("other", np.full(shape[1], np.nan)),
        },
        coords={
            "fact": list(facts.ids),
            "other": list(others.ids),
            "relation": ("fact", [fact.relation for fact in facts]),
            "answer": ("fact", [fact.answer for fact in facts]),
            "text": ("fact", list(facts.texts.values())),
            "n_tokens": ("fact", n_tokens),
            "other_relation": ("other", [fact.relation for fact in others]),
            "other_answer": ("other", [fact.answer for fact in others]),
            "other_text": ("other", list(others.texts.values())),
        },
        attrs=attrs,
    )


def _started(out: str | Path | None, resume: bool, settings: dict[str, Any]) -> xr.Dataset | None:
    """What lies at `out` and was made with the same settings; None where there is nothing to go on with."""
    if out is None:
        return None
    folder = Path(out)
    check_replaceable(folder, kind="harm")
    if not resume or kind_of(folder) is None:
        return None
    stored = open_result(folder).load()
    was = {name: stored.attrs.get(name) for name in settings}
    differing = [name for name, now in settings.items() if was[name] != now]
    if differing:
        raise ValueError(
            f"{folder} holds a result with other settings, it differs in {', '.join(differing)}: choose another out=, "
            "or start anew with resume=False (--no-resume)."
        )
    return stored

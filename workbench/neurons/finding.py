"""Which units a fact's prompts agree on: thresholds and sharing, after Knowledge Neurons (arXiv 2104.08696)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from tqdm import tqdm

from workbench.attribution import FIXED, attribute
from workbench.facts import FactSet
from workbench.models import HookedModel, check_unit
from workbench.results import check_asked, check_made_with
from workbench.selection import Selection

FACTS_AT_ONCE = 16
STEP = 0.05  # by which the paper raises or lowers the share of prompts
COLUMNS = ["fact", "relation", "kind", "layer", "unit", "score", "share", "n_prompts", "threshold", "needed"]


def knowledge_neurons(
    model: HookedModel,
    facts: FactSet,
    *,
    threshold: float | int = 0.2,
    share: float | int = 0.7,
    adaptive: bool = True,
    number: tuple[float | int, float | int] = (2, 5),
    method: str | None = None,
    unit: str = "neuron",
    attribution: xr.Dataset | None = None,
    progress: bool = True,
    **options: Any,
) -> pd.DataFrame:
    """Find the units to which the prompts of a fact agree to attribute its answer (Knowledge Neurons, section 3).

    Every prompt of a fact (the prompt and its paraphrases) keeps the units whose attribution is above `threshold` times
    the largest one; the fact keeps the units that at least a share of its prompts keep. With `adaptive`, that share
    starts at `share` and is raised or lowered by 0.05 at a time, for each relation, until the mean number of units per
    fact lies within `number`, as in the paper; where no share reaches the range, the one that comes closest is taken,
    of equals the one closest to `share`.

    Args:
        model: a model from `load_model`.
        facts: the facts; those with several paraphrases are told apart from their wording best.
        threshold: share of a prompt's largest attribution, in (0, 1).
        share: share of a fact's prompts that must agree, in (0, 1].
        adaptive: adapt the share, relation by relation.
        number: the mean number of units per fact that is aimed at.
        method: attribution method; None takes the paper's, `kn`, for neurons, and `ig` for nodes, or that of
            `attribution`.
        unit: `"neuron"` (the paper's) or `"node"`, which has no value vector to erase or edit.
        attribution: scores of `facts.per_prompt()` from before; None computes them, a few facts at a time.
        progress: show a progress bar.
        options: further options of `attribute`; none beside `attribution`.

    Returns:
        Frame with fact, relation, kind ("neuron" or "node"), layer, unit, score (mean attribution over the fact's
        prompts), share (of its prompts that keep the unit), n_prompts, threshold, needed (the share that was asked
        for in the end), the highest score of a fact first. A fact without such units has no rows. `attrs` say how the
        scores were computed.

    Raises:
        ValueError: an option out of range, or an attribution of another model or of other facts.
    """
    check_unit(unit)
    if attribution is not None:
        _check_prompts(model, facts, attribution, unit)
        _check_beside(attribution, method, options)
    method = check_finding(threshold, share, number, method, unit)
    found, attrs = _agreed(model, facts, attribution, threshold, progress, {"method": method, "unit": unit, **options})
    needed = _adapt(facts, found, share, number) if adaptive else dict.fromkeys(facts.relations, share)
    frames = []
    for fact, coarse in zip(facts, found, strict=True):
        kept = coarse[coarse["share"] >= needed[fact.relation] - 1e-9].sort_values(
            ["score", "layer", "unit"], ascending=[False, True, True]
        )
        about = {"fact": fact.id, "relation": fact.relation, "kind": attrs["unit"]}
        frames.append(kept.assign(**about, threshold=threshold, needed=needed[fact.relation])[COLUMNS])
    frame = pd.concat(frames, ignore_index=True)
    frame.attrs = attrs | {"threshold": threshold, "share": share, "adaptive": adaptive, "facts": facts.name}
    return frame


def _agreed(
    model: HookedModel,
    facts: FactSet,
    attribution: xr.Dataset | None,
    threshold: float | int,
    progress: bool,
    options: dict[str, Any],
) -> tuple[list[pd.DataFrame], dict[str, Any]]:
    """The units that some prompt of each fact keeps, and how they were scored; a few facts are attributed at a time."""
    if odd := sorted({"out", "resume", "progress"} & set(options)):
        raise ValueError(f"A few facts are attributed at a time, so {odd[0]} is no option: give attribution= instead.")
    prompts, names = facts.per_prompt(), _prompts(facts)
    found: list[pd.DataFrame] = []
    attrs: dict[str, Any] = {}
    with tqdm(total=len(facts), unit="fact", desc="neurons", disable=not progress) as bar:
        for start in range(0, len(facts), FACTS_AT_ONCE):
            some = [names[fact.id] for fact in facts[start : start + FACTS_AT_ONCE]]
            wanted = [prompt for ids in some for prompt in ids]
            if attribution is None:
                own = prompts.filter(ids=wanted)
                scores = attribute(model, own, progress=False, **options)
            else:
                scores = attribution.sel(fact=wanted)
            attrs = {name: value for name, value in scores.attrs.items() if name != "fact_digest"}
            found += [_coarse(scores, ids, threshold) for ids in some]
            bar.update(len(some))
    return found, attrs


def selection_of(model: HookedModel, neurons: pd.DataFrame) -> Selection:
    """The units of a frame of `knowledge_neurons` as one `Selection`; rows of one fact or of several.

    Raises:
        ValueError: no rows, units of two kinds, or units that the model does not have.
    """
    missing = [name for name in ("kind", "layer", "unit") if name not in neurons]
    if missing or neurons.empty:
        what = f"the column {missing[0]!r}" if missing else "a row"
        raise ValueError(f"The frame of knowledge neurons lacks {what}: give what knowledge_neurons returns.")
    kinds = sorted(set(neurons["kind"]))
    if len(kinds) > 1:
        raise ValueError(f"The frame has units of two kinds, {' and '.join(kinds)}: give one kind at a time.")
    positions: list[list[int]] = [[] for _ in range(model.n_layers)]
    for layer, unit in sorted(set(zip(neurons["layer"], neurons["unit"], strict=True))):
        if not 0 <= layer < model.n_layers:
            raise ValueError(f"The frame names layer {layer}, but {model.name} has {model.n_layers} layers.")
        positions[int(layer)].append(int(unit))
    found = Selection.from_positions(positions, unit=kinds[0], n_units=model.width(kinds[0]))
    facts = [str(fact) for fact in neurons["fact"].unique()] if "fact" in neurons else []
    return Selection(found.mask, found.unit, {"knowledge_neurons": facts})


def _coarse(scores: xr.Dataset, ids: Sequence[str], threshold: float) -> pd.DataFrame:
    """The units that at least one prompt keeps: layer, unit, score (mean), share, n_prompts."""
    values = scores["score"].sel(fact=list(ids)).transpose("fact", "layer", "unit").values
    largest = values.max(axis=(1, 2), keepdims=True)
    kept = (values > threshold * largest) & (largest > 0)
    layers, units = np.nonzero(kept.any(0))
    return pd.DataFrame(
        {
            "layer": scores["layer"].values[layers].astype(int),
            "unit": scores["unit"].values[units].astype(int),
            "score": values[:, layers, units].mean(0, dtype=np.float64),
            "share": kept[:, layers, units].mean(0),
            "n_prompts": len(ids),
        }
    )


def _adapt(
    facts: FactSet, found: Sequence[pd.DataFrame], share: float | int, number: tuple[float | int, float | int]
) -> dict[str, float]:
    """For each relation the share of prompts that brings the mean number of units closest to the range."""
    needed = {}
    for relation in facts.relations:
        own = [coarse for fact, coarse in zip(facts, found, strict=True) if fact.relation == relation]
        needed[relation] = adapted_share([coarse["share"].to_numpy() for coarse in own], share, number)
    return needed


def adapted_share(shares: Sequence[np.ndarray], start: float | int, number: tuple[float | int, float | int]) -> float:
    """Walk from `start` in steps of 0.05 until the mean count of shares that reach it lies within `number`.

    The walk goes up while there are too many and down while there are too few, and ends at 1, at 0.05 or where it
    would turn back; then the share whose count is closest to the range is taken, the closest to `start` of equals.

    >>> adapted_share([np.array([1.0, 0.5, 0.25])], 0.7, (2, 5))
    0.5
    """

    def miss(share: float) -> float:
        mean = sum(int((one >= share - 1e-9).sum()) for one in shares) / len(shares)
        return mean - number[1] if mean > number[1] else min(mean - number[0], 0.0)

    first = miss(start)
    walk = [start]
    for step in range(1, int(1 / STEP) + 1):
        share = round(start + step * STEP * np.sign(first), 10)
        if not first or not STEP <= share <= 1:
            break
        walk.append(share)
        if miss(share) * first <= 0:
            break
    return float(min(walk, key=lambda share: (abs(miss(share)), abs(share - start))))


def _prompts(facts: FactSet) -> dict[str, list[str]]:
    """The ids of the prompts of every fact."""
    ids: dict[str, list[str]] = {fact.id: [] for fact in facts}
    for prompt in facts.per_prompt().ids:
        ids[prompt.rpartition("#")[0]].append(prompt)
    return ids


def _check_prompts(model: HookedModel, facts: FactSet, attribution: xr.Dataset, unit: str) -> None:
    """Refuse an attribution of another model or without the prompts of these facts."""
    if "score" not in attribution or "unit" not in attribution.attrs:
        raise ValueError("attribution= takes what attribute(model, facts.per_prompt()) returns.")
    check_made_with(attribution, model.digest, model.name)
    if attribution.attrs["unit"] != unit:
        raise ValueError(f"The attribution is of {attribution.attrs['unit']}s, not of {unit}s; say so with unit=.")
    missing = sorted(set(facts.per_prompt().ids) - {str(one) for one in attribution["fact"].values})
    if missing:
        raise ValueError(f"The attribution has no prompt {missing[0]!r}: attribute facts.per_prompt().")
    check_asked(attribution, facts.per_prompt().texts)


def _check_beside(attribution: xr.Dataset, method: str | None, options: Mapping[str, Any]) -> None:
    """Refuse options that an attribution from before cannot follow."""
    if options:
        raise ValueError(
            f"The scores of attribution= are made, so {min(options)} is no option beside it: leave one out."
        )
    made = attribution.attrs.get("method", "unknown")
    if method is not None and made not in ("unknown", method):
        raise ValueError(f"The attribution is by {made}, not by {method}; leave method out, or attribute by {method}.")


def check_finding(
    threshold: float | int,
    share: float | int,
    number: tuple[float | int, float | int] = (2, 5),
    method: str | None = None,
    unit: str = "neuron",
) -> str:
    """The method that is used, where none is named; or one sentence about the first option that is wrong."""
    if not 0 < threshold < 1:
        raise ValueError(f"threshold is {threshold}: give a share of the largest attribution, between 0 and 1.")
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}: give a share of a fact's prompts, above 0 and at most 1.")
    if not 0 < number[0] <= number[1]:
        raise ValueError(f"number is {number}: give the smallest and the largest mean number of units, as in (2, 5).")
    if method is None:
        return "kn" if unit == "neuron" else "ig"
    if method not in FIXED:
        raise ValueError(f"method must be one of {', '.join(FIXED)}, not {method!r}.")
    if FIXED[method].get("unit", unit) != unit:
        raise ValueError(f"{method} is defined for {FIXED[method]['unit']}s; use method='ig' for {unit}s.")
    return method

"""Is a score right about which units matter? Zero the lowest, the highest and random ones, and read other facts.

The test of LoKI (arXiv 2505.22120), which zeroes the 1% of units with the highest and the lowest attribution.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from workbench.facts import FactSet
from workbench.intervals import means
from workbench.models import HookedModel
from workbench.results import Parts, check_made_with, digest_of
from workbench.selection import Selection, select
from workbench.suppression.reading import compare, scaled

#: (strategy, group) -> the strategy of `select` that chooses the units.
GROUPS = {
    ("layer_balanced", "lowest"): "layer_balanced",
    ("layer_balanced", "highest"): "layer_highest",
    ("layer_balanced", "random"): "random",
    ("global", "lowest"): "global_lowest",
    ("global", "highest"): "global_highest",
    ("global", "random"): "global_random",
}


KEYS = ["suite", "metric", "fact", "weight"]  # of one reading
COLUMNS = ["method", "unit", "strategy", "score", "group", "quota", "seed", "n_units", "suite", "metric", "n", "before",
           "after", "change", "low", "high", "draws", "bootstrap_seed"]  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One choice of units: how it was made, and the units."""

    strategy: str
    score: str
    group: str
    quota: float
    seed: int | None
    selection: Selection


def suppression_curve(
    model: HookedModel,
    attribution: xr.Dataset,
    facts: FactSet,
    *,
    quotas: Sequence[float | int] = (0.5, 1.0, 5.0),
    groups: Sequence[str] = ("lowest", "random", "highest"),
    scores: Sequence[str] = ("signed", "magnitude"),
    strategies: Sequence[str] = ("layer_balanced", "global"),
    seeds: Sequence[int] = (0, 1, 2),
    factor: float | int = 0.0,
    general: Sequence[str] | None = None,
    max_tokens: int = 3000,
    overlap: str = "refuse",
    draws: int = 2000,
    seed: int = 0,
    parts: str | Path | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Zero units chosen by an attribution, and read held-out facts and general text, with bootstrap intervals.

    Args:
        model: the model that was attributed.
        attribution: the result of `attribute` by which units are chosen.
        facts: held-out facts, which the attribution has not seen.
        quotas: shares of the units that are zeroed, in percent.
        groups: `"lowest"` and `"highest"` scores, and `"random"` units, which look at no score.
        scores: sign policies: `"signed"` ranks scores, `"magnitude"` their absolute values.
        strategies: `"layer_balanced"` zeroes the same number in every layer, `"global"` ranks all layers together.
        seeds: of the random units.
        factor: what activations are multiplied by.
        general: passages of plain text; None reads none.
        max_tokens: read at most this many tokens of them.
        overlap: what to do with facts that the attribution has seen, itself or as a prompt of `per_prompt`:
            `"refuse"`, `"drop"` them, or `"read"` them all the same.
        draws: of the bootstrap over facts or pieces of text.
        seed: of the bootstrap.
        parts: folder in which readings are kept as they are made; a second call goes on there.
        progress: show a progress bar.

    Returns:
        Frame with method, unit, strategy, score, group, quota (percent), seed, n_units (zeroed), suite, metric, n,
        before, after, change, low, high (of the change), draws, bootstrap_seed; metrics as in `means`. `seed` is the
        seed of random units; a row of random units without one is the mean over seeds, fact by fact. Random units do
        not depend on the sign policy: their numbers are repeated under each. The groups "lowest vs random" and
        "highest vs random" compare the same facts under both, random first: `change` below zero in accuracy says that
        more was lost than with as many random units.

    Raises:
        ValueError: an attribution of another model, held-out facts that it has seen, an unknown option, or a quota of
            less than one unit; all before anything is read.
    """
    if isinstance(general, str):
        raise ValueError("general is one text; give a list of passages.")
    _check_choices(groups, strategies, quotas, scores, seeds)
    if draws < 1:
        raise ValueError(f"A bootstrap needs at least one draw, not {draws}.")
    check_made_with(attribution, model.digest, model.name)
    facts = held_out(facts, attribution, overlap)
    tokens = model.tokenise(facts)
    points = choices(attribution, quotas, groups, scores, strategies, seeds)
    different = list(dict.fromkeys(point.selection for point in points))
    interventions = [scaled(model, selection, factor) for selection in different]
    settings = {
        "model": model.digest, "facts": facts.digest, "unit": attribution.attrs["unit"],
        "units": digest_of([one.positions() for one in different]),
        "factor": factor, "text": digest_of(list(general or [])), "max_tokens": max_tokens,
    }  # fmt: skip
    texts: dict[str, Any] = {"general": general, "max_tokens": max_tokens}
    kept = Parts(parts, settings)
    read = compare(model, interventions, {"facts": tokens}, **texts, parts=kept, progress=progress)
    about = {"method": str(attribution.attrs.get("method", "")), "unit": str(attribution.attrs["unit"])}
    return _table(points, dict(zip(different, read, strict=True)), draws, seed).assign(**about)[COLUMNS]


def _table(points: Sequence[Point], found: dict[Selection, pd.DataFrame], draws: int, seed: int) -> pd.DataFrame:
    """Every choice of units with its numbers, over all seeds and seed by seed, and beside random units."""
    frames, pools = [], {}
    for place, group in _same_but_seed(points):
        pooled = _pooled([found[point.selection] for point in group])
        readings = [(None, pooled), *((one.seed, found[one.selection]) for one in group if one.seed is not None)]
        n_units = group[0].selection.n_selected
        frames += [_numbers(place, drawn, n_units, frame, draws, seed) for drawn, frame in readings]
        pools[tuple(place.values())] = (n_units, pooled)
    for (strategy, score, name, quota), (n_units, pooled) in pools.items():
        random = pools.get((strategy, score, "random", quota))
        if random is not None and name != "random":
            both = pooled.assign(before=random[1]["after"])
            place = {"strategy": strategy, "score": score, "group": f"{name} vs random", "quota": quota}
            frames.append(_numbers(place, None, n_units, both, draws, seed))
    return pd.concat(frames, ignore_index=True)


def _pooled(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Means over seeds, fact by fact, so that intervals are over facts."""
    return pd.concat(frames).groupby(KEYS, sort=False)[["before", "after"]].mean().reset_index()


def _numbers(
    place: dict[str, str | float], drawn: int | None, n_units: int, frame: pd.DataFrame, draws: int, seed: int
) -> pd.DataFrame:
    """Means with intervals of one choice of units."""
    numbers = means(frame, draws=draws, seed=seed).assign(draws=draws, bootstrap_seed=seed)
    labels = place | {"seed": pd.NA if drawn is None else drawn, "n_units": n_units}
    return pd.DataFrame({**labels, **dict(numbers)}).astype({"seed": "Int64"})


def held_out(facts: FactSet, attribution: xr.Dataset, overlap: str = "refuse") -> FactSet:
    """The facts that an attribution has not seen: neither their id, as such or as `<id>#<prompt>`, nor their text.

    Raises `ValueError` if it has seen some and `overlap` is "refuse", or all of them and it is "drop".
    """
    if overlap not in ("refuse", "drop", "read"):
        raise ValueError(f'overlap must be "refuse", "drop" or "read", not {overlap!r}.')
    ids = [str(name) for name in attribution["fact"].values]
    used = {*ids, *(name.rpartition("#")[0] for name in ids)}
    named = [name for name in ("text", "prompt_text") if name in attribution.coords]
    texts = {str(text) for name in named for text in np.ravel(attribution[name].values)}
    seen = [fact.id for fact in facts if fact.id in used or fact.digest in texts]
    if not seen or overlap == "read":
        return facts
    if overlap == "refuse":
        raise ValueError(
            f"{len(seen)} of the {len(facts)} facts to be read were used for the attribution, {seen[0]!r} first: "
            'give held-out facts, leave these out with overlap="drop", or read them all the same with overlap="read".'
        )
    known = set(seen)
    left = facts.filter(where=lambda fact: fact.id not in known)
    if not len(left):
        raise ValueError(f"All {len(facts)} facts to be read were used for the attribution: give held-out facts.")
    return left


def choices(
    attribution: xr.Dataset,
    quotas: Sequence[float | int],
    groups: Sequence[str],
    scores: Sequence[str],
    strategies: Sequence[str],
    seeds: Sequence[int],
) -> list[Point]:
    """Every choice of units, random ones once a seed."""
    points = []
    for strategy in strategies:
        for score in scores:
            for group in groups:
                for quota in quotas:
                    for drawn in seeds if group == "random" else [None]:
                        name = GROUPS[strategy, group]
                        found = select(attribution, strategy=name, quota=quota, score=score, seed=drawn or 0)
                        points.append(Point(strategy, score, group, float(quota), drawn, found))
    return points


def _same_but_seed(points: Sequence[Point]) -> list[tuple[dict[str, str | float], list[Point]]]:
    """The choices that differ only in their seed, together."""
    groups: dict[tuple[str, str, str, float], list[Point]] = {}
    for point in points:
        groups.setdefault((point.strategy, point.score, point.group, point.quota), []).append(point)
    names = ("strategy", "score", "group", "quota")
    return [(dict(zip(names, key, strict=True)), group) for key, group in groups.items()]


def _check_choices(
    groups: Sequence[str],
    strategies: Sequence[str],
    quotas: Sequence[float | int],
    scores: Sequence[str],
    seeds: Sequence[int],
) -> None:
    known = {"strategies": (strategies, 0), "groups": (groups, 1)}
    for name, (given, place) in known.items():
        allowed = list(dict.fromkeys(key[place] for key in GROUPS))
        wrong = [one for one in given if one not in allowed]
        if wrong:
            raise ValueError(f"{name} knows {', '.join(allowed)}, not {wrong[0]!r}.")
    for name, some in {"quotas": quotas, "groups": groups, "scores": scores, "strategies": strategies}.items():
        if not some or len(set(some)) < len(some):
            raise ValueError(f"{name} must name at least one, each once, not {list(some)}.")
    if "random" in groups and (not seeds or len(set(seeds)) < len(seeds)):
        raise ValueError(f"Random units need seeds, each once, not {list(seeds)}.")

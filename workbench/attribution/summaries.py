"""An attribution in few numbers: by layer, the strongest units, one score a fact from several prompts."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from workbench.facts import FactSet, relation_label
from workbench.intervals import interval


def by_layer(attribution: xr.Dataset, *, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Mean |score| per layer over facts, with 95% bootstrap intervals, for all facts and for every relation.

    Columns layer, relation ("all" for every fact; a relation of that name is "all (relation)", facts without one are
    "(no relation)"), mean_abs, low, high, n (facts).
    """
    per_fact = np.stack([np.abs(attribution["score"][i].values).mean(-1) for i in range(attribution.sizes["fact"])])
    relations = attribution["relation"].values
    frames = []
    parts = [(relation_label(str(name)), per_fact[relations == name]) for name in sorted(set(relations))]
    for relation, values in [("all", per_fact), *parts]:
        low, high = interval(values, draws=draws, seed=seed)
        columns = {"layer": attribution["layer"].values, "relation": relation, "mean_abs": values.mean(0)}
        frames.append(pd.DataFrame({**columns, "low": low, "high": high, "n": len(values)}))
    return pd.concat(frames, ignore_index=True)


def strongest(attribution: xr.Dataset, facts: FactSet, *, top: int = 12) -> pd.DataFrame:
    """The units with the largest |score| of every fact: columns fact, label, rank (from 1), layer, unit, score.

    Ties go to the lower layer, then the lower unit.
    """
    rows: list[dict[str, Any]] = []
    n_units = attribution.sizes["unit"]
    for fact_id in attribution["fact"].values:
        fact = facts[str(fact_id)]
        score = attribution["score"].sel(fact=fact_id).values.ravel()
        for rank, index in enumerate(np.argsort(-np.abs(score), kind="stable")[:top], start=1):
            layer, unit = divmod(int(index), n_units)
            rows.append({"fact": fact.id, "label": f"{fact.prompt} → {fact.answer}", "rank": rank, "layer": layer,
                         "unit": unit, "score": float(score[index])})  # fmt: skip
    return pd.DataFrame(rows)


def by_fact(attribution: xr.Dataset) -> xr.Dataset:
    """One score a fact from the attribution of several of its prompts (`FactSet.per_prompt`): means over prompts.

    The result has the facts in the order in which they first appear, `n_prompts` (fact,), and `prompt_text` (fact,
    prompt), what tells their prompts from others.

    Raises:
        ValueError: a fact id that is not `<id>#<number>`.
    """
    return xr.concat(list(fact_means(attribution)), "fact")


def fact_means(attribution: xr.Dataset, at_once: int = 32) -> Iterator[xr.Dataset]:
    """What `by_fact` gives, a few facts at a time, so that a stored attribution of any size can be averaged."""
    ids = [str(name) for name in attribution["fact"].values]
    odd = [name for name in ids if not name.rpartition("#")[2].isdigit() or not name.rpartition("#")[0]]
    if odd:
        raise ValueError(f"{odd[0]!r} is no prompt of a fact: attribute facts.per_prompt() for a score per prompt.")
    owned: dict[str, list[int]] = {}
    for row, name in enumerate(ids):
        owned.setdefault(name.rpartition("#")[0], []).append(row)
    most = max(map(len, owned.values()))
    about = attribution.attrs | {"aggregate": "mean over prompts"}
    facts = list(owned)
    for start in range(0, len(facts), at_once):
        parts = [_mean(attribution.isel(fact=owned[fact]), fact, most) for fact in facts[start : start + at_once]]
        yield xr.concat(parts, "fact").transpose("fact", "layer", "unit", ...).assign_attrs(about)


def _mean(prompts: xr.Dataset, fact: str, most: int) -> xr.Dataset:
    """The mean over the prompts of one fact; their texts are padded to as many as the fact with `most` has."""
    mean = prompts[["score", "gap", "target_prob"]].mean("fact", keep_attrs=True).expand_dims("fact")
    coords: dict[str, Any] = {"fact": [fact], "relation": ("fact", [str(prompts["relation"].values[0])])}
    if "text" in prompts.coords:
        texts = [str(text) for text in prompts["text"].values]
        coords["prompt_text"] = (("fact", "prompt"), [texts + [""] * (most - len(texts))])
    return mean.assign_coords(coords).assign(n_prompts=("fact", [prompts.sizes["fact"]]))

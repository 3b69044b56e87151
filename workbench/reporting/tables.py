"""From a run's artefacts to the small tidy frames behind its figures, each number with a 95% interval."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import xarray as xr

from workbench.facts import relation_label
from workbench.intervals import interval, wilson
from workbench.selection import Selection


def recall_by_relation(recall: pd.DataFrame) -> pd.DataFrame:
    """Count known and unknown facts per `relation_label` and over all ("all"), with Wilson intervals of the share."""
    groups = [(relation_label(str(name)), rows["known"]) for name, rows in recall.groupby("relation", sort=True)]
    records = []
    for relation, known in [*groups, ("all", recall["known"])]:
        hits, total = int(known.sum()), len(known)
        low, high = wilson(hits, total)
        share = hits / total if total else 0.0
        records.append((relation, hits, total - hits, share, low, high))
    return pd.DataFrame(records, columns=["relation", "known", "unknown", "share", "low", "high"])


def overlap_layers(interference: xr.Dataset, metric: str, most_facts: int = 240, most_layers: int = 6) -> xr.DataArray:
    """Return overlaps (layer, fact, other) without the diagonal: the mean over layers and some layers, evenly spread.

    Facts are ordered by relation, then id; of more than `most_facts` every so many-th is kept. `layer` is text.
    """
    value = interference["value"].sel(metric=metric)
    order = np.lexsort((value["fact"].values.astype(str), value["relation"].values.astype(str)))
    if len(order) > most_facts:
        order = order[np.linspace(0, len(order) - 1, most_facts).round().astype(int)]
    value = value.isel(fact=order, other=order)
    layers = value["layer"].values
    shown = np.unique(np.linspace(0, len(layers) - 1, min(most_layers, len(layers))).round().astype(int))
    total = sum(value.isel(layer=place).values.astype(np.float64) for place in range(len(layers)))
    stacked = np.stack([total / len(layers), *(value.isel(layer=place).values for place in shown)]).astype(np.float32)
    stacked[:, np.arange(len(order)), np.arange(len(order))] = np.nan
    coords = {"layer": ["mean", *(str(layers[place]) for place in shown)], "fact": value["fact"].values}
    made = xr.DataArray(stacked, dims=("layer", "fact", "other"), coords={**coords, "other": value["other"].values})
    return made.assign_coords(relation=("fact", value["relation"].values.astype(str)))


def closest_pairs(overlap: xr.DataArray, top: int = 50) -> pd.DataFrame:
    """Return the pairs of facts with the largest mean overlap over layers: fact, other, same_relation, overlap.

    Two facts without a relation are not of one relation.
    """
    mean = overlap.sel(layer="mean").values
    first, second = np.triu_indices(len(mean), k=1)
    best = np.lexsort((second, first, -mean[first, second]))[:top]
    ids, relations = overlap["fact"].values, overlap["relation"].values
    one, two = first[best], second[best]
    same = (relations[one] == relations[two]) & (relations[one] != "")
    columns = {"fact": ids[one], "other": ids[two], "same_relation": same}
    return pd.DataFrame({**columns, "overlap": mean[one, two]})


def within_across(interference: xr.Dataset, metric: str) -> pd.DataFrame:
    """Return per layer the overlap within and across relations, the difference, its null band, p- and q-value."""
    names = ["within", "across", "difference", "null_low", "null_high", "p_value", "q_value"]
    chosen = interference[[name for name in names if name in interference]].sel(metric=metric, drop=True)
    frame = chosen.to_dataframe().reset_index()
    return frame[["layer", *(name for name in names if name in frame)]]


def related_pairs(interference: xr.Dataset) -> int:
    """Return how many pairs of facts are of one relation; facts without one are of none."""
    counts = pd.Series(interference["relation"].values.astype(str)).value_counts().drop("", errors="ignore")
    return int((counts * (counts - 1) // 2).sum())


def load_and_selection(load: xr.DataArray, selections: Mapping[str, Selection]) -> pd.DataFrame:
    """Return per layer and method how many units are selected, of how many, and their mean load.

    The method "all" stands for every unit. `share` is the part of the layer's load that the selected units carry.
    """
    values = load.transpose("layer", "unit").values.astype(np.float64)
    masks = {"all": np.ones(values.shape, dtype=bool), **{name: s.mask.values for name, s in selections.items()}}
    frames = []
    for method, mask in masks.items():
        if mask.shape != values.shape:
            raise ValueError(f"The selection of {method} has shape {mask.shape}, the load {values.shape}: run again.")
        count, carried, total = mask.sum(axis=1), (values * mask).sum(axis=1), values.sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            columns = {"load": carried / count, "share": carried / total}
        place = {"layer": load["layer"].values, "method": method, "selected": count, "units": values.shape[1]}
        frames.append(pd.DataFrame({**place, **columns}))
    return pd.concat(frames, ignore_index=True)


def drift_summary(drift: pd.DataFrame) -> pd.DataFrame:
    """Return the mean over facts of before, after and change per method, group, metric and layer, with an interval.

    The layer of metrics without one is -1.
    """
    rows = drift.assign(layer=drift["layer"].astype("Int64").fillna(-1).astype(int))
    frames = []
    for (method, group, metric), part in rows.groupby(["method", "group", "metric"], sort=False):
        wide = part.pivot(index="fact", columns="layer", values=["before", "after", "change"])
        change = wide["change"].dropna()
        means = wide.loc[change.index].mean()
        low, high = interval(change.to_numpy()) if len(change) else (np.nan, np.nan)
        place = {"method": method, "group": group, "metric": metric, "layer": change.columns.to_numpy()}
        found = {name: means[name].to_numpy() for name in ("before", "after", "change")}
        frames.append(pd.DataFrame({**place, "n": len(change), **found, "low": low, "high": high}))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def kept(forgetting: pd.DataFrame) -> pd.DataFrame:
    """Return per method the share of retained facts, right before, that are still right, with Wilson intervals."""
    records = []
    for method, rows in _accuracy(forgetting, "retained").groupby("method", sort=False):
        right = rows[rows["before"] > 0.5]
        hits = int((right["after"] > 0.5).sum())
        if len(right):
            records.append((method, hits, len(right), hits / len(right), *wilson(hits, len(right))))
    return pd.DataFrame(records, columns=["method", "hits", "total", "share", "low", "high"])


def paired_difference(forgetting: pd.DataFrame, suite: str, first: str, second: str) -> dict[str, int | float] | None:
    """Return the difference (first minus second) of the share right after, over shared facts, with a paired interval.

    Facts that the base model did not answer are left out of `retained` and `neighbourhood`. None without shared facts.
    """
    rows = _accuracy(forgetting, suite)
    if suite in ("retained", "neighbourhood"):
        rows = rows[rows["before"] > 0.5]
    wide = (
        rows[rows["method"].isin([first, second])].pivot_table(index="fact", columns="method", values="after").dropna()
    )
    if first not in wide or second not in wide or wide.empty:
        return None
    change = (wide[first] - wide[second]).to_numpy()
    low, high = interval(change)
    return {"n": len(change), "difference": float(change.mean()), "low": float(low), "high": float(high)}


def _accuracy(forgetting: pd.DataFrame, suite: str) -> pd.DataFrame:
    return forgetting[(forgetting["suite"] == suite) & (forgetting["metric"] == "accuracy")]

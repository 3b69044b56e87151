"""`attribute_drift`: which trained weights moved a fact, by putting them back and measuring what comes back."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor, nn
from tqdm import tqdm

from workbench.facts import FactSet, TokenisedFact
from workbench.intervals import DRAWS, SEED, interval
from workbench.metrics import logprob
from workbench.models import HookedModel, pad_batch
from workbench.opening import check_comparable, hooked_among, open_model
from workbench.recollection import by_length
from workbench.results import check_asked, check_made_with
from workbench.selection import Selection
from workbench.semantics.distance import soft_of_answers
from workbench.semantics.leaning import leaned_and_matched, magnitudes, sizes
from workbench.semantics.reverting import (
    Change,
    changed_units,
    changes,
    check_fits,
    check_same_weights,
    elsewhere,
    partly_reverted,
    reverted,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where facts stand: log P(answer) in nats, `d_soft`, and the last hidden state at the last prompt token."""

    logprob: Float[Tensor, " fact"]
    soft: Float[Tensor, " fact"]
    state: Float[Tensor, "fact d_model"]


def attribute_drift(
    before: Any,
    after: Any,
    facts: FactSet,
    attribution: xr.Dataset | None = None,
    selection: Selection | None = None,
    *,
    share: float = 0.25,
    draws: int = 5,
    seed: int = SEED,
    tokenizer: Any = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Revert trained units to the base, layer by layer, and measure how much of each fact's drift comes back.

    The trained units are those of the down-projections that differ between the models (see `changed_units`), or those
    of `selection`. Rows of `units`:

    - `trained`: all trained units of the layer (of all layers where `layer` is missing). The weights themselves are
      reverted and put back to the bit, so what comes back is exact.
    - `leaned`: the `share` of the layer's trained units with the fact's largest |score| in `attribution`.
    - `paired`: those of them that have partners among the other trained units, whose change is of like size for this
      fact: what the change of their weights adds to the layer's output at the last prompt token (nodes: |change|;
      neurons: |activation| times the length of the changed value vector).
    - `matched`: as many of these others, drawn at random in bins of like size, `draws` times, by `seed`. Scores that
      say nothing make no difference between the two (see `paired_and_matched`).

    `leaned`, `paired` and `matched` differ from fact to fact, so they are reverted in the layer's output, which equals
    reverting the weights up to rounding. Units interact: the shares of layers need not add up to that of all layers,
    and what other weights did (embeddings, attention, up-projections; counted in the log and in `attrs["elsewhere"]`)
    does not come back here.

    Rows of `metric`: with D the drift (after - before) and B what comes back (after - reverted), `logprob` (nats) and
    `d_soft` (the semantic distance, in the embedding of `before`, as `measure_drift` has it) have drift = D, back = B
    and share = B/D; `state` (the last hidden state at the last prompt token) has drift = |D|, share = <B, D>/|D|^2 and
    back = share * drift. Reverting nothing gives 0, reverting every weight that differs 1. The share is missing where
    the drift is 0, and where no unit has a partner; average it with weights |drift|, as `drift_shares` does.

    Returns:
        Frame with fact, relation, layer, units, draw, n_units, size (mean over these units), metric, drift, back,
        share, seed.

    Raises:
        ValueError: nothing differs, weights of other names, shapes or types, or an attribution or selection that does
            not fit.
    """
    if not 0 < share <= 0.5 or draws < 1:
        raise ValueError(f"share is {share} and draws is {draws}: give a share above 0, up to 0.5, and a draw or more.")
    first = open_model(before, beside=hooked_among(after), tokenizer=tokenizer)
    second = open_model(after, beside=first, tokenizer=tokenizer)
    check_comparable(first, second)
    check_same_weights(first, second)
    tokens = first.tokenise(facts)
    if attribution is not None:
        check_asked(attribution, facts.texts)
        of_second = attribution.attrs.get("model_digest") == second.digest
        check_made_with(attribution, (second if of_second else first).digest, f"{first.name} or {second.name}")
    units = _units(first, second, attribution, selection)
    scores = None if attribution is None else magnitudes(attribution, facts, units)
    by_layer = changes(first, second, units)
    other = elsewhere(first, second, units)
    if not any(change.differs for change in by_layer.values()) and (selection is None or not other):
        raise ValueError(
            f"No down-projection of {second.name} differs from {first.name}: there are no trained units to revert."
        )
    if not by_layer:
        raise ValueError("The selection has no units: leave it out to revert all that differ.")
    if other:
        log.warning("%d weights beyond these units differ too (%s, ...); they are not reverted.", len(other), other[0])
    size = sizes(second, tokens, by_layer)
    chosen = {} if scores is None else leaned_and_matched(scores, size, by_layer, share, draws, seed)
    start, end = (place_facts(model, tokens, first.W_E) for model in (first, second))
    trial = _Trial(first, second, tokens, units, by_layer, size, start, end)
    labels = pd.DataFrame({"fact": facts.ids, "relation": [fact.relation for fact in facts]})
    rows: list[pd.DataFrame] = []
    sets = [*((layer, [layer]) for layer in by_layer), (pd.NA, list(by_layer))]
    for layer, layers in tqdm(sets, unit="layer", desc="blame", disable=not progress):
        place = labels.assign(layer=layer)
        rows += trial.trained(place.assign(units="trained", draw=pd.NA), layers)
        for (name, draw), masks in chosen.items():
            own = {key: masks[key] for key in layers if key in masks}
            rows += trial.partly(place.assign(units=name, draw=draw), own) if own else []
    frame = pd.concat([one.astype({"layer": "Int64", "draw": "Int64"}) for one in rows], ignore_index=True)
    frame = frame.assign(seed=seed)
    frame.attrs = {"unit": units.unit, "elsewhere": len(other), "share": share, "draws": draws, "seed": seed}
    return frame


def drift_shares(frame: pd.DataFrame, *, draws: int = DRAWS, seed: int = SEED) -> pd.DataFrame:
    """The share of the facts' drift that comes back, per layer, units and metric, with intervals over facts.

    Shares are averaged with weights |drift|, so that what did not move counts for little. Matched draws are averaged
    within a fact first; `difference` is paired - matched of the same fact. Columns: layer, units, metric, n
    (facts that drifted and have such units), n_units and size (means over these facts), share, low, high (95% bootstrap
    over facts; missing where n is below 2).
    """
    records = []
    for (layer, metric), rows in frame.groupby(["layer", "metric"], sort=False, dropna=False):
        drift = rows.groupby("fact", sort=False)["drift"].first().abs()
        drift = drift[drift > 0]
        shares = rows.groupby(["units", "fact"], sort=False)["share"].mean().unstack("units").reindex(drift.index)
        if {"paired", "matched"} <= set(shares):
            shares["difference"] = shares["paired"] - shares["matched"]
        about = rows[rows["share"].notna()].groupby("units")[["n_units", "size"]].mean()
        for units in shares if len(drift) else []:
            there = shares[units].notna()
            values, weights = (of[there].to_numpy(np.float64) for of in (shares[units], drift))
            told = [np.nan] * 3
            if len(values):
                told[0] = float(np.average(values, weights=weights))
            if len(values) > 1:
                told[1:] = map(float, interval(values, weights, draws=draws, seed=seed))
            found = about.loc[units].tolist() if units in about.index else [np.nan, np.nan]
            records.append((layer, units, metric, len(values), *found, *told))
    columns = ["layer", "units", "metric", "n", "n_units", "size", "share", "low", "high"]
    return pd.DataFrame(records, columns=columns).astype({"layer": "Int64"})


def place_facts(
    model: HookedModel,
    tokens: Sequence[TokenisedFact],
    W_E: Float[Tensor, "d_vocab d_embed"],
    around: Callable[[list[int]], AbstractContextManager[None]] = lambda rows: nullcontext(),
) -> Place:
    """Read where every fact stands, by the distances of one embedding, each batch inside `around(its facts)`."""
    found, soft = torch.zeros(2, len(tokens), dtype=torch.float64)
    states = torch.zeros(len(tokens), model.d_model)
    for indices in by_length([len(fact.ids) for fact in tokens]):
        ids, mask = pad_batch([tokens[i].ids[:-1] for i in indices], side="left")
        lengths = torch.tensor([len(tokens[i].answer_ids) for i in indices])
        kept: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any, kept: list[Tensor] = kept) -> None:
            kept.append(output if isinstance(output, Tensor) else output[0])

        handle = model.block(model.n_layers - 1).register_forward_hook(keep)
        try:
            with around(indices):
                logits = model.logits(ids, mask, last=int(lengths.max()))
        finally:
            handle.remove()
        states[indices] = kept[0][torch.arange(len(indices)), -lengths].float().cpu()
        soft[indices] = soft_of_answers(logits, [tokens[i].answer_ids for i in indices], W_E)
        for row, i in enumerate(indices):
            gold = torch.tensor(tokens[i].answer_ids, device=logits.device)
            found[i] = logprob(logits[row, -len(gold) :], gold).double().sum().cpu()
    return Place(found, soft, states)


@dataclass(frozen=True)
class _Trial:
    """Two models, the trained units, and where every fact stood before and after."""

    before: HookedModel
    after: HookedModel
    tokens: Sequence[TokenisedFact]
    units: Selection
    by_layer: dict[int, Change]
    size: dict[int, Float[Tensor, "fact chosen"]]
    start: Place
    end: Place

    def trained(self, labels: pd.DataFrame, layers: list[int]) -> list[pd.DataFrame]:
        """All trained units of some layers, reverted in the weights."""
        inside = xr.DataArray(np.isin(np.arange(self.units.n_layers), layers), dims="layer")
        with reverted(self.after, self.before, Selection(self.units.mask & inside, self.units.unit)):
            found = place_facts(self.after, self.tokens, self.before.W_E)
        return self._rows(labels, found, {key: torch.ones_like(self.size[key], dtype=torch.bool) for key in layers})

    def partly(self, labels: pd.DataFrame, masks: dict[int, Bool[Tensor, "fact chosen"]]) -> list[pd.DataFrame]:
        """Other units for every fact, reverted in the layer's output."""

        def around(rows: list[int]) -> AbstractContextManager[None]:
            return partly_reverted(self.after, self.by_layer, {layer: mask[rows] for layer, mask in masks.items()})

        return self._rows(labels, place_facts(self.after, self.tokens, self.before.W_E, around), masks)

    def _rows(
        self, labels: pd.DataFrame, found: Place, masks: dict[int, Bool[Tensor, "fact chosen"]]
    ) -> list[pd.DataFrame]:
        count = torch.stack([mask.sum(1) for mask in masks.values()]).sum(0)
        total = torch.stack([(self.size[layer] * mask).sum(1) for layer, mask in masks.items()]).sum(0)
        labels = labels.assign(n_units=count.numpy(), size=(total / count).double().numpy())
        none = count == 0
        metrics: list[tuple[str, Tensor, Tensor, Tensor]] = []
        for metric, end, start, now in (
            ("logprob", self.end.logprob, self.start.logprob, found.logprob),
            ("d_soft", self.end.soft, self.start.soft, found.soft),
        ):
            drift, back = end - start, end - now
            metrics.append((metric, drift, back, torch.where((drift == 0) | none, torch.nan, back / drift)))
        moved, returned = (self.end.state - place.state for place in (self.start, found))
        length = moved.double().norm(dim=1)
        part = torch.einsum("fd,fd->f", returned.double(), moved.double()) / length**2
        part = torch.where(none, torch.nan, part)
        return [
            labels.assign(metric=metric, drift=whole.numpy(), back=some.numpy(), share=share.numpy())
            for metric, whole, some, share in (*metrics, ("state", length, part * length, part))
        ]


def _units(
    first: HookedModel, second: HookedModel, attribution: xr.Dataset | None, selection: Selection | None
) -> Selection:
    """The trained units: those given, or those that differ, of the attribution's kind where there is one."""
    if selection is None:
        return changed_units(first, second, None if attribution is None else str(attribution.attrs["unit"]))
    check_fits(selection, second)
    if attribution is not None and attribution.attrs["unit"] != selection.unit:
        raise ValueError(
            f"The attribution is of {attribution.attrs['unit']}s and the selection of {selection.unit}s: give an "
            f"attribution of {selection.unit}s."
        )
    return selection

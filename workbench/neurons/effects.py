"""What a fact's neurons do: its answer, its relation and other relations, beside random units matched on activation."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from workbench.facts import Fact, FactSet, TokenisedFact
from workbench.intervals import means
from workbench.models import HookedModel
from workbench.neurons.editing import answer_tokens, edit, erase
from workbench.neurons.finding import selection_of
from workbench.selection import Selection
from workbench.suppression import Intervention, compare, scaled

#: What is done to activations, by a factor, and to value vectors.
FACTORS = {"suppress": 0.0, "enhance": 2.0}
ACTIONS = (*FACTORS, "erase", "edit")


def effects(
    model: HookedModel,
    facts: FactSet,
    neurons: pd.DataFrame,
    *,
    action: str = "suppress",
    factor: float | int | None = None,
    scope: str = "last",
    answers: Mapping[str, str] | None = None,
    controls: int = 3,
    others: int = 20,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Suppress, enhance, erase or edit the neurons of one fact after the other; read it, its relation and others.

    Beside the neurons stand matched random units: for every neuron one of the same layer, not chosen for the fact, with
    the nearest mean |activation| on the fact's prompts where the intervention acts. With several `controls`, the
    nearest as many units are dealt out in random order, so that no unit stands in two of them.

    Args:
        model: a model from `load_model`; its weights are afterwards what they were, to the bit.
        facts: the facts that are read; each is asked by its prompt, and its own effect by its paraphrases as well.
        neurons: a frame of `knowledge_neurons` about some of these facts.
        action: `"suppress"` (activations times 0), `"enhance"` (times 2), `"erase"` (value vectors set to zero, see
            `erase`) or `"edit"` (value vectors that write another answer, see `edit`).
        factor: another factor for activations.
        scope: of activations: `"last"`, the last prompt token as in the paper, or `"all"` positions. Value vectors act
            at all.
        answers: for `"edit"`, the new answer of every fact whose neurons are given, by its id.
        controls: how many sets of matched units are drawn for every fact.
        others: read at most this many facts of the same relation, and as many of others, drawn by seed.
        seed: of what is drawn.
        progress: show a progress bar.

    Returns:
        Frame with fact (whose neurons), relation, group ("fact", "relation", "others"; of an edit also "new", the new
        answer's first token to the fact's prompts), units ("chosen", "matched"),
        draw (of the matched units; 0 for the chosen), n_units, n (prompts read), before, after, change: mean
        log-probability of the answers in nats. Groups without a fact to read have no rows. `effect_means` summarises.

    Raises:
        ValueError: neurons of facts that are not given, or layers with too few units to match; nodes, or a fact
            without a new answer, where value vectors are to change.
    """
    if action not in ACTIONS:
        raise ValueError(f"action must be one of {', '.join(ACTIONS)}, not {action!r}.")
    if controls < 1 or others < 0 or seed < 0:
        raise ValueError(
            "Effects need controls of at least 1, and others and a seed of at least 0, not "
            f"{controls}, {others} and {seed}."
        )
    if (action == "edit") != (answers is not None):
        raise ValueError('The action "edit", and no other, takes answers: the new answer of every fact, by its id.')
    if action not in FACTORS:
        if factor is not None:
            raise ValueError(f"A factor multiplies activations, but {action!r} changes weights: leave it out.")
        scope = "all"
    strength = FACTORS.get(action, np.nan) if factor is None else factor
    if "fact" not in neurons:
        raise ValueError("The frame of knowledge neurons does not say whose they are: it lacks the column 'fact'.")
    owners = [str(fact) for fact in neurons["fact"].unique()]
    unknown = [fact for fact in owners if fact not in facts.ids]
    if not owners:
        raise ValueError("The frame of knowledge neurons has no rows: there is nothing to suppress or enhance.")
    if unknown:
        raise ValueError(f"The neurons belong to the fact {unknown[0]!r}, which is not among the facts to be read.")
    if lacking := [fact for fact in owners if answers is not None and fact not in answers]:
        raise ValueError(f"The fact {lacking[0]!r} has neurons to edit but no new answer: name it in answers.")
    new = {fact: answer_tokens(model, facts[fact], answers[fact])[1] for fact in owners} if answers else {}
    tokens = {fact.fact_id: fact for fact in model.tokenise(facts)}
    selections = {fact: selection_of(model, neurons[neurons["fact"] == fact]) for fact in owners}
    for chosen in selections.values():
        _check_room(chosen, controls)
    frames = []
    for fact, chosen in tqdm(selections.items(), unit="fact", desc="effects", disable=not progress):
        prompts = model.tokenise(facts.filter(ids=[fact]).per_prompt())
        matched = matched_units(model, chosen, prompts, scope=scope, draws=controls, seed=seed)
        suites = {"fact": prompts, **_beside(facts, facts[fact], tokens, others, seed)}
        if answers:
            suites["new"] = [replace(prompt, answer_ids=(new[fact],)) for prompt in prompts]
        interventions: list[Intervention]
        if action in FACTORS:
            interventions = [scaled(model, selection, strength, scope) for selection in (chosen, *matched)]
        else:
            interventions = [
                partial(_rewritten, model, selection, facts[fact], answers[fact] if answers else None)
                for selection in (chosen, *matched)
            ]
        rows = _mean_rows(compare(model, interventions, suites))
        frames.append(rows.assign(fact=fact, relation=facts[fact].relation, n_units=chosen.n_selected))
    columns = ["fact", "relation", "group", "units", "draw", "n_units", "n", "before", "after", "change"]
    frame = pd.concat(frames, ignore_index=True)[columns]
    frame.attrs = {"action": action, "factor": strength, "scope": scope, "controls": controls, "seed": seed}
    return frame


def _rewritten(
    model: HookedModel, selection: Selection, fact: Fact, answer: str | None, answer_tokens: int
) -> AbstractContextManager[None]:
    """The context in which units are erased, or write another answer."""
    return erase(model, selection) if answer is None else edit(model, fact, selection, answer)


def _mean_rows(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Mean log-probabilities per group: of the chosen units, then of every draw of matched ones."""
    rows = []
    for place, frame in enumerate(frames):
        part = frame[frame["metric"] == "logprob"].groupby("suite", sort=False)
        mean = part[["before", "after", "change"]].mean().assign(n=part.size()).rename_axis("group").reset_index()
        rows.append(mean.assign(units="matched" if place else "chosen", draw=max(place - 1, 0)))
    return pd.concat(rows, ignore_index=True)


def effect_means(frame: pd.DataFrame, *, draws: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Mean effects over facts with bootstrap 95% intervals: of the chosen, of the matched, and of their difference.

    Matched draws are averaged within a fact first; facts are drawn with replacement, chosen and matched together.
    Columns: group, units ("chosen", "matched", "difference"), n (facts), change, low, high (nats), draws, seed.
    """
    per_fact = frame.groupby(["group", "units", "fact"], sort=False)["change"].mean().unstack("units")
    rows = []
    for group, values in per_fact.groupby("group", sort=False):
        named = {
            "chosen": (0.0, values["chosen"]),
            "matched": (0.0, values["matched"]),
            "difference": (values["matched"], values["chosen"]),
        }
        for units, (before, after) in named.items():
            paired = pd.DataFrame({"suite": group, "metric": units, "weight": 1.0, "before": before, "after": after})
            rows.append(means(paired, draws=draws, seed=seed))
    found = pd.concat(rows, ignore_index=True).rename(columns={"suite": "group", "metric": "units"})
    return found.assign(draws=draws, seed=seed)[["group", "units", "n", "change", "low", "high", "draws", "seed"]]


def matched_units(
    model: HookedModel,
    chosen: Selection,
    prompts: Sequence[TokenisedFact],
    *,
    scope: str = "last",
    draws: int = 1,
    seed: int = 0,
) -> list[Selection]:
    """For every chosen unit another of its layer with the nearest mean |activation| on these prompts, `draws` times.

    Ties and the order of the draws are settled by `seed`; no unit is used twice.

    Raises:
        ValueError: a layer with fewer units than that takes.
    """
    _check_room(chosen, draws)
    size = mean_activation(model, chosen.unit, prompts, scope)
    masks = np.zeros((draws, chosen.n_layers, chosen.n_units), dtype=bool)
    for layer in range(chosen.n_layers):
        rows = chosen.rows(layer)
        generator = np.random.default_rng([seed, layer, *rows])
        free = np.setdiff1d(np.arange(chosen.n_units), rows)
        for row in rows:
            distance = np.abs(size[layer, free] - size[layer, row])
            nearest = free[np.lexsort((generator.permutation(free.size), distance))[:draws]]
            for draw, unit in enumerate(generator.permutation(nearest)):
                masks[draw, layer, unit] = True
            free = np.setdiff1d(free, nearest)
    origin = {"matched_to": chosen.origin, "seed": seed}
    return [Selection(chosen.mask.copy(data=mask), chosen.unit, origin | {"draw": i}) for i, mask in enumerate(masks)]


def _check_room(chosen: Selection, draws: int) -> None:
    """Refuse to match the chosen units of a layer more often than its other units allow."""
    for layer in range(chosen.n_layers):
        count = len(chosen.rows(layer))
        if count * (draws + 1) > chosen.n_units:
            raise ValueError(
                f"Layer {layer} has {chosen.n_units} {chosen.unit}s, {count} of them chosen: too few to match "
                f"{draws} times; ask for fewer controls."
            )


def mean_activation(
    model: HookedModel, unit: str, prompts: Sequence[TokenisedFact], scope: str = "last"
) -> Float[np.ndarray, "layer unit"]:
    """Mean |activation| of every unit over prompts, at their last token, or over all their tokens and then prompts."""
    total = torch.zeros(model.n_layers, model.width(unit), dtype=torch.float64)

    def add(layer: int, activation: Float[Tensor, "batch pos unit"]) -> Float[Tensor, "batch pos unit"]:
        seen = activation[0, -1:] if scope == "last" else activation[0]
        total[layer] += seen.abs().cpu().double().mean(0)
        return activation

    def patch(layer: int) -> Callable[[Tensor], Tensor]:
        return lambda activation: add(layer, activation)

    with model.patched(unit, {layer: patch(layer) for layer in range(model.n_layers)}):
        for prompt in prompts:
            model.logits(torch.tensor([prompt.prompt_ids]), last=1)
    return (total / len(prompts)).numpy()


def _beside(
    facts: FactSet, fact: Fact, tokens: dict[str, TokenisedFact], most: int, seed: int
) -> dict[str, list[TokenisedFact]]:
    """Other facts of the relation and of other relations, some of them; a group without facts is left out.

    Facts that do not say their relation share none.
    """
    kin = {one.id for one in facts if one.relation == fact.relation != ""}
    groups = {
        "relation": facts.filter(where=lambda one: one.id in kin and one.id != fact.id),
        "others": facts.filter(where=lambda one: one.id not in kin and one.id != fact.id),
    }
    drawn = {name: group.sample(min(most, len(group)), seed) for name, group in groups.items() if len(group) and most}
    return {name: [tokens[one] for one in group.ids] for name, group in drawn.items()}

"""Which FFN units carry each fact: methods that score every unit of every layer, on one engine.

A method is one function and one line in `METHODS`. Formulas: integrated gradients after Sundararajan et al.
(arXiv 1703.01365) over FFN units as in Knowledge Neurons (arXiv 2104.08696) and LoKI (arXiv 2505.22120).
"""

import logging
import pathlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from workbench.engine import Batch, Clean, check_engine, clean_gradients, make_batch, run_clean
from workbench.facts import FactSet, TokenisedFact
from workbench.metrics import OBJECTIVES, logprob
from workbench.models import HookedModel, check_unit
from workbench.path import FIRST_POINTS, ROWS_PER_PASS, RULES, Path, adaptive_integral, integral, quadrature
from workbench.results import open_store

log = logging.getLogger(__name__)


#: Steps of the rules that do not adapt, where the user names none.
STEPS = 16


@dataclass(frozen=True)
class Settings:
    """What defines a score; written into every result. `steps` is 0 where the rule is adaptive."""

    method: str
    unit: str
    steps: int
    rule: str
    baseline: str
    scope: str
    objective: str
    target: str
    tolerance: float


@dataclass(frozen=True)
class Problem:
    """One batch of facts to be scored: the path of every layer, and the objective with each layer at its baseline."""

    path: Path
    start: Float[Tensor, "batch layer"]
    settings: Settings


Method = Callable[[Problem], Float[Tensor, "batch layer width"]]


def integrated_gradients(problem: Problem) -> Float[Tensor, "batch layer width"]:
    """`(a_j - a'_j) * integral_0^1 dF(a' + alpha (a - a'))/da_j dalpha`, by a fixed rule or to a tolerance."""
    settings, path = problem.settings, problem.path
    if settings.steps:
        gradient = integral(path, settings.rule, settings.steps)
    else:
        gradient = adaptive_integral(path, problem.start, settings.tolerance)
    return torch.einsum("lbmw,lbmw->blw", gradient, path.difference.float())


def gradient_x_activation(problem: Problem) -> Float[Tensor, "batch layer width"]:
    """`(a_j - a'_j) * dF(a)/da_j`: the first-order effect, one backward pass for all layers."""
    path = problem.path
    gradient = clean_gradients(path.model, path.clean.batch, path.unit, path.objective)
    return torch.einsum("lbmw,lbmw->blw", gradient.float(), path.difference.float())


#: Every method, by the name that users give.
METHODS: dict[str, Method] = {"ig": integrated_gradients, "grad_x_act": gradient_x_activation}


def attribute(
    model: HookedModel,
    facts: FactSet,
    *,
    method: str = "ig",
    unit: Literal["node", "neuron"] | str = "node",
    steps: int | None = None,
    rule: str = "midpoint",
    baseline: str = "zero",
    scope: str = "last",
    objective: str = "logprob",
    target: str = "gold",
    tolerance: float = 0.05,
    batch_size: int | str = "auto",
    out: str | pathlib.Path | None = None,
    resume: bool = True,
    progress: bool = True,
) -> xr.Dataset:
    """Score how much every FFN unit of every layer contributes to every fact.

    Args:
        model: a model from `load_model`.
        facts: what to attribute; an answer of several tokens is teacher-forced and the objective sums over its tokens.
        method: `"ig"` (integrated gradients) or `"grad_x_act"` (gradient times activation).
        unit: `"node"` (outputs of the down-projection, d_model per layer) or `"neuron"` (its inputs, d_mlp per layer).
        steps: points of the quadrature of `ig`; None refines a layer until its completeness gap is within
            `tolerance` times its effect, or times a fifth of the fact's largest effect if that is more (see
            `workbench.path.adaptive_integral`). `grad_x_act` has one.
        rule: quadrature rule of `ig`: midpoint, left, right or trapezoid; only the midpoint adapts, the others take
            16 steps where none are given.
        baseline: `"zero"`, or `"blank"`: the activations of the same prompt with every token id replaced by 0.
        scope: `"last"` moves the activations at the last prompt token; `"all"` those of every prompt token, and the
            score of a unit is its sum over them.
        objective: logprob (nats), prob, logit or margin (logit of the answer minus the best other).
        target: `"gold"` (the fact's answer) or `"predicted"` (the model's own next token).
        tolerance: of the adaptive rule: the gap, as a share of the layer's effect.
        batch_size: facts per pass; `"auto"` fills passes of a fixed number of token rows.
        out: a zarr folder to stream to; None keeps the result in memory.
        resume: go on where an earlier call with the same settings stopped.
        progress: show a progress bar.

    Returns:
        Dataset with `score` (fact, layer, unit) in units of the objective, `gap` (fact, layer): the completeness
        error F(clean) - F(baseline) - sum of scores, and `target_prob` (fact,): probability of the target.

    Raises:
        ValueError: an unknown option, a fact that does not fit the model, or a result at `out` with other settings.
    """
    settings = checked_settings(method, unit, steps, rule, baseline, scope, objective, target, tolerance)
    if batch_size != "auto" and not (isinstance(batch_size, int) and batch_size > 0):
        raise ValueError(f'batch_size must be "auto" or a positive number, not {batch_size!r}.')
    tokenised = model.tokenise(facts)
    if settings.target == "predicted":
        tokenised = [replace(fact, answer_ids=(0,)) for fact in tokenised]
    check_engine(model)
    attrs = asdict(settings) | {"model_digest": model.digest, "fact_digest": facts.digest}
    notes = {"model": model.name, "facts": facts.name, "dtype": str(model.dtype).removeprefix("torch.")}
    with open_store(
        out,
        ids=facts.ids,
        relations=[fact.relation for fact in facts],
        n_layers=model.n_layers,
        n_units=model.width(unit),
        attrs=attrs,
        notes=notes,
        resume=resume,
    ) as store:
        bar = tqdm(total=len(facts), initial=len(store.done), unit="fact", desc="attribute", disable=not progress)
        with bar:
            for indices in batches(tokenised, store.todo, settings, model.n_layers, batch_size):
                store.write(indices, *score_batch(model, [tokenised[i] for i in indices], settings))
                bar.update(len(indices))
        return store.dataset()


def score_batch(
    model: HookedModel, facts: Sequence[TokenisedFact], settings: Settings
) -> tuple[Float[np.ndarray, "batch layer width"], Float[np.ndarray, "batch layer"], Float[np.ndarray, " batch"]]:
    """Scores, completeness gaps and target probabilities of a few facts."""
    batch = make_batch(facts, model.device, settings.scope)
    clean = run_clean(model, batch, settings.unit)
    if settings.target == "predicted":
        last = clean.logits[:, -1:].argmax(-1)
        batch = replace(batch, target=torch.cat([batch.target[:, :-1], last], 1))
        clean = replace(clean, batch=batch)
    baseline = baseline_of(model, batch, clean, settings)
    path = Path(model, clean, baseline, settings.unit, OBJECTIVES[settings.objective])
    problem = Problem(path, path.start(), settings)
    score = METHODS[settings.method](problem)
    gap = path.end()[:, None] - problem.start - score.sum(-1)
    target_prob = (logprob(clean.logits, batch.target) * batch.weight).sum(-1).exp()
    return score.cpu().numpy(), gap.float().cpu().numpy(), target_prob.cpu().numpy()


def baseline_of(
    model: HookedModel, batch: Batch, clean: Clean, settings: Settings
) -> Float[Tensor, "layer batch moved width"]:
    """Where the path starts: zeros, or the activations of the prompt with every token replaced by token 0."""
    if settings.baseline == "zero":
        return torch.zeros_like(clean.activation)
    return run_clean(model, replace(batch, ids=torch.zeros_like(batch.ids)), settings.unit).activation


def checked_settings(
    method: str,
    unit: str,
    steps: int | None,
    rule: str,
    baseline: str,
    scope: str,
    objective: str,
    target: str,
    tolerance: float = 0.05,
) -> Settings:
    """The settings, or one sentence about the first that is unknown."""
    choices: dict[str, tuple[str, Sequence[str]]] = {
        "method": (method, list(METHODS)),
        "rule": (rule, [*RULES, "trapezoid"]),
        "baseline": (baseline, ["zero", "blank"]),
        "scope": (scope, ["last", "all"]),
        "objective": (objective, list(OBJECTIVES)),
        "target": (target, ["gold", "predicted"]),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}.")
    check_unit(unit)
    if steps is not None and steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}.")
    if method == "grad_x_act":
        if steps not in (None, 1):
            raise ValueError("grad_x_act has one step; use method='ig' for more.")
        steps = 1
    if steps is None and rule != "midpoint":
        steps = STEPS
    if steps is not None and method == "ig":
        quadrature(rule, steps)
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance must lie between 0 and 1, not {tolerance}.")
    return Settings(method, unit, steps or 0, rule, baseline, scope, objective, target, 0.0 if steps else tolerance)


def batches(
    facts: Sequence[TokenisedFact], todo: Sequence[int], settings: Settings, n_layers: int, batch_size: int | str
) -> Iterator[list[int]]:
    """Indices of facts that share a pass: alike in answer and prompt length, so that little is padded."""
    order = sorted(todo, key=lambda i: (len(facts[i].answer_ids), len(facts[i].prompt_ids), i))
    while order:
        first = facts[order[0]]
        tail = len(first.answer_ids) + (len(first.prompt_ids) - 1 if settings.scope == "all" else 0)
        rows = n_layers * (settings.steps or FIRST_POINTS) * tail
        size = batch_size if isinstance(batch_size, int) else max(1, ROWS_PER_PASS // rows)
        same = [i for i in order[:size] if len(facts[i].answer_ids) == len(first.answer_ids)]
        yield same
        order = order[len(same) :]


def by_layer(attribution: xr.Dataset, *, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Mean |score| per layer over facts, with 95% bootstrap intervals, for all facts and for every relation.

    Columns layer, relation ("all" for every fact), mean_abs, low, high, n (facts).
    """
    per_fact = np.stack([np.abs(attribution["score"][i].values).mean(-1) for i in range(attribution.sizes["fact"])])
    relations = attribution["relation"].values
    generator = np.random.default_rng(seed)
    frames = []
    for relation in ["all", *sorted(set(relations))]:
        values = per_fact if relation == "all" else per_fact[relations == relation]
        drawn = values[generator.integers(len(values), size=(draws, len(values)))].mean(1)
        low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
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

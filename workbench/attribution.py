"""Which FFN units carry each fact: methods that score every unit of every layer, on one engine.

A method is one function and one line in `METHODS`. Formulas: integrated gradients after Sundararajan et al.
(arXiv 1703.01365) over FFN units as in Knowledge Neurons (arXiv 2104.08696) and LoKI (arXiv 2505.22120).
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from workbench.engine import Batch, Clean, check_engine, clean_gradients, make_batch, run_clean, run_queries
from workbench.facts import FactSet, TokenisedFact
from workbench.metrics import OBJECTIVES, Objective, logprob
from workbench.models import HookedModel, check_unit
from workbench.results import open_store

log = logging.getLogger(__name__)

#: Token rows of queries in one pass: enough for full matrix products, small enough for the processor's caches.
ROWS_PER_PASS = 840
#: Steps of `ig` where the user names none.
DEFAULT_STEPS = 8


@dataclass(frozen=True)
class Settings:
    """What defines a score; written into every result."""

    method: str
    unit: str
    steps: int
    rule: str
    baseline: str
    scope: str
    objective: str
    target: str


@dataclass(frozen=True)
class Problem:
    """One batch of facts to be scored."""

    model: HookedModel
    clean: Clean
    baseline: Float[Tensor, "layer batch moved width"]
    settings: Settings

    @property
    def objective(self) -> Objective:
        """The function that is differentiated."""
        return OBJECTIVES[self.settings.objective]

    @property
    def difference(self) -> Float[Tensor, "layer batch moved width"]:
        """Clean activation minus baseline."""
        return self.clean.activation - self.baseline

    @property
    def effect(self) -> Float[Tensor, "batch layer"]:
        """F(clean) - F(one layer at its baseline): what the scores of a layer should sum to."""
        batch = self.clean.batch
        value = (self.objective(self.clean.logits, batch.target) * batch.weight).sum(-1)
        columns = []
        with torch.no_grad():
            for chunk in chunked([(layer, 0) for layer in range(self.model.n_layers)], self.variants_per_pass):
                points = {layer: self.baseline[layer][:, None] for layer, _ in chunk}
                columns.append(run_queries(self.model, self.clean, self.settings.unit, points, self.objective))
        return value[:, None] - torch.cat(columns, 1)

    @property
    def variants_per_pass(self) -> int:
        """How many (layer, step) variants of every fact of the batch fit one pass."""
        return max(1, ROWS_PER_PASS // (len(self.clean.batch.ids) * self.clean.batch.tail))


Method = Callable[[Problem], Float[Tensor, "batch layer width"]]


def integrated_gradients(problem: Problem) -> Float[Tensor, "batch layer width"]:
    """`(a_j - a'_j) * integral_0^1 dF(a' + alpha (a - a'))/da_j dalpha`, by a quadrature rule."""
    alphas, weights = quadrature(problem.settings.rule, problem.settings.steps)
    model, clean = problem.model, problem.clean
    total = torch.zeros_like(clean.activation, dtype=torch.float32)
    variants = [(layer, step) for layer in range(model.n_layers) for step in range(len(alphas))]
    for chunk in chunked(variants, problem.variants_per_pass):
        points = {}
        for layer in dict.fromkeys(layer for layer, _ in chunk):
            alpha = torch.tensor([alphas[step] for at, step in chunk if at == layer], device=model.device)
            alpha = alpha[None, :, None, None].to(model.dtype)
            path = problem.baseline[layer][:, None] + alpha * problem.difference[layer][:, None]
            points[layer] = path.requires_grad_()
        values = run_queries(model, clean, problem.settings.unit, points, problem.objective)
        gradients = torch.autograd.grad(values.sum(), list(points.values()))
        for layer, gradient in zip(points, gradients, strict=True):
            weight = torch.tensor([weights[step] for at, step in chunk if at == layer], device=model.device)
            total[layer] += torch.einsum("bsmw,s->bmw", gradient.float(), weight)
    return torch.einsum("lbmw,lbmw->blw", total, problem.difference.float())


def gradient_x_activation(problem: Problem) -> Float[Tensor, "batch layer width"]:
    """`(a_j - a'_j) * dF(a)/da_j`: the first-order effect, one backward pass for all layers."""
    gradient = clean_gradients(problem.model, problem.clean.batch, problem.settings.unit, problem.objective)
    return torch.einsum("lbmw,lbmw->blw", gradient.float(), problem.difference.float())


#: Every method, by the name that users give.
METHODS: dict[str, Method] = {"ig": integrated_gradients, "grad_x_act": gradient_x_activation}


def quadrature(rule: str, steps: int) -> tuple[list[float], list[float]]:
    """Points on [0, 1] and their weights, which sum to 1.

    >>> quadrature("midpoint", 2)
    ([0.25, 0.75], [0.5, 0.5])
    >>> quadrature("trapezoid", 3)
    ([0.0, 0.5, 1.0], [0.25, 0.5, 0.25])
    """
    if rule == "trapezoid":
        if steps < 2:
            raise ValueError('rule="trapezoid" needs at least 2 steps.')
        ends = [0.5 if k in (0, steps - 1) else 1.0 for k in range(steps)]
        return [k / (steps - 1) for k in range(steps)], [end / (steps - 1) for end in ends]
    offset = RULES[rule]
    return [(k + offset) / steps for k in range(steps)], [1 / steps] * steps


#: Riemann sums: where in its interval each point lies. The trapezoid is not one of them.
RULES: dict[str, float] = {"midpoint": 0.5, "left": 0.0, "right": 1.0}


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
    batch_size: int | str = "auto",
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
) -> xr.Dataset:
    """Score how much every FFN unit of every layer contributes to every fact.

    Args:
        model: a model from `load_model`.
        facts: what to attribute; an answer of several tokens is teacher-forced and the objective sums over its tokens.
        method: `"ig"` (integrated gradients) or `"grad_x_act"` (gradient times activation).
        unit: `"node"` (outputs of the down-projection, d_model per layer) or `"neuron"` (its inputs, d_mlp per layer).
        steps: points of the quadrature; None is 8 for `ig`. `grad_x_act` has one.
        rule: quadrature rule of `ig`: midpoint, left, right or trapezoid.
        baseline: `"zero"`, or `"blank"`: the activations of the same prompt with every token id replaced by 0.
        scope: `"last"` moves the activations at the last prompt token; `"all"` those of every prompt token, and the
            score of a unit is its sum over them.
        objective: logprob (nats), prob, logit or margin (logit of the answer minus the best other).
        target: `"gold"` (the fact's answer) or `"predicted"` (the model's own next token).
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
    settings = checked_settings(method, unit, steps, rule, baseline, scope, objective, target)
    if batch_size != "auto" and not (isinstance(batch_size, int) and batch_size > 0):
        raise ValueError(f'batch_size must be "auto" or a positive number, not {batch_size!r}.')
    tokenised = facts.tokenise(model.tokenizer, max_tokens=model.max_tokens)
    if settings.target == "predicted":
        tokenised = [replace(fact, answer_ids=(0,)) for fact in tokenised]
    if settings.method != "grad_x_act" or progress:
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
    problem = Problem(model, clean, baseline_of(model, batch, clean, settings), settings)
    score = METHODS[settings.method](problem)
    gap = problem.effect - score.sum(-1)
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
    method: str, unit: str, steps: int | None, rule: str, baseline: str, scope: str, objective: str, target: str
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
    steps = steps or DEFAULT_STEPS
    if method == "ig":
        quadrature(rule, steps)
    return Settings(method, unit, steps, rule, baseline, scope, objective, target)


def batches(
    facts: Sequence[TokenisedFact], todo: Sequence[int], settings: Settings, n_layers: int, batch_size: int | str
) -> Iterator[list[int]]:
    """Indices of facts that share a pass: alike in answer and prompt length, so that little is padded."""
    order = sorted(todo, key=lambda i: (len(facts[i].answer_ids), len(facts[i].prompt_ids), i))
    while order:
        first = facts[order[0]]
        tail = len(first.answer_ids) + (len(first.prompt_ids) - 1 if settings.scope == "all" else 0)
        size = batch_size if isinstance(batch_size, int) else max(1, ROWS_PER_PASS // (n_layers * settings.steps * tail))
        same = [i for i in order[:size] if len(facts[i].answer_ids) == len(first.answer_ids)]
        yield same
        order = order[len(same) :]


def chunked(variants: Sequence[tuple[int, int]], size: int) -> Iterator[Sequence[tuple[int, int]]]:
    """Consecutive parts of at most `size`."""
    for start in range(0, len(variants), size):
        yield variants[start : start + size]


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

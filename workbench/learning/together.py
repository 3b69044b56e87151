"""Learning a fact alone against learning it together with others, at the same exposures: `behaviour`."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from workbench.facts import FactSet, TokenisedFact
from workbench.intervals import benjamini_hochberg, interval, jackknifed, ratio_of_sums
from workbench.learning.learner import STEPS, check_learning, learnt, natural_rate
from workbench.models import HookedModel, pad_batch
from workbench.recollection import read_facts
from workbench.selection import Selection


class Read(NamedTuple):
    """What is read of some facts: log-probability of the answer, its margin, and hidden states after every block."""

    logprob: Float[np.ndarray, " fact"]
    margin: Float[np.ndarray, " fact"]
    hidden: Float[Tensor, "layer fact d_model"]


def behaviour(
    model: HookedModel,
    facts: FactSet,
    *,
    steps: int = STEPS,
    rate: float | None = None,
    layers: Sequence[int] | None = None,
    selection: Selection | None = None,
    permutations: int = 999,
    seed: int = 0,
    progress: bool = True,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Compare what facts become when each is learnt alone and when all are learnt together, seen equally often.

    Alone, every step goes down the loss of fact i; together, down the summed loss of all facts, so that i pulls as hard
    in both (see `learnt`; `rate` None is `natural_rate`). With h the residual stream after a block at the last prompt
    token, f = h(alone) - h0 and 0 the model as it is:

    - interference `I = log P_alone(y) - log P_joint(y)`, nats;
    - expression `(margin_joint - margin_0) / (margin_alone - margin_0)`, margins in logits: 1 is undisturbed;
    - suppression, per layer, `1 - <h(joint) - h0, f> / |f|^2`: 0 is undisturbed, 1 nothing left of f;
    - effective rank, per layer, of the stacked h - h0 of all facts (see `effective_rank`), joint against alone.

    The null of suppression pairs the f of every fact with the h(joint) - h0 of another, drawn by `seed` in
    `permutations` shuffles that all layers share: what is left of f beyond what facts learnt together share with any
    fact. The p-value is two-sided, by the distance from the mean over all pairings: little suppression is learning that
    stays a fact's own, much is learning that the others turn against; Benjamini-Hochberg over the layers gives q.

    These are two frames and no measure of `interference`, because nothing here is of a pair: a fact is learnt alone or
    with all others, so there is no (fact, other) matrix for that dataset to hold, and it is what a model becomes, not
    what it is. What each fact does to each other is `harm`.

    Returns:
        A frame per fact (fact, relation, logprob_before, logprob_alone, logprob_joint, interference, margin_before,
        margin_alone, margin_joint, expression, suppression: the mean over layers, moved: the mean over layers of |f|^2)
        and one per layer (layer, suppression, low, high: 1 - sum <h(joint) - h0, f> / sum |f|^2 over facts, so that
        what hardly moved counts for little, and its 95% interval over facts; null_low, null_high: the central 95% of
        the null; p_value, q_value; rank_alone, rank_joint, rank_change, rank_low, rank_high: interval of the change,
        from the jackknife over facts). NaN where learning alone moved nothing, as below the first layer that learns.
        `averages` sums up the first frame. The model stays as it was, to the bit.

    Raises:
        ValueError: settings that do not fit, or a rate at which losses have no end.
    """
    check_learning(steps, rate)
    if not isinstance(permutations, Integral) or permutations < 1:
        raise ValueError(f"A null needs at least one permutation, a whole number, not {permutations!r}.")
    tokens = model.tokenise(facts)
    part: dict[str, Any] = {"layers": layers, "selection": selection}
    used = natural_rate(model, tokens, **part) if rate is None else rate
    how: dict[str, Any] = {"rate": used, "steps": steps, **part}
    before = _read(model, tokens)
    singles = []
    for fact in tqdm(tokens, unit="fact", desc="alone", disable=not progress):
        with learnt(model, [fact], **how):
            singles.append(_read(model, [fact]))
    with learnt(model, tokens, **how):
        joint = _read(model, tokens)
    alone = Read(
        np.concatenate([one.logprob for one in singles]),
        np.concatenate([one.margin for one in singles]),
        torch.cat([one.hidden for one in singles], dim=1),
    )
    moved_alone, moved_joint = alone.hidden - before.hidden, joint.hidden - before.hidden
    suppressed = suppression(moved_alone, moved_joint)
    moved = torch.einsum("lfd,lfd->lf", moved_alone, moved_alone).mean(0).numpy()
    per_fact = _per_fact(facts, before, alone, joint, suppressed).assign(moved=moved)
    per_layer = _per_layer(moved_alone, moved_joint, permutations, seed)
    for frame in (per_fact, per_layer):
        frame.attrs |= {"steps": steps, "rate": used, "permutations": permutations, "seed": seed}
    return per_fact, per_layer


def averages(per_fact: pd.DataFrame) -> pd.DataFrame:
    """Interference, expression and suppression of all facts, with 95% intervals over facts: metric, n, mean, low, high.

    Interference is a mean. The other two are ratios, whose mean a fact that was known before could decide by itself, so
    they are ratios of sums: expression `sum(margin_joint - margin_0) / sum(margin_alone - margin_0)`, where a fact
    counts by what learning it alone gained; suppression the mean over facts weighted by `moved`, how far that went.
    """
    gained, moved = (per_fact[f"margin_{name}"] - per_fact["margin_before"] for name in ("alone", "joint"))
    values = per_fact["interference"].to_numpy(np.float64)
    weights = per_fact["moved"].to_numpy(np.float64)
    low, high = interval(values)
    rows = {
        "interference": (values.mean(), float(low), float(high)),
        "expression": ratio_of_sums(moved.to_numpy(), gained.to_numpy()),
        "suppression": ratio_of_sums(weights * per_fact["suppression"].fillna(0).to_numpy(), weights),
    }
    found = [(metric, len(per_fact), *ends) for metric, ends in rows.items()]
    return pd.DataFrame(found, columns=["metric", "n", "mean", "low", "high"])


def suppression(
    alone: Float[Tensor, "layer fact d_model"], joint: Float[Tensor, "layer fact d_model"]
) -> Float[np.ndarray, "layer fact"]:
    """`1 - <joint, alone> / |alone|^2` of two movements; NaN where the first is 0.

    >>> f = torch.tensor([[[2.0, 0.0]]])
    >>> suppression(f, torch.tensor([[[0.5, 3.0]]])).tolist(), suppression(f, f).tolist()
    ([[0.75]], [[0.0]])
    """
    square = torch.einsum("lfd,lfd->lf", alone, alone)
    along = torch.einsum("lfd,lfd->lf", joint, alone)
    return torch.where(square > 0, 1 - along / square, torch.nan).numpy()


def effective_rank(rows: Float[Tensor, "*batch row d_model"]) -> Float[Tensor, "*batch"]:
    """Exponential of the entropy of the singular values, normed to sum 1 (Roy and Vetterli, 2007); 0 where all are 0.

    It goes from 1, where all rows point along one line, to the number of rows, where they are orthogonal and equally
    long.

    >>> effective_rank(torch.eye(3)).item(), effective_rank(torch.ones(3, 2)).item()
    (3.0, 1.0)
    """
    return _rank_of(torch.linalg.svdvals(rows.double()))


def _rank_of(singular_values: Float[Tensor, "*batch value"]) -> Float[Tensor, "*batch"]:
    total = singular_values.sum(-1)
    rank = torch.special.entr(singular_values / total[..., None]).sum(-1).exp()
    return torch.where(total > 0, rank, 0.0).round(decimals=9)


def _read(model: HookedModel, facts: Sequence[TokenisedFact]) -> Read:
    """Readings and hidden states, on the processor, in float64.

    One fact at a time, as they are learnt alone: so what did not change is equal to the bit.
    """
    readings = [read_facts(model, [fact], greedy=False)[0] for fact in facts]
    hidden = torch.zeros(model.n_layers, len(facts), model.d_model, dtype=torch.float64)
    for place, fact in enumerate(facts):
        ids, mask = pad_batch([fact.prompt_ids])
        hidden[:, place] = model.resid_post(ids, mask, mask.sum(-1) - 1)[:, 0].cpu().double()
    logprobs = np.array([float(sum(reading.logprobs)) for reading in readings])
    return Read(logprobs, np.array([reading.margin for reading in readings]), hidden)


def _per_fact(
    facts: FactSet, before: Read, alone: Read, joint: Read, suppressed: Float[np.ndarray, "layer fact"]
) -> pd.DataFrame:
    gained = alone.margin - before.margin
    expression = np.divide(joint.margin - before.margin, gained, out=np.full(len(gained), np.nan), where=gained != 0)
    read = {"before": before, "alone": alone, "joint": joint}
    return pd.DataFrame(
        {
            "fact": facts.ids,
            "relation": [fact.relation for fact in facts],
            **{f"logprob_{name}": one.logprob for name, one in read.items()},
            "interference": alone.logprob - joint.logprob,
            **{f"margin_{name}": one.margin for name, one in read.items()},
            "expression": expression,
            "suppression": pd.DataFrame(suppressed).mean().to_numpy(),
        }
    )


def _per_layer(
    alone: Float[Tensor, "layer fact d_model"],
    joint: Float[Tensor, "layer fact d_model"],
    permutations: int = 999,
    seed: int = 0,
) -> pd.DataFrame:
    rows = []
    null = _against_shuffled(alone, joint, permutations, seed)
    square = torch.einsum("lfd,lfd->lf", alone, alone).numpy()
    along = torch.einsum("lfd,lfd->lf", joint, alone).numpy()
    for layer in range(len(square)):
        value, *ends = ratio_of_sums(square[layer] - along[layer], square[layer])
        ranks = [effective_rank(moved[layer]).item() for moved in (alone, joint)]
        change = ranks[1] - ranks[0]
        low, high = jackknifed(change, _without_each(joint[layer]) - _without_each(alone[layer]))
        rows.append((layer, value, *ends, *null[layer], np.nan, *ranks, change, low, high))
    names = ["layer", "suppression", "low", "high", "null_low", "null_high", "p_value", "q_value", "rank_alone"]
    frame = pd.DataFrame(rows, columns=[*names, "rank_joint", "rank_change", "rank_low", "rank_high"])
    return frame.assign(q_value=benjamini_hochberg(frame["p_value"].to_numpy(np.float64)))


def _against_shuffled(
    alone: Float[Tensor, "layer fact d_model"], joint: Float[Tensor, "layer fact d_model"], permutations: int, seed: int
) -> Float[np.ndarray, "layer number"]:
    """The central 95% of the suppression of shuffled facts, and the p-value; NaN in layers that learning alone left."""
    generator, n = np.random.default_rng(seed), alone.shape[1]
    shuffles = np.stack([np.arange(n), *(generator.permutation(n) for _ in range(permutations))])
    found = np.full((len(alone), 3), np.nan)
    for layer, (moved, together) in enumerate(zip(alone, joint, strict=True)):
        products, square = (moved @ together.T).numpy(), float((moved * moved).sum())
        if square == 0:
            continue
        values = 1 - products[np.arange(n), shuffles].sum(1) / square  # the first is as observed
        far = np.abs(values - (1 - products.sum() / n / square))
        rounding = 1e-9 * np.abs(products).sum() / square
        found[layer] = *np.quantile(values[1:], [0.025, 0.975]), (far >= far[0] - rounding).mean()
    return found


def _without_each(rows: Float[Tensor, "fact d_model"]) -> Float[np.ndarray, " fact"]:
    """The effective rank with every fact left out in turn, from inner products, which is quicker for many facts."""
    n = len(rows)
    if n == 1:
        return np.zeros(1)
    kept = (~torch.eye(n, dtype=torch.bool)).nonzero()[:, 1].view(n, n - 1)
    products = rows @ rows.T
    found = []
    for one in kept:
        values = torch.linalg.eigvalsh(products[one][:, one]).clamp(min=0).sqrt()
        found.append(_rank_of(values).item())
    return np.array(found)

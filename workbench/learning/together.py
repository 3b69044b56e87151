"""Learning a fact alone against learning it together with others, at the same exposures: `behaviour`."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from workbench.facts import FactSet, TokenisedFact
from workbench.intervals import benjamini_hochberg, interval, jackknifed, ratio_of_sums
from workbench.learning.chance import PERMUTATIONS, band, exchanges, of_shuffles, p_value, shuffles
from workbench.learning.learner import STEPS, check_learning, learnt, natural_rate
from workbench.models import HookedModel, pad_batch
from workbench.recollection import read_facts
from workbench.selection import Selection

#: Draws of the null of a rank, at most: each costs two spectra of all facts.
RANK_DRAWS = 199
#: Effective ranks nearer than this are the same: singular values are square roots of what is exact to rounding.
ROUNDING = 1e-6


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
    permutations: int = PERMUTATIONS,
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
    Shuffling facts cannot change a mean of interference or of expression, nor a rank, so their null is another: alone
    and together are exchanged for every fact at random, as if it made no difference which of the two a fact came from;
    all facts are learnt together once, and it is for that one learning that these p-values hold. No units are chosen
    here, so there are none to match.

    These are two frames and no measure of `interference`, because nothing here is of a pair: a fact is learnt alone or
    with all others, so there is no (fact, other) matrix for that dataset to hold, and it is what a model becomes, not
    what it is. What each fact does to each other is `harm`.

    Returns:
        A frame per fact (fact, relation, logprob_before, logprob_alone, logprob_joint, interference, margin_before,
        margin_alone, margin_joint, expression, suppression: the mean over layers, moved: the mean over layers of |f|^2)
        and one per layer (layer, suppression, low, high: 1 - sum <h(joint) - h0, f> / sum |f|^2 over facts, so that
        what hardly moved counts for little, and its 95% interval over facts; null_low, null_high: the central 95% of
        the null; p_value, q_value; rank_alone, rank_joint, rank_change, rank_low, rank_high: interval of the change,
        from the jackknife over facts; rank_null_low, rank_null_high, rank_p, rank_q: what exchanges give, 199 of them
        at most). NaN where learning alone moved nothing, as below the first layer that learns. `averages` sums up the
        first frame. The model stays as it was, to the bit.

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
    settings = {"steps": steps, "rate": used, "permutations": permutations, "seed": seed}
    for frame in (per_fact, per_layer):
        frame.attrs |= {**settings, "model_digest": model.digest, "fact_digest": facts.digest}
    per_fact.attrs["suppression_null"] = _of_the_mean(moved_alone, moved_joint, permutations, seed)
    return per_fact, per_layer


def averages(per_fact: pd.DataFrame) -> pd.DataFrame:
    """Interference, expression and suppression of all facts, each with its null.

    Interference is a mean. The other two are ratios, whose mean a fact that was known before could decide by itself, so
    they are ratios of sums: expression `sum(margin_joint - margin_0) / sum(margin_alone - margin_0)`, where a fact
    counts by what learning it alone gained; suppression the mean over facts weighted by `moved`, how far that went.

    Returns:
        Frame with metric, n, mean, its 95% interval over facts low..high, the central 95% of the null
        null_low..null_high and a two-sided p_value: exchanges of alone and together for interference and expression,
        shuffled facts for suppression (see `behaviour`). A frame that was read from a .csv has lost its attributes: the
        exchanges are then 999 by seed 0, and the null of suppression is missing.
    """
    gained, moved = ((per_fact[f"margin_{name}"] - per_fact["margin_before"]).to_numpy() for name in ("alone", "joint"))
    values = per_fact["interference"].to_numpy(np.float64)
    weights = per_fact["moved"].to_numpy(np.float64)
    low, high = interval(values)
    swaps = exchanges(len(values), per_fact.attrs.get("permutations", PERMUTATIONS), per_fact.attrs.get("seed", 0))
    exchanged = np.where(swaps, -values, values).mean(1)
    top, bottom = np.where(swaps, gained, moved).sum(1), np.where(swaps, moved, gained).sum(1)
    expressed = np.divide(top, bottom, out=np.full(len(top), np.nan), where=bottom != 0)
    nulls = {
        "interference": (*band(exchanged[1:]), p_value(exchanged)),
        "expression": (*band(expressed[1:]), p_value(top - bottom)),
        "suppression": tuple(per_fact.attrs.get("suppression_null", [np.nan] * 3)),
    }
    rows = {
        "interference": (values.mean(), float(low), float(high)),
        "expression": ratio_of_sums(moved, gained),
        "suppression": ratio_of_sums(weights * per_fact["suppression"].fillna(0).to_numpy(), weights),
    }
    found = [(metric, len(per_fact), *ends, *nulls[metric]) for metric, ends in rows.items()]
    return pd.DataFrame(found, columns=["metric", "n", "mean", "low", "high", "null_low", "null_high", "p_value"])


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
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> pd.DataFrame:
    rows = []
    orders = shuffles(alone.shape[1], permutations, seed)
    swaps = exchanges(alone.shape[1], min(permutations, RANK_DRAWS), seed)
    for layer, (own, together) in enumerate(zip(alone, joint, strict=True)):
        square, along = (torch.einsum("fd,fd->f", of, own).numpy() for of in (own, together))
        value, *ends = ratio_of_sums(square - along, square)
        null = of_shuffles((together @ own.T).T.numpy() / square.sum(), orders) if square.any() else [np.nan] * 3
        ranks = [effective_rank(moved).item() for moved in (own, together)]
        change = ranks[1] - ranks[0]
        low, high = jackknifed(change, _without_each(together) - _without_each(own))
        of_ranks = _rank_null(own, together, swaps) if square.any() else [np.nan] * 3
        rows.append((layer, value, *ends, *null, *ranks, change, low, high, *of_ranks))
    names = ["layer", "suppression", "low", "high", "null_low", "null_high", "p_value", "rank_alone", "rank_joint"]
    names += ["rank_change", "rank_low", "rank_high", "rank_null_low", "rank_null_high", "rank_p"]
    frame = pd.DataFrame(rows, columns=names)
    q, rank_q = (benjamini_hochberg(frame[p].to_numpy(np.float64)) for p in ("p_value", "rank_p"))
    frame.insert(names.index("p_value") + 1, "q_value", q)
    return frame.assign(rank_q=rank_q)


def _of_the_mean(
    alone: Float[Tensor, "layer fact d_model"], joint: Float[Tensor, "layer fact d_model"], permutations: int, seed: int
) -> list[float]:
    """The null of the suppression that `averages` tells: facts weighted by how far learning alone moved them."""
    square = torch.einsum("lfd,lfd->lf", alone, alone)
    if not square.any():
        return [np.nan] * 3
    along = torch.einsum("lfd,lod->lfo", alone, joint)
    kept = torch.where(square[..., None] > 0, along / square[..., None], torch.nan).nanmean(0).nan_to_num()
    weights = square.mean(0)[:, None]
    return list(of_shuffles((weights * kept / weights.sum()).numpy(), shuffles(alone.shape[1], permutations, seed)))


def _rank_null(
    alone: Float[Tensor, "fact d_model"], joint: Float[Tensor, "fact d_model"], swaps: Bool[np.ndarray, "draw fact"]
) -> tuple[float, ...]:
    """Central 95% and p-value of the change of effective rank when alone and together are exchanged."""
    n, rows = len(alone), torch.cat([alone, joint])
    products, own = rows @ rows.T, torch.arange(n)
    changes = []
    for swap in torch.from_numpy(swaps):
        places = (torch.where(swap, own, own + n), torch.where(swap, own + n, own))
        ranks = [_rank_of_products(products[at][:, at]) for at in places]
        changes.append(ranks[0] - ranks[1])
    values = np.array(changes)
    return *band(values[1:]), p_value(values, rounding=ROUNDING)


def _rank_of_products(products: Float[Tensor, "row row"]) -> float:
    """The effective rank of rows from their inner products, which is quicker for many facts."""
    return _rank_of(torch.linalg.eigvalsh(products).clamp(min=0).sqrt()).item()


def _without_each(rows: Float[Tensor, "fact d_model"]) -> Float[np.ndarray, " fact"]:
    """The effective rank with every fact left out in turn."""
    n = len(rows)
    if n == 1:
        return np.zeros(1)
    kept = (~torch.eye(n, dtype=torch.bool)).nonzero()[:, 1].view(n, n - 1)
    products = rows @ rows.T
    return np.array([_rank_of_products(products[one][:, one]) for one in kept])

"""How alike two models hold a whole set of facts, layer by layer: linear CKA and RSA, with intervals over facts."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from workbench.facts import FactSet
from workbench.intervals import SEED, bootstrap, jackknifed
from workbench.opening import check_several, hooked_among, open_model, opened_beside
from workbench.semantics.anchors import last_states

#: Draws of the bootstraps: of RSA each costs three products of a fact x fact matrix per layer.
DRAWS = 500
FEWEST = 3  # prompts: two have a single pair, which correlates with nothing


def similarity(
    before: Any,
    after: Any,
    facts: FactSet,
    *,
    draws: int = DRAWS,
    seed: int = SEED,
    tokenizer: Any = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Compare, per layer, how two models arrange the same facts: their states at the last prompt token.

    `cka` is linear CKA, `rsa` the correlation of pairwise cosines (see `linear_cka`, `rsa`): 1 where the arrangement
    is the same up to a rotation and a scale. With fewer facts than dimensions linear CKA lies above its value for many
    facts, so compare values over the same facts only. The intervals are of that value too: they cover what other facts,
    as many and of the same kind, would be expected to give, and not the limit of ever more facts.

    Returns:
        Frame with layer, metric, value, low, high (95% over facts: of CKA from the jackknife, since a fact that is
        drawn twice would raise it, of RSA by percentile bootstrap), n, draws, seed; and method, where `after` is a
        dictionary of several models by name.

    Raises:
        ValueError: fewer than three facts with different prompts, or models that differ in width, depth or vocabulary.
    """
    check_several(after)
    first = open_model(before, beside=hooked_among(after), tokenizer=tokenizer)
    prompts = [fact.prompt_ids for fact in first.tokenise(facts)]
    if len(set(prompts)) < FEWEST:
        raise ValueError(
            f"Similarity needs at least {FEWEST} facts with different prompts, and {facts.name!r} has "
            f"{len(set(prompts))}."
        )
    several = opened_beside(first, after, tokenizer)
    drawn = torch.from_numpy(bootstrap(np.eye(len(facts)), draws=draws, seed=seed))
    old = last_states(first, prompts)
    records = []
    for name, second in several:
        new = last_states(second, prompts)
        for layer in tqdm(range(first.n_layers), unit="layer", desc="similarity", disable=not progress):
            found = {
                "cka": _cka_interval(old[layer], new[layer], draws, seed),
                "rsa": _rsa_interval(old[layer], new[layer], drawn),
            }
            for metric, ends in found.items():
                records.append((name, layer, metric, *ends, len(facts), draws, seed))
    columns = ["method", "layer", "metric", "value", "low", "high", "n", "draws", "seed"]
    frame = pd.DataFrame(records, columns=columns)
    return frame if isinstance(after, Mapping) else frame.drop(columns="method")


def linear_cka(
    first: Float[Tensor, "fact d_first"],
    second: Float[Tensor, "fact d_second"],
    weights: Float[Tensor, "draw fact"] | None = None,
) -> Float[Tensor, " draw"]:
    """Linear CKA (arXiv 1905.00414): `|Y^T X|_F^2 / (|X^T X|_F |Y^T Y|_F)`, features centred over facts.

    Written with Gram matrices, K = X X^T and L = Y Y^T: `<K, L>/sqrt(<K, K><L, L>)`, both centred. `weights` has a row
    per draw that sums to 1 (of a bootstrap, or without one fact); the centring is that of the drawn facts. Invariant
    under rotations and scales of either side, not under linear maps in general.

    >>> round(linear_cka(torch.eye(3), 2 * torch.eye(3)).item(), 6)
    1.0
    """
    K, L = (_gram(states.double() - states.double().mean(0)) for states in (first, second))
    w = _even(len(K)) if weights is None else weights.double()

    def inner(A: Tensor, B: Tensor) -> Tensor:
        """<A, B> of the matrices centred by the weights, without centring them."""
        a, b = w @ A, w @ B
        cross = torch.einsum("df,df,df->d", w, a, b)
        return _quadratic(A * B, w) - 2 * cross + torch.einsum("df,df->d", w, a) * torch.einsum("df,df->d", w, b)

    return (inner(K, L) / (inner(K, K) * inner(L, L)).sqrt()).clamp(max=1)


def rsa(
    first: Float[Tensor, "fact d_first"],
    second: Float[Tensor, "fact d_second"],
    weights: Float[Tensor, "draw fact"] | None = None,
) -> Float[Tensor, " draw"]:
    """Correlation (Pearson) of the pairwise cosines of two sets of states, over pairs of different facts.

    With `weights` (see `linear_cka`) a pair counts by the product of its facts' weights; a fact that is drawn twice
    makes no pair with itself. Invariant under rotations and scales of either side. Missing where all cosines are equal.

    >>> states = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    >>> round(rsa(states, 3 * states).item(), 6)
    1.0
    """
    A, B = (_gram(normalize(states.double(), dim=-1)).fill_diagonal_(0) for states in (first, second))
    w = _even(len(A)) if weights is None else weights.double()
    total = 1 - (w * w).sum(-1)
    a, b = _quadratic(A, w) / total, _quadratic(B, w) / total
    covariance = _quadratic(A * B, w) / total - a * b
    spread = (_quadratic(A * A, w) / total - a * a) * (_quadratic(B * B, w) / total - b * b)
    return covariance / spread.clamp(min=0).sqrt()


def _cka_interval(
    first: Float[Tensor, "fact d_first"], second: Float[Tensor, "fact d_second"], draws: int, seed: int
) -> tuple[float, float, float]:
    """Linear CKA and its ends; they stay within 0 and 1, as it does."""
    n = len(first)
    without = (1 - torch.eye(n, dtype=torch.float64)) / (n - 1)
    value, *others = linear_cka(first, second, torch.cat([_even(n), without])).tolist()
    low, high = jackknifed(value, np.array(others), draws=draws, seed=seed)
    return value, max(low, 0.0), min(high, 1.0)


def _rsa_interval(
    first: Float[Tensor, "fact d_first"], second: Float[Tensor, "fact d_second"], drawn: Float[Tensor, "draw fact"]
) -> tuple[float, float, float]:
    """RSA and its ends; draws of too few different facts stay out, and all is missing where it is missing itself."""
    value, *others = rsa(first, second, torch.cat([_even(len(first)), drawn])).tolist()
    if np.isnan(others).all():
        return value, np.nan, np.nan
    low, high = np.nanpercentile(others, [2.5, 97.5])
    return value, float(low), float(high)


def _gram(states: Float[Tensor, "fact d"]) -> Float[Tensor, "fact fact"]:
    return states @ states.T


def _even(n: int) -> Float[Tensor, "1 fact"]:
    return torch.full((1, n), 1 / n, dtype=torch.float64)


def _quadratic(matrix: Float[Tensor, "fact fact"], w: Float[Tensor, "draw fact"]) -> Float[Tensor, " draw"]:
    """`w^T matrix w` of every draw."""
    return torch.einsum("df,df->d", w @ matrix, w)

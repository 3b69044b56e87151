"""The methods: from the path of every layer to a score for every unit. One function and one line in `METHODS` each.

Integrated gradients after Sundararajan et al. (arXiv 1703.01365) over FFN units as in Knowledge Neurons
(arXiv 2104.08696, `kn`) and LoKI (arXiv 2505.22120, `loki-paper` and, as released, `loki-code`).
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor

from workbench.attribution.settings import Settings
from workbench.engine import clean_gradients, run_queries
from workbench.facts import TokenisedFact
from workbench.path import Path, adaptive_integral, integral


@dataclass(frozen=True)
class Problem:
    """One batch of facts to be scored: the path of every layer, and the objective with each layer at its baseline.

    Methods that take one layer after another score `layers` only.
    """

    facts: Sequence[TokenisedFact]
    path: Path
    start: Float[Tensor, "batch layer"]
    settings: Settings
    layers: Sequence[int]


Scores = Float[Tensor, "batch layer width"]
Method = Callable[[Problem], Scores]


def integrated_gradients(problem: Problem) -> Scores:
    """`(a_j - a'_j) * integral_0^1 dF(a' + alpha (a - a'))/da_j dalpha`, by a fixed rule or to a tolerance."""
    settings, path = problem.settings, problem.path
    if settings.steps:
        gradient = integral(path, settings.rule, settings.steps)
    else:
        gradient = adaptive_integral(path, problem.start, settings.tolerance)
    return _read(gradient * path.difference.float(), settings)


def mean_gradient(problem: Problem) -> Scores:
    """`(1/m) sum_{k=1..m} dF((k/m) z)/dz_j`: LoKI's equation 5, which has no factor z_j."""
    return _read(integral(problem.path, problem.settings.rule, problem.settings.steps), problem.settings)


def gradient_x_activation(problem: Problem) -> Scores:
    """`(a_j - a'_j) * dF(a)/da_j`: the first-order effect, one backward pass for all layers."""
    path = problem.path
    gradient = clean_gradients(path.model, path.clean, path.unit, path.objective)
    return _read(gradient.float() * path.difference.float(), problem.settings)


@torch.no_grad()
def ablation(problem: Problem) -> Scores:
    """`F(a) - F(a with a_j replaced by a'_j)`: the exact effect of every unit, one forward query each.

    Exact to rounding: in bfloat16 that is larger than many effects, so open the model in float32.
    """
    path, clean = problem.path, problem.path.clean
    n_layers, n_batch, _, width = clean.activation.shape
    score = torch.zeros(n_batch, n_layers, width, device=path.model.device)
    for layer in problem.layers:
        for units in torch.arange(width, device=path.model.device).split(path.room):
            points = repeat(clean.activation[layer], "b m w -> b n m w", n=len(units)).clone()
            rows = torch.arange(len(units), device=units.device)
            points[:, rows, :, units] = path.baseline[layer][:, :, units].permute(2, 0, 1)
            values = run_queries(path.model, clean, path.unit, {layer: points}, path.objective)
            score[:, layer, units] = (path.end[:, None] - values).to(score.dtype)
    return score


def activation(problem: Problem) -> Scores:
    """`a_j - a'_j`: how strongly a unit speaks, whatever it says. A control."""
    return _read(problem.path.difference.float(), problem.settings)


def random(problem: Problem) -> Scores:
    """Standard normal draws, by seed and fact id. A control."""
    shape = problem.path.clean.activation.shape
    draws = []
    for fact in problem.facts:
        digest = hashlib.sha256(f"{problem.settings.seed}/{fact.fact_id}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
        draws.append(torch.randn(shape[0], shape[3], generator=generator))
    return torch.stack(draws).to(problem.path.model.device)


def _read(moved: Float[Tensor, "layer batch moved width"], settings: Settings) -> Scores:
    """One number a unit: the sum over the moved positions, or the last of them."""
    moved = moved[:, :, -1:] if settings.read == "last" else moved
    return torch.einsum("lbmw->blw", moved)


#: Every method, by the name that users give.
METHODS: dict[str, Method] = {
    "ig": integrated_gradients,
    "grad_x_act": gradient_x_activation,
    "ablation": ablation,
    "activation": activation,
    "random": random,
    "loki-paper": mean_gradient,
    "loki-code": integrated_gradients,
    "kn": integrated_gradients,
    "kn-code": integrated_gradients,
}

#: Methods that score one layer after another.
LAYER_BY_LAYER = ("ablation",)

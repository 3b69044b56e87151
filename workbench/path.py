"""Integrals along the path from a baseline to the clean activations, at fixed points or to a stated tolerance.

For integrated gradients (arXiv 1703.01365) the objective at two points of the path says exactly what the gradients
between them must add up to, so an adaptive rule needs no guess of its error: it halves the intervals in which the
midpoint's gradient misses the change of the objective (ours).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.engine import Clean, run_queries
from workbench.metrics import Objective
from workbench.models import HookedModel

#: Token rows of queries in one pass: enough for full matrix products, small enough for the processor's caches.
ROWS_PER_PASS = 840
#: Points per layer with which the adaptive rule begins, and at most ends up with.
FIRST_POINTS, MOST_POINTS = 4, 64
#: Riemann sums: where in its interval each point lies. The trapezoid is not one of them.
RULES: dict[str, float] = {"midpoint": 0.5, "left": 0.0, "right": 1.0}

Alphas = Mapping[int, Float[Tensor, "batch point"]]


@dataclass(frozen=True)
class Path:
    """Straight lines from a baseline to the clean activation, one per fact and layer."""

    model: HookedModel
    clean: Clean
    baseline: Float[Tensor, "layer batch moved width"]
    unit: str
    objective: Objective

    @property
    def difference(self) -> Float[Tensor, "layer batch moved width"]:
        """Clean activation minus baseline."""
        return self.clean.activation - self.baseline

    def start(self) -> Float[Tensor, "batch layer"]:
        """The objective with one layer at its baseline."""
        zero = torch.zeros(len(self.clean.batch.ids), 1, device=self.model.device)
        values = self.values(dict.fromkeys(range(self.model.n_layers), zero))
        return torch.cat([values[layer] for layer in range(self.model.n_layers)], 1)

    def end(self) -> Float[Tensor, " batch"]:
        """The objective of the clean run."""
        batch = self.clean.batch
        return (self.objective(self.clean.logits, batch.target) * batch.weight).sum(-1)

    @torch.no_grad()
    def values(self, alphas: Alphas) -> dict[int, Float[Tensor, "batch point"]]:
        """The objective at points of the path, per layer."""
        found: dict[int, list[Tensor]] = {layer: [] for layer in alphas}
        for chunk in self._chunks(alphas):
            points = {layer: self._at(layer, alpha) for layer, alpha in chunk.items()}
            values = run_queries(self.model, self.clean, self.unit, points, self.objective)
            for layer, part in zip(chunk, values.split([a.shape[1] for a in chunk.values()], 1), strict=True):
                found[layer].append(part)
        return {layer: torch.cat(parts, 1) for layer, parts in found.items()}

    def gradients(
        self, alphas: Alphas
    ) -> Iterator[tuple[int, Float[Tensor, "batch point"], Float[Tensor, "batch point moved width"]]]:
        """(layer, objective, gradient in the activation) at points of the path; a layer may come in several parts."""
        for chunk in self._chunks(alphas):
            points = {layer: self._at(layer, alpha).requires_grad_() for layer, alpha in chunk.items()}
            values = run_queries(self.model, self.clean, self.unit, points, self.objective)
            gradients = torch.autograd.grad(values.sum(), list(points.values()))
            parts = values.detach().split([a.shape[1] for a in chunk.values()], 1)
            yield from zip(chunk, parts, (gradient.float() for gradient in gradients), strict=True)

    def _at(self, layer: int, alpha: Float[Tensor, "batch point"]) -> Float[Tensor, "batch point moved width"]:
        weight = alpha[:, :, None, None].to(self.model.dtype)
        return self.baseline[layer][:, None] + weight * self.difference[layer][:, None]

    def _chunks(self, alphas: Alphas) -> Iterator[dict[int, Float[Tensor, "batch point"]]]:
        """Consecutive variants that fit one pass, layers in order."""
        batch = self.clean.batch
        room = most = max(1, ROWS_PER_PASS // (len(batch.ids) * batch.tail))
        chunk: dict[int, Tensor] = {}
        for layer in sorted(alphas):
            for part in alphas[layer].split(1, 1):
                chunk[layer] = torch.cat([chunk[layer], part], 1) if layer in chunk else part
                room -= 1
                if not room:
                    yield chunk
                    chunk, room = {}, most
        if chunk:
            yield chunk


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


def integral(path: Path, rule: str, steps: int) -> Float[Tensor, "layer batch moved width"]:
    """Integral of the gradient along the path of every layer, by a fixed rule."""
    points, weights = quadrature(rule, steps)
    alpha = torch.tensor(points, device=path.model.device).repeat(len(path.clean.batch.ids), 1)
    total = torch.zeros_like(path.clean.activation, dtype=torch.float32)
    seen = dict.fromkeys(range(path.model.n_layers), 0)
    for layer, _, gradient in path.gradients(dict.fromkeys(seen, alpha)):
        count = gradient.shape[1]
        weight = torch.tensor(weights[seen[layer] : seen[layer] + count], device=gradient.device)
        total[layer] += torch.einsum("bsmw,s->bmw", gradient, weight)
        seen[layer] += count
    return total


@dataclass(frozen=True)
class Interval:
    """A part of one path, with the objective at its ends and middle and the gradient at its middle."""

    low: float
    high: float
    value_low: float
    value_mid: float
    value_high: float
    gradient: Float[Tensor, "moved width"]

    @property
    def middle(self) -> float:
        """Where the gradient was taken."""
        return (self.low + self.high) / 2

    def error(self, difference: Float[Tensor, "moved width"]) -> float:
        """By how much the midpoint rule misses the change of the objective."""
        step = (self.high - self.low) * float((self.gradient * difference).sum())
        return abs(self.value_high - self.value_low - step)


def adaptive_integral(
    path: Path, start: Float[Tensor, "batch layer"], tolerance: float
) -> Float[Tensor, "layer batch moved width"]:
    """Integral of the gradient along the path of every layer, refined until the completeness error is small.

    All paths begin with `FIRST_POINTS` midpoints. Where the completeness gap of a fact and layer is larger than
    `tolerance` times the layer's effect (or times a fifth of the fact's largest effect, if that is more), intervals
    are halved until the sum of their errors is within it, or `MOST_POINTS` are reached. A fact's result does not
    depend on the others in its batch.
    """
    points = torch.tensor(quadrature("midpoint", FIRST_POINTS)[0], device=path.model.device)
    alphas = dict.fromkeys(range(path.model.n_layers), points.repeat(len(start), 1))
    values: dict[int, list[Tensor]] = {}
    slopes: dict[int, list[Tensor]] = {}
    for layer, value, gradient in path.gradients(alphas):
        values.setdefault(layer, []).append(value)
        slopes.setdefault(layer, []).append(gradient)
    slope = torch.stack([torch.cat(slopes[layer], 1) for layer in sorted(slopes)])
    value = torch.stack([torch.cat(values[layer], 1) for layer in sorted(values)])
    total = slope.mean(2)
    difference = path.difference.float()
    effect = path.end()[:, None] - start
    gap = effect - torch.einsum("lbmw,lbmw->bl", total, difference)
    allowed = tolerance * torch.maximum(effect.abs(), 0.2 * effect.abs().amax(1, keepdim=True))
    rough = [(int(b), int(layer)) for b, layer in (gap.abs() > allowed).nonzero()]
    if not rough:
        return total
    paths = _first_intervals(path, rough, start, value, slope)
    while rough:
        rough = [k for k in rough if not _fine(paths[k], difference[k[1], k[0]], float(allowed[k]))]
        _halve(path, {k: paths[k] for k in rough}, difference, allowed)
    for (b, layer), intervals in paths.items():
        total[layer, b] = sum((i.gradient * (i.high - i.low) for i in intervals), torch.zeros_like(total[layer, b]))
    return total


def _fine(intervals: list[Interval], difference: Float[Tensor, "moved width"], allowed: float) -> bool:
    """Whether a path is refined enough, or has as many points as it may have."""
    return len(intervals) >= MOST_POINTS or sum(i.error(difference) for i in intervals) <= allowed


def _first_intervals(
    path: Path,
    keys: list[tuple[int, int]],
    start: Float[Tensor, "batch layer"],
    value: Float[Tensor, "layer batch point"],
    slope: Float[Tensor, "layer batch point moved width"],
) -> dict[tuple[int, int], list[Interval]]:
    """The intervals around the first midpoints, with the objective at their ends."""
    n = value.shape[2]
    inner = torch.tensor([k / n for k in range(1, n)], device=value.device).repeat(len(start), 1)
    ends = path.values(dict.fromkeys(sorted({layer for _, layer in keys}), inner))
    end = path.end()
    paths = {}
    for b, layer in keys:
        edges = [float(start[b, layer]), *ends[layer][b].tolist(), float(end[b])]
        paths[b, layer] = [
            Interval(k / n, (k + 1) / n, edges[k], float(value[layer, b, k]), edges[k + 1], slope[layer, b, k])
            for k in range(n)
        ]
    return paths


def _halve(
    path: Path,
    paths: Mapping[tuple[int, int], list[Interval]],
    difference: Float[Tensor, "layer batch moved width"],
    allowed: Float[Tensor, "batch layer"],
) -> None:
    """Halve the intervals with the larger errors of every path, all in as few passes as possible."""
    chosen = {
        (b, layer): [i for i in intervals if i.error(difference[layer, b]) > float(allowed[b, layer]) / len(intervals)]
        for (b, layer), intervals in paths.items()
    }
    for layer in sorted({layer for _, layer in chosen}):
        rows = {b: intervals for (b, at), intervals in chosen.items() if at == layer}
        alphas = torch.full((len(allowed), 2 * max(map(len, rows.values()))), 0.5, device=allowed.device)
        for b, intervals in rows.items():
            middles = [(i.low + i.middle) / 2 for i in intervals] + [(i.middle + i.high) / 2 for i in intervals]
            alphas[b, : len(middles)] = torch.tensor(middles)
        parts = list(path.gradients({layer: alphas}))
        value = torch.cat([part[1] for part in parts], 1)
        slope = torch.cat([part[2] for part in parts], 1)
        for b, intervals in rows.items():
            n = len(intervals)
            for k, i in enumerate(intervals):
                left = Interval(i.low, i.middle, i.value_low, float(value[b, k]), i.value_mid, slope[b, k])
                right = Interval(i.middle, i.high, i.value_mid, float(value[b, n + k]), i.value_high, slope[b, n + k])
                at = paths[b, layer].index(i)
                paths[b, layer][at : at + 1] = [left, right]

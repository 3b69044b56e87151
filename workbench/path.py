"""Integrals along the path from a baseline to the clean activations, at fixed points or to a stated tolerance.

For integrated gradients (arXiv 1703.01365) the objective at two points of the path says exactly what the gradients
between them must add up to, so an adaptive rule needs no guess of its error: it halves the intervals in which the
midpoint's gradient misses the change of the objective (ours).
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import isfinite

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.engine import ROWS_PER_PASS, Clean, run_queries
from workbench.metrics import Objective
from workbench.models import HookedModel

log = logging.getLogger(__name__)

#: Points per layer with which the adaptive rule begins, and at most ends up with.
FIRST_POINTS, MOST_POINTS = 4, 128
#: Points of one fact in one row of a refining pass.
POINTS_PER_ROW = 8
#: Riemann sums: where in its interval each point lies; trapezoids have points at both ends.
RULES: dict[str, float | None] = {
    "midpoint": 0.5,
    "left": 0.0,
    "right": 1.0,
    "trapezoid": None,
    "riemann_trapezoid": None,
}

Alphas = Mapping[int, Float[Tensor, "batch point"]]


@dataclass(frozen=True)
class Path:
    """Straight lines from a baseline to the clean activation, one per fact and layer."""

    model: HookedModel
    clean: Clean
    baseline: Float[Tensor, "layer batch moved width"]
    unit: str
    objective: Objective
    rows: int = ROWS_PER_PASS

    @property
    def room(self) -> int:
        """How many variants of every fact fit one pass."""
        batch = self.clean.batch
        return max(1, self.rows // (len(batch.ids) * batch.tail))

    def of(self, rows: Int[Tensor, " row"]) -> "Path":
        """The paths of the facts with these indices, which may repeat."""
        return replace(self, clean=self.clean.of(rows), baseline=self.baseline[:, rows])

    @property
    def difference(self) -> Float[Tensor, "layer batch moved width"]:
        """Clean activation minus baseline; 0 at padding, which moves nowhere."""
        batch = self.clean.batch
        real = batch.mask[:, batch.start : batch.start + batch.moved].to(self.clean.activation.dtype)
        return (self.clean.activation - self.baseline) * real[None, :, :, None]

    def start(self) -> Float[Tensor, "batch layer"]:
        """The objective with one layer at its baseline."""
        zero = torch.zeros(len(self.clean.batch.ids), 1, device=self.model.device)
        values = self.values(dict.fromkeys(range(self.model.n_layers), zero))
        return torch.cat([values[layer] for layer in range(self.model.n_layers)], 1)

    @cached_property
    def end(self) -> Float[Tensor, " batch"]:
        """The objective of the clean run, read in the same kind of pass as the others, so that rounding cancels."""
        last = self.model.n_layers - 1
        return self.values({last: torch.ones(len(self.clean.batch.ids), 1, device=self.model.device)})[last][:, 0]

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
        room = self.room
        chunk: dict[int, Tensor] = {}
        for layer in sorted(alphas):
            for part in alphas[layer].split(1, 1):
                chunk[layer] = torch.cat([chunk[layer], part], 1) if layer in chunk else part
                room -= 1
                if not room:
                    yield chunk
                    chunk, room = {}, self.room
        if chunk:
            yield chunk


def quadrature(rule: str, steps: int) -> tuple[list[float], list[float]]:
    """Points on [0, 1] and their weights, which sum to 1; Captum's `riemann_trapezoid` sums to (steps - 1) / steps.

    >>> quadrature("midpoint", 2)
    ([0.25, 0.75], [0.5, 0.5])
    >>> quadrature("trapezoid", 3)
    ([0.0, 0.5, 1.0], [0.25, 0.5, 0.25])
    """
    offset = RULES[rule]
    if offset is None:
        if steps < 2:
            raise ValueError(f"rule={rule!r} needs at least 2 steps.")
        ends = [0.5 if k in (0, steps - 1) else 1.0 for k in range(steps)]
        parts = steps if rule == "riemann_trapezoid" else steps - 1
        return [k / (steps - 1) for k in range(steps)], [end / parts for end in ends]
    return [(k + offset) / steps for k in range(steps)], [1 / steps] * steps


def integral(path: Path, rule: str, steps: int) -> Float[Tensor, "layer batch moved width"]:
    """Integral of the gradient along the path of every layer, by a fixed rule."""
    points, weights = quadrature(rule, steps)
    exact = torch.promote_types(path.model.dtype, torch.float32)
    alpha = torch.tensor(points, dtype=exact, device=path.model.device).repeat(len(path.clean.batch.ids), 1)
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
    effect = path.end[:, None] - start
    gap = effect - torch.einsum("lbmw,lbmw->bl", total, difference)
    allowed = tolerance * torch.maximum(effect.abs(), 0.2 * effect.abs().amax(1, keepdim=True))
    rough = [(int(b), int(layer)) for b, layer in (gap.abs() > allowed).nonzero()]
    if not rough:
        return total
    paths = _first_intervals(path, rough, start, value, slope)
    while rough:
        rough = [k for k in rough if not _fine(paths[k], difference[k[1], k[0]], float(allowed[k]))]
        _halve(path, {k: paths[k] for k in rough}, difference, allowed)
    rest = sum(sum(i.error(difference[k[1], k[0]]) for i in paths[k]) > float(allowed[k]) for k in paths)
    if rest:
        log.info("%d layers of facts keep a gap above the tolerance with %d points", rest, MOST_POINTS)
    for (b, layer), intervals in paths.items():
        total[layer, b] = sum((i.gradient * (i.high - i.low) for i in intervals), torch.zeros_like(total[layer, b]))
    return total


def _fine(intervals: list[Interval], difference: Float[Tensor, "moved width"], allowed: float) -> bool:
    """Whether a path is refined enough, has as many points as it may have, or cannot be helped (not finite)."""
    error = sum(i.error(difference) for i in intervals)
    return len(intervals) >= MOST_POINTS or not error > allowed or not isfinite(error)


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
    paths = {}
    for b, layer in keys:
        edges = [float(start[b, layer]), *ends[layer][b].tolist(), float(path.end[b])]
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
    """Halve the intervals with the larger errors of every path, all in as few passes as possible.

    A pass is a table of facts and points; a fact with many intervals has several of its rows.
    """
    rows: dict[int, list[tuple[int, list[Interval]]]] = {}
    for (b, layer), intervals in paths.items():
        gaps = difference[layer, b]
        rough = [i for i in intervals if i.error(gaps) > float(allowed[b, layer]) / len(intervals)]
        worst = np.argsort([-i.error(gaps) for i in rough], kind="stable")[: MOST_POINTS - len(intervals)]
        rough = [rough[k] for k in worst]
        pieces = [rough[k : k + POINTS_PER_ROW // 2] for k in range(0, len(rough), POINTS_PER_ROW // 2)]
        rows.setdefault(layer, []).extend((b, piece) for piece in pieces)
    size = max(1, path.rows // (POINTS_PER_ROW * path.clean.batch.tail))
    for layer in sorted(rows):
        for k in range(0, len(rows[layer]), size):
            for b, intervals, halves in _halved(path, layer, rows[layer][k : k + size]):
                for i, pair in zip(intervals, halves, strict=True):
                    at = paths[b, layer].index(i)
                    paths[b, layer][at : at + 1] = pair


def _halved(
    path: Path, layer: int, rows: Sequence[tuple[int, list[Interval]]]
) -> Iterator[tuple[int, list[Interval], list[tuple[Interval, Interval]]]]:
    """The two halves of some intervals of some facts, in one pass."""
    device = path.model.device
    alphas = torch.full((len(rows), 2 * max(len(intervals) for _, intervals in rows)), 0.5, device=device)
    for row, (_, intervals) in enumerate(rows):
        middles = [((i.low + i.middle) / 2, (i.middle + i.high) / 2) for i in intervals]
        alphas[row, : 2 * len(middles)] = torch.tensor(middles).flatten()
    part = path.of(torch.tensor([b for b, _ in rows], device=device))
    _, values, slopes = (list(column) for column in zip(*part.gradients({layer: alphas}), strict=True))
    value, slope = torch.cat(values, 1), torch.cat(slopes, 1)
    for row, (b, intervals) in enumerate(rows):
        halves = [
            (
                Interval(i.low, i.middle, i.value_low, float(value[row, 2 * k]), i.value_mid, slope[row, 2 * k]),
                Interval(
                    i.middle, i.high, i.value_mid, float(value[row, 2 * k + 1]), i.value_high, slope[row, 2 * k + 1]
                ),
            )
            for k, i in enumerate(intervals)
        ]
        yield b, intervals, halves

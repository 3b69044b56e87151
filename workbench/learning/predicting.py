"""Does a measure of interference predict harm? Chosen on some facts, judged on others, against relabelled facts."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

from workbench.intervals import benjamini_hochberg
from workbench.learning.candidates import Candidate, aligned
from workbench.learning.pairs import (
    Matrix,
    Stack,
    drawn_facts,
    halves,
    mantel_rows,
    off_diagonal,
    pair_ranks,
    relabelled,
    resampled,
    shuffled,
    within,
)

DRAWS = 1000  # of the interval
SHUFFLES = 199  # of the control
Blocks = Sequence[tuple[np.ndarray, np.ndarray]]


def predicts(
    interference: xr.Dataset,
    harm: xr.Dataset,
    *,
    splits: int = 5,
    permutations: int = 999,
    seed: int = 0,
) -> pd.DataFrame:
    """Say which measure of interference predicts, on facts it was not chosen by, what learning j does to i.

    The facts are cut in halves, `splits` times, each cut used both ways. On one half the layer with the largest
    |Spearman correlation| of value and harm over ordered pairs is chosen, with its sign; on the other half that choice
    is judged. `rho` is the mean over cuts of these held-out correlations, in the direction that was chosen: 1 is a
    perfect forecast, 0 none, less a choice that did not hold.

    Args:
        interference: a result of `interference`; entry [i, j] is what j does to i.
        harm: a result of `harm`; only facts that both results have, as learnt and as read, take part.
        splits: random cuts of the facts.
        permutations: draws of the null.
        seed: of cuts and draws.

    Returns:
        A row for every measure at its best layer and as the mean over layers, one for the first-order forecast
        `-<g_i, g_j>` summed over layers where the interference has gradients, and one for every simple baseline (same
        relation, same answer, nearness in meaning where the interference has it, how well i was known): measure, kind,
        layer and `chosen` (the layer that most cuts chose, and their share), sign, rho, `low` and `high` (95% interval
        over facts drawn again, the choices as made), `control` with `control_low` and `control_high` (rho when the
        harms are shuffled over pairs: mean and central 95%), `p_value` (one-sided; facts relabelled jointly and
        everything, the choice of the layer too, done again), `q_value` (Benjamini-Hochberg over the measures; over the
        baselines apart), `gain` (R^2 on held-out pairs that the row adds to the (other) baselines, in ranks), n_facts,
        splits and seed.

    Raises:
        ValueError: fewer than 8 common facts, results of different models, values that are not finite.
    """
    if splits < 1 or permutations < 1:
        raise ValueError(f"predicts needs at least one split and one permutation, not {splits} and {permutations}.")
    target, candidates = aligned(interference, harm)
    blocks = halves(len(target), splits, seed)
    observed = held_out(candidates, lambda: iter([target[None]]), blocks)[:, 0]
    null = held_out(candidates, partial(relabelled, target, permutations, seed), blocks)
    control = held_out(candidates, partial(shuffled, target, SHUFFLES, seed), blocks)
    chosen = [choices(candidates, target, choose) for choose, _ in blocks]
    low, high = _intervals(candidates, chosen, target, blocks, seed)
    frame = pd.DataFrame(
        {
            "measure": [one.measure for one in candidates],
            "kind": [one.kind for one in candidates],
            **_summary(candidates, chosen),
            "rho": observed,
            "low": low,
            "high": high,
            "control": control.mean(1),
            "control_low": np.percentile(control, 2.5, axis=1),
            "control_high": np.percentile(control, 97.5, axis=1),
            "p_value": (1 + (null >= observed[:, None] - 1e-12).sum(1)) / (1 + null.shape[1]),
        }
    )
    apart = frame["kind"] == "baseline"
    for rows in (apart, ~apart):
        frame.loc[rows, "q_value"] = benjamini_hochberg(frame.loc[rows, "p_value"].to_numpy())
    about = {"n_facts": len(target), "splits": splits, "seed": seed}
    frame = frame.assign(gain=_gains(candidates, chosen, target, blocks), **about, apart=apart)
    frame = frame.sort_values(["apart", "rho"], ascending=[True, False], kind="stable", ignore_index=True)
    return frame.drop(columns="apart")


def by_layer(interference: xr.Dataset, harm: xr.Dataset, *, permutations: int = 999, seed: int = 0) -> pd.DataFrame:
    """Correlate every measure at every layer with the harm, on all facts: measure, layer, rho, p_value, q_value.

    Spearman over ordered pairs; two-sided p-values of Mantel's test, with Benjamini-Hochberg over layers. Nothing is
    chosen here, so nothing is held out; for the measure to trust see `predicts`.
    """
    target, candidates = aligned(interference, harm)
    frames = []
    for one in candidates:
        if one.kind == "best layer":
            rho, p_value = mantel_rows(one.matrices, target, permutations=permutations, seed=seed)
            columns = {"measure": one.measure, "layer": list(one.layers), "rho": rho, "p_value": p_value}
            frames.append(pd.DataFrame(columns).assign(q_value=benjamini_hochberg(p_value)))
    return pd.concat(frames, ignore_index=True)


def verdict(frame: pd.DataFrame, *, level: float = 0.05) -> str:
    """Say in words which measure of a table of `predicts` to trust on this model, or that it is none."""
    rows = frame[frame["kind"] != "baseline"]
    baselines = frame[frame["kind"] == "baseline"]
    best = rows.loc[rows["rho"].idxmax()]
    good = rows[(rows["q_value"] < level) & (rows["low"] > 0)]
    if good.empty:
        failed = [] if best["q_value"] < level else [f"that is not below {level:g}"]
        failed += [] if best["low"] > 0 else ["the interval is not above 0"]
        return (
            f"None of the measures predicts the harm on facts they were not chosen by: the best, {_named(best)}, has a "
            f"rank correlation of {_with_interval(best)}, p = {best['q_value']:.2g} after correction: "
            f"{' and '.join(failed)}."
        )
    best = good.loc[good["rho"].idxmax()]
    direction = "more" if best["sign"] > 0 else "less"
    simple = baselines.loc[baselines["rho"].idxmax()] if len(baselines) else None
    text = (
        f"Trust {_named(best)}: on facts it was not chosen by, the larger it is the {direction} harm learning one fact "
        f"does to another, with a rank correlation of {_with_interval(best)}, p = {best['q_value']:.2g} after "
        f"correction; shuffled pairs give {best['control']:+.2f}."
    )
    if simple is None:
        return text
    text += f" It adds {best['gain']:.3f} of R^2 to what simple baselines say"
    if simple["rho"] >= best["rho"]:
        return f"{text}, of which {simple['measure']} alone does no worse ({simple['rho']:.2f})."
    return f"{text}, the best of which is {simple['measure']} ({simple['rho']:.2f})."


def held_out(
    candidates: Sequence[Candidate], draws: Callable[[], Iterator[Stack]], blocks: Blocks
) -> Float[np.ndarray, "candidate draw"]:
    """Mean over blocks of the correlation on the judging half, at the layer and sign chosen on the other half.

    `draws` gives the harm matrices, again for every block; every draw makes its own choices.
    """
    rows = np.concatenate([one.matrices for one in candidates])
    ends = np.cumsum([len(one.matrices) for one in candidates])
    total: np.ndarray | float = 0.0
    for choose, judge in blocks:
        first, second = (pair_ranks(within(rows, part)) for part in (choose, judge))
        parts = []
        for stack in draws():
            tried = first @ pair_ranks(within(stack, choose)).T
            judged = second @ pair_ranks(within(stack, judge)).T
            each = zip(np.split(tried, ends[:-1]), np.split(judged, ends[:-1]), strict=True)
            parts.append(np.stack([_judged(*pair) for pair in each]))
        total = total + np.concatenate(parts, axis=1)
    return np.asarray(total) / len(blocks)


def choices(candidates: Sequence[Candidate], target: Matrix, facts: np.ndarray) -> list[tuple[int, int]]:
    """The place of the layer and the sign that these facts choose for every candidate."""
    wanted = pair_ranks(within(target[None], facts))[0]
    found = []
    for one in candidates:
        tried = pair_ranks(within(one.matrices, facts)) @ wanted
        best = int(np.abs(tried).argmax())
        found.append((best, int(np.sign(tried[best]))))
    return found


def _judged(
    tried: Float[np.ndarray, "layer draw"], judged: Float[np.ndarray, "layer draw"]
) -> Float[np.ndarray, " draw"]:
    best = np.abs(tried).argmax(0)[None]
    sign = np.sign(np.take_along_axis(tried, best, axis=0))
    return (sign * np.take_along_axis(judged, best, axis=0))[0]


def _summary(candidates: Sequence[Candidate], chosen: Sequence[Sequence[tuple[int, int]]]) -> dict[str, Any]:
    """What most blocks chose: layer, share of the blocks, sign."""
    columns: dict[str, list[Any]] = {"layer": [], "chosen": [], "sign": []}
    for number, one in enumerate(candidates):
        place, count = Counter(choice[number][0] for choice in chosen).most_common(1)[0]
        columns["layer"].append(one.layers[place] if one.layers else pd.NA)
        columns["chosen"].append(count / len(chosen))
        columns["sign"].append(int(np.sign(sum(choice[number][1] for choice in chosen))))
    return {**columns, "layer": pd.array(columns["layer"], dtype="Int64")}


def _uniform(matrices: Stack) -> Stack:
    """Ranks over the pairs from 0 to 1, as matrices again, with 0 on the diagonal."""
    filled = np.zeros(matrices.shape)
    ranks = pd.DataFrame(matrices[:, off_diagonal(matrices.shape[1])].T).rank(method="average").to_numpy().T
    filled[:, off_diagonal(matrices.shape[1])] = (ranks - 1) / (ranks.shape[1] - 1)
    return filled


def _intervals(
    candidates: Sequence[Candidate],
    chosen: Sequence[Sequence[tuple[int, int]]],
    target: Matrix,
    blocks: Blocks,
    seed: int,
) -> tuple[Float[np.ndarray, " candidate"], Float[np.ndarray, " candidate"]]:
    """95% percentile intervals of the mean held-out correlation when facts are drawn again, the choices as made."""
    shares = drawn_facts(len(target), DRAWS, seed)
    drawn = np.full((len(candidates), len(blocks), DRAWS), np.nan)
    for block, (choice, (_, judge)) in enumerate(zip(chosen, blocks, strict=True)):
        harm = _uniform(within(target[None], judge))[0]
        for number, (one, (place, sign)) in enumerate(zip(candidates, choice, strict=True)):
            value = _uniform(within(one.matrices[place][None], judge))[0]
            varies = sign != 0 and np.ptp(value) > 0  # what never varies forecasts nothing, and that is sure
            drawn[number, block] = sign * resampled(value, harm, shares[:, judge]) if varies else 0.0
    defined = np.isfinite(drawn).sum(1)  # a draw with too few different facts in a half has no correlation there
    means = np.divide(np.nansum(drawn, axis=1), defined, out=np.full(defined.shape, np.nan), where=defined > 0)
    low, high = np.nanpercentile(means, [2.5, 97.5], axis=1)
    return low, high


def _gains(
    candidates: Sequence[Candidate],
    chosen: Sequence[Sequence[tuple[int, int]]],
    target: Matrix,
    blocks: Blocks,
) -> list[float]:
    """Mean R^2 on the judging halves of ranks regressed on the baselines and the candidate, less without it."""
    simple = [number for number, one in enumerate(candidates) if one.kind == "baseline"]
    gains = np.zeros((len(blocks), len(candidates)))
    for block, (choice, (choose, judge)) in enumerate(zip(chosen, blocks, strict=True)):
        picked = np.stack([one.matrices[place] for one, (place, _) in zip(candidates, choice, strict=True)])
        (x, y), (new_x, new_y) = (_in_ranks(picked, target, part) for part in (choose, judge))
        for number in range(len(candidates)):
            others = [one for one in simple if one != number]
            scores = []
            for used in ([*others, number], others):
                weights = np.linalg.lstsq(_with_one(x[:, used]), y, rcond=None)[0]
                error = new_y - _with_one(new_x[:, used]) @ weights
                scores.append(1 - error @ error / np.square(new_y - new_y.mean()).sum())
            gains[block, number] = scores[0] - scores[1]
    return [float(gain) for gain in gains.mean(0)]


def _in_ranks(matrices: Stack, target: Matrix, facts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranks of the pairs of some facts: predictors (pair, row) and harm (pair)."""
    apart = off_diagonal(len(facts))
    return _uniform(within(matrices, facts))[:, apart].T, _uniform(within(target[None], facts))[0][apart]


def _with_one(columns: np.ndarray) -> np.ndarray:
    return np.column_stack([columns, np.ones(len(columns))])


def _named(row: pd.Series) -> str:
    where = f" at layer {row['layer']}" if row["kind"] == "best layer" else f", {row['kind']}"
    return f"{row['measure']}{where}"


def _with_interval(row: pd.Series) -> str:
    return f"{row['rho']:.2f} ({row['low']:.2f} to {row['high']:.2f})"

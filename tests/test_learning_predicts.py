"""Which measure predicts harm: planted ones are found, others are not, p-values hold, and choices do not leak."""

import itertools
from collections.abc import Iterator
from functools import partial

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from workbench.learning import by_layer, mantel, predicts, verdict
from workbench.learning.candidates import Candidate, aligned
from workbench.learning.pairs import (
    drawn_facts,
    halves,
    off_diagonal,
    pair_ranks,
    relabelled,
    resampled,
    shuffled,
)
from workbench.learning.predicting import held_out

N = 16


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Over ordered pairs, by the textbook."""
    pairs = [(i, j) for i in range(len(a)) for j in range(len(a)) if i != j]
    x, y = ([matrix[i, j] for i, j in pairs] for matrix in (a, b))
    rank = [[sum(w < v for w in row) + (sum(w == v for w in row) - 1) / 2 for v in row] for row in (x, y)]
    return float(np.corrcoef(rank)[0, 1])


def harms(matrix: np.ndarray, before: np.ndarray | None = None, relation: list[str] | None = None) -> xr.Dataset:
    n = len(matrix)
    ids = [f"f{i}" for i in range(n)]
    level = np.zeros(n) if before is None else before
    return xr.Dataset(
        {
            "harm": (("fact", "other"), matrix.astype(np.float64)),
            "before": ("fact", level),
            "gained": ("other", np.ones(n)),
            "reached": ("other", np.ones(n)),
        },
        coords={
            "fact": ids,
            "other": ids,
            "relation": ("fact", relation or ["r"] * n),
            "answer": ("fact", [f"a{i % 5}" for i in range(n)]),
            "n_tokens": ("fact", np.ones(n, dtype=np.int64)),
        },
        attrs=dict.fromkeys(("steps", "rate", "rate_used"), 1)
        | {"model_digest": "m", "fact_digest": "f", "other_digest": "f"},
    )


def measured(value: np.ndarray, names: list[str], **beside: object) -> xr.Dataset:
    """An interference result of values (metric, layer, fact, other)."""
    ids = [f"f{i}" for i in range(value.shape[-1])]
    return xr.Dataset(
        {"value": (("metric", "layer", "fact", "other"), value.astype(np.float32)), **beside},
        coords={"metric": names, "layer": np.arange(value.shape[1]), "fact": ids, "other": ids},
        attrs={"unit": "node", "model_digest": "m"},
    )


def planted(seed: int = 0, n: int = N, layers: int = 4, noise: float = 0.7) -> tuple[xr.Dataset, xr.Dataset]:
    """Layer 2 of "good" is minus the harm and noise; everything else has nothing to do with it."""
    generator = np.random.default_rng(seed)
    value = generator.normal(size=(2, layers, n, n))
    matrix = -value[0, 2] + noise * generator.normal(size=(n, n))
    return measured(value, ["good", "idle"]), harms(matrix, generator.normal(size=n), [f"r{i % 3}" for i in range(n)])


def test_a_planted_measure_is_found_with_its_layer_and_sign_and_an_idle_one_is_not() -> None:
    interference, harm = planted()
    frame = predicts(interference, harm, permutations=199).set_index(["measure", "kind"])
    good = frame.loc[("good", "best layer")]
    assert (good["layer"], good["chosen"], good["sign"]) == (2, 1.0, -1)
    assert good["p_value"] == 1 / 200
    assert good["q_value"] < 0.05
    assert 0.6 < good["low"] < good["rho"] < good["high"] < 0.95
    assert good["gain"] > 0.3
    assert (frame["control"].abs() < 0.03).all()
    assert ((frame["control_low"] < 0) & (frame["control_high"] > 0)).all()
    assert (frame.loc["idle"]["p_value"] > 0.05).all()
    assert (frame.loc["idle"]["gain"] < 0.02).all()
    baselines = frame[frame.index.get_level_values("kind") == "baseline"]
    assert set(baselines.index.get_level_values("measure")) == {"same relation", "same answer", "already known"}
    assert frame.loc[("good", "mean over layers"), "rho"] < good["rho"]
    text = verdict(frame.reset_index())
    assert text.startswith("Trust good at layer 2: on facts it was not chosen by, the larger it is the less harm")
    nothing = verdict(frame.drop(index="good", level="measure").reset_index())
    assert nothing.startswith("None of the measures predicts the harm")
    assert "idle" in nothing
    assert nothing.endswith("after correction: that is not below 0.05 and the interval is not above 0.")
    wide = frame.drop(index="idle", level="measure").reset_index().assign(low=-0.1)
    assert verdict(wide).endswith("after correction: the interval is not above 0.")
    pd.testing.assert_frame_equal(frame, predicts(interference, harm, permutations=199).set_index(["measure", "kind"]))


def test_held_out_correlations_equal_a_literal_loop() -> None:
    interference, harm = planted(1, n=8, layers=3)
    values, target = interference["value"].values[1].astype(np.float64), harm["harm"].values
    frame = predicts(interference, harm, splits=2, permutations=1, seed=7).set_index(["measure", "kind"])
    found = []
    for choose, judge in halves(8, 2, 7):
        assert sorted([*choose, *judge]) == list(range(8))
        tried = [spearman(layer[np.ix_(choose, choose)], target[np.ix_(choose, choose)]) for layer in values]
        best = int(np.argmax(np.abs(tried)))
        found.append(np.sign(tried[best]) * spearman(values[best][np.ix_(judge, judge)], target[np.ix_(judge, judge)]))
    assert frame.loc[("idle", "best layer"), "rho"] == pytest.approx(np.mean(found))


def test_a_baseline_that_explains_everything_leaves_no_gain() -> None:
    generator = np.random.default_rng(2)
    known = generator.normal(size=N)
    matrix = np.tile(known[:, None], (1, N)) + 0.1 * generator.normal(size=(N, N))
    value = np.tile(known[:, None], (1, N))[None, None] + 0.5 * generator.normal(size=(1, 1, N, N))
    frame = predicts(measured(value, ["copy"]), harms(matrix, known), permutations=99).set_index("measure")
    assert frame.loc["copy", "q_value"].iloc[0] < 0.05
    assert frame.loc["copy", "gain"].iloc[0] < 0.02
    assert frame.loc["already known", "gain"] > 0.05
    assert "already known alone does no worse" in verdict(frame.reset_index())


def test_the_first_order_forecast_sums_gradients_over_layers() -> None:
    generator = np.random.default_rng(3)
    ids = [f"f{i}" for i in range(10)]
    cosines, norm = generator.uniform(-1, 1, size=(1, 3, 10, 10)), generator.uniform(1, 2, size=(3, 10))
    beside = {
        "gradient_norm": (("layer", "fact"), norm),
        "meaning": (("fact", "other"), generator.normal(size=(10, 10))),
    }
    tokens = np.arange(1, 11)
    products = (cosines[0] * norm[:, :, None] * norm[:, None]).sum(0) * tokens[:, None] * tokens[None]
    harm = harms(-products).assign_coords(n_tokens=("fact", tokens))
    frame = predicts(measured(cosines, ["gradient"], **beside), harm.sel(fact=ids[::-1]), permutations=9)
    row = frame.set_index("measure").loc["first-order harm"]
    assert row["rho"] == pytest.approx(1)
    assert row["sign"] == 1
    assert row["kind"] == "sum over layers"
    assert "near in meaning" in set(frame["measure"])


def test_mantel_equals_every_permutation_of_five_facts() -> None:
    generator = np.random.default_rng(0)
    a = generator.normal(size=(5, 5))
    b = a + generator.normal(size=(5, 5))
    rho, p = mantel(a, b, permutations=120)
    assert rho == pytest.approx(spearman(a, b))
    null = [spearman(a, b[np.ix_(order, order)]) for order in itertools.permutations(range(5))]
    assert p == sum(abs(one) >= abs(rho) - 1e-12 for one in null) / 120
    assert mantel(a, b, permutations=119)[1] != p  # drawn, no longer all of them
    assert mantel(a, b, permutations=119)[1] == pytest.approx(p, abs=0.1)


def test_relabelling_keeps_facts_together_and_shuffling_does_not() -> None:
    matrix = np.random.default_rng(0).normal(size=(12, 12))
    moved, mixed = (np.concatenate(list(draw(matrix, 150, 0))) for draw in (relabelled, shuffled))
    assert moved.shape == mixed.shape == (150, 12, 12)
    apart = off_diagonal(12)
    for one in (moved[0], mixed[0]):
        np.testing.assert_array_equal(np.sort(one[apart]), np.sort(matrix[apart]))
    rows = np.sort(np.where(apart, matrix, 9), axis=1)[:, :-1]
    assert {tuple(row) for row in np.sort(np.where(apart, moved[0], 9), axis=1)[:, :-1]} == {tuple(r) for r in rows}
    assert {tuple(row) for row in np.sort(np.where(apart, mixed[0], 9), axis=1)[:, :-1]} != {tuple(r) for r in rows}


def test_a_resampled_correlation_equals_the_pairs_written_out() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, 6, 6))
    shares = drawn_facts(6, 20, 0)
    found = resampled(a, b, shares)
    for draw in range(20):
        facts = np.repeat(np.arange(6), np.rint(shares[draw] * 6).astype(int))
        pairs = [(i, j) for i in facts for j in facts if i != j]
        assert found[draw] == pytest.approx(np.corrcoef([a[p] for p in pairs], [b[p] for p in pairs])[0, 1])
    assert np.isnan(resampled(np.zeros((6, 6)), b, shares)).all()


def just(target: np.ndarray) -> Iterator[np.ndarray]:
    yield target[None]


def p_values(layers: int, cases: int, n: int = 9, draws: int = 99) -> np.ndarray:
    """One-sided p-values of the whole procedure where there is nothing to find, but every fact has its own level."""
    found = []
    for case in range(cases):
        generator = np.random.default_rng([case, layers])
        value = generator.normal(size=(layers, n, n)) + generator.normal(size=(layers, n, 1))
        target = generator.normal(size=(n, n)) + generator.normal(size=(n, 1)) + generator.normal(size=(1, n))
        candidates, blocks = [Candidate("m", "best layer", value)], halves(n, 1, case)
        (observed,) = held_out(candidates, partial(just, target), blocks)[:, 0]
        (null,) = held_out(candidates, partial(relabelled, target, draws, case), blocks)
        found.append((1 + (null >= observed - 1e-12).sum()) / (1 + draws))
    return np.array(found)


@pytest.mark.parametrize("layers", [1, 40])
def test_p_values_are_calibrated_and_choosing_among_many_layers_does_not_leak(layers: int) -> None:
    p = p_values(layers, 150)
    assert 1 <= (p <= 0.05).sum() <= 15  # of 150 at 5%: P(0) = 0.0005, P(more than 15) = 0.003
    assert 0.4 < p.mean() < 0.6


def test_choosing_and_judging_on_the_same_facts_would_leak() -> None:
    """The control of the test above: the best of 40 idle layers looks good on the facts that chose it."""
    found = []
    for case in range(10):
        generator = np.random.default_rng(case)
        value, target = generator.normal(size=(40, 9, 9)), generator.normal(size=(9, 9))
        everything = np.arange(9)
        found += [
            held_out([Candidate("m", "best layer", value)], partial(just, target), blocks)[0, 0]
            for blocks in ([(everything, everything)], halves(9, 1, case))
        ]
    assert np.mean(found[0::2]) > 0.2
    assert abs(np.mean(found[1::2])) < 0.15


def test_every_layer_is_correlated_and_corrected() -> None:
    interference, harm = planted()
    frame = by_layer(interference, harm, permutations=199)
    assert len(frame) == 8
    row = frame[(frame["measure"] == "good") & (frame["layer"] == 2)].iloc[0]
    assert row["rho"] == pytest.approx(spearman(interference["value"].values[0, 2], harm["harm"].values))
    assert row["rho"] < -0.5
    assert row["p_value"] == 1 / 200
    others = frame.drop(index=row.name)
    assert (others["q_value"] > 0.05).all()
    assert (frame["q_value"] >= frame["p_value"]).all()


def test_ties_and_values_that_never_vary() -> None:
    a = np.random.default_rng(0).integers(0, 3, size=(6, 6)).astype(float)
    b = np.random.default_rng(1).integers(0, 3, size=(6, 6)).astype(float)
    assert (pair_ranks(a[None]) @ pair_ranks(b[None]).T).item() == pytest.approx(spearman(a, b))
    assert not pair_ranks(np.ones((1, 6, 6))).any()
    interference, harm = planted(n=8)
    flat = predicts(interference * 0.0 + 1.0, harm, permutations=9)
    measures = flat[flat["kind"] != "baseline"]
    assert measures["rho"].eq(0).all()
    assert measures["p_value"].eq(1).all()


def test_wrong_inputs_are_named() -> None:
    interference, harm = planted(n=8)
    with pytest.raises(ValueError, match=r"at least 8 facts .* there are 7"):
        predicts(interference, harm.isel(other=slice(7)))
    with pytest.raises(ValueError, match="different models"):
        predicts(interference.assign_attrs(model_digest="n"), harm)
    with pytest.raises(ValueError, match="values of good that are not finite"):
        predicts(interference.where(interference["metric"] != "good"), harm)
    with pytest.raises(ValueError, match="at least one split"):
        predicts(interference, harm, splits=0)
    with pytest.raises(ValueError, match="7 of 8 learnt facts"):
        predicts(interference, harm.assign(reached=harm["reached"].where(harm["other"] != "f0")))


def test_results_of_other_facts_with_the_same_ids_are_not_joined() -> None:
    interference, harm = planted()
    ids = [str(name) for name in harm["fact"].values]
    asked = interference.assign_coords(text=("fact", ids))
    for read, learnt, refused in ((ids, ids, False), (["x", *ids[1:]], ids, True), (ids, [*ids[:-1], "x"], True)):
        told = harm.assign_coords(text=("fact", read), other_text=("other", learnt))
        if refused:
            name = ids[0] if read != ids else ids[-1]
            with pytest.raises(ValueError, match=f"Fact '{name}' has another prompt or answer in the interference"):
                predicts(asked, told, permutations=9)
        else:
            pd.testing.assert_frame_equal(
                predicts(asked, told, permutations=9), predicts(interference, harm, permutations=9)
            )
    some = told.isel(other=slice(0, -1))
    assert len(predicts(asked, some, permutations=9))  # the fact that differs is not common to both


def test_a_measure_whose_other_one_suffers_is_turned_before_it_is_compared() -> None:
    """Superposition has the edited fact first: harm that follows it is found only with the two exchanged."""
    draw = np.random.default_rng(5)
    values = draw.normal(size=(1, 1, 12, 12)).astype(np.float32)
    target, candidates = aligned(measured(values, ["superposition"]), harms(values[0, 0].T))
    (one,) = [c for c in candidates if c.measure == "superposition" and c.kind == "best layer"]
    np.testing.assert_allclose(one.matrices[0], target)
    assert not np.allclose(one.matrices[0], values[0, 0])

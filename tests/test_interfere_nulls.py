"""Nulls, intervals and corrections: literal loops, hand-worked examples, and calibration on data without structure."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.facts import FactSet
from workbench.interfere import interference
from workbench.interfere.measures import METRICS, _of_chance
from workbench.interfere.nulls import (
    BIN,
    DRAWS,
    against_meaning,
    against_relations,
    by_chance,
    chance_level,
    drawn,
    level_of_all,
    matched_orders,
    mean_interval,
    orders,
)
from workbench.intervals import benjamini_hochberg
from workbench.results import validate_interference

RELATIONS = np.array(["a", "a", "a", "a", "b", "b", "b", "c", "c", "c", "d", "d"])


def shuffles(n: int, draws: int = 199, seed: int = 1) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return np.stack([generator.permutation(n) for _ in range(draws)])


def noise(layers: int, n: int = len(RELATIONS), seed: int = 0) -> np.ndarray:
    """Values that are not symmetric, with facts that interfere with everyone more or less, and no structure else."""
    generator = np.random.default_rng(seed)
    return generator.normal(size=(layers, n, n)) + generator.normal(size=(layers, n, 1))


def test_benjamini_hochberg_is_the_example_worked_by_hand() -> None:
    """p times 5 over rank is .005, .05, .05, .04, .5 sorted; from the right, no q is above the next."""
    q = benjamini_hochberg(np.array([0.03, 0.5, 0.001, 0.032, 0.02]))
    np.testing.assert_allclose(q, [0.04, 0.5, 0.005, 0.04, 0.04])
    assert np.isnan(benjamini_hochberg(np.array([np.nan, np.nan]))).all()


@settings(max_examples=40, deadline=None)
@given(p=st.lists(st.integers(0, 30).map(lambda n: n / 101), min_size=1, max_size=12), level=st.floats(0.03, 0.3))
def test_benjamini_hochberg_calls_what_the_step_up_rule_calls(p: list[float], level: float) -> None:
    ranked = sorted(p)
    passed = [k for k, value in enumerate(ranked, start=1) if value * len(p) / k <= level]
    cut = ranked[passed[-1] - 1] if passed else -1.0
    assert (benjamini_hochberg(np.array(p)) <= level).tolist() == [value <= cut for value in p]


def test_the_tests_are_calibrated_where_there_is_nothing_to_find() -> None:
    """Of 400 cases at 0.05 about 20 are called; more than 34 or fewer than 8 has a chance below 0.002."""
    values = noise(400)
    near = noise(1, seed=5)[0]
    relation = against_relations(values, RELATIONS, shuffles(12), draws=50)["p_value"]
    mantel = against_meaning(values, near + near.T, shuffles(12))["meaning_p"]
    for p in (relation, mantel):
        assert 8 <= (p <= 0.05).sum() <= 34
        assert 0.45 < p.mean() < 0.55
        assert (benjamini_hochberg(p) <= 0.05).sum() <= 1


def test_what_is_planted_in_one_layer_is_called_there_only() -> None:
    values = noise(20)
    values[7] += 2.5 * (RELATIONS[:, None] == RELATIONS[None])
    near = noise(1, seed=7)[0]
    near = near + near.T
    values[11] += 2 * near
    relation = against_relations(values, RELATIONS, shuffles(12, 999))
    assert np.flatnonzero(benjamini_hochberg(relation["p_value"]) <= 0.05).tolist() == [7]
    assert relation["low"][7] > 0 > relation["low"][8]
    assert relation["null_high"][7] < relation["difference"][7]
    meaning = against_meaning(values, near, shuffles(12, 999))
    assert np.flatnonzero(benjamini_hochberg(meaning["meaning_p"]) <= 0.05).tolist() == [11]


def test_differences_and_their_interval_are_literal_loops() -> None:
    values = noise(1)
    found = against_relations(values, RELATIONS, shuffles(12), seed=3, draws=300)
    mean = (values[0] + values[0].T) / 2

    def difference(facts: np.ndarray) -> float:
        inside, outside = [], []
        for a in range(len(facts)):
            for b in range(a):
                if facts[a] != facts[b]:  # a fact and its own copy are no pair
                    same = RELATIONS[facts[a]] == RELATIONS[facts[b]]
                    (inside if same else outside).append(mean[facts[a], facts[b]])
        return float(np.mean(inside) - np.mean(outside))

    assert found["difference"][0] == pytest.approx(difference(np.arange(12)))
    counts = np.random.default_rng(3).multinomial(12, np.full(12, 1 / 12), size=300)
    drawn = [difference(np.repeat(np.arange(12), count)) for count in counts]
    np.testing.assert_allclose([found["low"][0], found["high"][0]], np.percentile(drawn, [2.5, 97.5]))
    null = []
    for shuffle in shuffles(12):
        of = RELATIONS[shuffle]
        pairs = [(i, j) for i in range(12) for j in range(i)]
        null.append(np.mean([mean[i, j] for i, j in pairs if of[i] == of[j]])
                    - np.mean([mean[i, j] for i, j in pairs if of[i] != of[j]]))  # fmt: skip
    np.testing.assert_allclose([found["null_low"][0], found["null_high"][0]], np.quantile(null, [0.025, 0.975]))
    assert found["p_value"][0] == (1 + sum(abs(d) >= abs(found["difference"][0]) for d in null)) / 200


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    values = noise(200, n=36, seed=9)
    relations = np.repeat(["a", "b", "c"], 12)
    found = against_relations(values, relations, shuffles(36, 2), draws=400)
    covered = ((found["low"] <= 0) & (found["high"] >= 0)).mean()
    assert 0.88 <= covered <= 1.0


def test_rank_correlation_with_meaning_is_spearman_over_pairs() -> None:
    values = np.round(3 * noise(2))  # with ties
    near = np.round(noise(1, seed=4)[0])
    near = near + near.T
    found = against_meaning(values, near, shuffles(12))
    pairs = [(i, j) for i in range(12) for j in range(i)]
    for layer in range(2):
        one = pd.Series([values[layer, i, j] + values[layer, j, i] for i, j in pairs]).rank()
        two = pd.Series([near[i, j] for i, j in pairs]).rank()
        assert found["meaning_rho"][layer] == pytest.approx(np.corrcoef(one, two)[0, 1], abs=1e-6)
    flat = against_meaning(np.ones((1, 12, 12)), near, shuffles(12))
    assert np.isnan(flat["meaning_p"]).all()


def test_too_few_facts_for_a_test_give_nan_and_no_warning() -> None:
    found = against_relations(noise(2, n=3), np.array(["a", "b", "c"]), shuffles(3))
    assert all(np.isnan(numbers).all() for numbers in found.values())
    pair = against_meaning(noise(2, n=2), np.eye(2), shuffles(2))
    assert np.isnan(pair["meaning_p"]).all()


@pytest.mark.parametrize("n_units", [5, BIN, 3 * BIN + 7])
def test_shuffles_are_permutations_and_the_matched_ones_stay_in_their_bin(n_units: int) -> None:
    generator = np.random.default_rng(0)
    size = generator.random(n_units)
    place = np.argsort(np.argsort(-size))
    free, matched = orders(6, n_units, generator), matched_orders(6, size, generator)
    for order in (free, matched):
        assert (np.sort(order, axis=1) == np.arange(n_units)).all()
    assert (place[matched] // BIN == place // BIN).all()
    assert n_units <= BIN or (place[free] // BIN != place // BIN).any()


def test_sizes_explain_what_the_matched_null_holds_fixed_and_the_free_one_does_not() -> None:
    """Facts that share nothing but loud units are beyond plain chance, and not beyond the matched one."""
    generator = np.random.default_rng(2)
    scores = np.abs(generator.normal(size=(10, 1, 320))) * np.where(np.arange(320) < 32, 20.0, 1.0)
    records = [{"id": f"f{i}", "relation": "ab"[i % 2], "prompt": f"p{i}", "answer": "a"} for i in range(10)]
    facts = FactSet.from_records(records)
    ds = xr.Dataset(
        {"score": (("fact", "layer", "unit"), scores.astype(np.float32))},
        coords={"fact": list(facts.ids), "layer": [0], "unit": np.arange(320)},
        attrs={"unit": "neuron", "method": "ig", "model_digest": "m", "fact_digest": "f"},
    )
    found = interference(None, facts, ds, progress=False).sel(metric="cosine", layer=0)
    largest = drawn(found["value"].values).largest
    assert float(found["chance"]) < 0.7 * largest
    assert 0.9 * largest < float(found["matched_chance"]) < 1.2 * largest


def test_chance_is_a_percentile_of_the_largest_pairs() -> None:
    found = iter(np.arange(40.0))

    def again(order: np.ndarray) -> np.ndarray:
        level = next(found)
        return np.array([[99.0, level], [level - 5, 99.0]])

    free, matched = by_chance(again, 2, np.ones(4), generator=np.random.default_rng(0), matched=7)
    assert [draw.largest for draw in (*free, *matched)] == list(range(26))
    assert [draw.smallest for draw in free] == list(range(-5, 14))
    assert (free[1].mean, free[1].below, free[3].below) == (-1.5, 1.0, 0.0)
    assert chance_level([draw.largest for draw in free]) == 18.0


def small() -> tuple[FactSet, xr.Dataset]:
    records = [{"id": f"f{i}", "relation": "ab"[i % 2], "prompt": f"p{i}", "answer": "a"} for i in range(4)]
    facts = FactSet.from_records(records)
    ds = xr.Dataset(
        {"score": (("fact", "layer", "unit"), np.random.default_rng(0).normal(size=(4, 2, 20)).astype(np.float32))},
        coords={"fact": list(facts.ids), "layer": [0, 1], "unit": np.arange(20)},
        attrs={"unit": "node", "method": "ig", "model_digest": "m", "fact_digest": "f"},
    )
    return facts, ds


def test_the_interval_of_a_mean_over_pairs_is_a_literal_bootstrap_over_facts() -> None:
    marks = np.triu(np.random.default_rng(2).random((9, 9)) < 0.4, 1)
    marks = marks | marks.T
    counts = np.random.default_rng(0).multinomial(9, np.full(9, 1 / 9), size=2000)
    rates = []
    for count in counts:
        drawn = np.repeat(np.arange(9), count)
        pairs = [marks[i, j] for i in drawn for j in drawn if i != j]
        rates.append(np.mean(pairs))
    assert mean_interval(marks) == pytest.approx(tuple(np.percentile(rates, [2.5, 97.5])))
    assert np.isnan(mean_interval(marks[:2, :2])).all()


def test_the_interval_of_the_correlation_with_meaning_is_a_literal_bootstrap_over_facts() -> None:
    near = noise(1, n=9, seed=4)[0]
    near = near + near.T
    values = np.stack([noise(1, n=9, seed=5)[0], near + noise(1, n=9, seed=6)[0], np.ones((9, 9))])
    found = against_meaning(values, near, shuffles(9), seed=3, draws=200)
    counts = np.random.default_rng(3).multinomial(9, np.full(9, 1 / 9), size=200)
    first, second = np.triu_indices(9, 1)
    for layer in range(2):
        ranks = [pd.Series(of[first, second] + of[second, first]).rank().to_numpy() for of in (values[layer], near)]
        rank = [{frozenset(pair): r for *pair, r in zip(first, second, one, strict=True)} for one in ranks]
        again = []
        for count in counts:
            drawn = np.repeat(np.arange(9), count)
            pairs = [frozenset((i, j)) for i in drawn for j in drawn if i != j]
            again.append(np.corrcoef([rank[0][pair] for pair in pairs], [rank[1][pair] for pair in pairs])[0, 1])
        low, high = np.percentile(again, [2.5, 97.5])
        assert (found["meaning_low"][layer], found["meaning_high"][layer]) == pytest.approx((low, high), abs=1e-9)
    assert found["meaning_low"][1] > 0  # negative control: the second has something to find, the first has not
    assert found["meaning_low"][0] < 0 < found["meaning_high"][0]
    assert np.isnan(found["meaning_low"][2])


@pytest.mark.parametrize("matched", [False, True])
def test_chance_is_exceeded_as_often_as_it_says(matched: bool) -> None:
    """Of 19 draws and one observation without structure, the observation is the largest in one of 20."""
    exceeded, planted = [], []
    generator = np.random.default_rng(3)
    for repetition in range(400):
        scores = generator.normal(size=(5, 48))
        scores /= np.linalg.norm(scores, axis=1, keepdims=True)
        shared = scores.copy()
        shared[1] = (shared[0] + 0.3 * shared[1]) / np.linalg.norm(shared[0] + 0.3 * shared[1])
        for values, found in ((scores, exceeded), (shared, planted))[: 2 if repetition < 100 else 1]:

            def again(order: np.ndarray, values: np.ndarray = values) -> np.ndarray:
                mixed = np.take_along_axis(values, order, axis=1)
                return mixed @ mixed.T

            size = np.arange(48.0)  # says nothing of these scores
            nulls = by_chance(again, 5, size, generator=generator)[matched]
            found.append(drawn(values @ values.T).largest > chance_level([draw.largest for draw in nulls]))
    assert 0.025 < np.mean(exceeded) < 0.08  # 5% of 400, within 2.5 standard errors
    assert np.mean(planted) > 0.99


def test_some_layer_is_beyond_its_level_as_often_as_it_says() -> None:
    """One result in 20 has a layer beyond at most; what is planted is found in its layer, and seldom elsewhere."""
    generator, any_layer, planted, elsewhere = np.random.default_rng(5), [], [], []
    scale = np.array([0.0, 0.1, 1.0, 1.0, 5.0, 1.0, 1.0, 1.0, 2.0, 1.0])  # of the layers, one without any spread
    for _ in range(400):
        largest = scale * generator.gumbel(size=(20, 10))
        observed, level = largest[0], level_of_all(largest[1:])
        any_layer.append((observed > level).any())
        beyond = observed + 9 * (np.arange(10) == 4) * scale > level
        planted.append(beyond[4])
        elsewhere.append(beyond[[0, 1, 2, 3, 5, 6, 7, 8, 9]].any())
    assert 0.02 < np.mean(any_layer) < 0.085
    assert np.mean(planted) > 0.9
    assert np.mean(elsewhere) < 0.085
    assert np.isnan(level_of_all(np.ones((DRAWS - 1, 2)))).all()  # too few to judge by
    assert level_of_all(np.ones((DRAWS, 2))).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("harmful", [1, -1])
def test_pairs_collide_by_chance_in_one_result_of_twenty(harmful: int) -> None:
    """300 results of four layers without structure, from their draws to their levels; and 100 with a planted pair."""
    generator, found, planted = np.random.default_rng(11), [], []
    for repetition in range(300):
        scores = generator.normal(size=(4, 5, 48)) * np.array([1.0, 3.0, 1.0, 0.2])[:, None, None]
        loud = scores[:, 1] * (np.arange(4) == 2)[:, None]
        for values, beyond in (
            (scores, found),
            (scores + harmful * 4 * np.eye(5)[0][:, None] * loud[:, None], planted),
        )[: 2 if repetition < 100 else 1]:
            layers = [
                by_chance(lambda order, x=x: products(x, order), 5, np.ones(48), generator=generator, matched=1)
                for x in values
            ]
            level = _of_chance(list(zip(*layers, strict=True)), replace(METRICS["superposition"], harmful=harmful))[
                "level"
            ]
            pairs = np.stack([products(x)[np.triu_indices(5, 1)] for x in values])
            beyond.append((harmful * (pairs - level[:, None]) > 0).any(1))
    assert 0.015 < np.mean([any(of) for of in found]) < 0.085  # 5% within binomial error
    assert np.mean([of[2] for of in planted]) > 0.95
    assert np.mean([of[[0, 1, 3]].any() for of in planted]) < 0.085


def test_the_level_of_a_bounded_measure_can_be_reached_beside_a_layer_of_few_loud_units() -> None:
    """Cosines of four layers, in one of which chance comes near to 1: found there or elsewhere in one result of 20."""
    generator, loudness = np.random.default_rng(7), np.array([0.5, 2.5, 0.5, 0.5])[:, None, None]
    found, planted, levels, unbounded = [], [], [], []
    for repetition in range(200):
        scores = np.exp(loudness * generator.normal(size=(4, 5, 48)))
        shared = scores.copy()
        shared[2, 1] = shared[2, 0] * np.exp(0.1 * generator.normal(size=48))
        for values, beyond in ((scores, found), (shared, planted))[: 2 if repetition < 60 else 1]:
            unit = values / np.linalg.norm(values, axis=2, keepdims=True)
            layers = [
                by_chance(
                    lambda order, x=x: products(x, order), 5, np.ones(48), generator=generator, free=39, matched=1
                )
                for x in unit
            ]
            draws = list(zip(*layers, strict=True))
            level, free = (_of_chance(draws, replace(METRICS["cosine"], bounded=b))["level"] for b in (True, False))
            pairs = np.stack([products(x)[np.triu_indices(5, 1)] for x in unit])
            beyond.append((pairs > level[:, None]).any(1))
            levels.append(level)
            unbounded.append(free)
    assert np.max(levels) < 1 < np.max(unbounded)  # the control: levels that no cosine has
    assert 0.01 < np.mean([any(of) for of in found]) < 0.1  # 5% within binomial error
    assert np.mean([of[2] for of in planted]) > 0.95
    assert np.mean([of[[0, 1, 3]].any() for of in planted]) < 0.1


def products(values: np.ndarray, order: np.ndarray | None = None) -> np.ndarray:
    mixed = values if order is None else np.take_along_axis(values, order, axis=1)
    return mixed @ mixed.T


def test_results_of_before_stay_valid_and_new_columns_are_checked() -> None:
    facts, ds = small()
    found = interference(None, facts, ds, progress=False, permutations=5)
    validate_interference(found)
    validate_interference(found.drop_vars(["low", "high", "q_value", "chance", "matched_chance"]))
    with pytest.raises(ValueError, match="`q_value` with dims"):
        validate_interference(found.assign(q_value=found["q_value"].transpose("layer", "metric")))
    with pytest.raises(ValueError, match="`value` at metric"):
        validate_interference(found.assign(value=found["value"].where(found["layer"] == 0)))


def test_facts_without_a_relation_are_of_none() -> None:
    facts, ds = small()
    bare = FactSet.from_records([record | {"relation": ""} for record in facts.to_records()])
    ds = ds.assign_coords(text=("fact", list(bare.texts.values())))
    assert np.isnan(interference(None, bare, ds, progress=False, permutations=5)["within"]).all()
    two = [record | {"relation": "a" if record["id"] in ("f0", "f1") else ""} for record in facts.to_records()]
    found = interference(None, FactSet.from_records(two), ds, progress=False, permutations=5)
    pair = found["value"].sel(fact="f0", other="f1").values
    np.testing.assert_allclose(found["within"].values, pair, rtol=1e-5)

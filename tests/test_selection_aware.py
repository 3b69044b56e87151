"""`interference_aware` against plain Python, each of its terms off in turn, and what it refuses."""

from fractions import Fraction

import numpy as np
import pytest
import xarray as xr
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_selection import chosen, dataset, distinct

from workbench.facts import FactSet
from workbench.interfere import interference as measured
from workbench.selection import WEIGHTS, Selection, select
from workbench.selection.aware import layer_budgets

EXAMPLES = settings(max_examples=40, deadline=None)
OFF = dict.fromkeys(WEIGHTS, 0)


def collisions(value: list[float], load: np.ndarray, **attrs: object) -> xr.Dataset:
    """An interference result of three facts that overlap in a layer as much as `value` says."""
    pairs = np.broadcast_to(np.array(value)[None, :, None, None], (1, len(value), 3, 3)).copy()
    pairs[:, :, np.arange(3), np.arange(3)] = 1.0
    variables = {
        "value": (("metric", "layer", "fact", "other"), pairs.astype(np.float32)),
        "chance": (("metric", "layer"), np.zeros((1, len(value)), dtype=np.float32)),
        "load": (("layer", "unit"), load.astype(np.float32)),
    }
    return xr.Dataset(variables, coords={"layer": range(len(value))}, attrs={"unit": "node", **attrs})


def rank_plainly(row: list[Fraction]) -> list[Fraction]:
    """Share of the other units below, equal ones counting half."""
    others = max(1, len(row) - 1)
    return [(sum(w < v for w in row) + Fraction(sum(w == v for w in row) - 1, 2)) / others for v in row]


def keep_plainly(scores: np.ndarray, load: np.ndarray, new: np.ndarray, k: int, weights: dict) -> set[int]:
    """One layer: (fact, unit) scores of retained and of new facts, by sorting tuples of exact numbers."""
    rows = [[Fraction(float(v)) for v in row] for row in scores]
    width = len(rows[0])
    votes = [0] * width
    for row in rows:
        for _, j in sorted((value, j) for j, value in enumerate(row))[:k]:
            votes[j] += 1
    leaned = rank_plainly([Fraction(float(v)) for v in load])
    helped = rank_plainly([sum(abs(Fraction(float(row[j]))) for row in new) for j in range(width)])
    total = [sum(row[j] for row in rows) for j in range(width)]
    use = [
        Fraction(votes[j], len(rows)) - Fraction(weights["load"]) * leaned[j] + Fraction(weights["new"]) * helped[j]
        for j in range(width)
    ]
    return set(sorted(range(width), key=lambda j: (-use[j], total[j], j))[:k])


def share_plainly(total: int, z: list[float], weight: float) -> list[int]:
    """Largest remainder, no layer full."""
    share = [max(Fraction(0), 1 - Fraction(weight) * Fraction(v)) for v in z]
    ideal = [total * v / sum(share) for v in share]
    whole = [int(v) for v in ideal]
    for layer in sorted(range(len(z)), key=lambda i: (whole[i] - ideal[i], i))[: total - sum(whole)]:
        whole[layer] += 1
    return whole


@EXAMPLES
@example(seed=864, quota=25, load=0.5, new=0)  # two sums are equal as fractions, and not in floating point
@given(
    seed=st.integers(0, 999),
    quota=st.integers(20, 60),
    load=st.sampled_from([0, 0.5, 3]),
    new=st.sampled_from([0, 0.25, 2]),
)
def test_units_equal_plain_sorting(seed, quota, load, new):
    generator = np.random.default_rng(seed)
    scores = generator.integers(-3, 4, (4, 2, 8)).astype(float)  # many ties, between means as well
    fresh = generator.integers(-3, 4, (3, 2, 8)).astype(float)
    leaned = generator.integers(0, 5, (2, 8)).astype(float)
    weights = {"collision": 0, "load": load, "new": new}
    found = select(
        dataset(scores),
        strategy="interference_aware",
        quota=quota,
        interference=collisions([0.1, 0.9], leaned),
        new=dataset(fresh),
        weights=weights,
    )
    k = quota * 8 // 100
    expected = [keep_plainly(scores[:, i], leaned[i], fresh[:, i], k, weights) for i in range(2)]
    assert [set(found.rows(i)) for i in range(2)] == expected


@EXAMPLES
@given(seed=st.integers(0, 99), score=st.sampled_from(["signed", "magnitude"]), quota=st.integers(10, 90))
def test_all_weights_zero_is_layer_balanced(seed, score, quota):
    scores = np.random.default_rng(seed).integers(-2, 3, (5, 3, 10)).astype(float)
    inputs = {"interference": collisions([0.9, 0.1, 0.2], distinct(seed, 1, 3, 10)[0]), "new": dataset(scores[::-1])}
    straight = select(dataset(scores), quota=quota, score=score)
    arguments = {"strategy": "interference_aware", "quota": quota, "score": score}
    assert select(dataset(scores), **arguments, **inputs, weights=OFF) == straight
    assert select(dataset(scores), **arguments, weights=OFF) == straight  # nothing is read


@EXAMPLES
@given(
    z=st.lists(st.floats(-3, 3).map(lambda v: round(v, 3)), min_size=1, max_size=6),
    weight=st.sampled_from([0.0, 0.3, 1.0, 5.0]),
    total=st.integers(1, 40),
)
def test_budgets_are_the_largest_remainders(z, weight, total):
    z = [v - max(z) if all(1 - weight * v <= 0 for v in z) else v for v in z]  # some layer has a share
    found = layer_budgets(total, np.array(z), weight, n_units=10**6)
    share = [max(0.0, 1 - weight * v) for v in z]
    ideal = [total * v / sum(share) for v in share]
    assert sum(found) == total
    assert all(abs(n - x) < 1 + 1e-6 for n, x in zip(found, ideal, strict=True))
    if min(abs(x % 1 - y % 1) for i, x in enumerate(ideal) for y in [*ideal[:i], 0.5, 2]) > 1e-6:
        assert found == share_plainly(total, z, weight)


@EXAMPLES
@given(
    z=st.lists(st.floats(-3, 3), min_size=2, max_size=6),
    weight=st.sampled_from([0.0, 1.0, 9.0]),
    share=st.floats(0.05, 1),
)
def test_budgets_never_exceed_a_layer(z, weight, share):
    total = round(share * len(z) * 7)
    found = layer_budgets(total, np.array(z), weight, n_units=7)
    assert sum(found) == total
    assert all(0 <= n <= 7 for n in found)


def test_where_facts_collide_less_is_trained_and_the_total_stays():
    data, load = dataset(distinct(0, 6, 4, 20)), distinct(1, 1, 4, 20)[0]
    clashing = collisions([0.1, 0.2, 0.3, 0.9], load)
    found = select(
        data, strategy="interference_aware", quota=20, interference=clashing, weights={**OFF, "collision": 1}
    )
    counts = found.per_layer()["n_selected"].tolist()
    assert sum(counts) == select(data, quota=20).n_selected == 16
    assert counts == sorted(counts, reverse=True)
    assert counts[3] == 0  # 1.6 standard deviations above the mean of the layers
    assert found.origin["budgets"] == {str(layer): n for layer, n in enumerate(counts)}
    z = (np.array([0.1, 0.2, 0.3, 0.9]) - 0.375) / np.std([0.1, 0.2, 0.3, 0.9])
    assert counts == share_plainly(16, z.tolist(), 1.0)
    for layer, k in enumerate(counts):  # which units: the vote with that budget
        alone = select(data, strategy="per_layer_budget", quota={layer: 5 * k}) if k else None
        assert found.rows(layer) == (alone.rows(layer) if alone else [])
    even = collisions([0.5] * 4, load)
    flat = select(data, strategy="interference_aware", quota=20, interference=even, weights={**OFF, "collision": 1})
    assert flat == select(data, quota=20)
    lifted = clashing.assign(expected=clashing["chance"] + clashing["value"].values[:, :, 0, 1])  # all of it by chance
    flat = select(data, strategy="interference_aware", quota=20, interference=lifted, weights={**OFF, "collision": 1})
    assert flat == select(data, quota=20)


def test_each_term_off_in_turn_changes_the_selection_and_only_its_part():
    data, new = dataset(distinct(0, 8, 3, 30)), dataset(distinct(1, 5, 3, 30))
    load = np.abs(distinct(2, 1, 3, 30)[0])
    arguments = {
        "strategy": "interference_aware",
        "quota": 20,
        "interference": collisions([0.1, 0.2, 0.6], load),
        "new": new,
    }
    whole = select(data, **arguments)
    assert whole.origin["weights"] == WEIGHTS
    ablated = {name: select(data, **arguments, weights={name: 0}) for name in WEIGHTS}
    assert all(selection != whole and selection.n_selected == whole.n_selected for selection in ablated.values())
    assert ablated["collision"].per_layer()["n_selected"].tolist() == [6, 6, 6]
    assert ablated["load"].per_layer().equals(whole.per_layer())
    assert load[whole.mask.values].mean() < load[ablated["load"].mask.values].mean()
    helping = np.abs(new["score"].values).mean(axis=0)
    assert helping[whole.mask.values].mean() > helping[ablated["new"].mask.values].mean()
    assert select(data, **{**arguments, "new": None}).mask.equals(ablated["new"].mask)


def test_a_heavy_load_excludes_and_a_heavy_help_decides():
    data, load = dataset(distinct(0, 6, 2, 10)), np.abs(distinct(3, 1, 2, 10)[0])
    arguments = {"strategy": "interference_aware", "quota": 30, "interference": collisions([0.5, 0.5], load)}
    lightest = select(data, **arguments, weights={"load": 1e6})
    assert chosen(lightest) == {(i, int(j)) for i in range(2) for j in np.argsort(load[i])[:3]}
    new = distinct(4, 3, 2, 10)
    most = select(data, **arguments, new=dataset(new), weights={"load": 0, "new": 1e6})
    assert chosen(most) == {(i, int(j)) for i in range(2) for j in np.argsort(-np.abs(new).mean(axis=0)[i])[:3]}


@EXAMPLES
@given(seed=st.integers(0, 99))
def test_relabelling_units_permutes_the_selection(seed):
    scores, fresh, load = distinct(seed, 5, 3, 8), distinct(seed + 1, 4, 3, 8), distinct(seed + 2, 1, 3, 8)[0]
    shuffle = np.random.default_rng(seed).permutation(8)

    def made(order: np.ndarray) -> Selection:
        beside = {"interference": collisions([0.1, 0.5, 0.3], load[:, order]), "new": dataset(fresh[:, :, order])}
        return select(dataset(scores[:, :, order]), strategy="interference_aware", quota=40, **beside)

    assert np.array_equal(made(shuffle).mask.values, made(np.arange(8)).mask.values[:, shuffle])


def test_layers_restrict_it_and_what_it_reads():
    scores, load = distinct(0, 4, 4, 10), np.abs(distinct(1, 1, 4, 10)[0])
    whole = collisions([0.2, 0.9, 0.4, 0.1], load)
    arguments = {"strategy": "interference_aware", "quota": 30, "layers": [3, 1]}
    found = select(dataset(scores), **arguments, interference=whole, new=dataset(scores))
    assert found.rows(0) == found.rows(2) == []
    assert found.n_selected == 6
    other = collisions([9.0, 0.9, -3.0, 0.1], load)  # frozen layers take no part in the mean
    assert select(dataset(scores), **arguments, interference=other, new=dataset(scores)) == found


def test_it_reads_what_interference_measures(tmp_path):
    scores = np.abs(distinct(0, 4, 3, 12))
    scores[:, 2] = scores[:1, 2]  # in this layer all facts share their units
    facts = FactSet.from_records(
        [{"id": f"f{i}", "relation": "r", "prompt": f"p {i}", "answer": f"a{i}"} for i in range(4)], name="four"
    )
    data = dataset(scores, method="ig", model_digest="m", fact_digest=facts.digest)
    found = measured(None, facts, data, permutations=5, progress=False)
    selection = select(data, strategy="interference_aware", quota=25, interference=found, weights={"load": 0})
    assert selection.per_layer()["n_selected"].tolist()[2] == 0
    assert selection.n_selected == 9
    loaded = Selection.load(selection.save(tmp_path / "selection.json"))
    assert loaded.origin["weights"] == {"collision": 1.0, "load": 0.0, "new": 0.0}
    assert loaded.origin["interference"]["model_digest"] == "m"


DATA = dataset(distinct(0, 3, 2, 10), model_digest="m")
GOOD = collisions([0.1, 0.2], np.ones((2, 10)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs interference=, a result of `interference`"),
        ({"weights": {"lode": 1}}, "no term 'lode': its terms are collision, load, new"),
        ({"weights": {"load": -1}}, "weight of load is -1"),
        ({"weights": {"load": float("nan")}}, "weight of load is nan"),
        ({"interference": GOOD, "weights": {"new": 1}}, "no scores for it: give new="),
        ({"interference": GOOD.drop_vars("load")}, "lacks the variable `load`"),
        ({"interference": GOOD.isel(unit=slice(9))}, "covers 9 units of the layers"),
        ({"interference": GOOD.isel(layer=[0])}, r"of the layers \[0\]; the selection is made from 10 units"),
        ({"interference": GOOD.assign_attrs(unit="neuron")}, r"another kind of unit \(node, neuron\)"),
        ({"interference": GOOD.assign_attrs(model_digest="n")}, r"another model \(m, n\)"),
        ({"interference": GOOD * np.nan}, "load is not finite"),
        ({"interference": GOOD.assign(value=GOOD["value"] * np.nan)}, "overlaps that are not finite"),
        ({"interference": GOOD.isel(fact=[0], other=[0])}, "fewer than 2 facts"),
        ({"interference": GOOD, "new": DATA.isel(unit=slice(9))}, "new has 9 units in a layer"),
        ({"interference": GOOD, "new": DATA.assign_attrs(model_digest="n")}, r"and new are of another model \(m, n\)"),
        ({"interference": GOOD, "quota": 5}, "less than one unit"),
        ({"strategy": "layer_balanced", "new": DATA}, "does not read new: leave `new` out"),
        ({"strategy": "random", "weights": {}}, "does not read weights"),
    ],
)
def test_wrong_inputs_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        select(DATA, **{"strategy": "interference_aware", "quota": 20, **options})


def test_collisions_are_overlaps_and_nothing_that_means_something_else() -> None:
    """A larger gradient cosine is less harm: it changes nothing beside an overlap, and alone counts the other way."""
    scores = dataset(distinct(0, 6, 3, 20))
    plain = collisions([0.1, 0.5, 0.2], distinct(2, 1, 3, 20)[0])
    named = plain.assign_coords(metric=["cosine"])
    other = collisions([0.9, 0.1, 0.1], distinct(2, 1, 3, 20)[0]).assign_coords(metric=["gradient"])
    both = xr.concat([named, other], "metric", data_vars="minimal")
    options = {"strategy": "interference_aware", "quota": 20}
    rows = [select(scores, interference=found, **options).positions() for found in (plain, named, both)]
    assert rows[0] == rows[1] == rows[2]
    turned = collisions([-0.9, -0.1, -0.1], distinct(2, 1, 3, 20)[0]).assign_coords(metric=["cosine"])
    alone, as_overlap = (select(scores, interference=found, **options).positions() for found in (other, turned))
    assert alone == as_overlap != rows[0]
    keys = other.assign_coords(metric=["superposition"])
    with pytest.raises(ValueError, match="from cosine, jaccard or gradient; this interference has only superposition"):
        select(scores, interference=keys, **options)
    assert select(scores, interference=other, weights={"collision": 0}, **options).n_selected


def test_a_layer_where_most_facts_lean_on_one_unit_collides_most() -> None:
    """Its mean overlap is that of the other layers, where it comes of noise that shuffled units share as well."""
    generator = np.random.default_rng(0)
    scores = np.abs(generator.normal(size=(20, 6, 64)))
    scores[:, 3] *= 1e-3
    scores[:16, 3, 7], scores[range(16, 20), 3, range(20, 24)] = 1.0, 1.0
    data = dataset(scores.astype(np.float32))
    records = [{"id": str(i), "relation": "r", "prompt": f"p{i}", "answer": "a"} for i in data["fact"].values]
    found = measured(None, FactSet.from_records(records), data, metrics=["cosine"], progress=False)
    mean = found["value"].values[0][:, ~np.eye(20, dtype=bool)].mean(1)
    assert mean.std() < 0.02
    shuffled = [generator.permuted(scores[:, layer], axis=1) for layer in range(6)]
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in shuffled]
    by_hand = [float((rows @ rows.T)[~np.eye(20, dtype=bool)].mean()) for rows in unit]  # one draw
    assert found["expected"].values[0] == pytest.approx(by_hand, abs=0.03)
    options = {"strategy": "interference_aware", "quota": 20, "interference": found, "weights": {"load": 0}}
    counts = select(data, **options).per_layer()["n_selected"].to_numpy()
    assert counts[3] < 0.2 * np.delete(counts, 3).min()

"""Selections: mask algebra, position files, and every strategy against plain Python sorting."""

import json
import math
from fractions import Fraction

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from workbench.config import STRATEGIES as NAMED
from workbench.results import open_store
from workbench.selection import READ_INTERFERENCE, STRATEGIES, Selection, check_choice, keep, select, votes, voting

EXAMPLES = settings(max_examples=40, deadline=None)
VOTING = ["layer_balanced", "layer_highest", "global_lowest", "global_highest"]
TIED = arrays(np.int64, st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(2, 9)), elements=st.integers(-2, 2))


def dataset(scores: np.ndarray, unit: str = "node", **attrs: object) -> xr.Dataset:
    facts, layers, units = scores.shape
    coords = {"fact": [f"f{i}" for i in range(facts)], "layer": range(layers), "unit": range(units)}
    array = xr.DataArray(scores.astype(np.float32), dims=("fact", "layer", "unit"), coords=coords)
    return xr.Dataset({"score": array}, attrs={"unit": unit, **attrs})


def distinct(seed: int, facts: int, layers: int, units: int) -> np.ndarray:
    """Scores without a single tie, also none between means."""
    return np.random.default_rng(seed).normal(size=(facts, layers, units))


# The oracle: plain Python, one fact after the other, sorting tuples


def vote_plainly(rows: list[list[Fraction]], k: int) -> set[int]:
    """Keep k of the columns of `rows` (one row per fact) by votes, then mean, then index."""
    width = len(rows[0])
    count = dict.fromkeys(range(width), 0)
    for row in rows:
        for _, j in sorted((value, j) for j, value in enumerate(row))[:k]:
            count[j] += 1
    mean = [sum(row[j] for row in rows) / len(rows) for j in range(width)]
    return set(sorted(range(width), key=lambda j: (-count[j], mean[j], j))[:k])


def select_plainly(scores: np.ndarray, strategy: str, quota: int, magnitude: bool) -> set[tuple[int, int]]:
    sign = -1 if strategy.endswith("highest") else 1
    exact = [[[sign * (abs(v) if magnitude else v) for v in map(Fraction, row)] for row in fact] for fact in scores]
    layers, units = scores.shape[1:]
    if strategy.startswith("layer"):
        k = quota * units // 100
        return {(layer, j) for layer in range(layers) for j in vote_plainly([fact[layer] for fact in exact], k)}
    flat = [[value for row in fact for value in row] for fact in exact]
    return {divmod(j, units) for j in vote_plainly(flat, quota * layers * units // 100)}


def chosen(selection: Selection) -> set[tuple[int, int]]:
    return {(layer, row) for layer in range(selection.n_layers) for row in selection.rows(layer)}


@EXAMPLES
@given(scores=TIED, quota=st.integers(50, 99), strategy=st.sampled_from(VOTING), magnitude=st.booleans())
def test_strategies_equal_plain_sorting_with_many_ties(scores, quota, strategy, magnitude):
    kind = "magnitude" if magnitude else "signed"
    found = select(dataset(scores), strategy=strategy, quota=quota, score=kind)
    assert chosen(found) == select_plainly(scores, strategy, quota, magnitude)


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8", "float16", "float32"])
@pytest.mark.parametrize("strategy", ["layer_balanced", "layer_highest"])
def test_scores_of_every_type_of_number_are_selected_from_alike(dtype, strategy):
    scores = np.random.default_rng(0).integers(0, 100, (20, 2, 400)).astype(dtype)  # wide enough to be sampled
    assert chosen(select(dataset(scores), strategy=strategy)) == select_plainly(scores.astype(int), strategy, 10, False)


def test_layers_are_whole_numbers_and_layers_of_scores_those_of_the_model():
    scores = dataset(distinct(0, 3, 2, 10))
    for layers in (iter([0.5]), iter("0")):  # whose kinds are not seen before they are read
        with pytest.raises(ValueError, match="layers must be whole numbers"):
            select(scores, layers=layers)
    for labels, n_layers in (([0, 0], 2), ([0, 2], 2), ([-1, 0], 2)):
        with pytest.raises(ValueError, match="must be different ones of the 2 of the model"):
            select(scores.assign_coords(layer=labels).assign_attrs(n_layers=n_layers))


def test_the_oracle_can_tell_a_wrong_rule_from_the_right_one():
    scores = np.array([[[-1, 0, 1]], [[-1, 0, 1]], [[9, 0, 1]]])
    right = chosen(select(dataset(scores), quota=34))
    assert right == select_plainly(scores, "layer_balanced", 34, False) == {(0, 0)}
    by_mean_alone = {(0, int(scores.mean(axis=0)[0].argmin()))}
    assert by_mean_alone == {(0, 1)} != right


@EXAMPLES
@given(scores=TIED, data=st.data())
def test_votes_mark_the_k_lowest_by_score_and_index(scores, data):
    rows = scores[:, 0]
    k = data.draw(st.integers(0, rows.shape[1]))
    expected = [0] * rows.shape[1]
    for row in rows.tolist():
        for _, j in sorted((value, j) for j, value in enumerate(row))[:k]:
            expected[j] += 1
    assert votes(rows, k).tolist() == expected
    assert votes(rows, k).sum() == k * len(rows)


@EXAMPLES
@given(seed=st.integers(0, 99), strategy=st.sampled_from(VOTING))
def test_relabelling_units_permutes_the_selection(seed, strategy):
    scores = distinct(seed, 5, 3, 8)
    shuffle = np.random.default_rng(seed + 1).permutation(8)
    straight = select(dataset(scores), strategy=strategy, quota=40)
    relabelled = select(dataset(scores[:, :, shuffle]), strategy=strategy, quota=40)
    assert np.array_equal(relabelled.mask.values, straight.mask.values[:, shuffle])


@pytest.mark.parametrize("strategy", VOTING)
def test_order_of_facts_and_chunks_change_nothing(strategy, monkeypatch):
    # widely different magnitudes: a plain float64 sum of these columns depends on its order
    column = np.array([1e20, 3.0, -1e20, 1e-9, 2.0, -3.0, 7.0])
    rng = np.random.default_rng(0)
    scores = np.stack([rng.permutation(column) for _ in range(2 * 6)], axis=1).reshape(7, 2, 6)
    naive = {sum(scores[:, 0, j]) for j in range(6)} | {sum(scores[::-1, 0, j]) for j in range(6)}
    assert len(naive) > 1  # the case is hard: equal means look different when added plainly
    whole = select(dataset(scores), strategy=strategy, quota=40)
    for seed in range(5):
        mixed = scores[np.random.default_rng(seed).permutation(7)]
        assert select(dataset(mixed), strategy=strategy, quota=40) == whole
    monkeypatch.setattr(voting, "CHUNK_BYTES", 1)
    assert select(dataset(scores), strategy=strategy, quota=40) == whole
    assert select(dataset(scores * rng.normal(size=scores.shape)), strategy=strategy, quota=40) != whole


def test_scores_are_read_again_only_where_rounding_could_decide(monkeypatch):
    reads, chunks = [], voting.ScoreSource.chunks
    monkeypatch.setattr(voting.ScoreSource, "chunks", lambda source: reads.append(1) or chunks(source))
    for strategy in VOTING:
        select(dataset(distinct(0, 9, 3, 30)), strategy=strategy, quota=20)
    assert len(reads) == len(VOTING)
    reads.clear()
    tenths = np.array([[0.1, 0.6], [0.2, 0.4], [0.3, -0.4]], dtype=np.float32)  # both add to 0.6, or nearly so
    scores = np.concatenate([tenths, tenths[:, ::-1]])[:, None]
    assert select(dataset(scores), quota=50).rows(0) == select(dataset(scores[::-1]), quota=50).rows(0) == [0]
    assert len(reads) == 4
    reads.clear()
    assert select(dataset(np.zeros((4, 1, 6))), quota=50).rows(0) == [0, 1, 2]  # nothing was rounded
    assert len(reads) == 1


@EXAMPLES
@given(units=st.integers(2, 60), quota=st.floats(0.1, 99.9).map(lambda q: round(q, 1)), seed=st.integers(0, 9))
def test_quotas_are_met(units, quota, seed):
    scores = distinct(seed, 2, 3, units)
    k, total = (math.floor(Fraction(str(quota)) * n / 100) for n in (units, 3 * units))
    for strategy in ("layer_balanced", "random"):
        if k:
            assert select(dataset(scores), strategy=strategy, quota=quota).per_layer()["n_selected"].tolist() == [k] * 3
        else:
            with pytest.raises(ValueError, match="less than one unit"):
                select(dataset(scores), strategy=strategy, quota=quota)
    if total:
        assert select(dataset(scores), strategy="global_lowest", quota=quota).n_selected == total


def test_a_quota_is_exact_where_binary_floats_are_not():
    assert 32.3 * 1000 / 100 < 323  # what float arithmetic says
    assert select(dataset(distinct(0, 1, 1, 1000)), quota=32.3).n_selected == 323


def test_the_smallest_quota_named_by_the_error_works():
    data = dataset(distinct(0, 2, 2, 57))
    with pytest.raises(ValueError, match=r"less than one unit: use at least 1\.7544"):
        select(data, quota=1)
    assert select(data, quota=1.7544).n_selected == 2
    with pytest.raises(ValueError, match="less than one unit"):
        select(data, quota=1.7543)


def test_signed_and_magnitude_differ_on_negative_scores():
    scores = np.array([[[-9.0, -0.1, 0.2, 5.0]]])
    assert select(dataset(scores), quota=25, score="signed").rows(0) == [0]
    assert select(dataset(scores), quota=25, score="magnitude").rows(0) == [1]
    positive = np.abs(scores)
    assert select(dataset(positive), quota=25) == select(dataset(positive), quota=25, score="magnitude")


def test_random_is_seeded_and_ignores_the_scores():
    one, other = dataset(distinct(0, 2, 3, 40)), dataset(distinct(1, 2, 3, 40))
    drawn = select(one, strategy="random", seed=3)
    assert drawn == select(other, strategy="random", seed=3)
    assert drawn != select(one, strategy="random", seed=4)
    assert drawn.rows(0) != drawn.rows(1)
    assert select(one, strategy="random", seed=3, layers=[1]).rows(1) == drawn.rows(1)
    assert drawn.origin["seed"] == 3


def test_random_over_all_layers_meets_the_quota_as_a_whole_and_is_seeded():
    one, other = dataset(distinct(0, 2, 3, 40)), dataset(distinct(1, 2, 3, 40))
    drawn = select(one, strategy="global_random", seed=3, quota=30)
    assert drawn == select(other, strategy="global_random", seed=3, quota=30)
    assert drawn != select(one, strategy="global_random", seed=4, quota=30)
    assert drawn.n_selected == 36
    assert drawn.per_layer()["n_selected"].nunique() > 1  # layers are not balanced


@pytest.mark.parametrize(
    "strategy", [name for name in STRATEGIES if name not in {"per_layer_budget", *READ_INTERFERENCE}]
)
def test_layers_restrict_every_strategy(strategy):
    scores = distinct(0, 4, 4, 10)
    found = select(dataset(scores), strategy=strategy, quota=30, layers=[3, 1])
    assert found.rows(0) == found.rows(2) == []
    assert found.n_selected == 6
    alone = select(dataset(scores[:, [1, 3]]), strategy=strategy, quota=30)
    if strategy != "random":
        assert [found.rows(1), found.rows(3)] == alone.positions()


def test_scores_of_some_layers_select_in_the_whole_model():
    data = dataset(distinct(0, 3, 4, 10), n_layers=4).isel(layer=[2])
    found = select(data, quota=20)
    assert found.matches(4, 10)
    assert found.per_layer()["n_selected"].tolist() == [0, 0, 2, 0]


def test_per_layer_budget():
    data = dataset(distinct(0, 4, 3, 10))
    even = select(data, strategy="per_layer_budget", quota=[20, 20, 20])
    assert even == select(data, quota=20)
    uneven = select(data, strategy="per_layer_budget", quota={0: 50, 2: 10})
    assert uneven.per_layer()["n_selected"].tolist() == [5, 0, 1]
    assert uneven.per_layer()["share"].tolist() == [0.5, 0.0, 0.1]
    for quota, message in [
        (10, "one percentage per layer"),
        ([1, 2], "2 percentages for 3 layers"),
        ({7: 9}, "layer 7"),
    ]:
        with pytest.raises(ValueError, match=message):
            select(data, strategy="per_layer_budget", quota=quota)
    with pytest.raises(ValueError, match="freezes every eligible layer"):
        select(data, strategy="per_layer_budget", quota=[0, 0, 0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "best"}, "no selection strategy 'best': choose one of layer_balanced"),
        ({"score": "squared"}, "no score 'squared'"),
        ({"quota": 0}, "not a percentage in"),
        ({"quota": 100}, "not a percentage in"),
        ({"quota": float("nan")}, "not a percentage in"),
        ({"quota": [10, 10]}, "takes one quota"),
        ({"layers": [0, 9]}, "layer 9 has no scores"),
        ({"layers": []}, "no layer is named"),
        ({"strategy": "random", "seed": -1}, "seed must not be negative, not -1"),
        ({"interference": xr.Dataset()}, "does not read interference"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        select(dataset(distinct(0, 2, 2, 10)), **options)


def test_wrong_results_are_named():
    data = dataset(distinct(0, 2, 2, 10))
    with pytest.raises(ValueError, match="unit kind 'row' is unknown"):
        select(data.assign_attrs(unit="row"))
    with pytest.raises(ValueError, match="needs the variable `score`"):
        select(data.rename(score="value"))
    with pytest.raises(ValueError, match="every unit"):
        select(data.isel(unit=slice(None, None, -1)))
    broken = data.copy(deep=True)
    broken["score"][1, 0, 3] = np.nan
    with pytest.raises(ValueError, match="score of fact f1, layer 0, unit 3 is nan"):
        select(broken)
    assert select(broken.isel(fact=[0])).n_selected == 2


def test_a_stored_result_gives_the_same_selection_and_streams(tmp_path, monkeypatch):
    monkeypatch.setattr("workbench.results.store.CHUNK_BYTES", 2 * 3 * 12 * 4)  # two facts in a file
    scores = distinct(0, 30, 3, 12).astype(np.float32)
    names = [f"f{i}" for i in range(30)]
    arguments = {"ids": names, "relations": names, "n_layers": 3, "n_units": 12, "attrs": {"unit": "neuron"}}
    with open_store(tmp_path / "a.zarr", **arguments) as store:
        store.write(range(30), scores, scores[..., 0], scores[:, 0, 0])
        data = store.dataset()
    monkeypatch.setattr(voting, "CHUNK_BYTES", 5 * 3 * 12 * 4)  # five facts at once
    sizes, counted = [], voting.votes_per_layer
    monkeypatch.setattr(voting, "votes_per_layer", lambda chunk, k: sizes.append(len(chunk)) or counted(chunk, k))
    found = select(data, quota=25)
    assert sizes == [4] * 7 + [2]  # whole files only
    assert found == select(dataset(scores, "neuron"), quota=25)
    assert found.unit == "neuron"
    assert found.origin["n_facts"] == 30


# Selections by themselves

masks = arrays(np.bool_, (3, 5))


def made(values: np.ndarray, unit: str = "node") -> Selection:
    return Selection(mask=xr.DataArray(values, dims=("layer", "unit")), unit=unit)


@EXAMPLES
@given(left=masks, right=masks)
def test_algebra_is_that_of_sets(left, right):
    a, b = made(left), made(right)
    sets = chosen(a), chosen(b)
    everything = {(layer, unit) for layer in range(3) for unit in range(5)}
    assert chosen(a & b) == sets[0] & sets[1]
    assert chosen(a | b) == sets[0] | sets[1]
    assert chosen(a ^ b) == sets[0] ^ sets[1]
    assert chosen(a - b) == sets[0] - sets[1]
    assert chosen(~a) == everything - sets[0]
    assert ~~a == a
    assert (a == b) == (sets[0] == sets[1])
    assert a != b or hash(a) == hash(b)


def test_selections_of_another_kind_or_shape_do_not_mix():
    nodes, neurons = made(np.eye(3, 5, dtype=bool)), made(np.eye(3, 5, dtype=bool), "neuron")
    assert nodes != neurons
    for other in (neurons, made(np.eye(3, 6, dtype=bool))):
        with pytest.raises(ValueError, match="Cannot combine"):
            nodes & other


@EXAMPLES
@given(values=masks)
def test_round_trips(values, tmp_path_factory):
    folder = tmp_path_factory.mktemp("selection")
    original = made(values, "neuron")
    positions = original.to_positions(folder / "positions.json")
    assert Selection.from_positions(positions, unit="neuron", n_units=5, n_layers=3) == original
    assert Selection.from_positions(original.positions(), unit="neuron", n_units=5) == original
    noted = Selection(original.mask, "neuron", {"strategy": "by hand", "seed": 1})
    loaded = Selection.load(noted.save(folder / "selection.json"))
    assert loaded == original
    assert loaded.origin == {"strategy": "by hand", "seed": 1}


def test_a_published_position_file_is_written_back_equal(tmp_path):
    rng = np.random.default_rng(0)
    lists = [rng.choice(896, 89, replace=False).tolist() for _ in range(24)]
    source = tmp_path / "published.json"
    source.write_text(json.dumps(lists))
    found = Selection.from_positions(source, unit="node", n_units=896, n_layers=24)
    assert found.matches(24, 896)
    assert found.per_layer()["n_selected"].tolist() == [89] * 24
    assert found.rows(0) == sorted(lists[0]) != lists[0]
    assert json.loads(found.to_positions(tmp_path / "again.json").read_text()) == lists
    assert Selection.load(found.save(tmp_path / "saved.json")).positions() == lists
    assert (found & found).positions() == [sorted(rows) for rows in lists]


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"0": [1]}, "not a list of lists"),
        ([1, 2], "not a list of lists"),
        ([], "not a list of lists"),
        ([[0], [1, 5]], "layer 1: unit 5 is out of range, the layer has units 0 to 4"),
        ([[-1], []], "unit -1 is out of range"),
        ([[0, 2, 2], []], "layer 0: unit 2 is listed twice"),
        ([[0.5], []], "0.5 is not a unit index"),
        ([[True], []], "True is not a unit index"),
        ([[0]], "positions for 1 layers, but the model has 2"),
    ],
)
def test_wrong_position_files_are_named(lists, message, tmp_path):
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(lists))
    with pytest.raises(ValueError, match=f"wrong.json.*{message}"):
        Selection.from_positions(path, unit="node", n_units=5, n_layers=2)


def test_wrong_files_and_masks_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*absent\.json"):
        Selection.from_positions(tmp_path / "absent.json", unit="node", n_units=5)
    bare = made(np.eye(3, 5, dtype=bool)).to_positions(tmp_path / "bare.json")
    with pytest.raises(ValueError, match="not a saved selection"):
        Selection.load(bare)
    with pytest.raises(ValueError, match="boolean, not int64"):
        made(np.ones((2, 2), dtype=np.int64))
    with pytest.raises(ValueError, match="unit kind 'head' is unknown"):
        made(np.ones((2, 2), dtype=bool), "head")
    with pytest.raises(ValueError, match="dims"):
        Selection(xr.DataArray(np.ones((2, 2), dtype=bool), dims=("a", "b")), "node")
    with pytest.raises(ValueError, match="no layer 3"):
        made(np.eye(3, 5, dtype=bool)).rows(3)


def test_a_selection_does_not_change_with_the_array_it_was_made_from():
    values = np.zeros((2, 3), dtype=bool)
    selection = made(values)
    values[:] = True
    assert selection.n_selected == 0
    with pytest.raises(ValueError, match="read-only"):
        selection.mask.values[0, 0] = True


def test_keep_breaks_ties_by_mean_then_index():
    count, mean = np.array([1, 3, 3, 3]), np.array([0.0, 2.0, 1.0, 1.0])
    assert np.flatnonzero(keep(count, mean, 2)).tolist() == [2, 3]
    assert np.flatnonzero(keep(count, mean, 1)).tolist() == [2]


def test_the_strategies_that_settings_name_are_those_that_take_one_quota() -> None:
    assert NAMED.replace(" or ", ", ").split(", ") == [name for name in STRATEGIES if name != "per_layer_budget"]


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "per_layer_budget"])
def test_the_fullest_layer_gets_no_more_than_a_quota_can_give(strategy) -> None:
    scores = distinct(0, 4, 3, 10)
    scores[:, 1] += {"global_lowest": -9, "global_highest": 9}.get(strategy, 0)  # all in one layer
    found, options = dataset(scores), {"strategy": strategy, "quota": 28}
    if strategy in READ_INTERFERENCE:
        options |= {"interference": unequal(3, 10), "weights": {"collision": 2}}
    fullest = select(found, **options).per_layer()["n_selected"].max()
    most = check_choice(strategy, 28, 10, 3)
    expected = {"layer_balanced": 2, "layer_highest": 2, "random": 2, "interference_aware": 6}.get(strategy, 8)
    assert most == expected >= fullest
    if not strategy.endswith("random"):
        assert fullest == expected  # no lower bound would do
    assert check_choice(strategy, 90, 10, 3) == (9 if expected == 2 else 10)


def unequal(layers: int, units: int) -> xr.Dataset:
    """Interference of two facts that collide in all layers but the first."""
    value = np.ones((1, layers, 2, 2))
    value[:, 0] = 0
    load = np.zeros((layers, units))
    variables = {"value": (("metric", "layer", "fact", "other"), value), "load": (("layer", "unit"), load)}
    return xr.Dataset(variables, coords={"layer": range(layers)}, attrs={"unit": "node"})


def test_the_cut_is_that_of_a_sort_also_where_the_sample_misleads() -> None:
    scores = np.random.default_rng(0).normal(size=(6, 640)).astype(np.float32)
    scores[1, :: voting.SAMPLED] -= 99  # what is sampled is all of the lowest, so that too few lie below
    scores[2, :: voting.SAMPLED] += 99
    scores[3] = 0.0
    scores[4] = scores[4].round()
    for k in (1, 32, 64, 639, 640):
        np.testing.assert_array_equal(voting.cuts(scores, k)[:, 0], np.sort(scores, axis=1)[:, k - 1])
    assert voting.cuts(scores, 64)[1] > scores[1, :: voting.SAMPLED].max()  # the control: the sample did mislead

"""Every measure of interference: what all must promise, and each against a second, literal way."""

import inspect
import math
from collections.abc import Sequence

import numpy as np
import planted
import pytest
import torch
import xarray as xr
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import FACTS, WORDS, tiny

from workbench.attribution import attribute
from workbench.facts import FactSet
from workbench.interfere import (
    METRICS,
    checked_metrics,
    colliding_pairs,
    conflict_rates,
    cross,
    gradients,
    interference,
    key_statistics,
    nulls,
    top_sets,
    within_across,
)
from workbench.interfere.gradients import inner_products
from workbench.interfere.moments import Moment
from workbench.interfere.nulls import groups, mean_interval, orders, share_by_chance
from workbench.intervals import benjamini_hochberg
from workbench.metrics import logprob
from workbench.models import HookedModel, pad_batch

SUBJECTS = {"france": "France", "japan": "Japan", "kenya": "Kenya", "gold": "gold", "grass": "grass"}
RECORDS = [{**record, "subject": SUBJECTS.get(record["id"], "")} for record in FACTS.to_records()]
#: Answers of one to three tokens, prompts of three to six; three facts without a subject in their prompt.
ASKED = FactSet.from_records(RECORDS, name="asked")
ORDER = [4 + (7 * i + i * i // 5) % (len(WORDS) - 4) for i in range(59)]
TEXT = [" ".join(WORDS[at] for at in ORDER[:50]), " ".join(WORDS[at] for at in ORDER[9:])]
ALL = tuple(METRICS)
#: The measures whose pairs are judged whatever is asked.
JUDGED = tuple(name for name in METRICS if name != "suppression")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def scores_of(model: HookedModel, facts: FactSet = ASKED) -> xr.Dataset:
    return attribute(model, facts, method="grad_x_act", unit="neuron", progress=False)


def measured(
    model: HookedModel,
    metrics: Sequence[str] = ALL,
    facts: FactSet = ASKED,
    scores: xr.Dataset | None = None,
    **options,
) -> xr.Dataset:
    settings = {"top": 10, "permutations": 20, "text": TEXT, "progress": False} | options
    return interference(
        model, facts, scores_of(model, facts) if scores is None else scores, metrics=metrics, **settings
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> tuple[xr.Dataset, xr.Dataset]:
    """The scores and every measure of the tiny llama."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORKBENCH_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        scores = scores_of(tiny("llama"))
        return scores, measured(tiny("llama"), scores=scores)


@pytest.mark.parametrize("metric", METRICS)
def test_every_measure_keeps_its_promises(metric: str, llama) -> None:
    scores, everything = llama
    model = tiny("llama")
    before = {name: weight.clone() for name, weight in model.hf.state_dict().items()}
    alone = measured(model, [metric], scores=scores)
    assert all(torch.equal(weight, before[name]) for name, weight in model.hf.state_dict().items())
    value = everything["value"].sel(metric=metric)
    np.testing.assert_array_equal(alone["value"].sel(metric=metric), value)  # whichever others are asked for
    for column in ("chance", "matched_chance", "p_value", "low", "meaning_p"):
        np.testing.assert_array_equal(alone[column].sel(metric=metric), everything[column].sel(metric=metric))
    assert value.dims == ("layer", "fact", "other")
    assert value.shape == (3, len(ASKED), len(ASKED))
    assert value.dtype == np.float32
    assert np.isfinite(value).all()
    assert list(value["fact"]) == list(value["other"]) == list(ASKED.ids)
    difference = float(np.abs(value - value.transpose("layer", "other", "fact").values).max())
    assert (difference < 1e-6) == METRICS[metric].symmetric
    assert (value.values < 0).any() == METRICS[metric].signed
    assert np.ptp(value.values, axis=(1, 2)).min() > 1e-4  # not all the same: something is measured in every layer


@pytest.mark.parametrize("metric", METRICS)
def test_order_company_and_batches_of_facts_change_no_value(metric: str, llama, monkeypatch) -> None:
    groups: list[list[int]] = []
    rows = gradients._rows
    monkeypatch.setattr(gradients, "_rows", lambda problem, group, n: groups.append(group) or rows(problem, group, n))
    scores, everything = llama
    order = np.random.default_rng(0).permutation(len(ASKED))[:5]
    fewer = measured(tiny("llama"), [metric], scores=scores.isel(fact=order), seed=7, memory=3e-5)
    assert metric != "gradient" or groups == [[0], [1], [2]]  # a layer at a time
    wanted = everything["value"].sel(metric=metric).isel(fact=order, other=order)
    np.testing.assert_allclose(fewer["value"].sel(metric=metric), wanted, atol=1e-5)
    turned = measured(tiny("llama"), [metric], scores=scores.isel(fact=order, layer=[2, 0, 1]), seed=7)
    for column in ("value", "matched_chance", "load"):
        np.testing.assert_allclose(turned[column], fewer[column].sel(layer=[2, 0, 1]), atol=1e-5)
    assert np.abs(turned["value"].values - fewer["value"].values).max() > 1e-3  # the control: layers differ
    again = measured(tiny("llama"), [metric], scores=scores.isel(fact=order), seed=7)
    np.testing.assert_array_equal(again["p_value"], fewer["p_value"])
    assert list(fewer["relation"]) == [FACTS[str(i)].relation for i in fewer["fact"].values]


def test_superposition_is_a_literal_double_loop() -> None:
    """Keys by plain hooks, a prompt at a time; C by a sum over tokens; p by a solved system for each fact."""
    for kind in ("gpt2", "llama"):
        model = tiny(kind)
        found = measured(model, ["superposition"])
        assert found.attrs["keys_at_last_token"] == 3
        tokens = model.tokenise(ASKED)
        last = [next((i for i, word in enumerate(fact.prompt_ids) if WORDS[word] == SUBJECTS.get(fact.fact_id)),
                     len(fact.prompt_ids) - 1) for fact in tokens]  # fmt: skip
        for layer in range(3):
            keys = [plain_keys(model, layer, fact.prompt_ids)[at] for fact, at in zip(tokens, last, strict=True)]
            read = [key for text in TEXT for key in plain_keys(model, layer, model.tokenizer(text).input_ids)[1:]]
            n, d = len(read), len(read[0])
            assert found.attrs["text_tokens"] == n
            second = sum(np.outer(key, key) for key in read) / n
            mean = np.trace(second) / d
            error = sum(np.sum((np.outer(key, key) - second) ** 2) for key in read) / n**2
            shrinkage = min(1.0, error / np.sum((second - mean * np.eye(d)) ** 2))
            assert found.attrs["shrinkage"][layer] == pytest.approx(shrinkage, rel=1e-4)
            covariance = (1 - shrinkage) * second + shrinkage * mean * np.eye(d)
            for i, own in enumerate(keys):
                opened = np.linalg.solve(covariance, own)
                for j, other in enumerate(keys):
                    wanted = (other @ opened) / (own @ opened)
                    assert float(found["value"][0, layer, i, j]) == pytest.approx(wanted, rel=2e-4, abs=2e-5)


def plain_keys(model: HookedModel, layer: int, ids: Sequence[int]) -> np.ndarray:
    kept: list[torch.Tensor] = []
    handle = model.down_proj(layer).register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    with torch.no_grad():
        model.hf(torch.tensor([list(ids)]))
    handle.remove()
    return kept[0].reshape(len(ids), -1).double().numpy()


def test_second_moments_come_from_the_cache_and_a_spoilt_text_gives_others(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    model = tiny("llama")
    scores = scores_of(model)
    first = measured(model, ["superposition"], scores=scores)
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 3
    written = [file.stat().st_mtime_ns for file in files]
    second = measured(model, ["superposition"], scores=scores)
    assert second.identical(first)
    assert [file.stat().st_mtime_ns for file in files] == written
    files[1].unlink()  # one layer is measured again, in groups of one
    assert measured(model, ["superposition"], scores=scores, memory=2.4e-5).identical(first)
    other = measured(model, ["superposition"], scores=scores, text=TEXT[:1])
    assert not np.allclose(other["value"], first["value"], atol=1e-3)
    with pytest.raises(ValueError, match=r"second moment of one layer .* give more with memory="):
        measured(model, ["superposition"], scores=scores, memory=1e-9)


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "other count", "no sum", "no moment"])
def test_a_damaged_second_moment_is_measured_again(damage: str, tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    scores = scores_of(tiny("llama"))
    first = measured(tiny("llama"), ["superposition"], scores=scores)
    file = sorted(tmp_path.rglob("*.safetensors"))[1]
    whole = file.read_bytes()
    with safe_open(file, framework="pt") as opened:
        about, lower = opened.metadata(), opened.get_tensor("lower").clone()  # else mapped
    if damage in ("cut", "empty", "flipped"):
        flipped = whole[:-6] + bytes([whole[-6] ^ 64]) + whole[-5:]
        file.write_bytes({"cut": whole[:-100], "empty": b"", "flipped": flipped}[damage])
    elif damage == "no sum":  # of before there were sums: nothing to warn of
        save_file({"lower": 2 * lower}, file, {name: about[name] for name in ("fourth", "tokens")})
    else:
        changed = about | {"tokens": "7"}
        save_file({"lower" if damage == "other count" else "upper": lower}, file, changed)
    assert measured(tiny("llama"), ["superposition"], scores=scores).identical(first)
    assert [str(file) in record.getMessage() for record in caplog.records] == [True] * (damage != "no sum")
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == about
        assert torch.equal(opened.get_tensor("lower"), lower)


def test_shrinkage_lies_between_none_and_all_and_nothing_is_singular() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(5000, 6, dtype=torch.float64, generator=generator) * torch.tensor([3.0, 1, 1, 1, 1, 0])
    many, few = (
        Moment(part.T @ part / len(part), float(part.square().sum(-1).square().mean()), len(part))
        for part in (keys, keys[:4])
    )
    assert 0 < many.shrunk()[1] < 0.01 < 0.1 < few.shrunk()[1] <= 1
    dead = Moment(torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64)), 1.0, 10)  # no spread of k k^T at all
    assert dead.shrunk()[1] == 0
    lower, shrinkage = dead.factor()
    assert 0 < shrinkage < 1e-5
    assert torch.isfinite(lower).all()
    silent = Moment(torch.zeros(2, 2, dtype=torch.float64), 0.0, 10)
    assert silent.factor()[0].tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_conflict_rates_are_shares_of_pairs(llama) -> None:
    _, found = llama
    values = found["value"].sel(metric="gradient").values
    row = conflict_rates(found).set_index("layer").loc[1]
    below = [values[1, i, j] < 0 for i in range(8) for j in range(i)]
    same = [ASKED[i].relation == ASKED[j].relation for i in range(8) for j in range(i)]
    assert row["conflict_rate"] == pytest.approx(np.mean(below))
    assert row["within"] == pytest.approx(np.mean([b for b, s in zip(below, same, strict=True) if s]))
    assert row["across"] == pytest.approx(np.mean([b for b, s in zip(below, same, strict=True) if not s]))
    assert row["n_pairs"] == 28
    assert row["low"] < row["conflict_rate"] < row["high"]
    assert 0 < row["chance"] < 1
    assert row["matched_chance"] == float(found["conflict_matched"].sel(metric="gradient", layer=1))
    for chance, p, draws in (("chance", "p_value", 19), ("matched_chance", "matched_p", gradients.MATCHED)):
        assert row[p] == share_by_chance(row["conflict_rate"], row[chance], 28, draws)
    # a pair in relation is a pair of facts whose relation is shuffled: literally, by the result's own draws
    relations, generator = np.array(groups(found["relation"].values)), np.random.default_rng(0)
    null = []
    for _ in range(20):
        of = relations[generator.permutation(8)]
        marks = np.array([of[i] == of[j] for i in range(8) for j in range(i)])
        null.append(np.mean(np.array(below)[marks]) - np.mean(np.array(below)[~marks]))
    assert row["difference"] == pytest.approx(row["within"] - row["across"])
    assert row["relation_p"] == (1 + sum(abs(x) >= abs(row["difference"]) - 1e-9 for x in null)) / 21
    assert row["difference_low"] <= row["difference"] <= row["difference_high"]
    table = conflict_rates(found)
    for p, q in (("p_value", "q_value"), ("matched_p", "matched_q"), ("relation_p", "relation_q")):
        assert table[q].tolist() == pytest.approx(benjamini_hochberg(table[p].to_numpy()).tolist())
    turned = conflict_rates(found.isel(layer=[2, 1])).set_index("layer").loc[1]  # a layer keeps its own chance
    assert (
        turned[["conflict_rate", "chance", "p_value"]].tolist() == row[["conflict_rate", "chance", "p_value"]].tolist()
    )
    with pytest.raises(ValueError, match="These are 3 of the 8 facts"):
        conflict_rates(found.isel(fact=[0, 1, 2], other=[0, 1, 2]))
    for metric in ("superposition", "linear_suppression"):  # of the latter, pairs with one silenced fact share a draw
        other = conflict_rates(found, metric=metric)
        assert other[["p_value", "q_value", "matched_p", "matched_q"]].isna().all(axis=None)
        assert other[["chance", "matched_chance", "relation_p"]].stack().between(0, 1).all()
    before = conflict_rates(found.drop_vars(["conflict_chance", "conflict_matched"]))  # as results were before
    assert before[["chance", "p_value", "q_value", "matched_p"]].isna().all(axis=None)
    with pytest.raises(ValueError, match="no 'gradient', only cosine"):
        conflict_rates(found.sel(metric=["cosine"]))


def test_what_chance_leaves_in_conflict_is_counted_draw_by_draw(llama, monkeypatch) -> None:
    scores, everything = llama
    drawn, seen = nulls.drawn, []
    monkeypatch.setattr(nulls, "drawn", lambda matrix: seen.append(matrix) or drawn(matrix))
    measured(tiny("llama"), ["gradient"], scores=scores)
    n_draws = 19 + gradients.MATCHED
    assert len(seen) == 3 * n_draws
    for layer in range(3):
        shares = [
            np.mean([matrix[i, j] < 0 for i in range(8) for j in range(i)])
            for matrix in seen[layer * n_draws : (layer + 1) * n_draws]
        ]
        at = {"metric": "gradient", "layer": layer}
        assert float(everything["conflict_chance"].sel(at)) == pytest.approx(np.mean(shares[:19]), abs=1e-6)
        assert float(everything["conflict_matched"].sel(at)) == pytest.approx(np.mean(shares[19:]), abs=1e-6)


def conflicts(n: int, shared: float, seed: int, planted: bool = False) -> list[float]:
    """p-values of the share of conflicts among facts of two tokens each, free and matched.

    The more all slopes have in common and all keys lie on one side, the fewer pairs conflict by chance.
    """
    generator = torch.Generator().manual_seed(seed)
    slope = torch.randn(2 * n, 6, generator=generator) + 3 * shared * torch.ones(6)
    key = torch.randn(2 * n, 48, generator=generator) ** 3 + shared  # few units carry most, as in a model
    if planted:  # one unit that all facts share, with the same slope: no conflict is left
        key[:, 3], slope[:] = 40.0, slope[:1]
    owner = torch.arange(2 * n) // 2
    found = gradients._found((slope, key), owner, n, np.random.default_rng(seed))
    rate = float((found.value[np.triu_indices(n, 1)] < 0).mean())
    n_pairs = n * (n - 1) // 2
    return [
        share_by_chance(rate, float(np.mean([draw.below for draw in null])), n_pairs, len(null))
        for null in (found.free, found.matched)
    ]


@pytest.mark.parametrize("shared", [0.0, 0.5])
def test_conflict_rates_are_called_no_more_often_than_chance_allows_and_where_planted(shared: float) -> None:
    """Of 200 results without anything shared, more than 19 at 0.05 has a chance below 0.003, as has more than 3 at
    0.05/30; there may be fewer, because not every pair is as likely in conflict as all are in the mean.
    """
    p = np.array([conflicts(8, shared, seed) for seed in range(200)])
    assert ((p <= 0.05).sum(0) <= 19).all()
    assert ((p <= 0.05 / 30).sum(0) <= 3).all()
    assert shared or (p <= 0.2).any(0).all()  # it is no test that never calls
    assert conflicts(8, 0.0, 0, planted=True)[0] < 1e-4


@pytest.mark.parametrize(("n_pairs", "chance", "n_draws"), [(28, 0.02, 4), (10, 0.05, 4), (21, 0.5, 4), (15, 0.1, 1)])
def test_the_test_of_a_share_is_exact(n_pairs: int, chance: float, n_draws: int) -> None:
    """Over all that could be seen: a p-value of at most a level has at most that chance, also far out."""

    def binomial(n: int) -> list[float]:
        return [math.comb(n, k) * chance**k * (1 - chance) ** (n - k) for k in range(n + 1)]

    n_others = n_pairs * n_draws
    called = dict.fromkeys((0.05, 0.01, 0.05 / 30), 0.0)
    for below, one in enumerate(binomial(n_others)):
        if one < 1e-9:
            continue
        for seen, other in enumerate(binomial(n_pairs)):
            p = share_by_chance(seen / n_pairs, below / n_others, n_pairs, n_draws)
            ways = [math.comb(n_pairs, k) * math.comb(n_others, seen + below - k) for k in range(seen + below + 1)]
            assert p == pytest.approx(sum(way for way in ways if way <= ways[seen]) / sum(ways))  # by counting
            for level in called:
                called[level] += one * other * (p <= level)
    assert all(share <= level for level, share in called.items())
    assert called[0.05] > 0


def test_a_share_of_pairs_in_draws_varies_as_the_binomial_share_says() -> None:
    """Pairs that have a fact in common are independent under shuffled units: the second way is 600 draws of one."""
    generator = torch.Generator().manual_seed(0)
    slope, key = torch.randn(20, 6, generator=generator), torch.randn(20, 48, generator=generator)
    owner, order = torch.arange(20) // 2, np.random.default_rng(0)
    shares = []
    for _ in range(600):
        shuffled = key.gather(1, torch.from_numpy(orders(10, 48, order))[owner])
        shares.append((inner_products(slope, shuffled, owner, 10)[np.triu_indices(10, 1)] < 0).mean())
    chance = np.mean(shares)
    assert np.var(shares) == pytest.approx(chance * (1 - chance) / 45, rel=0.2)
    one_for_all = [  # the control: one order for all facts keeps every product, and the share with it
        (inner_products(slope, key[:, order.permutation(48)], owner, 10)[np.triu_indices(10, 1)] < 0).mean()
        for _ in range(20)
    ]
    assert np.ptp(one_for_all) == 0


def test_a_result_says_how_many_draws_judge_its_pairs_and_one_draw_judges_none(llama) -> None:
    _, found = llama
    assert found.attrs["unit_draws"] == {name: {"suppression": 1, "gradient": 19}.get(name, 199) for name in ALL}
    few = {"gradient": gradients.MATCHED, "suppression": 1}
    assert found.attrs["matched_draws"] == {name: few.get(name, 19) for name in ALL}
    assert np.isnan(found["level"].sel(metric="suppression")).all()
    assert np.isfinite(found["level"].drop_sel(metric="suppression")).all()
    with pytest.raises(ValueError, match=r"pairs of 'suppression' are not judged: .* by another measure, as cosine\."):
        colliding_pairs(found, metric="suppression")


def test_suppression_judges_its_pairs_by_nineteen_draws_of_random_units(llama, tmp_path) -> None:
    scores, everything = llama
    model = tiny("llama")
    found = measured(model, ["suppression"], scores=scores, draws=19, parts=tmp_path / "parts")
    one = everything.sel(metric=["suppression"])
    np.testing.assert_allclose(found["value"], one["value"], atol=2e-5)  # draws change the null alone
    assert found.attrs["unit_draws"] == {"suppression": 19}
    assert (found["chance"] >= one["chance"] - 2e-5).all()  # the largest of 19, the first of which is the one
    assert np.isfinite(found["level"]).all()
    pairs = colliding_pairs(found, metric="suppression")
    by_hand = set()
    for layer, i, j in np.argwhere(found["value"].values[0] > found["level"].values[0][:, None, None] + 1e-6):
        if i != j:
            by_hand.add((layer, ASKED.ids[i], ASKED.ids[j]))
    assert set(zip(pairs["layer"], pairs["fact"], pairs["other"], strict=True)) == by_hand
    with pytest.raises(ValueError, match=r"other settings .*draws"):
        measured(model, ["suppression"], scores=scores, draws=20, parts=tmp_path / "parts")


def test_planted_suppression_is_beyond_its_level_and_not_once_it_is_gone() -> None:
    model, facts = planted.model(), planted.facts()
    scores = attribute(model, facts, unit="neuron", progress=False)
    for units, wanted in ((scores, {(1, "Italy", "Spain"), (1, "Spain", "Italy")}), (shuffled(scores), set())):
        found = interference(model, facts, units, metrics=["suppression"], draws=19, progress=False)
        pairs = colliding_pairs(found, metric="suppression")
        assert set(zip(pairs["layer"], pairs["fact"], pairs["other"], strict=True)) == wanted


def shuffled(scores: xr.Dataset) -> xr.Dataset:
    """The units of every fact in another order: nothing is shared but by chance."""
    order = np.random.default_rng(0).permuted(
        np.tile(np.arange(scores.sizes["unit"]), (scores.sizes["fact"], 1)), axis=1
    )
    values = np.take_along_axis(scores["score"].values, order[:, None], axis=2)
    return scores.assign(score=(scores["score"].dims, values))


def test_key_statistics_are_moments_of_the_pairs_off_the_diagonal(llama) -> None:
    _, found = llama
    row = key_statistics(found).set_index("layer").loc[2]
    values = found["value"].sel(metric="superposition", layer=2).values.astype(np.float64)
    pairs = np.array([values[i, j] for i in range(8) for j in range(8) if i != j])
    assert row["mean"] == pytest.approx(pairs.mean())
    assert row["low"] < row["mean"] < row["high"]
    assert (row["low"], row["high"]) == pytest.approx(mean_interval(values))
    assert row["spread"] == pytest.approx(pairs.std())
    assert row["kurtosis"] == pytest.approx(np.mean(((pairs - pairs.mean()) / pairs.std()) ** 4) - 3)


@pytest.mark.parametrize(("kind", "unit"), [("gpt2", "neuron"), ("llama", "node"), ("gemma3_text", "neuron")])
def test_suppression_equals_a_naive_loop(kind: str, unit: str) -> None:
    model = tiny(kind)
    facts = ASKED[2:7]
    scores = attribute(model, facts, method="grad_x_act", unit=unit, progress=False)
    found = measured(model, ["suppression"], facts, scores)
    count = max(1, round(scores.sizes["unit"] / 10))
    for layer in range(3):
        sets = top_sets(scores["score"].isel(layer=layer).values, count)
        for i, fact in enumerate(model.tokenise(facts)):
            ids, mask = pad_batch([fact.ids[:-1]])
            target = torch.tensor(fact.answer_ids)

            def read(silent=None, fact=fact, ids=ids, mask=mask, target=target, layer=layer) -> float:
                def zero(activation: torch.Tensor) -> torch.Tensor:
                    changed = activation.clone()
                    changed[:, len(fact.prompt_ids) - 1, silent] = 0
                    return changed

                with model.patched(unit, {} if silent is None else {layer: zero}):
                    return float(logprob(model.logits(ids, mask)[0, -len(target) :], target).sum())

            clean = read()
            drops = [clean - read(torch.from_numpy(marks)) for marks in sets]
            np.testing.assert_allclose(found["value"][0, layer, i], drops, atol=2e-4)
            assert np.abs(drops).max() > 1e-2


@pytest.mark.parametrize(("kind", "unit"), [("gpt2", "neuron"), ("llama", "node"), ("gemma3_text", "neuron")])
def test_linear_suppression_is_the_slope_of_suppression(kind: str, unit: str) -> None:
    """By autograd through plain hooks, a fact at a time; and by silencing the units by a hundredth only."""
    model = tiny(kind)
    facts = ASKED[2:7]
    scores = attribute(model, facts, method="grad_x_act", unit=unit, progress=False)
    found = measured(model, ["linear_suppression"], facts, scores)["value"][0]
    count = max(1, round(scores.sizes["unit"] / 10))
    for layer in range(3):
        sets = top_sets(scores["score"].isel(layer=layer).values, count)
        for i, fact in enumerate(model.tokenise(facts)):
            ids, mask = pad_batch([fact.ids[:-1]])
            at, target = len(fact.prompt_ids) - 1, torch.tensor(fact.answer_ids)
            factor = torch.ones(scores.sizes["unit"], requires_grad=True)

            def read(factor: torch.Tensor, ids=ids, mask=mask, at=at, target=target, layer=layer) -> torch.Tensor:
                def scaled(activation: torch.Tensor) -> torch.Tensor:
                    marked = torch.zeros(activation.shape[1], 1)
                    marked[at] = 1
                    return activation * (1 + marked * (factor - 1))

                with model.patched(unit, {layer: scaled}):
                    logits = model.hf(ids, attention_mask=mask).logits[0]
                return logprob(logits[-len(target) :], target).sum()

            slope = torch.autograd.grad(read(factor), factor)[0].double().numpy()
            np.testing.assert_allclose(found[layer, i], sets @ slope, atol=1e-6, rtol=0)
            for j, marks in enumerate(sets):
                less, more = (float(read(torch.tensor(1 + step * marks).float())) for step in (-0.01, 0.01))
                assert float(found[layer, i, j]) == pytest.approx((more - less) / 0.02, abs=3e-4)
    assert np.abs(found).max() > 1e-2
    exact = measured(model, ["suppression"], facts, scores)["value"][0]
    assert np.abs(found - exact).max() > 1e-2  # the control: it is another number than the whole drop


def test_suppression_goes_on_where_it_stopped_and_only_there(tmp_path, monkeypatch, llama) -> None:
    scores, everything = llama
    model, parts = tiny("llama"), tmp_path / "parts"
    run, done = cross.run_queries, []

    def counted(*given):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return run(*given)

    monkeypatch.setattr(cross, "FACTS", 2)
    monkeypatch.setattr(cross, "run_queries", counted)
    with pytest.raises(KeyboardInterrupt):
        measured(model, ["suppression"], scores=scores, parts=parts)
    kept = len(list(parts.iterdir()))
    assert kept > 1  # the settings and at least one part
    monkeypatch.setattr(cross, "run_queries", lambda *given: done.append(1) or run(*given))
    done.clear()
    again = measured(model, ["suppression"], scores=scores, parts=parts)
    value = everything["value"].sel(metric="suppression")
    np.testing.assert_allclose(again["value"].sel(metric="suppression"), value, atol=2e-5)  # other batches
    resumed = len(done)
    monkeypatch.setattr(cross, "run_queries", lambda *given: pytest.fail("read again"))
    assert measured(model, ["suppression"], scores=scores, parts=parts).identical(again)
    monkeypatch.setattr(cross, "run_queries", lambda *given: done.append(1) or run(*given))
    done.clear()
    assert measured(model, ["suppression"], scores=scores).identical(again)
    assert resumed == len(done) - (kept - 1)
    with pytest.raises(ValueError, match=r"other settings .*scores"):
        measured(model, ["suppression"], scores=2 * scores.assign_attrs(scores.attrs), parts=parts)


def test_what_a_measure_refuses_is_refused_before_another_starts(monkeypatch) -> None:
    model = tiny("llama")
    scores = scores_of(model)
    monkeypatch.setattr("workbench.interfere.cross.run_queries", lambda *given: pytest.fail("started"))
    for last, wrong, words in (
        ("superposition", {"text": ["sky"]}, "no passage"),
        ("superposition", {"memory": 1e-9}, "second moment"),
        ("gradient", {"memory": 1e-9}, "gradients of"),
    ):
        names = [last, "suppression"] if "memory" in wrong else ["suppression", last]  # both refuse little memory
        with pytest.raises(ValueError, match=words):
            measured(model, names, scores=scores, **wrong)


def test_an_engine_that_is_refused_is_refused_before_another_measure_starts(monkeypatch) -> None:
    def refused(model) -> None:
        raise ValueError("engine")

    monkeypatch.setattr("workbench.interfere.gradients._rows", lambda *given: pytest.fail("started"))
    scores = scores_of(tiny("llama"))
    monkeypatch.setattr("workbench.interfere.cross.check_engine", refused)
    with pytest.raises(ValueError, match="engine"):
        measured(tiny("llama"), ["gradient", "suppression"], scores=scores)


def planted_measures(
    without: Sequence[tuple[int, int]] = (), subjects: Sequence[str] = tuple(planted.RELATION), **options
) -> xr.Dataset:
    model, facts = planted.model(without), planted.facts(subjects)
    text = [" ".join(["the capital of", *planted.RELATION, "is a city in the sky"] * 3)]
    scores = attribute(model, facts, unit="neuron", progress=False)
    return interference(model, facts, scores, metrics=ALL, text=text, permutations=20, progress=False, **options)


def test_planted_interference_is_found_at_its_layer_and_nowhere_else_and_not_once_it_is_gone() -> None:
    found = planted_measures()
    for metric in JUDGED:
        pairs = colliding_pairs(found, metric=metric)
        both = {(1, "Italy", "Spain"), (1, "Spain", "Italy")}
        wanted = {(1, "Italy", "Spain")} if METRICS[metric].symmetric else both
        assert set(zip(pairs["layer"], pairs["fact"], pairs["other"], strict=True)) == wanted, metric
    assert far_pairs(found) == {("Italy", "Spain", 1)}
    assert suppressed(found) == {(1, "Italy", "Spain"), (1, "Spain", "Italy")}
    conflict = colliding_pairs(found, metric="gradient").iloc[0]
    assert conflict["value"] < -0.5 < conflict["level"] <= 0
    shared = found["value"].sel(metric="gradient", layer=1, fact="Italy", other="Spain")
    assert float(shared) < -0.5  # one neuron writes both answers: to raise one is to lower the other
    assert float(found["value"].sel(metric="superposition", layer=1, fact="Italy", other="Spain")) > 0.9
    assert float(found["value"].sel(metric="suppression", layer=1, fact="Italy", other="Spain")) > 1
    for gone in (
        planted_measures(without=[(1, 999)]),
        planted_measures(subjects=["France", "Japan", "Kenya", "Italy"]),
    ):
        assert far_pairs(gone) == set()
        assert suppressed(gone) == set()
        for metric in JUDGED:
            assert colliding_pairs(gone, metric=metric).empty


def suppressed(found: xr.Dataset) -> set[tuple[int, str, str]]:
    """Pairs of facts of which one falls by a nat when the units of the other are silenced."""
    values = found["value"].sel(metric="suppression").values
    ids = [str(i) for i in found["fact"].values]
    return {(int(layer), ids[i], ids[j]) for layer, i, j in np.argwhere(values > 1) if i != j}


def far_pairs(found: xr.Dataset) -> set[tuple[str, str, int]]:
    """Pairs whose gradients are not at right angles."""
    pairs = np.argwhere(np.abs(np.triu(found["value"].sel(metric="gradient").values, 1)) > 0.01)
    ids = [str(i) for i in found["fact"].values]
    return {(ids[i], ids[j], int(layer)) for layer, i, j in pairs}


def test_nearness_in_meaning_is_the_cosine_of_mean_embeddings(llama) -> None:
    _, found = llama
    model = tiny("llama")
    table = model.W_E.double()
    rows = []
    for fact in ASKED:
        words = [*fact.subject.split(), *fact.answer.split()]
        rows.append(table[[WORDS.index(word) for word in words]].mean(0))
    for i, one in enumerate(rows):
        for j, two in enumerate(rows):
            cosine = float(torch.cosine_similarity(one, two, dim=0))
            assert float(found["meaning"][i, j]) == pytest.approx(cosine, abs=1e-6)
    assert "meaning" not in interference(None, ASKED, scores_of(model), progress=False, permutations=2)


def test_what_cannot_be_measured_is_refused_before_any_work(llama) -> None:
    scores, _ = llama
    model = tiny("llama")
    for options, message in (
        ({"metrics": ["cosines"]}, "no measure 'cosines': choose from cosine, jaccard"),
        ({"metrics": "cosine"}, "metrics is a list"),
        ({"metrics": []}, "metrics is a list"),
        ({"metrics": ["cosine", "cosine"]}, "asked for twice"),
        ({"top": 0}, "percentage"),
        ({"permutations": 0}, "at least one permutation"),
        ({"draws": 0}, "at least one draw of random units"),
        ({"memory": 0}, "positive number of GiB"),
        ({"text": "one text"}, "list of passages"),
    ):
        with pytest.raises(ValueError, match=message):
            interference(model, ASKED, scores, progress=False, **options)
    for wrong in ({"draws": 1.5}, {"draws": "19"}, {"permutations": 2.5}):
        with pytest.raises(ValueError, match=rf"a whole number, not {next(iter(wrong.values()))!r}\."):
            inspect.unwrap(checked_metrics)(["suppression"], **wrong)
    with pytest.raises(ValueError, match="'gradient' runs the model"):
        interference(None, ASKED, scores, metrics=["cosine", "gradient"], progress=False)
    with pytest.raises(ValueError, match=r"gradients of 8 facts take .* fewer facts"):
        measured(model, ["gradient"], scores=scores, memory=1e-6)


def test_the_frame_has_every_number_per_metric_and_layer(llama) -> None:
    frame = within_across(llama[1])
    assert len(frame) == len(ALL) * 3
    assert list(frame.columns[:5]) == ["metric", "layer", "within", "across", "difference"]
    assert {"low", "high", "q_value", "chance", "matched_chance", "meaning_rho", "meaning_q"} <= set(frame)
    assert (frame["low"] <= frame["high"]).all()
    assert (frame["q_value"] >= frame["p_value"] - 1e-6).all()

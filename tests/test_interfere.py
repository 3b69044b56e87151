"""Interference: overlaps against literal loops, nulls that are calibrated, and a planted collision."""

from dataclasses import replace

import numpy as np
import planted
import pytest
import torch
import xarray as xr
from tiny import FACTS, tiny

from workbench.attribution import attribute
from workbench.facts import FactSet
from workbench.interfere import METRICS, colliding_pairs, cosine, interference, jaccard, top_sets, within_across
from workbench.interfere.nulls import MANY, by_chance, chance_level
from workbench.results import open_result, save_result


def invented(scores: np.ndarray, relations: list[str]) -> tuple[FactSet, xr.Dataset]:
    """An attribution made of given scores (fact, layer, unit)."""
    _, n_layers, n_units = scores.shape
    facts = FactSet.from_records(
        [{"id": f"f{i}", "relation": r, "prompt": f"p{i}", "answer": "a"} for i, r in enumerate(relations)]
    )
    ds = xr.Dataset(
        {"score": (("fact", "layer", "unit"), scores.astype(np.float32))},
        coords={"fact": list(facts.ids), "layer": np.arange(n_layers), "unit": np.arange(n_units)},
        attrs={"unit": "neuron", "method": "ig", "model_digest": "m", "fact_digest": "f"},
    )
    return facts, ds


def test_overlaps_equal_a_literal_double_loop() -> None:
    scores = np.random.default_rng(0).normal(size=(7, 40))
    scores[3] = 0
    ours_cosine, ours_jaccard = cosine(scores, 5), jaccard(scores, 5)
    for i in range(7):
        for j in range(7):
            a, b = abs(scores[i]), abs(scores[j])
            size = (a**2).sum() ** 0.5 * (b**2).sum() ** 0.5
            assert ours_cosine[i, j] == pytest.approx((a * b).sum() / size if size else 0)
            first = {k for k in sorted(range(40), key=lambda k: -a[k])[:5] if a[k]}
            second = {k for k in sorted(range(40), key=lambda k: -b[k])[:5] if b[k]}
            union = first | second
            assert ours_jaccard[i, j] == pytest.approx(len(first & second) / len(union) if union else 0)


def test_ties_in_top_sets_go_to_the_lower_unit_and_zeros_to_nobody() -> None:
    assert top_sets(np.array([[1.0, 0.0, 1.0, 1.0]]), 2).tolist() == [[True, False, True, False]]
    assert top_sets(np.array([[0.0, 0.0, 5.0, 0.0]]), 2).tolist() == [[False, False, True, False]]


def test_relabelling_units_changes_no_cosine() -> None:
    scores = np.random.default_rng(1).normal(size=(5, 30))
    order = np.random.default_rng(2).permutation(30)
    np.testing.assert_allclose(cosine(scores[:, order], 3), cosine(scores, 3))
    np.testing.assert_allclose(jaccard(scores[:, order], 3), jaccard(scores, 3))


@pytest.mark.parametrize(("n_units", "top"), [(64, 1.0), (200, 1.0)])
def test_sets_of_few_units_collide_on_noise_in_one_result_of_twenty(n_units: int, top: float) -> None:
    """Sets of one or two units coincide in shuffled scores too, so that no pair can be beyond chance there."""
    found = 0
    for seed in range(12):
        scores = np.random.default_rng(seed).normal(size=(12, 4, n_units))
        facts, ds = invented(scores, ["a", "b", "c"] * 4)
        result = interference(None, facts, ds, metrics=("jaccard",), top=top, permutations=1, seed=seed, progress=False)
        found += len(colliding_pairs(result, metric="jaccard")) > 0
    assert found <= 3  # of 12 at a rate of 5%: more in one of 450 series


def test_the_planted_pair_and_nothing_else_collides_and_not_without_it(tmp_path) -> None:
    facts = planted.facts()
    for without, expected in (((), [(1, "Italy", "Spain")]), ([(1, 999)], [])):
        model = planted.model(without)
        found = interference(model, facts, attribute(model, facts, unit="neuron", progress=False), progress=False)
        for metric in ("cosine", "jaccard"):
            pairs = colliding_pairs(found, metric=metric)
            assert list(zip(pairs["layer"], pairs["fact"], pairs["other"], strict=True)) == expected
    load = found["load"]
    assert (load > 0).sum() == 3  # three neurons are left, one fact each
    again = open_result(save_result(found, tmp_path / "i.zarr", kind="interference"))
    np.testing.assert_array_equal(again["value"], found["value"])


def test_shared_units_within_relations_are_found_at_their_layer_only() -> None:
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(24, 3, 200))
    relations = [f"r{i % 4}" for i in range(24)]
    for i in range(24):
        scores[i, 1, (i % 4) * 10 : (i % 4) * 10 + 10] += 4
    facts, ds = invented(scores, relations)
    frame = within_across(interference(None, facts, ds, progress=False)).set_index(["metric", "layer"])
    for metric in ("cosine", "jaccard"):
        assert frame.loc[(metric, 1), "p_value"] <= 0.01
        assert frame.loc[(metric, 1), "within"] > frame.loc[(metric, 1), "across"]
        assert frame.loc[(metric, 0), "p_value"] > 0.05
        assert frame.loc[(metric, 2), "p_value"] > 0.05


def test_within_across_and_difference_equal_plain_means() -> None:
    scores = np.random.default_rng(3).normal(size=(6, 1, 20))
    relations = ["a", "a", "b", "b", "b", "c"]
    facts, ds = invented(scores, relations)
    found = interference(None, facts, ds, progress=False)
    matrix = cosine(scores[:, 0], 1)
    pairs = [(i, j) for i in range(6) for j in range(i)]
    inside = [matrix[i, j] for i, j in pairs if relations[i] == relations[j]]
    outside = [matrix[i, j] for i, j in pairs if relations[i] != relations[j]]
    row = found.sel(metric="cosine", layer=0)
    assert float(row["within"]) == pytest.approx(np.mean(inside), rel=1e-5)
    assert float(row["across"]) == pytest.approx(np.mean(outside), rel=1e-5)
    assert float(row["difference"]) == pytest.approx(np.mean(inside) - np.mean(outside), rel=1e-4)
    np.testing.assert_allclose(found["load"][0], np.abs(scores[:, 0]).mean(0), rtol=1e-5)


def test_the_null_of_relations_is_calibrated() -> None:
    """Without any structure, about 5% of tests fall below 0.05: within binomial error over 120 layers."""
    scores = np.random.default_rng(4).normal(size=(12, 120, 30))
    facts, ds = invented(scores, [f"r{i % 3}" for i in range(12)])
    p = interference(None, facts, ds, progress=False, permutations=199)["p_value"].sel(metric="cosine").values
    assert (p < 0.05).sum() <= 13  # P(more than 13 of 120 at 5%) = 0.003
    assert 0.35 < p.mean() < 0.65


@pytest.mark.parametrize(("unit", "scope"), [("neuron", "last"), ("node", "all")])
def test_overlaps_are_matched_on_the_activation_that_the_attribution_read(unit: str, scope: str) -> None:
    """Read by plain hooks, a prompt at a time; by scores only where no model can tell it."""
    model = tiny("llama")
    scores = attribute(model, FACTS, method="grad_x_act", unit=unit, scope=scope, progress=False)
    options = {"metrics": ["cosine", "jaccard"], "permutations": 1, "top": 10, "progress": False}
    found, by_score = (interference(one, FACTS, scores, **options) for one in (model, None))
    top = max(1, round(scores.sizes["unit"] / 10))
    for layer in range(3):
        read: list[np.ndarray] = []
        handle = model.down_proj(layer).register_forward_hook(
            lambda module, args, output, read=read: read.append((args[0] if unit == "neuron" else output)[0].numpy())
        )
        with torch.no_grad():
            for fact in model.tokenise(FACTS):
                model.hf(torch.tensor([fact.prompt_ids]))
        handle.remove()
        rows = [np.abs(one[-1:] if scope == "last" else one).astype(np.float64) for one in read]
        for place, measure in enumerate((cosine, jaccard)):

            def again(order: np.ndarray, measure=measure, layer=layer) -> np.ndarray:
                return measure(np.take_along_axis(scores["score"].values[:, layer], order, axis=1), top)

            generator = np.random.default_rng([0, layer])
            loud = np.concatenate(rows).mean(0)
            _, matched = by_chance(again, len(FACTS), loud, generator=generator, free=MANY)
            wanted = chance_level([draw.largest for draw in matched])
            assert float(found["matched_chance"][place, layer]) == pytest.approx(wanted, rel=1e-5)
    np.testing.assert_array_equal(found["chance"], by_score["chance"])
    assert np.abs(found["matched_chance"] - by_score["matched_chance"]).max() > 1e-3
    where = {"last": "the last prompt token", "all": "every prompt token"}[scope]
    assert found.attrs["matched_on"] == dict.fromkeys(options["metrics"], f"|activation| at {where}")
    part = interference(model, FACTS, scores.isel(unit=range(20)), **options)  # not the units of the model
    for other in (by_score, part):
        assert other.attrs["matched_on"] == dict.fromkeys(options["metrics"], "|score|")


def test_every_measure_says_what_its_units_are_matched_on() -> None:
    scores = attribute(tiny("gpt2"), FACTS, method="grad_x_act", progress=False)
    text = ["the capital of France is Paris a city big small opposite hot cold"]
    found = interference(
        tiny("gpt2"), FACTS, scores, metrics=list(METRICS), text=text, permutations=1, progress=False
    ).attrs["matched_on"]
    assert found == {
        "cosine": "|activation| at the last prompt token",
        "jaccard": "|activation| at the last prompt token",
        "superposition": "|whitened key|",
        "gradient": "|activation| at every token",
        "linear_suppression": "|activation| at the last prompt token",
        "suppression": "|activation| at the last prompt token",
    }


def test_one_relation_has_no_across_and_wrong_inputs_are_refused() -> None:
    facts, ds = invented(np.ones((3, 1, 4)), ["a"] * 3)
    assert np.isnan(interference(None, facts, ds, progress=False)["p_value"]).all()
    with pytest.raises(ValueError, match="at least 2 facts"):
        interference(None, facts, ds.isel(fact=[0]), progress=False)
    with pytest.raises(ValueError, match="made with another model"):
        interference(tiny("gpt2"), facts, ds, progress=False)
    with pytest.raises(ValueError, match="f0"):
        interference(None, FACTS, ds, progress=False)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_refused_before_any_measure_runs(bad: float, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(METRICS, "jaccard", replace(METRICS["jaccard"], find=lambda problem: pytest.fail("it ran")))
    scores = np.ones((70, 2, 4))
    scores[66, 1, 3] = bad
    facts, ds = invented(scores, ["a", "b"] * 35)
    ds = ds.assign_coords(layer=[4, 9])
    at = "^The attribution has a `score` at fact f66, layer 9, unit 3 that is not finite: compute it again.$"
    for given in (ds, ds.transpose("unit", "layer", "fact"), ds.drop_vars("unit")):
        with pytest.raises(ValueError, match=at):
            interference(None, facts, given, metrics=["jaccard"], progress=False)

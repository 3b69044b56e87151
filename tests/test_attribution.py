"""`attribute`: against the naive loop, its own completeness, a planted answer, and the conditions of every method."""

import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import planted
import pytest
import torch
import xarray as xr
import zarr
from test_engine import naive
from tiny import FACTS, TOKENISED, default, random_model, tiny, tokenizer

from workbench import path
from workbench.attribution import (
    FIXED,
    METHODS,
    attribute,
    batches,
    by_fact,
    by_layer,
    checked_settings,
    fact_means,
    scoring,
    strongest,
)
from workbench.attribution.settings import DEFAULTS, _checked_steps
from workbench.engine import Room, room_for
from workbench.facts import FactSet, load_facts
from workbench.metrics import OBJECTIVES, logprob
from workbench.models import load_model
from workbench.path import quadrature
from workbench.results import open_result, open_store, save_parts, save_result, validate_attribution

CPU = Path("/proc/cpuinfo")
INTEL = CPU.is_file() and "GenuineIntel" in CPU.read_text(encoding="utf-8")
ALIKE = pytest.mark.skipif(
    not (INTEL and torch.backends.mkl.is_available()), reason="products round alike with oneMKL on Intel only"
)
KINDS = ["gpt2", "llama", "qwen2", "gemma3_text", "opt"]


def run(model, facts=FACTS, **options):
    return attribute(model, facts, progress=False, **options)


def loop(model, facts, unit, steps, scope="last", layers=None):
    """Integrated gradients by one hooked forward and backward per fact, layer and step."""
    scores = np.zeros((len(facts), model.n_layers, model.width(unit)))
    for row, fact in enumerate(facts.tokenise(model.tokenizer)):
        last = len(fact.prompt_ids) - 1
        moved = slice(last if scope == "last" else 0, last + 1)
        seen = []  # in the order of the layers
        keep = lambda value, seen=seen: seen.append(value.clone()) or value  # noqa: E731
        with model.patched(unit, dict.fromkeys(range(model.n_layers), keep)):
            model.logits(torch.tensor([fact.ids[:-1]]))
        for layer in range(model.n_layers) if layers is None else layers:
            for k in range(steps):
                _, gradient = naive(model, fact, unit, layer, (k + 0.5) / steps, scope, logprob)
                scores[row, layer] += (seen[layer][0, moved] * gradient / steps).sum(0).numpy()
    return scores


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unit", ["node", "neuron"])
def test_ig_equals_the_naive_loop(kind: str, unit: str) -> None:
    model = tiny(kind)
    ds = run(model, unit=unit, steps=3)
    validate_attribution(ds)
    expected = loop(model, FACTS, unit, 3)
    gap = np.abs(ds["score"].values - expected).max(axis=(1, 2)) / np.abs(expected).max(axis=(1, 2))
    assert gap.max() <= 1e-5  # measured: 2e-6
    shifted = loop(model, FACTS[:1], unit, 4)  # negative control: another number of steps is another number
    assert np.abs(ds["score"].values[:1] - shifted).max() > 1e-4 * np.abs(expected[0]).max()


def test_ig_over_all_positions_equals_the_naive_loop() -> None:
    expected = loop(tiny("gemma3_text"), FACTS, "node", 2, "all")
    ours = run(tiny("gemma3_text"), steps=2, scope="all")["score"].values
    np.testing.assert_allclose(ours, expected, atol=1e-5 * np.abs(expected).max())


def own(method: str, unit: str = "neuron") -> str:
    """The unit that a method defines, or the one that is wished."""
    return FIXED[method].get("unit", unit)


@pytest.mark.parametrize(
    ("kind", "method"),
    [*((kind, "ig") for kind in KINDS), *(("llama", method) for method in METHODS if method != "ig")],
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_batch_padding_and_order_change_nothing(kind: str, method: str, dtype: str) -> None:
    """Beyond 1e-6 of a fact's largest score in float64; in float32 of the largest, for products of few rows round."""
    model = tiny(kind) if dtype == "float32" else load_model(random_model(kind), tokenizer=tokenizer(), dtype=dtype)
    options = {"method": method, "unit": own(method), "steps": 4 if method == "ig" and kind != "llama" else None}
    together = run(model, **options)  # the adaptive rule on one architecture, four steps on the others
    alone = run(model, batch_size=1, **options)
    backwards = run(model, FactSet("backwards", FACTS.facts[::-1]), batch_size=3, **options)
    scale = np.abs(together["score"].values).max((1, 2))
    if method == "ablation":  # a difference of two objectives, each rounded at its own size
        scale = np.maximum(scale, -2 * np.log(together["target_prob"].values))
    for other in (alone, backwards.sel(fact=together["fact"])):
        gap = np.abs(other["score"].values - together["score"].values).max((1, 2))
        assert (gap <= 1e-6 * (scale.max() if dtype == "float32" else scale)).all()


@pytest.mark.real
@pytest.mark.parametrize("method", ["ig", "grad_x_act"])
def test_on_a_real_model_batch_padding_and_order_change_nothing(method: str) -> None:
    model, facts = default(), load_facts("world").filter(ids=["currency/italy", "continent/mexico"])
    tokens = model.tokenise(facts)
    assert len({len(fact.prompt_ids) for fact in tokens}) > 1
    assert len({len(fact.answer_ids) for fact in tokens}) > 1
    together = run(model, facts, method=method)["score"]
    alone = run(model, FactSet("backwards", facts.facts[::-1]), method=method, batch_size=1)["score"]
    assert together["fact"].values.tolist() != alone["fact"].values.tolist()
    gap = np.abs(alone.sel(fact=together["fact"]) - together) / np.abs(together).max(("layer", "unit"))
    assert float(gap.max()) <= 1e-6


@ALIKE
def test_products_round_alike_for_any_number_of_rows_once_the_package_is_imported() -> None:
    code = (
        "{}import torch; torch.manual_seed(0); rows, weight = torch.randn(600, 1536), torch.randn(576, 1536);"
        "whole = rows @ weight.T;"
        "print(all(torch.equal(rows[:count] @ weight.T, whole[:count]) for count in range(2, 300)))"
    )
    plain = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"}
    for first, alike in (("import workbench;", "True"), ("", "False")):  # without it they do not
        done = subprocess.run([sys.executable, "-c", code.format(first)], env=plain, capture_output=True, text=True)
        assert done.stdout.strip() == alike, done.stderr


def test_the_order_of_the_facts_does_not_touch_a_bit() -> None:
    forwards = run(tiny("llama"))
    backwards = run(tiny("llama"), FactSet("backwards", FACTS.facts[::-1]))
    np.testing.assert_array_equal(backwards.sel(fact=forwards["fact"])["score"], forwards["score"])


def moved_to(start: torch.Tensor, last: int, scope: str):
    """A patch that puts a baseline where the positions move."""

    def put(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        moved = slice(0 if scope == "all" else last, last + 1)
        value[:, moved] = start[moved]
        return value

    return put


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("unit", ["node", "neuron"])
def test_every_result_says_what_it_is_and_its_gap_is_the_completeness_error(method: str, unit: str) -> None:
    model, unit = tiny("llama"), own(method, unit)
    ds = run(model, method=method, unit=unit)
    attrs = ds.attrs
    assert (attrs["method"], attrs["unit"], attrs["model_digest"]) == (method, unit, model.digest)
    assert attrs["fact_digest"] == FACTS.digest
    assert {name: attrs[name] for name in FIXED[method] if name != "steps"} == {
        name: value for name, value in FIXED[method].items() if name != "steps"
    }
    effect = (ds["score"].sum("unit") + ds["gap"]).values
    objective = OBJECTIVES[attrs["objective"]]
    for row, fact in enumerate(FACTS.tokenise(model.tokenizer)):
        last = len(fact.prompt_ids) - 1
        ids, target = torch.tensor([fact.ids[:-1]]), torch.tensor([fact.answer_ids])
        if attrs["target"] == "predicted":
            ids = ids[:, : last + 1]
            target = model.logits(ids)[:, -1:].argmax(-1)
        clean = objective(model.logits(ids)[:, last:], target).sum()
        reached = logprob(model.logits(ids)[:, last:], target).sum().exp()
        assert ds["target_prob"].values[row] == pytest.approx(float(reached), rel=1e-4)
        for layer in range(model.n_layers):
            seen = [torch.zeros(ids.shape[1], model.width(unit))]
            if attrs["baseline"] == "blank":
                with model.patched(unit, {layer: lambda value, seen=seen: seen.append(value[0]) or value}):
                    model.logits(torch.zeros_like(ids))
            with model.patched(unit, {layer: moved_to(seen[-1], last, attrs["scope"])}):
                moved = objective(model.logits(ids)[:, last:], target).sum()
            assert effect[row, layer] == pytest.approx(float(clean - moved), abs=1e-4)


def test_more_steps_close_the_gap() -> None:
    gaps = [float(np.abs(run(tiny("llama"), steps=steps)["gap"]).mean()) for steps in (1, 4, 64)]
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 0.05 * gaps[0]


@pytest.mark.parametrize("rule", ["midpoint", "left", "right", "trapezoid"])
def test_quadrature_weights_sum_to_one_and_integrate(rule: str) -> None:
    points, weights = quadrature(rule, 1000)
    assert sum(weights) == pytest.approx(1)
    assert sum(w * p**2 for p, w in zip(points, weights, strict=True)) == pytest.approx(1 / 3, abs=1e-3)


def test_blank_baseline_and_predicted_target() -> None:
    model = tiny("llama")
    ds = run(model, baseline="blank", target="predicted", steps=64)
    fact = FACTS.tokenise(model.tokenizer)[0]
    logits = model.logits(torch.tensor([fact.prompt_ids]))[0, -1]
    assert ds["target_prob"].values[0] == pytest.approx(float(logits.softmax(-1).max()), rel=1e-4)
    blank = []
    with model.patched("node", {0: lambda value: blank.append(value[0, -1]) or value}):
        model.logits(torch.zeros(1, len(fact.prompt_ids), dtype=torch.long))

    def put(value):
        value = value.clone()
        value[:, -1] = blank[0]
        return value

    with model.patched("node", {0: put}):
        moved = model.logits(torch.tensor([fact.prompt_ids]))[0, -1]
    effect = logits.log_softmax(-1).max() - moved.log_softmax(-1)[logits.argmax()]
    assert float(ds["score"][0, 0].sum() + ds["gap"][0, 0]) == pytest.approx(float(effect), abs=1e-4)


def test_streamed_resumed_and_in_memory_are_the_same(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    expected = run(model, batch_size=2)["score"].values
    original, calls = scoring.score_batch, []

    def killed(*args):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(scoring, "score_batch", killed)
    with pytest.raises(KeyboardInterrupt):
        run(model, batch_size=2, out=tmp_path / "a.zarr")
    monkeypatch.undo()
    assert 0 < open_result(tmp_path / "a.zarr", partial=True).sizes["fact"] < len(FACTS)
    resumed = run(model, batch_size=2, out=tmp_path / "a.zarr")
    np.testing.assert_array_equal(resumed["score"].values, expected)
    monkeypatch.setattr(scoring, "score_batch", lambda *args: pytest.fail("done before"))
    np.testing.assert_array_equal(run(model, out=tmp_path / "a.zarr")["score"].values, expected)
    with pytest.raises(ValueError, match="steps"):
        run(model, steps=5, out=tmp_path / "a.zarr")


def test_when_memory_runs_out_smaller_passes_go_on_and_stay_small(monkeypatch, caplog) -> None:
    model, sizes = tiny("llama"), []
    expected = run(model, steps=2)["score"]
    original = scoring.score_batch

    def scarce(model, facts, settings, room):
        sizes.append((len(facts), room.rows))
        if len(facts) > 2 or room.rows > 256:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(model, facts, settings, room)

    monkeypatch.setattr(scoring, "score_batch", scarce)
    np.testing.assert_allclose(run(model, steps=2)["score"], expected, atol=1e-6 * float(np.abs(expected).max()))
    assert "memory ran out" in caplog.text
    assert sorted(sizes[-5:]) == [(1, 256)] * 5  # it does not try the larger ones again
    monkeypatch.setattr(scoring, "score_batch", lambda *args: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(ValueError, match=r"Memory ran out on fact '\w+' alone"):
        run(model, steps=2)


def test_a_path_that_is_not_finite_ends(monkeypatch) -> None:
    """It is refused by the store, not refined for ever."""
    model, original, calls = tiny("llama"), path.run_queries, []

    def broken(*args):
        calls.append(args)
        return original(*args) * (torch.nan if len(calls) > 4 else 1)

    monkeypatch.setattr(path, "run_queries", broken)
    with pytest.raises(ValueError, match="not finite"):
        run(model, tolerance=1e-4)


def test_means_stored_in_parts_equal_those_in_memory_and_read_a_few_facts_at_a_time(tmp_path, monkeypatch) -> None:
    asked = FACTS.per_prompt()
    ds = run(tiny("llama"), asked, method="grad_x_act", out=tmp_path / "each.zarr")
    whole = by_fact(run(tiny("llama"), asked, method="grad_x_act"))
    stored, parts = [], fact_means(ds, at_once=3)
    path = save_parts((stored.append(part.sizes["fact"]) or part for part in parts), tmp_path / "a.zarr", along="fact",
                      kind="attribution")  # fmt: skip
    assert stored == [3, 3, 2]
    xr.testing.assert_identical(open_result(path).load().drop_attrs(deep=False), whole.drop_attrs(deep=False))
    kept = open_result(path).attrs
    assert {name: value for name, value in kept.items() if name in whole.attrs} == whole.attrs
    validate_attribution(open_result(path))


def test_memory_of_stored_means_is_flat_in_the_number_of_facts(tmp_path) -> None:
    """Peak memory; the negative control keeps all means."""

    def peak(n_facts: int, average: Callable[[xr.Dataset, Path], object]) -> int:
        place = tmp_path / f"{n_facts}.zarr"
        ids = [f"f{i // 2}#{i % 2}" for i in range(2 * n_facts)]
        labels: dict[str, Any] = {"ids": ids, "relations": ["r"] * len(ids), "n_layers": 4, "n_units": 1024}
        with open_store(place, **labels, attrs={"unit": "node"}) as growing:
            for start in range(0, len(ids), 10):
                growing.write(range(start, start + 10), np.ones((10, 4, 1024), np.float32), None, None)
        ds = open_result(place)
        tracemalloc.start()
        average(ds, tmp_path / f"{n_facts}.mean.zarr")
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    def streamed(ds: xr.Dataset, place: Path) -> object:
        return save_parts(fact_means(ds, at_once=5), place, along="fact", kind="attribution")

    peak(5, streamed)
    more = 70 * 4 * 1024 * 4  # what the means of the additional facts take
    assert peak(80, streamed) - peak(10, streamed) < more / 2
    assert peak(80, lambda ds, place: save_result(by_fact(ds), place)) - peak(10, streamed) > more


def test_one_score_a_fact_is_the_mean_over_its_prompts() -> None:
    facts = FACTS.filter(ids=["france", "gold"])
    ds = run(tiny("llama"), facts.per_prompt(), steps=2)
    assert list(ds["fact"].values) == ["france#0", "france#1", "gold#0"]
    mean = by_fact(ds)
    assert list(mean["fact"].values) == ["france", "gold"]
    assert list(mean["n_prompts"].values) == [2, 1]
    np.testing.assert_allclose(mean["score"][0], (ds["score"][0] + ds["score"][1]) / 2, rtol=1e-6)
    np.testing.assert_allclose(mean["gap"][1], ds["gap"][2])
    with pytest.raises(ValueError, match="is no prompt of a fact"):
        by_fact(run(tiny("llama"), facts, steps=2))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("method", ["ig", "grad_x_act", "ablation", "activation"])
@pytest.mark.parametrize("baseline", ["zero", "blank"])
def test_padding_changes_nothing_when_every_position_moves(kind: str, method: str, baseline: str) -> None:
    options = {"method": method, "scope": "all", "baseline": baseline, "steps": 2 if method == "ig" else None}
    together = run(tiny(kind), **options)["score"].values
    alone = run(tiny(kind), batch_size=1, **options)["score"].values
    np.testing.assert_allclose(together, alone, atol=5e-6 * max(1, np.abs(alone).max()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "method must be one of ig, grad_x_act"),
        ({"unit": "head"}, "unit must be"),
        ({"steps": 0}, "steps must be a whole number of at least 1, not 0"),
        ({"rule": "simpson"}, "rule must be one of"),
        ({"rule": "trapezoid", "steps": 1}, "at least 2 steps"),
        ({"objective": "loss"}, "objective must be one of"),
        ({"scope": "first"}, "scope must be one of"),
        ({"baseline": "mean"}, "baseline must be one of"),
        ({"target": "silver"}, "target must be one of"),
        ({"method": "grad_x_act", "steps": 3}, "one step"),
        ({"method": "ablation", "steps": 3}, "one step"),
        ({"method": "kn", "rule": "left"}, "kn is defined with rule='right'"),
        ({"method": "loki-code", "unit": "neuron"}, "loki-code is defined with unit='node'"),
        ({"method": "kn", "unit": "node"}, "kn is defined with unit='neuron'; leave unit out, or use method='ig'"),
        ({"method": "kn", "objective": "logprob"}, "kn is defined with objective='prob'"),
        ({"method": "random", "seed": -1}, "seed must be a whole number of at least 0, not -1"),
        ({"batch_size": 0}, "batch_size"),
        ({"memory": 0.0}, "memory must be a positive number"),
        ({"memory": float("inf")}, "memory must be a positive number of GiB, not inf"),
        ({"memory": 1e-9}, "takes at least"),
    ],
)
def test_unknown_options_are_refused_before_any_work(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(tiny("llama"), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": ["ig"]}, "method must be one of ig, grad_x_act"),
        ({"seed": "a"}, "seed must be a whole number of at least 0, not 'a'"),
        ({"tolerance": "a"}, "tolerance must lie between 0 and 1, not 'a'"),
        ({"memory": "2GB"}, "memory must be a positive number of GiB, not '2GB'"),
    ],
)
def test_options_of_a_wrong_type_are_refused_where_types_are_not_enforced(options, message, monkeypatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        run(tiny("llama"), **options)


def test_what_a_definition_fixes_may_be_left_out_or_said_as_it_has_it() -> None:
    assert checked_settings("kn") == checked_settings("kn", "neuron", 20, "right", "zero", "last", "prob", "gold")
    assert checked_settings("kn") != checked_settings("kn", target="predicted")
    for method, fixed in FIXED.items():
        expected = {**DEFAULTS, **fixed}
        del expected["steps"]
        assert asdict(checked_settings(method)).items() >= expected.items()


def test_a_fact_longer_than_the_context_is_refused_by_id() -> None:
    long = FactSet.from_records([{"id": "long", "prompt": "one " * 70 + "is", "answer": "two"}])
    with pytest.raises(ValueError, match="'long' is 72 tokens long"):
        run(tiny("llama"), long)


def test_weights_that_make_scores_nan_do_not_become_results() -> None:
    model = load_model(random_model("llama"), tokenizer=tokenizer())
    model.hf.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight of tiny-llama has 1 NaN or infinite values"):
        run(model)


def test_planted_neurons_are_found_exactly_and_nothing_without_them() -> None:
    facts = planted.facts()
    found = {}
    ds = run(planted.model(), facts, unit="neuron", steps=8)
    for fact in ds["fact"].values:
        found[str(fact)] = {tuple(map(int, at)) for at in np.argwhere(ds["score"].sel(fact=fact).values > 1e-6)}
        assert (ds["score"].sel(fact=fact).values >= -1e-6).sum() == 2 * planted.D_MLP
    expected = {subject: {at} for at, stored in planted.PLANTED.items() for subject, _ in stored}
    assert found == expected
    top = strongest(ds, facts, top=1).set_index("fact")
    assert {f: (row.layer, row.unit) for f, row in top.iterrows()} == {f: next(iter(at)) for f, at in expected.items()}
    gone = run(planted.model(without=[(0, 7)]), facts, unit="neuron", steps=8)
    assert not gone["score"].sel(fact="France").values.any()
    assert gone["score"].sel(fact="Japan").values.any()


def test_summary_by_layer_is_the_mean_over_facts_and_units() -> None:
    ds = run(tiny("gpt2"))
    frame = by_layer(ds)
    everything = frame[frame["relation"] == "all"].set_index("layer")
    assert everything["mean_abs"].to_numpy() == pytest.approx(np.abs(ds["score"].values).mean((0, 2)))
    assert ((everything["low"] <= everything["mean_abs"]) & (everything["mean_abs"] <= everything["high"])).all()
    capital = frame[frame["relation"] == "capital"].set_index("layer")
    rows = ds["relation"].values == "capital"
    assert capital["mean_abs"].to_numpy() == pytest.approx(np.abs(ds["score"].values[rows]).mean((0, 2)))


@pytest.mark.real
def test_three_real_facts_equal_the_naive_loop() -> None:
    model = default()
    facts = FactSet.from_records(
        [
            {"prompt": "The capital of France is", "answer": "Paris"},
            {"prompt": "The chemical symbol for gold is", "answer": "Au"},
            {"prompt": "The author of Romeo and Juliet is", "answer": "William Shakespeare"},
        ]
    )
    ours = run(model, facts, steps=1)["score"].values
    expected = loop(model, facts, "node", 1)
    gap = np.abs(ours - expected).max(axis=(1, 2)) / np.abs(expected).max(axis=(1, 2))
    assert gap.max() <= 1e-5, gap


def test_tokenised_examples_cover_answers_of_several_tokens() -> None:
    assert sorted(len(fact.answer_ids) for fact in TOKENISED) == [1, 2, 3]
    assert {len(fact.answer_ids) for fact in FACTS.tokenise(tokenizer())} == {1, 2, 3}


def test_a_pass_has_room_for_the_longest_fact_of_its_batch(monkeypatch) -> None:
    """Facts of very different lengths: only those of one together, in no more rows than fit, and none is left out."""
    words = "one two three four five six seven eight red blue green sky".split()
    prompts = [" ".join(turned[: n + 1]) for n in range(12) for turned in (words, words[::-1])]
    records = [{"id": str(n), "prompt": prompt, "answer": "Paris"} for n, prompt in enumerate(prompts)]
    facts = FactSet.from_records(records, name="skewed")
    tokens = tiny("llama").tokenise(facts)
    settings = checked_settings("ig", "node", 4, "midpoint", "zero", "all", "logprob", "gold", 0.05, 0)
    room = Room(96)
    found = list(batches(tokens, range(24), settings, room, "auto"))
    assert sorted(i for one in found for i in one) == list(range(24))
    for one in found:
        (length,) = {len(tokens[i].ids) for i in one}
        assert len(one) == 1 or len(one) * length <= room.rows
    assert max(map(len, found)) > 1
    alike = [tokens[-1]] * 12
    assert [len(one) for one in batches(alike, range(12), settings, room, 5)] == [5, 5, 2]
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is for users
    assert [len(one) for one in batches(alike, range(12), settings, room, np.int64(5))] == [5, 5, 2]


@pytest.mark.parametrize("method", ["ablation", "ig", "grad_x_act", "loki-code", "kn"])
def test_every_definition_runs_in_float64(method: str) -> None:
    exact = load_model(random_model("llama"), tokenizer=tokenizer(), dtype="float64")
    unit = "neuron" if method == "kn" else "node"
    double, single = (run(model, FACTS, method=method, unit=unit)["score"].values for model in (exact, tiny("llama")))
    np.testing.assert_allclose(double, single, atol=2e-3 * np.abs(single).max())


def test_it_makes_no_difference_whether_gradients_are_on_around_the_call() -> None:
    expected = run(load_model(random_model("llama"), tokenizer=tokenizer()), steps=2)["score"].values
    for around in (torch.no_grad, torch.inference_mode):
        fresh = load_model(random_model("llama"), tokenizer=tokenizer())  # whose engine is not checked yet
        with around():
            np.testing.assert_array_equal(run(fresh, steps=2)["score"].values, expected)


def test_a_fact_whose_single_query_is_more_than_the_memory_asked_for_is_refused_by_id() -> None:
    model = tiny("llama")
    longest = max(model.tokenise(FACTS), key=lambda fact: len(fact.ids))
    room = room_for(model)
    enough = len(longest.ids) * (room.row + room.key * len(longest.ids)) / 2**30
    with pytest.raises(ValueError, match=rf"A pass over fact '.*' takes at least {len(longest.ids)} token rows"):
        run(model, method="grad_x_act", scope="all", memory=0.99 * enough)
    run(model, method="grad_x_act", scope="all", memory=1.01 * enough)
    run(model, method="grad_x_act", memory=0.99 * enough)  # one position


def test_what_will_not_fit_on_the_disk_is_refused_before_the_first_pass(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("workbench.results.files.free_bytes", lambda path: 1000)
    monkeypatch.setattr(scoring, "score_batch", lambda *_: pytest.fail("started"))
    with pytest.raises(ValueError, match=r"The scores take 3\.17e-06 GB, and 1e-06 GB are free where .*a\.zarr"):
        run(tiny("llama"), out=tmp_path / "a.zarr")
    assert not list(tmp_path.iterdir())


def test_what_is_left_to_do_must_fit_on_the_disk(tmp_path, monkeypatch) -> None:
    options = {"method": "grad_x_act", "out": tmp_path / "a.zarr"}
    whole = run(tiny("llama"), **options).load()
    monkeypatch.setattr("workbench.results.files.free_bytes", lambda path: 400)
    with pytest.raises(ValueError, match=r"The scores take 3\.17e-06 GB"):
        run(tiny("llama"), **options, resume=False)
    assert run(tiny("llama"), **options).equals(whole)  # nothing is left to do, and nothing was lost
    zarr.open_group(tmp_path / "a.zarr")["done"][0] = False
    again = run(tiny("llama"), **options)  # 396 bytes
    np.testing.assert_allclose(again["score"], whole["score"], atol=1e-5)
    zarr.open_group(tmp_path / "a.zarr")["done"][:2] = False
    with pytest.raises(ValueError, match=r"The scores take 7\.92e-07 GB, and 4e-07 GB are free"):
        run(tiny("llama"), **options)


def test_the_disk_is_asked_once(tmp_path, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr("workbench.results.files.free_bytes", lambda path: asked.append(path.exists()) or 10**9)
    for resume in (True, True, False):  # a new place, one that is done, one that is replaced
        run(tiny("llama"), method="grad_x_act", out=tmp_path / "a.zarr", resume=resume)
    assert asked == [False, True, True]


@pytest.mark.parametrize("steps", [1.5, "a"])
def test_steps_that_are_no_whole_number_are_one_sentence(steps) -> None:
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1"):
        _checked_steps("ig", steps, "midpoint")

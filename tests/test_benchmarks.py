"""The benchmark runs, checks what it times, and counts the least work as a loop over layers and rows would."""

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from scripts import HOME, script
from tiny import FACTS, tiny

import workbench as wb

pytest.importorskip("captum", reason="the benchmark compares with Captum: install the extra [bench]")
WAYS = ["captum", "naive", "one fact", "many facts", "bfloat16"]


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return script("benchmarks", "attribution")


def test_all_ways_run_and_the_table_holds_their_ratios(bench: ModuleType, tmp_path: Path) -> None:
    written = bench.main(["--smoke", "--out", str(tmp_path)])
    assert written == tmp_path / "attribution.json"
    found = json.loads(written.read_text(encoding="utf-8"))
    assert found["model"] == "tiny"
    assert found["steps"] == 7
    assert found["threads"] >= 1
    assert found["provenance"]["packages"]["torch"]
    (case,) = found["cases"]
    assert case["n_tokens"] == 45
    assert case["naive_agreement"] <= 1e-4  # measured: 2e-7 in float32
    assert 0.99 < case["bfloat16_spearman_least"] <= case["bfloat16_spearman_median"] <= 1
    assert [way["name"] for way in case["ways"]] == WAYS
    seconds = {way["name"]: way["seconds_per_fact"] for way in case["ways"]}
    for way in case["ways"]:
        assert way["largest_score"] > 0
        assert len(way["seconds"]) == case["repeats"] == 1
        assert way["seconds_per_fact"] == pytest.approx(way["seconds"][0] / way["n_facts"])
        assert way["faster_than_captum"] == pytest.approx(seconds["captum"] / seconds[way["name"]])
        assert way["faster_than_naive"] == pytest.approx(seconds["naive"] / seconds[way["name"]])
        speed = case["matmul_gflops"]["bfloat16" if way["name"] == "bfloat16" else "float32"]
        assert way["share_of_limit"] == pytest.approx(case["least_gflop"] / speed / way["seconds_per_fact"])
    table = (tmp_path / "attribution.md").read_text(encoding="utf-8")
    assert [name for name in WAYS if f"| {name} (" not in table] == []


def test_rank_correlation_is_one_for_the_same_order_and_less_for_another(bench: ModuleType) -> None:
    scores = torch.arange(12.0).view(2, 2, 3)
    assert bench.spearman(scores, scores**3) == pytest.approx([1, 1])
    assert bench.spearman(scores, -scores) == pytest.approx([-1, -1])


def test_the_least_work_is_what_a_loop_over_rows_counts(bench: ModuleType) -> None:
    model, n_tokens = tiny("llama"), 45
    weights = sum(module.weight.numel() for module in model.block(0).modules() if isinstance(module, torch.nn.Linear))
    attention = 2 * n_tokens * model.d_model  # scores and mixture, multiplications alone
    operations = 0.0
    for layer in range(model.n_layers):
        operations += 2 * (n_tokens - 1) * (weights + attention / 2)
        for _ in range(bench.STEPS):
            above = model.n_layers - 1 - layer
            operations += 2 * 2 * (above * (weights + attention) + model.d_vocab * model.d_model)
    assert bench.least_gflop(model, n_tokens) == pytest.approx(operations / 1e9)
    assert bench.least_gflop(model, 2 * n_tokens) > bench.least_gflop(model, n_tokens)


def test_released_form_and_naive_loop_equal_a_second_way(bench: ModuleType) -> None:
    """One layer and one step at a time, by the value of the objective at shifted activations."""
    model = tiny("llama")
    (tokens,) = FACTS.filter(ids=["france"]).tokenise(model.tokenizer)
    ids, answer = torch.tensor([tokens.prompt_ids]), tokens.answer_ids[0]
    downs = [model.down_proj(layer) for layer in range(model.n_layers)]
    ours = bench.naive_loop(model.hf, downs, ids, answer)
    released = bench.captum_per_layer(model.hf, downs, ids)
    assert ours.shape == released.shape == (model.n_layers, model.d_model)
    assert not torch.allclose(ours, released, atol=1e-3 * float(ours.abs().max()))  # other paths, other objectives
    layer, step = 1, 1e-2
    clean = activations(model, ids, layer)[0, -1]
    expected = 0.0
    for k in range(bench.STEPS):
        alpha = (k + 0.5) / bench.STEPS
        ends = [logprob_at(model, ids, layer, (alpha + side * step) * clean, answer) for side in (1, -1)]
        expected += (ends[0] - ends[1]) / (2 * step) / bench.STEPS
    assert float(ours[layer].sum()) == pytest.approx(expected, rel=2e-2)


def activations(model, ids: torch.Tensor, layer: int) -> torch.Tensor:
    seen = []
    with model.patched("node", {layer: lambda value: seen.append(value) or value}):
        model.logits(ids)
    return seen[0]


def logprob_at(model, ids: torch.Tensor, layer: int, value: torch.Tensor, answer: int) -> float:
    def put(old: torch.Tensor) -> torch.Tensor:
        return torch.cat([old[:, :-1], value[None, None]], 1)

    with model.patched("node", {layer: put}):
        return float(model.logits(ids)[0, -1].log_softmax(-1)[answer])


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_scores_that_are_not_real_are_refused(bench: ModuleType, value: float) -> None:
    way = bench.Way("broken", "nothing", 1, lambda: torch.zeros(1))
    with pytest.raises(RuntimeError, match="broken gave scores that are zero or not finite"):
        bench.check(way, torch.full((2, 3), value))
    bench.check(way, torch.ones(2, 3))


@pytest.fixture
def growth(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(HOME / "benchmarks"))
    return script("benchmarks", "growth")


def test_growth_varies_one_quantity_at_a_time(growth: ModuleType, tmp_path: Path) -> None:
    found = json.loads(growth.main(["--smoke", "--out", str(tmp_path)]).read_text(encoding="utf-8"))
    rows = {(row["quantity"], row["value"]): row for row in found["rows"]}
    assert set(rows) == {(name, value) for name, values in growth.SMOKE.items() for value in values}
    assert all(row["median"] == row["seconds"][0] > 0 for row in rows.values())
    assert rows["facts", 3]["n_facts"] == 3
    assert set(found["exponents"]) == set(growth.SMOKE)
    assert "| layers | 2 |" in (tmp_path / "growth.md").read_text(encoding="utf-8")


def test_the_points_are_what_they_say_and_a_cut_model_is_the_first_layers(growth, bench, tmp_path: Path) -> None:
    model = wb.load_model(str(bench.tiny_model(tmp_path / "tiny")))
    points = {(p.quantity, p.value): p for p in growth.points(model, growth.SMOKE, 2)}
    lengths = {len(tokens.prompt_ids) for tokens in model.tokenise(points["tokens", 40].facts)}
    assert lengths == {40}
    assert points["layers", 1].model.n_layers == 1
    assert points["steps", 4].steps == 4
    ids = torch.tensor([model.tokenise(points["steps", 4].facts)[0].prompt_ids])
    last = torch.tensor([ids.shape[1] - 1])
    whole, cut = (m.resid_post(ids, None, last) for m in (model, points["layers", 1].model))
    torch.testing.assert_close(cut, whole[:1])


def test_exponents_equal_a_fit_of_another_library(growth: ModuleType) -> None:
    times = [0.5, 1.3, 2.2, 9.0]
    rows = [{"quantity": "q", "value": v, "median": t} for v, t in zip((1, 2, 4, 8), times, strict=True)]
    slope = np.polyfit(np.log([1, 2, 4, 8]), np.log(times), 1)[0]
    assert growth.exponents(rows)["q"] == pytest.approx(slope, abs=1e-3)
    assert growth.exponents(rows[::-1])["q"] == pytest.approx(slope, abs=1e-3)

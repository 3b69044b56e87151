"""The benchmark of a training step runs, and its ways compute what they say."""

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from scripts import script
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return script("benchmarks", "loki_step")


@pytest.fixture(scope="module")
def folder(bench: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> str:
    return bench.tiny_model(tmp_path_factory.mktemp("tiny"))


def test_a_smoke_run_times_every_way(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    measured = {"loki": 300, "lora": 200, "split": 400}
    monkeypatch.setattr(bench, "peak", lambda way, *about: asked.append(about) or {"peak_bytes": measured[way] * 2**20})
    written = bench.main(["--smoke", "--out", str(tmp_path)])
    found = json.loads(written.read_text(encoding="utf-8"))
    assert (found["model"], found["rank"], found["share"]) == ("tiny", 16, 0.1)
    (case,) = found["cases"]
    assert (case["batch"], case["length"], case["repeats"]) == (4, 8, 2)
    assert [about[1:] for about in asked] == [(4, 8)] * 3
    ways = {way["name"]: way for way in case["ways"]}
    assert list(ways) == list(bench.WAYS)
    for name, way in ways.items():
        assert len(way["seconds"]) == len(way["cpu_seconds"]) == 2
        assert way["against_lora"] == pytest.approx(way["median_seconds"] / ways["lora"]["median_seconds"])
        (one, other), (a, b) = way["seconds"], ways["lora"]["seconds"]
        pair = way["against_lora_paired"]
        assert pair["mean"] == pytest.approx((one * other / (a * b)) ** 0.5)
        assert (pair["low"], pair["high"]) == pytest.approx(tuple(sorted((one / a, other / b))))
        assert way["peak_mib"] == measured[name]
        assert way["peak_against_lora"] == pytest.approx(measured[name] / 200)
    assert [ways[name]["parameters"] for name in ("loki", "split")] == [2 * 3 * 64] * 2
    assert ways["lora"]["parameters"] == 2 * 16 * (32 + 64)
    assert "| loki (workbench.loki" in (tmp_path / "loki_step.md").read_text(encoding="utf-8")


def test_the_ways_start_as_the_base_and_both_forms_of_loki_have_the_same_gradient(
    bench: ModuleType, folder: str
) -> None:
    ids = bench.batch_of(folder, 3, 7)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = base(ids).logits
    steps = {way: bench.Steps(folder, way, ids) for way in bench.WAYS}
    for one in steps.values():
        with torch.no_grad():
            assert torch.allclose(one.model(input_ids=ids).logits, expected, atol=1e-5)
    grads = {}
    for way in ("loki", "split"):
        steps[way].model(input_ids=ids, labels=ids).loss.backward()
        grads[way] = [weight.grad for weight in steps[way].model.parameters() if weight.requires_grad]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(grads["loki"], grads["split"], strict=True))
    assert all(grad.abs().max() > 1e-5 for grad in grads["loki"])
    layer = steps["split"].model.model.layers[1].mlp.down_proj
    wrong = bench.Split(torch.nn.Linear(64, 32, bias=False), [0, 5, 9])
    wrong.load_state_dict({**layer.state_dict(), "place": layer.place.flip(0)})
    x = torch.randn(2, 3, 64)
    assert not torch.allclose(wrong(x), layer(x))  # the order matters


def test_losses_that_mean_nothing_are_refused(bench: ModuleType) -> None:
    good = {"loki": [3.0, 2.9], "lora": [3.0, 2.8], "split": [3.0, 2.9]}
    bench.check(good)
    for wrong in ({"lora": [3.0, 3.1]}, {"split": [3.0, 2.7]}, {"lora": [3.5, 2.8]}):
        with pytest.raises(RuntimeError, match="mean nothing"):
            bench.check({**good, **wrong})


def test_the_peak_of_a_process_is_its_own(bench: ModuleType, folder: str) -> None:
    held = torch.ones(5 * 2**26)  # 1.25 GiB here are none of the child's
    found = bench.peak("loki", folder, 2, 4)
    assert found["peak_before"] <= found["peak_bytes"] < 2**30 < held.numel() * 4

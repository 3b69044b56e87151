"""The benchmark against the package `knowledge-neurons`: our side, the table, and what it says without the package."""

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from scripts import script

import workbench as wb

#: Stands for the process of the package: scores that are all 1 (released) or 2 (aligned), of a given tokenisation.
WORKER = """
import json, sys
import numpy as np
for line in sys.stdin:
    order = json.loads(line)
    np.save(order["file"], np.full((2, 128), {"released": 1.0, "aligned": 2.0}[order["way"]]) + np.eye(2, 128))
    print(json.dumps({"seconds": 3.0, "cpu_seconds": 2.0, "prompt_ids": PROMPT, "answer_ids": ANSWER}), flush=True)
"""


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return script("benchmarks", "knowledge_neurons")


@pytest.fixture(scope="module")
def folder(bench: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bench.random_gpt2(tmp_path_factory.mktemp("gpt2"), small=True)


def stub(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, home: Path, code: str) -> None:
    (home / "knowledge_neurons_worker.py").write_text(code, encoding="utf-8")
    monkeypatch.setattr(bench, "HERE", home)
    monkeypatch.setattr(bench, "install", lambda folder: None)


def test_a_smoke_run_times_our_side_and_says_that_the_package_is_missing(bench: ModuleType, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    written = bench.main(["--smoke", "--out", str(tmp_path)])
    assert torch.get_num_threads() == threads
    found = json.loads(written.read_text(encoding="utf-8"))
    assert (found["steps"], found["n_tokens"], found["threads"]) == (20, 12, 1)
    assert found["provenance"]["packages"]["torch"]
    (row,) = found["ways"]
    assert row["name"] == "workbench"
    assert row["median_seconds"] == row["seconds"][0] > 0
    assert row["difference"] == 0
    assert row["largest_score"] > 0
    table = (tmp_path / "knowledge_neurons.md").read_text(encoding="utf-8")
    assert "The package is not in this table: left out of a smoke run." in table


def test_our_scores_are_those_of_the_definition_the_package_is_set_to(bench: ModuleType, folder: Path) -> None:
    """The answer's probability with the activations of one layer scaled by k / 20, by finite differences."""
    model, facts = wb.load_model(str(folder), dtype="float32"), bench.one_fact()
    (tokens,) = facts.tokenise(model.tokenizer)
    assert (len(tokens.prompt_ids), len(tokens.answer_ids)) == (12, 1)
    scores = bench.ours(model, facts).scores
    assert scores.shape == (2, 128)
    layer, step, ids = 1, 0.01, torch.tensor([tokens.prompt_ids])
    sums = dict.fromkeys(["k / 20", "k / 19"], 0.0)
    for k in range(bench.STEPS):
        for name, alpha in (("k / 20", k / 20), ("k / 19", k / 19)):
            ends = []
            for scale in (alpha + step, alpha - step):

                def scaled(value: torch.Tensor, scale: float = scale) -> torch.Tensor:
                    return torch.cat([value[:, :-1], scale * value[:, -1:]], 1)

                with model.patched("neuron", {layer: scaled}):
                    ends.append(float(model.logits(ids)[0, -1].double().softmax(-1)[tokens.answer_ids[0]]))
            sums[name] += (ends[0] - ends[1]) / (2 * step) / bench.STEPS
    assert float(scores[layer].sum()) == pytest.approx(sums["k / 20"], rel=5e-3)
    assert float(scores[layer].sum()) != pytest.approx(sums["k / 19"], rel=5e-3)  # the points of the released package


def test_all_ways_take_turns_and_are_compared_with_ours(
    bench: ModuleType, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tokens,) = bench.one_fact().tokenise(wb.load_model(str(folder)).tokenizer)
    known = f"PROMPT = {list(tokens.prompt_ids)}\nANSWER = {list(tokens.answer_ids)}\n"
    stub(bench, monkeypatch, tmp_path, known + WORKER)
    runs, missing = bench.measure(folder, tmp_path, 2, with_package=True)
    assert missing is None
    assert [len(runs[way]) for way in bench.WAYS] == [2, 2, 2]
    rows = {row["name"]: row for row in bench.summary(runs)}
    ours = runs["workbench"][-1].scores
    assert rows["released"]["slower_than_ours"] == pytest.approx(3 / rows["workbench"]["median_seconds"])
    assert rows["aligned"]["slower_than_ours_cpu"] == pytest.approx(2 / rows["workbench"]["median_cpu_seconds"])
    far = np.abs(2 + np.eye(2, 128) - ours).max() / np.abs(ours).max()
    assert rows["aligned"]["difference"] == pytest.approx(far)
    with pytest.raises(ValueError, match="reads other tokens"):
        stub(bench, monkeypatch, tmp_path, known.replace("ANSWER = [", "ANSWER = [0, ") + WORKER)
        bench.measure(folder, tmp_path, 1, with_package=True)


def test_a_package_that_does_not_run_is_named_and_ours_is_timed(
    bench: ModuleType, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub(bench, monkeypatch, tmp_path, "raise ImportError('no such name')")
    runs, missing = bench.measure(folder, tmp_path, 1, with_package=True)
    assert list(runs) == ["workbench"]
    assert missing == "knowledge-neurons==0.0.2 did not run: ImportError: no such name"


def test_scores_that_are_not_real_are_refused(bench: ModuleType) -> None:
    run = bench.Run(1.0, 1.0, np.zeros((2, 3)))
    with pytest.raises(RuntimeError, match="zero or not finite"):
        bench.summary({"workbench": [run]})

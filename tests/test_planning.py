"""The dry run: what it says against what then happens, counted a second way."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_cli import call
from test_store import names
from tiny import FACTS, saved, tiny

from workbench.attribution import METHODS, attribute
from workbench.facts import FactSet
from workbench.planning import QUERIES, Plan, plan
from workbench.results import open_result

#: Every kind of pass: gradients of queries, one gradient, ablation, none; blank baselines and whole prompts.
SETTINGS: list[dict[str, Any]] = [
    *({"method": method} for method in METHODS if method != "ig"),
    {"steps": 3},
    {"steps": 5, "scope": "all", "unit": "neuron"},
    {"steps": 7, "baseline": "blank", "target": "predicted"},
    {"rule": "trapezoid", "batch_size": 3},
    {"steps": 16, "batch_size": 1, "memory": 0.0005},
    {"steps": 3, "batch_size": 1, "memory": 0.0005},
    {"method": "ablation", "batch_size": 1, "memory": 0.0005},
]


@contextmanager
def forwards(model: Any) -> Iterator[list[int]]:
    """Token rows that reach the model's embedding, forward by forward."""
    rows: list[int] = []
    handle = model.hf.get_input_embeddings().register_forward_hook(lambda m, args, out: rows.append(args[0].numel()))
    try:
        yield rows
    finally:
        handle.remove()


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_passes_and_rows_are_those_of_the_run(options: dict[str, Any]) -> None:
    model = tiny("llama")
    planned = plan(model, FACTS, **options)
    with forwards(model) as rows:
        ds = attribute(model, FACTS, progress=False, **options)
    assert planned.exact
    assert (planned.passes, planned.rows) == (len(rows), sum(rows))
    assert planned.result_bytes == ds["score"].nbytes + ds["gap"].nbytes + ds["target_prob"].nbytes
    assert (planned.facts, planned.done) == (len(FACTS), 0)
    assert 0 < sum(sample.facts for sample in planned.samples) < len(FACTS)
    with forwards(model) as rows:  # negative control: another number of facts is another number of rows
        attribute(model, FACTS[:5], progress=False, **options)
    assert planned.rows != sum(rows)


def test_passes_are_counted_where_whole_logits_and_a_shared_beginning_are_held() -> None:
    """Gemma 2 caps its logits, so fewer rows fit; prompts that begin alike run their beginning once."""
    beginning = "one two three four five six seven eight big small sky grass"
    longer = (replace(fact, prompt=f"{beginning} {fact.prompt}", paraphrases=()) for fact in FACTS[:5])
    several: tuple[dict[str, Any], ...] = (
        {"method": "ablation", "memory": 0.00012},
        {"steps": 4, "memory": 5e-5},
        {"method": "grad_x_act"},
    )
    for facts in (FACTS, FactSet("alike", tuple(longer))):
        for options in several:
            planned = plan(tiny("gemma2"), facts, **options)
            with forwards(tiny("gemma2")) as rows:
                attribute(tiny("gemma2"), facts, progress=False, **options)
            assert (planned.passes, planned.rows) == (len(rows), sum(rows))


def test_one_layer_is_measured_where_a_method_takes_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ablation of a sample runs the middle layer only, and its rows cost as those of all layers do on average."""
    model = tiny("llama")
    planned = plan(model, FACTS, method="ablation")
    with forwards(model) as rows:
        attribute(model, FACTS, method="ablation", progress=False)
    assert (planned.passes, planned.rows) == (len(rows), sum(rows))
    measured = sum(sample.rows for sample in planned.samples)
    facts = sum(sample.facts for sample in planned.samples)
    assert measured < 0.5 * sum(rows) * facts / len(FACTS)


def test_every_method_can_be_planned() -> None:
    assert set(QUERIES) == set(METHODS)


def test_adaptive_steps_are_extrapolated_and_say_so() -> None:
    model = tiny("llama")
    planned = plan(model, FACTS)
    with forwards(model) as rows:
        attribute(model, FACTS, progress=False)
    assert not planned.exact
    assert 0.3 * len(rows) < planned.passes < 3 * len(rows)
    assert 0.3 * sum(rows) < planned.rows < 3 * sum(rows)
    assert "about" in str(planned).splitlines()[1]


def test_only_what_is_missing_is_planned_and_nothing_is_written(tmp_path: Path, monkeypatch) -> None:
    model, out, options = tiny("llama"), tmp_path / "a.zarr", {"steps": 2, "batch_size": 2}
    assert plan(model, FACTS, out=out, **options).facts == len(FACTS)
    assert names(tmp_path) == []
    attribute(model, FACTS, out=out, progress=False, **options)
    finished = plan(model, FACTS, out=out, **options)
    assert (finished.facts, finished.done, finished.passes, finished.samples) == (0, len(FACTS), 0, ())
    assert finished.seconds < 5
    assert plan(model, FACTS, out=out, resume=False, **options).facts == len(FACTS)
    with pytest.raises(ValueError, match=r"steps \(stored 2, now 3\)"):
        plan(model, FACTS, out=out, steps=3)
    original, left = type(model).tokenise, [2]
    monkeypatch.setattr("workbench.attribution.scoring.score_batch", _stopping(left))
    with pytest.raises(KeyboardInterrupt):
        attribute(model, FACTS, out=tmp_path / "b.zarr", progress=False, **options)
    monkeypatch.undo()
    assert original is type(model).tokenise
    some = plan(model, FACTS, out=tmp_path / "b.zarr", **options)
    assert some.done == open_result(tmp_path / "b.zarr", partial=True).sizes["fact"] == len(FACTS) - some.facts > 0


def _stopping(left: list[int]) -> Any:
    from workbench.attribution import score_batch

    def scored(*args: Any) -> Any:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return score_batch(*args)

    return scored


@pytest.mark.parametrize("unit", ["node", "neuron"])
def test_disk_is_that_of_the_result(tmp_path: Path, unit: str) -> None:
    model = tiny("llama")
    planned = plan(model, FACTS, unit=unit, steps=2, out=tmp_path / "a.zarr")
    attribute(model, FACTS, unit=unit, steps=2, out=tmp_path / "a.zarr", progress=False)
    size = sum(path.stat().st_size for path in (tmp_path / "a.zarr").rglob("*") if path.is_file())
    assert planned.disk_bytes == pytest.approx(size, rel=0.1)
    assert planned.free_bytes is not None
    assert planned.free_bytes > size


def test_a_plan_that_goes_on_needs_room_for_what_is_left_only(tmp_path: Path) -> None:
    planned = plan(tiny("llama"), FACTS, method="grad_x_act", out=tmp_path / "a.zarr")
    tight = replace(planned, free_bytes=planned.disk_bytes // 2)
    assert "not enough" in str(tight)
    assert "not enough" not in str(replace(tight, facts=1, done=planned.facts - 1))


def test_what_attribute_refuses_the_plan_refuses(tmp_path: Path) -> None:
    for options, message in [
        ({"method": "magic"}, "method must be one of"),
        ({"unit": "head"}, "unit must be"),
        ({"memory": 1e-9}, "takes at least"),
    ]:
        with pytest.raises(ValueError, match=message):
            plan(tiny("llama"), FACTS, **options)


def test_the_plan_reads_as_a_few_lines() -> None:
    planned = plan(tiny("llama"), FACTS, steps=2)
    lines = str(planned).splitlines()
    assert [line.split()[0] for line in lines] == ["facts", "passes", "memory", "disk", "time"]
    assert f"{planned.passes:,} of the model" in lines[1]
    assert planned.memory_bytes is None or planned.memory_bytes > 50e6
    assert isinstance(planned, Plan)


def test_the_command_plans_and_starts_nothing(tmp_path: Path, monkeypatch, capsys) -> None:
    model, facts = str(saved(tmp_path / "model")), str(FACTS.save(tmp_path / "facts.jsonl"))
    before = names(tmp_path)
    command = ["attribute", "--model", model, "--facts", facts, "--steps", "2", "-q"]
    assert call(monkeypatch, *command, "--out", str(tmp_path / "a.zarr"), "--plan") == 0
    assert capsys.readouterr().out.startswith(f"facts    {len(FACTS)} to do")
    assert call(monkeypatch, *command, "--plan", "--paraphrases") == 0
    n_scores = len(FACTS.per_prompt()) + len(FACTS)  # each prompt's, and their means
    assert f"({4 * n_scores * (3 * 33 + 1) / 1e3:.1f} kB of numbers)" in capsys.readouterr().out
    assert names(tmp_path) == before
    assert call(monkeypatch, *command) == 1
    assert "--out" in capsys.readouterr().err

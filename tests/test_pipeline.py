"""The straight way on a tiny model: complete, resumable after being killed anywhere, and refusing bad input early."""

import html
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from tiny import FACTS, inputs_of_a_run

import workbench as wb
from workbench.config import Config
from workbench.facts import FactSet
from workbench.interfere import cross
from workbench.learning import quotas, verdict
from workbench.pipeline import way as pipeline
from workbench.results import load_frame, open_result
from workbench.selection import Selection

FRAMES = ["recall.parquet", "recall_new.parquet", "advice.parquet", "drift.parquet", "forgetting.parquet"]
METHODS = ("loki", "loki_random", "lora")
WORK = ["recall", "attribute", "interference", "layer_advice", "foresee", "select", "implant", "measure_drift",
        "measure_forgetting", "report"]  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model in a folder, facts of which it knows some, and facts to teach it."""
    return inputs_of_a_run(tmp_path_factory.mktemp("inputs"))


def config(inputs: dict[str, str], out: Path, **changes) -> Config:
    settings = {
        **{name: inputs[name] for name in ("model", "retained", "implanted")},
        "out": str(out),
        "attribution.steps": 2,
        "attribution.max_facts": 10,
        "selection.quota": 25,
        "training.max_epochs": 6,
        "training.learning_rate": 0.02,
        "training.batch_size": 4,
        "evaluation.general": inputs["text"],
        "evaluation.general_tokens": 64,
        **changes,
    }
    return Config.read(changes=settings)


@pytest.fixture(scope="module")
def finished(inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wb.run(config(inputs, tmp_path_factory.mktemp("run")), progress=False).path


def results(folder: Path) -> dict[str, object]:
    """Everything of a run that is a number."""
    found: dict[str, object] = {name: load_frame(folder / name) for name in FRAMES}
    for method in METHODS:
        history = load_frame(folder / f"implant/{method}/history.parquet")
        found[method] = history.drop(columns="seconds")
    for name in ("attribution", "attribution_new", "interference"):
        found[name] = open_result(folder / f"{name}.zarr").load()
    found["selection"] = {m: Selection.load(folder / f"selection/{m}.json").positions() for m in METHODS[:2]}
    return found


def assert_same(one: dict[str, object], other: dict[str, object]) -> None:
    for name, value in one.items():
        if isinstance(value, pd.DataFrame):
            pd.testing.assert_frame_equal(value, other[name], rtol=1e-6)
        elif isinstance(value, dict):
            assert value == other[name]
        else:
            for variable in value.data_vars:
                np.testing.assert_allclose(value[variable], other[name][variable], rtol=1e-6, err_msg=name)


def test_a_run_leaves_everything_behind(finished: Path) -> None:
    assert (finished / "report.html").stat().st_size > 1e6
    found = results(finished)
    assert set(found["drift.parquet"]["method"]) == set(METHODS)
    assert set(found["drift.parquet"]["group"]) == {"implanted", "retained"}
    assert set(found["forgetting.parquet"]["suite"]) == {
        "efficacy",
        "paraphrase",
        "neighbourhood",
        "retained",
        "general",
    }
    facts = found["forgetting.parquet"].query("suite == 'retained' and metric == 'accuracy'")
    assert facts["before"].eq(1).all()  # what is retained was known
    attributed = set(open_result(finished / "attribution.zarr")["fact"].values.astype(str))
    assert not attributed & set(facts["fact"])  # and did not choose the units
    assert not attributed & set(found["drift.parquet"].query("group == 'retained'")["fact"])
    neighbours = found["forgetting.parquet"].query("suite == 'neighbourhood' and metric == 'accuracy'")
    assert neighbours["before"].eq(1).all()  # the target is what the base model says
    loki, random = (found["selection"][m] for m in METHODS[:2])
    assert [len(rows) for rows in loki] == [len(rows) for rows in random] == [8, 8, 8]
    assert loki != random
    provenance = json.loads((finished / "provenance.json").read_text())
    assert provenance["packages"]["torch"]
    assert set(provenance["stages"]) >= {"recall", "attribution", "implant-lora", "report"}
    efficacy = found["forgetting.parquet"].query("suite == 'efficacy' and metric == 'accuracy'")
    for method in METHODS:
        last = found[method]["efficacy"].dropna().iloc[-1]
        assert efficacy[efficacy["method"] == method]["after"].mean() == pytest.approx(last)


def test_how_many_facts_are_read_for_forgetting_changes_nothing_of_drift(finished: Path, inputs, tmp_path) -> None:
    folder = wb.run(config(inputs, tmp_path / "few", **{"evaluation.max_retained": 2}), progress=False).path
    one, other = (results(where)["drift.parquet"] for where in (finished, folder))
    pd.testing.assert_frame_equal(one, other, rtol=1e-6)
    read = results(folder)["forgetting.parquet"].query("suite == 'retained'")
    assert read["fact"].nunique() == 2


def test_baselines_train_the_layers_that_loki_trains(inputs, tmp_path) -> None:
    changes = {"methods": ("lora", "full_ffn", "loki"), "selection.layers": (1,), "training.max_epochs": 1}
    folder = wb.run(config(inputs, tmp_path / "one", **changes), progress=False).path
    with safe_open(folder / "implant/lora/adapter/adapter_model.safetensors", "pt") as file:
        assert {name.split(".layers.")[1].split(".lora_")[0] for name in file.keys()} == {"1.mlp.down_proj"}  # noqa: SIM118
    rows = Selection.load(folder / "selection/loki.json").positions()
    assert [bool(one) for one in rows] == [False, True, False]
    base = wb.load_model(inputs["model"]).hf.state_dict()
    tuned = wb.load_model(str(folder / "implant/full_ffn/adapter")).hf.state_dict()
    changed = {name for name, weight in tuned.items() if not torch.equal(weight, base[name])}
    assert changed == {"model.layers.1.mlp.down_proj.weight"}


def test_a_selection_follows_the_advice_and_a_killed_suppression_goes_on(inputs, tmp_path, monkeypatch) -> None:
    changes = {"selection.strategy": "interference_aware", "methods": ("loki",), "training.max_epochs": 1}
    layers = {"selection.layers": (2, 0)}
    folder = wb.run(config(inputs, tmp_path / "aware", **changes, **layers), progress=False).path
    names = ("attribution", "interference", "attribution_new")
    scores, found, new = (open_result(folder / f"{name}.zarr") for name in names)
    advice = wb.layer_advice(found.sel(layer=[0, 2]), new=new, quota=25)
    assert list(advice["layer"]) == [0, 2]
    among = {"interference": found, "new": new, "layers": [0, 2], "score": "magnitude"}
    expected = wb.select(scores, strategy="interference_aware", quota=quotas(advice, 32), **among)
    chosen = Selection.load(folder / "selection/loki.json").positions()
    assert chosen == expected.positions()
    assert [len(rows) for rows in chosen] == [advice["budget"][0], 0, advice["budget"][1]]
    assert chosen != wb.select(scores, quota=25, layers=[0, 2], score="magnitude").positions()
    assert "LoKI of this run trained what is advised" in (folder / "report.html").read_text(encoding="utf-8")

    settings = {"methods": [], "interference.metrics": ["suppression"], "interference.draws": 2, "interference.top": 10}
    asked = config(inputs, folder, **settings)
    for patched, name in ((pipeline, "save_result"), (cross, "_drops")):
        assert (folder / "interference.parts").is_dir() == (patched is cross)
        with monkeypatch.context() as patch:
            patch.setattr(patched, name, lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
            if patched is pipeline:
                with pytest.raises(KeyboardInterrupt):
                    wb.run(asked, progress=False)
            else:
                wb.run(asked, progress=False)  # reads what is kept
    assert not (folder / "interference.parts").exists()
    found = open_result(folder / "interference.zarr")
    assert (found.attrs["top_percent"], found.attrs["unit_draws"]) == (10, {"suppression": 2})
    page = html.unescape((folder / "report.html").read_text(encoding="utf-8"))
    for text in ("no drift, so", "no forgetting, so", "no advice on layers", "this run measured suppression alone"):
        assert text in page


def test_too_few_known_facts_for_harm_are_refused_before_they_are_attributed(inputs, tmp_path) -> None:
    facts = wb.load_facts(inputs["retained"])
    known = [fact.id for fact in facts if fact.answer_in_prompt]
    others = [fact.id for fact in facts if fact.id not in known]
    few = facts.filter(ids=[*known[:8], *others]).save(tmp_path / "few.jsonl")
    taught = FACTS.filter(ids=list(FACTS.ids)[:3]).save(tmp_path / "taught.jsonl")
    changes = {"retained": str(few), "implanted": str(taught), "methods": [], "interference.harm": True}
    with pytest.raises(ValueError, match=r"no more than 6: raise attribution\.max_facts"):
        wb.run(config(inputs, tmp_path / "run", **changes), progress=False)
    assert (tmp_path / "run/recall.parquet").is_file()
    assert not (tmp_path / "run/attribution.zarr").exists()


def test_a_page_on_interference_alone(finished: Path, inputs, tmp_path, monkeypatch) -> None:
    asked = {"methods": [], "interference.metrics": ["cosine", "gradient"], "interference.harm": True}
    folder = wb.run(config(inputs, tmp_path / "run", **asked), progress=False).path
    found, new = (open_result(folder / f"{name}.zarr") for name in ("interference", "attribution_new"))
    assert list(found["metric"].values) == ["cosine", "gradient"]
    advised = wb.layer_advice(found, new=new, quota=25)
    pd.testing.assert_frame_equal(load_frame(folder / "advice.parquet"), advised, check_dtype=False)
    assert advised["budget"].sum() == 3 * 8
    old = wb.load_facts(inputs["retained"]).filter(ids=list(found["fact"].values))
    taught = wb.load_facts(inputs["implanted"]).filter(ids=list(new["fact"].values))
    both = FactSet("both", (*old, *(fact for fact in taught if fact.id not in old.ids)))
    model = wb.load_model(inputs["model"])
    scores = wb.attribute(model, both, steps=2, progress=False)
    measured = wb.interference(model, both, scores, metrics=["cosine", "gradient"], progress=False)
    expected = wb.predicts(measured, wb.harm(model, both, progress=False))
    predicted, told = load_frame(folder / "prediction.parquet"), json.loads((folder / "prediction.json").read_text())
    pd.testing.assert_frame_equal(predicted, expected, check_dtype=False, rtol=1e-3, atol=1e-3)
    assert told["verdict"] == verdict(predicted)
    page = html.unescape((folder / "report.html").read_text(encoding="utf-8"))
    for text in ("Gradient differs within and across relations in", told["verdict"], "Which layers to train"):
        assert text in page
    assert "This run has no drift" in page
    assert not (folder / "implant").exists()
    assert "no prediction of harm" in (finished / "report.html").read_text(encoding="utf-8")
    for name in WORK:
        monkeypatch.setattr(pipeline, name, lambda *args, **kwargs: pytest.fail("was done before"))
    wb.run(config(inputs, folder, **asked), progress=False)


def test_a_damaged_record_is_known_before_any_work(finished: Path, inputs, tmp_path, monkeypatch) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / "provenance.json").write_text("{")
    monkeypatch.setattr(pipeline, "load_model", lambda *args, **options: pytest.fail("work began"))
    with pytest.raises(ValueError, match=r"provenance\.json"):
        wb.run(config(inputs, folder), progress=False)


def test_a_second_start_does_nothing(finished: Path, inputs: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.parquet")}
    for name in WORK:
        monkeypatch.setattr(pipeline, name, lambda *args, **kwargs: pytest.fail("was done before"))
    wb.run(config(inputs, finished), progress=False)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*.parquet")} == before


def test_killed_at_every_stage_a_run_goes_on_to_the_same_results(
    finished: Path, inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run, killed once at the end of every stage: its output lies there, but the stage is not marked as done."""
    for stage in (name for name in WORK if name != "foresee"):  # which is asked for by name
        original = getattr(pipeline, stage)

        def killed(*args, work=original, **kwargs):
            work(*args, **kwargs)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(pipeline, stage, killed)
            with pytest.raises(KeyboardInterrupt):
                wb.run(config(inputs, tmp_path), progress=False)
    wb.run(config(inputs, tmp_path), progress=False)
    assert_same(results(finished), results(tmp_path))


def test_a_changed_setting_redoes_what_depends_on_it(inputs: dict[str, str], tmp_path: Path) -> None:
    quick = {"methods": ["loki"], "training.max_epochs": 1}
    wb.run(config(inputs, tmp_path, **quick), progress=False)
    old = {name: (tmp_path / f"stages/{name}.json").read_text() for name in ("recall", "attribution", "implant-loki")}
    wb.run(config(inputs, tmp_path, **quick, **{"selection.quota": 50}), progress=False)
    new = {name: (tmp_path / f"stages/{name}.json").read_text() for name in old}
    assert (old["recall"], old["attribution"]) == (new["recall"], new["attribution"])
    assert old["implant-loki"] != new["implant-loki"]
    wb.run(config(inputs, tmp_path, **quick, **{"attribution.steps": 3}), progress=False)
    assert open_result(tmp_path / "attribution.zarr").attrs["steps"] == 3


def test_more_attributed_facts_leave_others_to_be_read(inputs: dict[str, str], tmp_path: Path) -> None:
    """Also where no selection is trained: a changed folder equals a fresh one."""
    quick = {"methods": ["lora"], "training.max_epochs": 1}
    for most, place in ((2, "one"), (6, "one"), (6, "two")):
        wb.run(config(inputs, tmp_path / place, **quick, **{"attribution.max_facts": most}), progress=False)
    one, two = (load_frame(tmp_path / name / "forgetting.parquet") for name in ("one", "two"))
    pd.testing.assert_frame_equal(one, two)
    read = set(one.loc[one["suite"] == "retained", "fact"])
    assert read.isdisjoint(open_result(tmp_path / "one/attribution.zarr")["fact"].values.tolist())


def test_what_is_taught_is_not_read_as_known_before(inputs: dict[str, str], tmp_path: Path, caplog) -> None:
    """An edit of known facts: their prompts, other answers, other ids."""
    retained = wb.load_facts(inputs["retained"])
    recall = wb.recall(wb.load_model(inputs["model"]), retained, progress=False)
    edited = retained.filter(ids=[str(name) for name in recall.index[recall["known"]][:2]])
    records = [{"id": f"new/{fact.id}", "prompt": fact.prompt, "answer": retained[0].answer} for fact in edited]
    place = str(FactSet.from_records(records).save(tmp_path / "edits.jsonl"))
    changes = {"implanted": place, "methods": ["lora"], "training.max_epochs": 1}
    folder = wb.run(config(inputs, tmp_path / "run", **changes), progress=False).path
    assert "have a taught prompt: they are left out" in caplog.text
    frame = load_frame(folder / "forgetting.parquet")
    read = set(frame.loc[frame["suite"] == "retained", "fact"])
    attributed = set(open_result(folder / "attribution.zarr")["fact"].values.tolist())
    assert len(read | attributed) == recall["known"].sum() - 2
    assert (read | attributed).isdisjoint(edited.ids)
    same = [record | {"id": retained.ids[0], "prompt": "a quite new one is"} for record in records[:1]]
    taken = str(FactSet.from_records(same).save(tmp_path / "taken.jsonl"))
    with pytest.raises(ValueError, match="is the id of one fact of each"):
        wb.run(config(inputs, tmp_path / "x", implanted=taken, **{"interference.harm": True}), progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["magic"]}, "methods knows loki"),
        ({"methods": "loki"}, "'methods' does not fit: Input should be a list, got 'loki'"),
        ({"methods": ["lora", "lora"]}, "list of different names"),
        ({"interference.metrics": ["magic"]}, "There is no measure 'magic'"),
        ({"interference.top": 0}, "'interference.top' does not fit"),
        ({"interference.harm": True, "attribution.max_facts": 3}, "at least 8 attributed facts, .* no more than 6"),
        (
            {"selection.strategy": "interference_aware", "interference.metrics": ["superposition"]},
            "reads cosine, jaccard, gradient: have one",
        ),
        ({"selection.quota": 0}, "'selection.quota' does not fit"),
        ({"seed": True}, "'seed' does not fit"),
        ({"selection.layers": []}, "'selection.layers' does not fit"),
        ({"selection.layers": [0, True]}, r"'selection\.layers\.1' does not fit"),
        ({"training.learning_rate": float("inf")}, r"'training\.learning_rate' does not fit"),
        ({"training.batch_size": 10**20}, r"'training\.batch_size' does not fit"),
        ({"selection.strategy": "best"}, "strategy must be one of"),
        ({"selection.strategy": "per_layer_budget"}, "strategy must be one of"),
        ({"selection.quota": 0.1}, "of 32 units .* is less than one unit"),
        ({"selection.layers": [9]}, "selection.layers has 9"),
        ({"attribution.method": "guess"}, "method must be one of"),
        ({"attribution.method": "kn", "attribution.unit": "node"}, "kn is defined with unit='neuron'; leave unit out"),
        ({"attribution.method": "kn", "selection.quota": 0.1}, "of 40 units .* is less than one unit"),
        ({"training.epochs": 3}, "There is no setting 'training.epochs'; known here: target_efficacy"),
        ({"retained": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"evaluation.general": "nowhere.txt"}, "nowhere.txt"),
        ({"model": "no/such/folder/at/all"}, "no/such/folder/at/all"),
    ],
)
def test_bad_settings_are_one_sentence_before_any_work(
    changes: dict, message: str, inputs: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        wb.run(config(inputs, tmp_path, **changes), progress=False)
    assert not list(tmp_path.rglob("*.parquet"))


def test_facts_without_paraphrases_or_neighbours_go_the_whole_way(inputs: dict[str, str], tmp_path: Path) -> None:
    bare = [{"prompt": fact.prompt, "answer": fact.answer} for fact in FACTS]
    taught = FactSet.from_records(bare).save(tmp_path / "bare.jsonl")
    changes = {"implanted": str(taught), "methods": ["lora"], "training.max_epochs": 1, "training.paraphrases": 1}
    run = wb.run(config(inputs, tmp_path / "run", **changes), progress=False)
    assert set(load_frame(run.file("forgetting.parquet"))["suite"]) == {"efficacy", "retained", "general"}


def test_a_folder_with_something_else_is_left_alone(inputs: dict[str, str], tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in Path(inputs["model"]).iterdir()}
    with pytest.raises(ValueError, match="holds something that is not a run"):
        wb.run(config(inputs, Path(inputs["model"])), progress=False)
    assert {path: path.read_bytes() for path in Path(inputs["model"]).iterdir()} == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="holds something that is not a run"):
        wb.run(config(inputs, tmp_path / "file"), progress=False)


def test_changed_text_and_fewer_methods_make_the_page_anew(inputs: dict[str, str], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(Path(inputs["text"]).read_text(), encoding="utf-8")
    quick = {"training.max_epochs": 1, "evaluation.general": str(text)}
    out = tmp_path / "run"
    wb.run(config(inputs, out, methods=["loki", "lora"], **quick), progress=False)
    old = load_frame(out / "forgetting.parquet")
    text.write_text(" ".join(reversed(text.read_text().split())), encoding="utf-8")
    wb.run(config(inputs, out, methods=["loki"], **quick), progress=False)
    new = load_frame(out / "forgetting.parquet")
    assert set(new["method"]) == {"loki"}
    nll = [frame.query("metric == 'nll'")["before"].mean() for frame in (old, new)]
    assert nll[0] != pytest.approx(nll[1])
    assert "LoRA" not in (out / "report.html").read_text(encoding="utf-8").split("<main")[-1][:200_000]
    stages = json.loads((out / "provenance.json").read_text())["stages"]
    assert "implant-lora" not in stages


def test_a_model_that_knows_nothing_is_said_so(inputs: dict[str, str], tmp_path: Path) -> None:
    nonsense = FACTS.filter(ids=["france", "kenya"]).save(tmp_path / "nonsense.jsonl")
    with pytest.raises(ValueError, match="knows 0 of the 2 facts"):
        wb.run(config(inputs, tmp_path / "run", retained=str(nonsense)), progress=False)


def test_the_page_is_written_again_from_what_a_run_gives(finished: Path) -> None:
    assert wb.report(wb.RunDir(finished)) == wb.report(str(finished)) == finished / "report.html"

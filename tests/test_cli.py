"""The command: quick help, the same results as the package, one sentence and a non-zero exit for bad input."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from command import call
from tiny import FACTS, random_model, saved, tokenizer

import workbench as wb
from workbench.config import Config
from workbench.results import open_result

COMMANDS = [
    "run",
    "settings",
    "recall",
    "attribute",
    "select",
    "stability",
    "agreement",
    "implant",
    "export",
    "trace",
    "lens",
    "neurons",
    "suppress",
    "distance",
    "drift",
    "blame",
    "forgetting",
    "report",
    "models",
    "convert",
]


@pytest.fixture
def tiny_inputs(tmp_path: Path) -> tuple[str, str]:
    return str(saved(tmp_path / "model")), str(FACTS.save(tmp_path / "facts.jsonl"))


def test_help_starts_without_torch() -> None:
    code = "import sys; sys.argv = ['workbench', '--help']\nfrom workbench.cli import main\nmain()\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "print('torch' in sys.modules)"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().endswith("False")
    assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, monkeypatch, capsys) -> None:
    assert call(monkeypatch, command, "--help") == 0
    assert f"workbench {command}" in capsys.readouterr().out


def test_what_is_read_is_not_written_over_and_a_bad_place_is_known_first(tiny_inputs, tmp_path, monkeypatch, capsys):
    model, _ = tiny_inputs
    table = tmp_path / "facts.csv"
    table.write_text("prompt,answer\nthe capital of France is,Paris\n")
    for name in ("folder.csv", "folder.jsonl"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr("workbench.opening.open_model", None)
    for command, out, words in (
        ("recall", table, "is what is read here, and would be lost"),
        ("lens", table, "is what is read here, and would be lost"),
        ("recall", tmp_path / "folder.csv", "is a folder"),
        ("recall", table / "below.csv", "facts.csv is a file, or lies under one"),
        ("filter", tmp_path / "folder.jsonl", "is a folder"),
        ("filter", table / "far" / "below.jsonl", "is a file, or lies under one"),
    ):
        assert call(monkeypatch, command, "--facts", table, "--model", model, "--out", out, "-q") == 1
        assert words in capsys.readouterr().err
    assert table.read_text().startswith("prompt,answer")


def test_two_models_are_opened_before_facts_are_asked(tiny_inputs, tmp_path, monkeypatch, capsys) -> None:
    model, facts = tiny_inputs
    # whoever imports it for good first, so that they keep the true one
    for room in ("forgetting.around", "semantics.filtered", "recollection"):
        monkeypatch.setattr(f"workbench.{room}.recall", lambda *given, **options: pytest.fail("asked"))
    random_model("llama", num_hidden_layers=2).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    for command in ("drift", "blame", "forgetting"):
        assert call(monkeypatch, command, model, tmp_path, "--facts", facts, "--known-only", "-q") == 1
        assert "n_layers is 3 and 2" in capsys.readouterr().err
        assert call(monkeypatch, command, model, "nowhere/at/all", "--facts", facts, "--known-only", "-q") == 1
        assert "nowhere/at/all" in capsys.readouterr().err
    assert call(monkeypatch, "filter", "--facts", facts, "--model", model, "--out", "x.jsonl", "--keep", "500") == 1
    assert "--keep 500 is more than the 8 facts" in capsys.readouterr().err


def test_too_little_text_is_refused_before_a_model_is_opened(tiny_inputs, monkeypatch, capsys) -> None:
    assert call(monkeypatch, "forgetting", "none", "none", "--facts", tiny_inputs[1], "--max-tokens", 7) == 2
    assert "--max-tokens" in capsys.readouterr().err


def test_recall_equals_the_package(tiny_inputs, tmp_path, monkeypatch, capsys) -> None:
    model, facts = tiny_inputs
    out = tmp_path / "recall.csv"
    assert call(monkeypatch, "recall", "--model", model, "--facts", facts, "--out", str(out), "-q") == 0
    expected = wb.recall(wb.load_model(model), wb.load_facts(facts))
    assert f"{expected['known'].sum()} of {len(expected)} facts known" in capsys.readouterr().out
    read = pd.read_csv(out).set_index("fact")
    assert read["logprob"].to_numpy() == pytest.approx(expected["logprob"].to_numpy(), rel=1e-5)
    assert read["known"].tolist() == expected["known"].tolist()


def test_attribute_and_select_equal_the_package(tiny_inputs, tmp_path, monkeypatch) -> None:
    model, facts = tiny_inputs
    zarr, rows = str(tmp_path / "a.zarr"), tmp_path / "rows.json"
    assert call(monkeypatch, "attribute", "--model", model, "--facts", facts, "--out", zarr, "--steps", "3", "-q") == 0
    assert call(monkeypatch, "select", zarr, "--out", str(rows), "--quota", "25") == 0
    ds = wb.attribute(wb.load_model(model), wb.load_facts(facts), steps=3, progress=False)
    assert json.loads(rows.read_text()) == wb.select(ds, quota=25).positions()


def test_attribute_prints_the_unit_that_the_method_fixes(tiny_inputs, tmp_path, monkeypatch, capsys) -> None:
    model, facts = tiny_inputs
    command = ["--model", model, "--facts", facts, "--method", "kn", "--steps", "1", "-q"]
    assert call(monkeypatch, "attribute", *command, "--out", str(tmp_path / "a.zarr")) == 0
    assert " neurons a layer: " in capsys.readouterr().out
    assert call(monkeypatch, "attribute", *command, "--unit", "node", "--out", str(tmp_path / "b.zarr")) == 1
    assert "kn is defined with unit='neuron'; leave unit out" in capsys.readouterr().err


def test_attribute_gives_the_mean_over_paraphrases(tiny_inputs, tmp_path, monkeypatch, capsys) -> None:
    model, facts = tiny_inputs
    out, each = tmp_path / "a.zarr", tmp_path / "a.prompts.zarr"
    command = ["attribute", "--model", model, "--facts", facts, "--out", out, "--method", "grad_x_act", "-q"]
    assert call(monkeypatch, *command, "--paraphrases") == 0
    assert "8 facts, 3 layers, 32 nodes a layer" in capsys.readouterr().out
    asked = wb.load_facts(facts)
    prompts = wb.attribute(wb.load_model(model), asked.per_prompt(), method="grad_x_act", progress=False)
    np.testing.assert_array_equal(open_result(each)["score"], prompts["score"])
    mean = open_result(out).load()
    france = prompts["score"].sel(fact=["france#0", "france#1"]).values.mean(0)
    np.testing.assert_allclose(mean["score"].sel(fact="france"), france, rtol=1e-6)
    assert np.abs(prompts["score"].sel(fact="france#0") - mean["score"].sel(fact="france")).max() > 1e-3
    assert mean["n_prompts"].values.tolist() == [1 + len(fact.paraphrases) for fact in asked]
    assert call(monkeypatch, "select", out, "--out", tmp_path / "rows.json") == 0

    monkeypatch.setattr("workbench.attribution.scoring.score_batch", lambda *given: pytest.fail("work began"))
    assert call(monkeypatch, *command, "--paraphrases") == 0  # nothing is left to do
    (out / "relation" / "c" / "0").unlink()
    (out / "fact" / "c" / "0").write_bytes(b"")
    assert call(monkeypatch, *command, "--paraphrases") == 0  # means that are damaged are made anew
    assert open_result(out).load().identical(mean)
    assert call(monkeypatch, *command) == 1  # means are not scores of the facts' own prompts
    assert "--no-resume" in capsys.readouterr().err
    shutil.rmtree(each)
    assert call(monkeypatch, *command, "--paraphrases") == 1
    assert "holds no means of" in capsys.readouterr().err
    assert open_result(out).equals(mean)


def test_prompts_and_their_means_must_fit_on_the_disk_together(tiny_inputs, tmp_path, monkeypatch, capsys) -> None:
    model, facts = tiny_inputs
    folder, fact_bytes = tmp_path / "scores", 4 * 3 * 33
    command = ["attribute", "--model", model, "--facts", facts, "--out", folder / "a.zarr", "--method", "grad_x_act"]

    def run(free: int) -> int:
        monkeypatch.setattr("workbench.results.files.free_bytes", lambda path: free)
        return call(monkeypatch, *command, "--paraphrases", "-q")

    with monkeypatch.context() as patch:
        patch.setattr("workbench.attribution.scoring.score_batch", lambda *given: pytest.fail("work began"))
        assert run(18 * fact_bytes - 1) == 1  # 10 prompts of 8 facts
        assert "The scores take 7.13e-06 GB, and 7.13e-06 GB are free" in capsys.readouterr().err
    assert not folder.exists()
    assert run(18 * fact_bytes) == 0
    assert run(8 * fact_bytes) == 0  # only the means are left to do
    assert run(8 * fact_bytes - 1) == 1


def test_drift_and_forgetting_of_a_model_against_itself(tiny_inputs, tmp_path, monkeypatch, capsys) -> None:
    model, facts = tiny_inputs
    out = tmp_path / "drift.parquet"
    assert call(monkeypatch, "drift", model, model, "--facts", facts, "--out", str(out), "-q") == 0
    assert pd.read_parquet(out)["change"].eq(0).all()
    assert call(monkeypatch, "forgetting", model, model, "--facts", facts, "--max-tokens", "64", "-q") == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("accuracy", "paraphrase", "neighbourhood", "general"))


def test_settings_are_read_from_files_and_flags(tmp_path, monkeypatch, capsys) -> None:
    file = tmp_path / "run.toml"
    file.write_text("seed = 3\n[training]\nmax_epochs = 2\n", encoding="utf-8")
    assert call(monkeypatch, "settings", "--config", str(file)) == 0
    printed = tmp_path / "run.json"
    printed.write_text(capsys.readouterr().out, encoding="utf-8")
    assert Config.read(printed) == Config.read(file) == Config.read(changes={"seed": 3, "training.max_epochs": 2})


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["recall", "--facts", "nowhere.jsonl"], "nowhere.jsonl"),
        (["recall", "--model", "nowhere/at/all", "--facts", "world"], "nowhere/at/all"),
        (["run", "--set", "training.seed"], "--set takes name=value"),
        (["run", "--set", "training.sede=1"], "no setting 'training.sede'"),
        (["run", "--set", "model.x=3", "--model", "m"], "'model' and 'model.x' cannot both be changed"),
        (["run", "--set", "training.seed=3", "--seed", "2"], "'training.seed' is given by --set and by a flag"),
        (["run", "--config", "nowhere.toml"], "no configuration file nowhere.toml"),
        (["run", "--set", "seed=" + "[" * 10**5], "The setting 'seed' does not fit"),
        (["run", "--methods", "magic"], "methods knows"),
        (["report", "nowhere"], "nowhere"),
        (["select", "nowhere.zarr", "--out", "x.json"], "nowhere.zarr"),
        (["recall", "--out", "table.xlsx"], "--out must end in .csv or .parquet"),
    ],
)
def test_bad_input_is_one_sentence_and_a_non_zero_exit(arguments, sentence, monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *arguments) == 1
    printed = capsys.readouterr().err
    assert sentence in printed
    assert len(printed.strip().splitlines()) == 1
    assert "Traceback" not in printed


def test_an_interrupt_says_what_is_kept(monkeypatch, capsys) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("workbench.results.open_result", interrupted)
    assert call(monkeypatch, "convert", "a.zarr", "a.h5") == 130
    assert capsys.readouterr().err.startswith("Stopped; what a run folder or a zarr --out holds is kept")


@pytest.mark.parametrize(
    "arguments",
    [
        ["implant", "--data", "none.jsonl", "--out", "new", "--layers", "0", "1.5"],
        ["implant", "--data", "none.jsonl", "--out", "new", "--epochs", "1.5"],
        ["implant", "--data", "none.jsonl", "--out", "new", "--rank", "2.5"],
        ["recall", "--facts", "none.jsonl", "--seed", "1.5"],
        ["select", "scores.zarr", "--out", "x.json", "--layers", "0.5"],
    ],
)
def test_a_whole_number_is_not_rounded(arguments, monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *arguments) == 2
    assert f'unable to convert "{arguments[-1]}" into int' in "".join(capsys.readouterr())


def test_a_run_without_methods_and_with_harm_is_asked_for_by_name(monkeypatch, tmp_path) -> None:
    asked: list[Config] = []

    def run(settings: Config, progress: bool) -> wb.RunDir:
        asked.append(settings)
        return wb.RunDir(tmp_path)

    monkeypatch.setattr("workbench.pipeline.run", run)
    metrics = 'interference.metrics=["cosine", "gradient"]'
    assert call(monkeypatch, "run", "--methods", "none", "--set", "interference.harm=true", "--set", metrics) == 0
    assert asked[0].methods == ()
    assert asked[0].interference.harm
    assert asked[0].interference.metrics == ("cosine", "gradient")
    assert call(monkeypatch, "run") == 0
    assert asked[1] == Config()


def test_an_unknown_command_is_explained(monkeypatch, capsys) -> None:
    assert call(monkeypatch, "explode") == 2
    printed = "".join(capsys.readouterr())
    assert "explode" in printed

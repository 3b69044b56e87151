"""Analyses: thin scripts that run, publish what they found, and have an entry in the log."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from scripts import HOME, script
from tiny import FACTS, inputs_of_a_run, saved

from workbench.attribution import attribute
from workbench.config import SelectionConfig
from workbench.facts import load_facts
from workbench.models import load_model
from workbench.pipeline.checks import LOKI_METHODS
from workbench.recollection import recall
from workbench.results import open_result
from workbench.suppression import suppression_curve

SCRIPTS = sorted((HOME / "analyses").glob("*.py"))
LOG = HOME / "analyses" / "LOG.md"


def entries(text: str) -> dict[str, str]:
    """Name of the script -> the text under its first heading `## <date> <name>`."""
    parts = re.split(r"^## (\d{4}-\d{2}-\d{2}) (\w+).*$", text, flags=re.MULTILINE)
    return dict(zip(reversed(parts[2::3]), reversed(parts[3::3]), strict=True))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_analysis_has_an_entry_with_question_command_seed_numbers_and_verdict(path: Path) -> None:
    found = entries(LOG.read_text(encoding="utf-8"))
    assert path.stem in found
    for word in ("Question", "Command", "Seeds", "Numbers", "Verdict"):
        assert f"**{word}" in found[path.stem], word
    assert f"analyses/{path.name}" in found[path.stem]


def test_an_analysis_without_an_entry_is_noticed() -> None:
    assert entries("# Log\n\n## 2026-01-02 one: a title\n\ntext\n") == {"one": "\n\ntext\n"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_analysis_publishes_under_its_name(path: Path) -> None:
    published = {one.suffix for one in (HOME / "figures").glob(f"{path.stem}.*")}
    assert {".html", ".csv", ".json"} <= published


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_analysis_says_what_it_does(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        script("analyses", path.stem).main(["--help"])
    assert not end.value.code
    assert "--smoke" in capsys.readouterr().out


def test_panels_are_means_and_ranges_over_seeds() -> None:
    rows = [
        (suite, metric, "loki", 5.0, seed, value + seed)
        for suite, metric, value in [
            ("efficacy", "accuracy", 0.5),
            ("retained", "accuracy", 0.25),
            ("general", "perplexity", 15.0),
            ("general", "kl", 99.0),
        ]
        for seed in (0, 1)
    ]
    frame = pd.DataFrame(rows, columns=["suite", "metric", "method", "quota", "seed", "after"])
    drawn = script("analyses", "quota_sweep").panels(frame).set_index("panel")
    assert drawn["mean"].tolist() == [1.0, 0.75, 15.5]
    assert drawn["low"].tolist() == [0.5, 0.25, 15.0]
    assert drawn["high"].tolist() == [1.5, 1.25, 16.0]
    assert drawn.index[0] == "taught facts answered (share)"


def test_quota_sweep_runs_shares_what_it_can_and_publishes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = script("analyses", "quota_sweep")
    given = inputs_of_a_run(tmp_path)
    options = ["--smoke", "--out", str(tmp_path / "runs"), "--figures", str(tmp_path / "figures")]
    options += [word for name in ("model", "retained", "implanted") for word in (f"--{name}", given[name])]
    page = sweep.main(options)
    assert page == tmp_path / "figures" / "quota_sweep.html"
    assert "plotly" in page.read_text(encoding="utf-8")
    assert "known facts still answered" in capsys.readouterr().out
    frame = pd.read_csv(page.with_suffix(".csv"))
    assert set(frame["method"]) == {"loki", "loki_random"}
    assert set(frame["quota"]) == {5, 20}
    assert set(frame["seed"]) == {0}
    assert {"efficacy", "retained", "general"} <= set(frame["suite"])
    assert frame[["before", "after", "change", "low", "high", "epochs"]].notna().all().all()
    nodes = {quota: 3 * (32 * quota // 100) for quota in (5, 20)}  # floor(q D / 100) in each of 3 layers
    sizes = frame.groupby(["method", "quota"])["trainable_parameters"].unique()
    for (_, quota), size in sizes.items():
        assert size.tolist() == [nodes[quota] * 40]
    about = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    assert about["quotas"] == [5, 20]
    assert about["smoke"] is True
    assert about["packages"]["torch"]
    assert about["settings"]["model"] == given["model"]
    assert "retained" not in about["settings"]
    runs = sorted(path.name for path in (tmp_path / "runs").glob("quota*"))
    assert runs == ["quota20-seed0", "quota5-seed0"]
    logs = [(tmp_path / "runs" / name / "log.txt").read_text(encoding="utf-8") for name in runs]
    assert "attribution: done before" in logs[0]  # shared with the first run
    assert "attribution: started" in logs[1]
    assert "selection-loki: started" in logs[0]
    cut_short = tmp_path / "runs" / ".quota20-seed0.part"  # a copy that was stopped, beside which nothing was made
    shutil.rmtree(tmp_path / "runs" / "quota20-seed0")
    cut_short.mkdir()
    (cut_short / "recall.parquet").write_bytes(b"half")
    assert sweep.main(options) == page
    assert not cut_short.exists()


def smoke(tmp_path: Path) -> list[str]:
    model, facts = tmp_path / "tiny", tmp_path / "facts.jsonl"
    if not model.exists():
        saved(model)
        FACTS.save(facts)
    return [
        *(
            "--smoke",
            "--models",
            str(model),
            "--facts",
            str(facts),
            "--all-facts",
            "--relations",
            "capital",
            "opposite",
        ),
        *("--out", str(tmp_path / "runs"), "--figures", str(tmp_path / "figures")),
    ]


def test_attribution_sweep_publishes_one_frame_and_does_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = script("analyses", "attribution_sweep")
    page, asked = sweep.main(smoke(tmp_path)), sweep.parsed(smoke(tmp_path))[0]
    assert page == tmp_path / "figures" / "attribution_sweep.html"
    assert {one.stem for one in page.parent.glob("*.html")} == {"attribution_sweep", "attribution_sweep_agreement"}
    frame = pd.read_csv(page.with_suffix(".csv"))
    keys = ["model", "unit", "method", "steps", "relation"]
    drawn = {(method, steps) for method, steps in zip(frame["method"], frame["steps"], strict=True)}
    assert drawn == {("ig", 0), ("ig", 1), ("ig", 4), ("grad_x_act", 1), ("random", 1)}
    assert set(frame["relation"]) == {"capital", "opposite"}
    assert set(frame["model"]) == {"tiny"}
    assert (frame.groupby(keys).size() == 4).all()  # three layers and all of them together
    assert (frame["facts"] == 2).all()
    assert (frame["seconds_per_fact"] > 0).all()
    reference = frame[(frame["method"] == "ig") & (frame["steps"] == 4)]
    assert np.allclose(reference[["spearman", "overlap"]], 1)
    assert (frame.loc[frame["method"] == "random", "spearman"].abs() < 0.5).all()
    assert frame.loc[frame["method"] == "random", "gap"].isna().all()
    assert "grad_x_act" in capsys.readouterr().out
    assert str(tmp_path) not in page.with_suffix(".json").read_text(encoding="utf-8")
    cells = sorted((tmp_path / "runs").rglob("*.zarr"))
    assert len(cells) == 10
    times = [cell.stat().st_mtime_ns for cell in cells]
    with monkeypatch.context() as patch:  # a second start opens no model and computes nothing
        patch.setattr(sweep.wb, "load_model", lambda name: pytest.fail("opened a model"))
        again = sweep.sweep_all(asked)
    assert [cell.stat().st_mtime_ns for cell in cells] == times
    pd.testing.assert_frame_equal(again.astype({"layer": float}), frame, check_dtype=False)
    cells[0].with_suffix(".json").unlink()
    calls = []

    def counted(*args: object, **options: object) -> xr.Dataset:
        calls.append(options["out"])
        return attribute(*args, **options)

    monkeypatch.setattr(sweep.wb, "attribute", counted)
    sweep.sweep_all(asked)
    assert calls == [cells[0]]
    for damaged in (cells[1] / "score" / "c", cells[0] / "relation" / "c" / "0"):
        file = next(one for one in (damaged, *damaged.rglob("*")) if one.is_file())
        file.write_bytes(file.read_bytes()[:-5] + b"\x07" + file.read_bytes()[-4:])
        frame = sweep.sweep_all(asked)
        pd.testing.assert_frame_equal(
            frame.drop(columns="seconds_per_fact"), again.drop(columns="seconds_per_fact"), check_dtype=False
        )
        assert calls[-1] == next(cell for cell in cells if damaged.is_relative_to(cell))
        assert frame["seconds_per_fact"].isna().sum() == 4  # of the cell that was found done, without its times
    assert len(calls) == 3
    ds, _ = sweep.Subject(asked, str(tmp_path / "tiny")).result(sweep.Cell("node", "ig", 4, "opposite"))
    facts = FACTS.filter(ids=[str(name) for name in ds["fact"].values])
    expected = attribute(load_model(str(tmp_path / "tiny")), facts, steps=4, progress=False)
    np.testing.assert_array_equal(ds["score"], expected["score"])


def test_attribution_sweep_passes_over_the_other_unit_kind_and_names_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = script("analyses", "attribution_sweep")
    asked = replace(sweep.parsed(smoke(tmp_path))[0], methods=("kn",), units=("node", "neuron"))
    frame = sweep.sweep_all(asked)
    assert set(frame["unit"]) == {"neuron"}
    assert set(frame["reference"]) == {"kn"}
    monkeypatch.setattr(sweep.wb, "load_model", lambda name: pytest.fail("opened a model"))
    for changes, sentence in (
        ({"units": ("node",)}, "kn is not defined for nodes"),
        ({"methods": ("ig",), "steps": (4, -1)}, "steps must be a whole number of at least 1, not -1"),
        ({"per_relation": 0}, "--per-relation must be at least 1"),
    ):
        with pytest.raises(ValueError, match=sentence):
            sweep.sweep_all(replace(asked, out=tmp_path / "new", **changes))


def test_attribution_sweep_summarises_by_hand(tmp_path: Path) -> None:
    sweep = script("analyses", "attribution_sweep")
    score = np.array([[[3.0, -2.0, 0.5], [1.0, 0.0, 0.0]], [[1.0, 1.0, 2.0], [0.0, -1.0, 4.0]]])
    other = np.array([[[1.0, 2.0, 3.0], [1.0, 0.0, 0.0]], [[1.0, 1.0, 2.0], [0.0, -1.0, 4.0]]])
    gap = np.array([[0.5, 0.0], [0.0, 1.0]])
    one, exact = (
        xr.Dataset({"score": (("fact", "layer", "unit"), x), "gap": (("fact", "layer"), gap)}, attrs={"method": "ig"})
        for x in (score, other)
    )
    frame = sweep.summary(one, 0.25, exact).set_index("layer")
    assert frame.loc[0, "mean_abs"] == pytest.approx((3 + 2 + 0.5 + 4) / 6)
    assert frame.loc[0, "gap"] == pytest.approx((0.5 / 2.0 + 0) / 2)
    assert frame.loc[1, "gap"] == pytest.approx((0 + 1 / 4.0) / 2)
    assert frame.loc[0, "spearman"] == pytest.approx((-0.5 + 1) / 2)  # ranks 3 1 2 against 1 2 3
    assert frame.loc[0, "overlap"] == pytest.approx(0.5)
    assert frame["seconds_per_fact"].eq(0.25).all()
    assert np.isnan(sweep.spearman(np.zeros(4), np.arange(4)))
    silent = sweep.summary(one.assign_attrs(method="random"), 0.25, exact)
    assert silent["gap"].isna().all()


def test_what_changes_under_its_name_is_told_apart(tmp_path: Path) -> None:
    sweep = script("analyses", "attribution_sweep")
    saved(tmp_path / "tiny")
    first = sweep.changing(str(tmp_path / "tiny"))
    assert sweep.changing(str(tmp_path / "tiny")) == first != []
    saved(tmp_path / "tiny", seed=1)
    assert sweep.changing(str(tmp_path / "tiny")) != first
    assert sweep.changing("smollm2-135m") == []


def test_attribution_sweep_refers_to_ablation_where_there_is_one(tmp_path: Path) -> None:
    sweep = script("analyses", "attribution_sweep")
    plan = sweep.Sweep(tmp_path, (), ("node",), ("ig", "kn", "loki-code"), (0, 2, 8), (), "world", 1, True, 0)
    found = list(sweep.cells(plan, "capital", "node"))
    assert [cell.place for cell in found] == [
        "node/ig-adaptive/capital", "node/ig-2/capital", "node/ig-8/capital", "node/loki-code-7/capital",
    ]  # fmt: skip
    assert sweep.reference_of(found).place == "node/ig-8/capital"
    exact = sweep.Cell("node", "ablation", 1, "capital")
    assert sweep.reference_of([*found, exact]) == exact


def test_a_method_of_loki_is_the_same_in_a_run_and_in_the_comparison() -> None:
    compared = script("analyses", "method_comparison").SELECTIONS
    both = compared.keys() & LOKI_METHODS
    assert both == {"loki_signed", "loki_magnitude", "loki_random", "loki_highest"}
    for name in both:
        run = SelectionConfig().model_dump() | LOKI_METHODS[name]
        assert compared[name].items() <= run.items(), name


def test_method_comparison_searches_trains_with_every_seed_and_keeps_its_trials(tmp_path: Path, capsys) -> None:
    comparison = script("analyses", "method_comparison")
    facts = FACTS.save(tmp_path / "facts.jsonl")
    options = ["--smoke", "--all-facts", "--model", str(saved(tmp_path / "model")), "--retained", str(facts)]
    options += ["--quota", "30", "--out", str(tmp_path / "runs"), "--figures", str(tmp_path / "figures")]
    page = comparison.main(options)
    assert page == tmp_path / "figures" / "method_comparison.html"
    frame = pd.read_csv(page.with_suffix(".csv"))
    assert set(frame["method"]) == {"loki_magnitude", "loki_interference", "lora", "ia3"}
    assert {"retained", "tuning", "general", "paraphrase"} <= set(frame["suite"])
    trials = pd.read_parquet(tmp_path / "runs" / "trials.parquet")
    assert trials.groupby("method").size().to_dict() == {
        "loki_magnitude": 3, "loki_interference": 3, "lora": 3, "ia3": 1,
    }  # fmt: skip
    assert trials.groupby("method")["chosen"].sum().tolist() == [1, 2, 2, 2]  # two seeds at the chosen rate
    rate = trials.query("chosen").groupby("method")["learning_rate"].unique()
    numbers = frame.drop_duplicates("method").set_index("method")
    assert all(rate[name].tolist() == [numbers.loc[name, "learning_rate"]] for name in rate.index)
    one = trials.query("chosen and method == 'lora'")
    readings = [
        pd.read_parquet(tmp_path / "runs" / "trials" / f"lora-{row.factor:g}-{row.seed}" / "forgetting.parquet")
        for row in one.itertuples()
    ]
    kl = pd.concat(readings).query("metric == 'kl'")
    mean = (kl["after"] * kl["weight"]).sum() / kl["weight"].sum()
    assert frame.query("method == 'lora' and metric == 'kl'")["after"].item() == pytest.approx(mean)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("trial.json")}
    comparison.main(options)  # nothing is trained again
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("trial.json")} == before
    assert str(tmp_path / "runs") not in page.with_suffix(".json").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="a trial with other facts or settings"):
        comparison.main([*options, "--quota", "20"])
    chosen = frame.set_index(["method", "suite", "metric"]).sort_index()
    pair = []
    for method in ("loki_magnitude", "lora"):
        rows = trials.query("chosen and method == @method")
        names = [f"{method}-{row.factor:g}-{row.seed}" for row in rows.itertuples()]
        places = [tmp_path / "runs" / "trials" / name / "forgetting.parquet" for name in names]
        pair.append(pd.concat([pd.read_parquet(place) for place in places]))
    logprob = [one.query("suite == 'retained' and metric == 'logprob'").groupby("fact")["after"].mean() for one in pair]
    row = chosen.loc[("loki_magnitude", "retained", "logprob")]
    assert row["minus_lora"] == pytest.approx((logprob[0] - logprob[1]).mean())
    assert row["seed_low"] <= row["after"] <= row["seed_high"]
    assert chosen.loc[("lora", "retained", "logprob"), "minus_lora"] == 0
    assert chosen.loc["lora", "edge"].all()  # of two rates each is at the edge
    assert not chosen.loc["ia3", "edge"].any()
    capsys.readouterr()


def test_suppression_reads_other_facts_than_it_chose_by(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = inputs_of_a_run(tmp_path)
    options = ["--smoke", "--out", str(tmp_path / "out"), "--figures", str(tmp_path / "figures")]
    options += ["--model", given["model"], "--facts", given["retained"]]
    page = script("analyses", "suppression").main(options)
    frame, about = pd.read_csv(page.with_suffix(".csv")), json.loads(page.with_suffix(".json").read_text("utf-8"))
    assert {"lowest", "random", "highest", "lowest vs random"} <= set(frame["group"])
    assert set(frame["score"]) == {"signed", "magnitude"}
    assert about["n_attributed"] > 1
    model, facts = load_model(given["model"]), load_facts(given["retained"])
    with open_result(next((tmp_path / "out").glob("scores-node-*.zarr"))) as scores:
        asked, seen = recall(model, facts), [str(i) for i in scores["fact"].values]
        assert asked.loc[seen, "known"].all()
        read = facts.filter(ids=asked.index[asked["known"]]).filter(where=lambda fact: fact.id not in seen)
        again = suppression_curve(model, scores, read, quotas=[10.0])
    assert about["n_read"] == len(read) > 1
    ours = frame[frame["suite"] == "facts"].reset_index(drop=True)
    np.testing.assert_allclose(ours["after"], again["after"], rtol=1e-5)

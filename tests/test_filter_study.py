"""The study of filter and weights: the whole way on a tiny model, resumed, and its numbers by hand."""

from pathlib import Path

import pandas as pd
import pytest
from scripts import script
from tiny import FACTS, saved

from workbench.intervals import means


def test_the_study_goes_all_the_way_and_does_only_what_is_missing(tmp_path: Path, capsys, monkeypatch) -> None:
    study = script("analyses", "filter_and_weights")
    facts = FACTS.save(tmp_path / "facts.jsonl")
    options = [
        "--smoke",
        "--all-facts",
        "--quota",
        "20",
        "--model",
        str(saved(tmp_path / "model")),
        "--retained",
        str(facts),
    ]
    options += ["--out", str(tmp_path / "runs"), "--figures", str(tmp_path / "figures")]
    page = study.main(options)
    assert page == tmp_path / "figures" / "filter_and_weights.html"
    frame = pd.read_csv(page.with_suffix(".csv"))
    arms = ["all", "near_diverse-0.5", "random-0.5", "sample_permuted", "full"]
    assert list(frame["method"].unique()) == arms
    assert {"taught", "kept", "retained", "general"} == set(frame["suite"])
    trials = pd.read_parquet(tmp_path / "runs" / "trials.parquet").set_index(["arm", "seed"])
    assert len(trials) == 2 * len(arms)
    assert trials.loc[("sample_permuted", 1), "weight_max"] > 1
    rows = frame.set_index(["method", "suite", "metric"]).sort_index()
    assert (frame.loc[frame["method"] == "all", "difference"] == 0).all()
    assert rows.loc[("random-0.5", "kept", "accuracy"), "n"] >= 2  # two seeds draw other facts
    one = [pd.read_parquet(tmp_path / "runs" / "trials" / f"{arm}-seed{seed}" / "forgetting.parquet")
           for arm in ("sample_permuted", "all") for seed in (0, 1)]  # fmt: skip
    kl = [means(part).set_index("metric").loc["kl", "after"] for part in one]
    found = rows.loc[("sample_permuted", "general", "kl")]
    assert found["after"] == pytest.approx((kl[0] + kl[1]) / 2)
    assert found["difference"] == pytest.approx((kl[0] + kl[1] - kl[2] - kl[3]) / 2)
    assert (found["seed_low"], found["seed_high"]) == pytest.approx((min(kl[:2]), max(kl[:2])))
    with pytest.raises(ValueError, match="a trial with other facts or settings"):
        study.main([*options, "--learning-rate", "0.5"])
    assert set(frame["reached"]) <= {0, 1, 2}
    monkeypatch.setattr(study, "implant", lambda *given, **options: pytest.fail("trained again"))
    monkeypatch.setattr(study, "publish", lambda figure, again, *rest: [again])
    pd.testing.assert_frame_equal(study.main(options).astype(frame.dtypes), frame)
    assert str(tmp_path / "runs") not in page.with_suffix(".json").read_text(encoding="utf-8")
    assert "KL on prose" in capsys.readouterr().out


def test_a_filter_is_compared_with_training_on_all_by_the_facts_that_it_kept() -> None:
    study = script("analyses", "filter_and_weights")
    rows = [("all", "taught", "a", 1.0), ("all", "taught", "b", 0.0), ("all", "kept", "a", 1.0),
            ("all", "kept", "b", 0.0), ("one", "taught", "a", 1.0), ("one", "taught", "b", 1.0),
            ("one", "kept", "b", 1.0)]  # fmt: skip
    readings = pd.DataFrame(rows, columns=["method", "suite", "fact", "after"]).assign(metric="accuracy", weight=1.0)
    found = study.against_all(readings).set_index(["method", "suite"])["difference"]
    assert found.to_dict() == {("all", "taught"): 0, ("all", "kept"): 0, ("one", "taught"): 0.5, ("one", "kept"): 1.0}


def test_an_unknown_arm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no arm .spread-0\.9. here; known are all, spread-0\.7"):
        script("analyses", "filter_and_weights").main(["--arms", "spread-0.9", "--out", str(tmp_path)])

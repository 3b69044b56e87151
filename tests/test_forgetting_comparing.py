"""LoKI's average and the paired tests: against hand-worked numbers, literal enumerations and a second bootstrap."""

from itertools import product

import numpy as np
import pandas as pd
import pytest

from workbench.cli.change import _show_average
from workbench.figures import forgetting_compared
from workbench.forgetting import loki_average, mcnemar, paired
from workbench.intervals import means


def frame_of(before: list[float], after: list[float], **about: object) -> pd.DataFrame:
    label = {"suite": "facts", "metric": "accuracy", "mode": "greedy", "weight": 1.0} | about
    frame = pd.DataFrame({"fact": [f"f{i}" for i in range(len(before))], "before": before, "after": after})
    return frame.assign(**label, change=frame["after"] - frame["before"])


def test_average_by_hand() -> None:
    # 10% of 0.6 lost, 25% of 0.4 lost, 5% of 0.2 gained: (10 + 25 - 5) / 3 = 10%
    assert loki_average({"a": 0.6, "b": 0.4, "c": 0.2}, {"c": 0.21, "b": 0.3, "a": 0.54}) == pytest.approx(10)
    assert loki_average({"a": 0.3}, {"a": 0.3}) == 0
    assert loki_average({"a": 0.3}, {"a": 0.0}) == 100


def test_the_command_averages_filtered_metrics_too_and_names_what_it_leaves_out(capsys) -> None:
    rows = [("sums", "exact_match:strict-match", 0.5, 0.1), ("sums", "exact_match:flexible", 0.6, 0.6),
            ("reading", "accuracy", 0.8, 0.8), ("strict", "exact_match:strict-match", 0.0, 0.0),
            ("strict", "exact_match:flexible-extract", 0.8, 0.4),
            ("lost", "acc_norm", 0.0, 0.0), ("prose", "word_perplexity", 9.0, 8.0)]  # fmt: skip
    _show_average(pd.DataFrame(rows, columns=["suite", "metric", "before", "after"]))
    printed = capsys.readouterr().out
    assert "over 3 tasks (LoKI's Avg): 43.33% (reading accuracy, strict exact_match:flexible-extract, " in printed
    assert "sums exact_match:strict-match)" in printed
    assert "score before is 0: lost." in printed
    assert "right or wrong there: prose." in printed


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        ({"a": 0.0, "b": 1.0}, {"a": 0.5, "b": 1.0}, "leave out a"),
        ({"a": 0.5}, {"b": 0.5}, "on one side only: a, b"),
        ({}, {}, "none at all"),
        ({"a": 0.5}, {"a": float("nan")}, "score of a is not a finite"),
    ],
)
def test_average_refuses_what_has_no_meaning(before, after, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        loki_average(before, after)


@pytest.mark.parametrize("n", range(9))
def test_mcnemar_equals_the_count_of_all_splits(n: int) -> None:
    splits = [abs(2 * sum(one) - n) for one in product((0, 1), repeat=n)]
    for lost in range(n + 1):
        as_uneven = sum(split >= abs(n - 2 * lost) for split in splits)
        assert mcnemar(lost, n - lost) == pytest.approx(as_uneven / 2**n)
    assert mcnemar(400, 100) < 1e-40
    with pytest.raises(ValueError, match="not negative"):
        mcnemar(-1, 2)


def test_paired_counts_and_tests_by_hand() -> None:
    before = [1.0] * 8 + [0.0] * 4
    after = [0.0] * 6 + [1.0] * 2 + [1.0, 0.0, 0.0, 0.0]
    table = paired(pd.concat([frame_of(before, after), frame_of([1.0, 0.0], [1.0, 0.0], suite="other")]))
    first, second = table.iloc[0], table.iloc[1]
    assert (first["lost"], first["gained"], first["n"]) == (6, 1, 12)
    assert first["p"] == pytest.approx(2 * (1 + 7) / 2**7)
    assert first["q"] == pytest.approx(2 * first["p"])
    assert (second["lost"], second["gained"], second["p"], second["q"]) == (0, 0, 1.0, 1.0)
    assert first["change"] == pytest.approx(-5 / 12)
    assert first["low"] < first["change"] < first["high"] < 0


def test_q_is_of_one_method_and_other_metrics_have_no_mcnemar() -> None:
    lost = frame_of([1.0] * 6, [0.0] * 6)
    nll = frame_of([1.0, 2.0], [2.0, 2.0], metric="nll", suite="general", weight=[1.0, 3.0])
    table = paired(pd.concat([part.assign(method=name) for name in ("a", "b") for part in (lost, nll)]))
    assert table["q"].dropna().tolist() == [mcnemar(6, 0)] * 2
    rows = table[table["suite"] == "general"]
    assert rows["metric"].tolist() == ["nll", "perplexity"] * 2
    assert rows[["lost", "gained", "p", "q"]].isna().all(axis=None)
    assert rows["after"].tolist()[:2] == pytest.approx([2.0, np.exp(2.0)])
    assert rows["before"].tolist()[:2] == pytest.approx([1.75, np.exp(1.75)])


def test_the_table_is_what_the_figure_draws() -> None:
    lost = frame_of([1.0] * 6, [0.0] * 3 + [1.0] * 3).assign(method="lora")
    table = paired(lost)
    fig = forgetting_compared(table)
    assert list(fig.data[0].x) == [-50.0]
    assert list(fig.data[0].error_x.array) == pytest.approx([100 * (table["high"].item() + 0.5)])


def test_intervals_equal_the_other_table() -> None:
    rng = np.random.default_rng(0)
    before, after = rng.normal(size=(2, 30))
    frame = frame_of(before.tolist(), after.tolist(), metric="nll", weight=rng.uniform(1, 5, 30))
    columns = ["suite", "metric", "n", "before", "after", "change", "low", "high"]
    pd.testing.assert_frame_equal(paired(frame)[columns], means(frame)[columns])


def test_intervals_equal_every_possible_resample() -> None:
    before, after = [0.0, 0.1, 0.4, 0.9, 0.3, 0.7], [0.5, 0.0, 0.4, 0.2, 0.35, 0.1]
    found = paired(frame_of(before, after, metric="logprob")).iloc[0]
    values = {"before_": before, "after_": after, "": [b - a for a, b in zip(before, after, strict=True)]}
    for prefix, each in values.items():
        every = np.array(list(product(each, repeat=6))).mean(1)
        assert (every <= found[f"{prefix}low"]).mean() == pytest.approx(0.025, abs=0.015)
        assert (every >= found[f"{prefix}high"]).mean() == pytest.approx(0.025, abs=0.015)
    unpaired = np.array(after)[:, None] - np.array(before)  # what the interval of a change must not be made of
    assert found["high"] - found["low"] != pytest.approx(2 * 1.96 * unpaired.std() / np.sqrt(6), rel=0.05)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    rng, held = np.random.default_rng(1), 0
    for trial in range(100):
        before = (rng.random(60) < 0.8).astype(float)
        after = np.where(rng.random(60) < 0.25, 0.0, before)  # a quarter is lost: the change is -0.2
        row = paired(frame_of(before.tolist(), after.tolist()), draws=200, seed=trial).iloc[0]
        held += row["low"] <= -0.2 <= row["high"]
    assert 87 <= held <= 99


def test_a_model_against_itself_is_zero_everywhere() -> None:
    row = paired(frame_of([1.0, 0.0, 1.0], [1.0, 0.0, 1.0])).iloc[0]
    assert row[["change", "low", "high", "lost", "gained"]].tolist() == [0] * 5
    assert row[["p", "q"]].tolist() == [1.0, 1.0]

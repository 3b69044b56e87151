"""`workbench select`, `stability` and `agreement` say what the package says."""

import json
from pathlib import Path

import pandas as pd
import pytest
from command import call
from test_selection import dataset, distinct
from test_selection_aware import collisions

from workbench.results import open_store, save_result
from workbench.selection import agreement, select, stability


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Path, Path, Path]:
    """An attribution of retained facts, one of new facts, and an interference result."""
    names = [f"f{i}" for i in range(8)]
    labels = {"ids": names, "relations": names, "n_layers": 3, "n_units": 20, "attrs": {"unit": "node"}}
    for seed, name in enumerate(("old", "new")):
        with open_store(tmp_path / name, **labels) as store:
            store.write(range(8), distinct(seed, 8, 3, 20), None, None)
    save_result(collisions([0.1, 0.5, 0.2], distinct(2, 1, 3, 20)[0]), tmp_path / "interference")
    return tmp_path / "old", tmp_path / "new", tmp_path / "interference"


def test_select_equals_the_function(stored, tmp_path, monkeypatch, capsys):
    old, new, clashes = stored
    out = tmp_path / "rows.json"
    beside = ("--interference", clashes, "--new", new, "--weights.load", 0, "--weights.new", 2)
    arguments = ("--strategy", "interference_aware", "--quota", 20, "--layers", 0, 2, *beside)
    assert call(monkeypatch, "select", old, "--out", out, *arguments) == 0
    expected = select(
        dataset(distinct(0, 8, 3, 20)),
        strategy="interference_aware",
        quota=20,
        layers=[0, 2],
        interference=collisions([0.1, 0.5, 0.2], distinct(2, 1, 3, 20)[0]),
        new=dataset(distinct(1, 8, 3, 20)),
        weights={"load": 0, "new": 2},
    )
    assert json.loads(out.read_text()) == expected.positions()
    assert expected.rows(1) == []
    assert f"{expected.n_selected} nodes in 3 layers" in capsys.readouterr().out
    assert call(monkeypatch, "select", old, "--out", out, "--strategy", "interference_aware") == 1
    assert "needs interference=" in capsys.readouterr().err
    assert call(monkeypatch, "select", old, "--out", out, "--interference", clashes) == 1
    assert "does not read interference" in capsys.readouterr().err


def test_a_position_file_of_neurons_says_how_to_read_it(tmp_path, monkeypatch, capsys):
    for unit, hinted in (("neuron", True), ("node", False)):
        with open_store(
            tmp_path / unit, ids=["a"], relations=["a"], n_layers=3, n_units=20, attrs={"unit": unit}
        ) as one:
            one.write(range(1), distinct(0, 1, 3, 20), None, None)
        assert call(monkeypatch, "select", tmp_path / unit, "--out", tmp_path / "rows.json") == 0
        assert ("give --unit neuron where" in capsys.readouterr().out) == hinted


def test_a_folder_is_no_position_file(stored, tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, "select", "scores.zarr", "--out", tmp_path) == 1
    assert "is a folder: name the position file" in " ".join(capsys.readouterr().err.split())


def test_stability_equals_the_function(stored, tmp_path, monkeypatch, capsys):
    out = tmp_path / "table.csv"
    for flags, options in ((("--share", 0.25), {"share": 0.25}), (("--bootstrap",), {"share": 1, "replace": True})):
        arguments = ("--draws", 3, "--quota", 20, "--out", out, "--quiet", *flags)
        assert call(monkeypatch, "stability", stored[0], *arguments) == 0
        expected = stability(dataset(distinct(0, 8, 3, 20)), draws=3, quota=20, progress=False, **options)
        pd.testing.assert_frame_equal(pd.read_csv(out).astype(expected.dtypes), expected)
        assert f"{expected.loc[0, 'kept']:.2%} of 12 units kept, by chance 20.00%" in capsys.readouterr().out
    assert call(monkeypatch, "stability", stored[0], "--share", 1, "--quiet") == 1
    assert call(monkeypatch, "stability", stored[0], "--out", tmp_path / "table.txt") == 1


def test_agreement_equals_the_function(stored, tmp_path, monkeypatch, capsys):
    out, published = tmp_path / "table.csv", tmp_path / "published.json"
    published.write_text(json.dumps([[3, 1], [], [19]]))
    arguments = ("--strategies", "layer_balanced", "random", "--positions", published, "--quota", 20, "--out", out)
    assert call(monkeypatch, "agreement", stored[0], *arguments) == 0
    data = dataset(distinct(0, 8, 3, 20))
    compared = {name: select(data, strategy=name, quota=20) for name in ("layer_balanced", "random")}
    compared["published"] = type(compared["random"]).from_positions([[3, 1], [], [19]], unit="node", n_units=20)
    expected = agreement(compared)
    assert expected["n_second"].tolist()[4] == 3
    for path in (published, compared["published"].save(tmp_path / "selection.json")):  # bare, or with its unit
        arguments = (*arguments[:4], path, *arguments[5:])
        assert call(monkeypatch, "agreement", stored[0], *arguments) == 0
        table = pd.read_csv(out).replace(str(path), "published")
        pd.testing.assert_frame_equal(table.astype(expected.dtypes), expected)
    assert "chance_jaccard" in capsys.readouterr().out
    assert call(monkeypatch, "agreement", stored[0], "--strategies", "random") == 1
    assert "agree in pairs" in capsys.readouterr().err

"""What is kept when facts are drawn again, and what selections share, against plain sets and against chance."""

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from test_selection import chosen, dataset, distinct

from workbench.results import open_store
from workbench.selection import Selection, agreement, select, stability


def made(values: np.ndarray) -> Selection:
    return Selection(xr.DataArray(values, dims=("layer", "unit")), "node")


def test_stability_equals_sets_of_drawn_facts():
    scores = distinct(0, 12, 3, 20)
    found = stability(dataset(scores), quota=25, draws=7, share=0.5, seed=3, progress=False)
    full = chosen(select(dataset(scores), quota=25))
    generator = np.random.default_rng(3)
    kept, by_layer = [], []
    for _ in range(7):
        again = chosen(select(dataset(scores[generator.choice(12, 6, replace=False)]), quota=25))
        kept.append(len(full & again) / len(full))
        by_layer.append([len({u for u in full & again if u[0] == layer}) / 5 for layer in range(3)])
    whole, *layers = found.to_dict("records")
    assert pd.isna(whole["layer"])
    assert [row["layer"] for row in layers] == [0, 1, 2]
    assert whole["kept"] == pytest.approx(np.mean(kept))
    assert [whole["low"], whole["high"]] == pytest.approx(np.quantile(kept, [0.025, 0.975]))
    assert [row["kept"] for row in layers] == pytest.approx(np.mean(by_layer, axis=0))
    assert found["n_selected"].tolist() == [15, 5, 5, 5]
    assert found["chance"].tolist() == pytest.approx([0.25] * 4)
    assert whole["chance"] < whole["kept"] < 1  # half of the facts tell something, not all


def test_stability_of_what_all_facts_agree_on_is_one_and_of_noise_is_chance():
    same = np.tile(distinct(0, 1, 2, 30), (10, 1, 1))
    assert stability(dataset(same), quota=20, draws=5, progress=False)["kept"].tolist() == [1.0] * 3
    noise = dataset(distinct(1, 400, 2, 300))
    loose = stability(noise, quota=20, draws=10, share=1 / 400, progress=False)  # one fact of four hundred
    assert loose.loc[0, "kept"] == pytest.approx(loose.loc[0, "chance"], abs=0.08)
    firm = stability(noise, quota=20, draws=10, share=0.9, progress=False)
    assert firm.loc[0, "low"] > 0.5


def test_chance_is_what_random_selections_keep_on_average():
    scores = distinct(2, 4, 3, 40)
    scores[:, 0] -= 1  # most of the lowest lie in one layer
    found = stability(dataset(scores), strategy="global_lowest", quota=20, draws=3, share=0.5, progress=False)
    full = select(dataset(scores), strategy="global_lowest", quota=20).mask.values
    facts, generator = np.random.default_rng(0), np.random.default_rng(1)
    kept = []
    for _ in range(3):
        again = select(dataset(scores[facts.choice(4, 2, replace=False)]), strategy="global_lowest", quota=20)
        blank = np.arange(40) < again.mask.values.sum(axis=1, keepdims=True)  # as many units in each layer
        kept += [(generator.permuted(blank, axis=1) & full).sum() / full.sum() for _ in range(300)]
    assert found.loc[0, "chance"] == pytest.approx(np.mean(kept), abs=0.015)
    assert found.loc[0, "chance"] > 0.25  # more than 20%: the layers are known


def test_the_bootstrap_draws_with_replacement_and_every_strategy_can_be_asked():
    data = dataset(distinct(3, 9, 2, 20))
    boot = stability(data, quota=30, draws=6, share=1, replace=True, progress=False)
    assert boot.loc[0, "chance"] < boot.loc[0, "kept"] < 1
    assert stability(data, strategy="random", quota=30, draws=2, progress=False)["kept"].tolist() == [1.0] * 3
    frozen = stability(data, quota=30, draws=2, layers=[1], progress=False)
    assert frozen["n_selected"].tolist() == [6, 0, 6]
    assert frozen.loc[1, ["kept", "low", "high", "chance"]].isna().all()
    assert frozen.loc[0, "chance"] == pytest.approx(0.3)


def test_a_stored_result_is_as_stable_as_one_in_memory(tmp_path):
    scores = distinct(0, 12, 2, 10).astype(np.float32)
    names = [f"f{i}" for i in range(12)]
    labels = {"ids": names, "relations": names, "n_layers": 2, "n_units": 10, "attrs": {"unit": "node"}}
    with open_store(tmp_path / "a.zarr", **labels) as store:
        store.write(range(12), scores, None, None)
        stored = store.dataset()
    for options in ({"share": 0.5}, {"share": 1, "replace": True}):
        one, other = (
            stability(data, quota=20, draws=3, progress=False, **options) for data in (stored, dataset(scores))
        )
        assert one.equals(other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0}, "share of facts that is drawn is 0"),
        ({"share": 1.5}, "share of facts that is drawn is 1.5"),
        ({"share": 1}, "4 of 4 facts without replacement gives all of them"),
        ({"draws": 0}, "0 draws"),
        ({"strategy": "best"}, "no selection strategy 'best'"),
    ],
)
def test_wrong_draws_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        stability(dataset(distinct(0, 4, 2, 10)), progress=False, **options)


def test_agreement_equals_sets():
    generator = np.random.default_rng(0)
    masks = {name: generator.random((3, 20)) < share for name, share in (("a", 0.3), ("b", 0.5), ("c", 0.4))}
    frame = agreement({name: made(values) for name, values in masks.items()})
    assert len(frame) == 3 * 4
    for row in frame.to_dict("records"):
        at = slice(None) if pd.isna(row["layer"]) else slice(row["layer"], row["layer"] + 1)
        one, other = ({*zip(*np.nonzero(masks[row[side]][at]), strict=True)} for side in ("first", "second"))
        assert (row["n_first"], row["n_second"], row["shared"]) == (len(one), len(other), len(one & other))
        assert row["overlap"] == pytest.approx(len(one & other) / min(len(one), len(other)))
        assert row["jaccard"] == pytest.approx(len(one & other) / len(one | other))


def test_agreement_by_chance_is_what_shuffled_selections_have():
    generator = np.random.default_rng(1)
    one = generator.random((2, 50)) < [[0.6], [0.1]]
    other = generator.random((2, 50)) < [[0.5], [0.1]]
    row = agreement({"one": made(one), "other": made(other)}).loc[0]
    shared = np.array([(generator.permuted(one, axis=1) & other).sum() for _ in range(2000)])
    assert row["chance_overlap"] == pytest.approx((shared / min(one.sum(), other.sum())).mean(), abs=0.01)
    assert row["chance_jaccard"] == pytest.approx((shared / (one.sum() + other.sum() - shared)).mean(), abs=0.01)
    blind = (one.sum() / 100) * (other.sum() / 100) * 100 / min(one.sum(), other.sum())  # if layers were not known
    assert row["chance_overlap"] > blind + 0.05


def test_agreement_with_itself_is_one_and_with_the_rest_nothing():
    one = made(np.eye(2, 6, dtype=bool))
    frame = agreement({"one": one, "again": one, "rest": ~one, "none": one - one})
    whole = frame[frame["layer"].isna()].set_index(["first", "second"])
    assert whole.loc[("one", "again"), ["overlap", "jaccard"]].tolist() == [1.0, 1.0]
    assert whole.loc[("one", "rest"), ["overlap", "jaccard"]].tolist() == [0.0, 0.0]
    assert whole.loc[("one", "none"), ["overlap", "chance_jaccard"]].isna().all()
    with pytest.raises(ValueError, match="agree in pairs; there are 1"):
        agreement({"one": one})
    with pytest.raises(ValueError, match="Cannot combine"):
        agreement({"one": one, "wider": made(np.eye(2, 7, dtype=bool))})

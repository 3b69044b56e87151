"""Blame: reverting is exact and leaves no trace, and drift planted in one layer is found there."""

import json

import numpy as np
import pandas as pd
import planted
import pytest
import torch
import xarray as xr
from test_cli import call
from tiny import FACTS, random_model, saved, tokenizer

import workbench as wb
from workbench import figures
from workbench.models import HookedModel, load_model
from workbench.results import save_result
from workbench.selection import Selection
from workbench.semantics import (
    attribute_drift,
    blame,
    changed_units,
    drift_shares,
    elsewhere,
    measure_drift,
    reverted,
    similarity,
)
from workbench.semantics.leaning import paired_and_matched, sizes
from workbench.semantics.reverting import changes

ROWS = {0: [3, 5], 2: [0, 1, 2, 7, 8, 9, 30, 31]}


def changed(kind: str = "llama", unit: str = "node", rows: dict[int, list[int]] | None = None) -> HookedModel:
    """The tiny model with other weights in some nodes or neurons of its down-projections."""
    model = load_model(random_model(kind), tokenizer=tokenizer())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer, index in (ROWS if rows is None else rows).items():
            module = model.down_proj(layer)
            matrix = module.weight.T if type(module).__name__ == "Conv1D" else module.weight
            part = matrix[index] if unit == "node" else matrix[:, index]
            noise = torch.randn(part.shape, generator=generator) * 0.3
            if unit == "node":
                matrix[index] += noise
                if module.bias is not None:
                    module.bias[index] += 0.5
            else:
                matrix[:, index] += noise
    return model


def base(kind: str = "llama") -> HookedModel:
    return load_model(random_model(kind), tokenizer=tokenizer())


def scores(model: HookedModel, unit: str = "node", seed: int = 0) -> xr.Dataset:
    values = np.random.default_rng(seed).normal(size=(len(FACTS), model.n_layers, model.width(unit)))
    coords = {"fact": list(FACTS.ids)}
    return xr.Dataset({"score": (("fact", "layer", "unit"), values.astype("float32"))}, coords, {"unit": unit})


@pytest.mark.parametrize("unit", ["node", "neuron"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_changed_units_are_found_and_reverting_them_brings_back_the_base_to_the_bit(kind: str, unit: str) -> None:
    first, second = base(kind), changed(kind, unit)
    units = changed_units(first, second)
    assert units.unit == unit
    assert {layer: units.rows(layer) for layer in (0, 2)} == ROWS
    assert units.rows(1) == []
    assert elsewhere(first, second, units) == []
    digests = first.digest, second.digest
    assert digests[0] != digests[1]
    with reverted(second, first, units):
        assert second.digest == digests[0]
    assert second.digest == digests[1]
    with pytest.raises(RuntimeError, match="inside"), reverted(second, first, units):
        raise RuntimeError("inside")
    assert second.digest == digests[1]
    with reverted(second, first, units & ~units):
        assert second.digest == digests[1]
    assert first.digest == digests[0]


@pytest.mark.parametrize(("kind", "unit"), [("llama", "node"), ("gpt2", "neuron"), ("opt", "node")])
def test_all_layers_bring_everything_back_and_outputs_equal_weights(kind: str, unit: str) -> None:
    first, second = base(kind), changed(kind, unit)
    before = second.digest
    # every unit leaned on: one draw of half, and its complement
    frame = attribute_drift(first, second, FACTS, scores(first, unit), share=0.5, draws=1, seed=2)
    assert second.digest == before
    whole = frame[(frame["units"] == "trained") & frame["layer"].isna()]
    assert (whole["share"] == 1).all() or whole["share"].to_numpy() == pytest.approx(1, abs=1e-12)
    assert whole[whole["metric"] == "logprob"]["back"].tolist() == whole[whole["metric"] == "logprob"]["drift"].tolist()
    soft, drifted = whole[whole["metric"] == "d_soft"], measure_drift(first, second, FACTS, metrics=["d_soft"])
    assert soft["fact"].tolist() == drifted["fact"].tolist()
    assert soft["drift"].tolist() == soft["back"].tolist() == pytest.approx(drifted["change"].tolist(), abs=1e-12)
    assert soft["drift"].abs().min() > 1e-4
    leaned = frame[(frame["units"] == "leaned") & (frame["layer"] == 2)]
    assert set(leaned["n_units"]) == {4}
    trained = changed_units(first, second)
    for i, fact in enumerate(FACTS.ids[:4]):  # by hand: the weights of this fact's own units reverted
        magnitude = np.abs(scores(first, unit)["score"].values[i, 2, ROWS[2]])
        mask = np.zeros_like(trained.mask.values)
        mask[2, np.array(ROWS[2])[np.argsort(-magnitude)[:4]]] = True
        own = Selection(trained.mask.copy(data=mask), unit)
        with reverted(second, first, own):
            one = wb.recall(second, FACTS.filter(ids=[fact]))["logprob"].item()
        row = leaned[(leaned["fact"] == fact) & (leaned["metric"] == "logprob")]
        now = wb.recall(second, FACTS.filter(ids=[fact]))["logprob"].item()
        assert row["back"].item() == pytest.approx(now - one, abs=2e-4)
    assert frame[frame["units"] == "leaned"]["back"].abs().max() > 1e-2
    assert set(frame["seed"]) == {2}


def test_drift_planted_in_one_layer_is_blamed_on_it() -> None:
    facts = planted.facts(["France", "Kenya", "Italy"])
    whole = planted.model()
    frame = attribute_drift(planted.model(without=[(1, 42)]), whole, facts)  # Kenya was learnt, in layer 1
    assert set(frame["layer"].dropna()) == {1}
    other = planted.model(without=[(1, 42), (0, 7)])
    shares = attribute_drift(other, whole, facts).set_index(["fact", "layer", "metric"])["share"]
    for fact, layer in (("Kenya", 1), ("France", 0)):
        for metric in ("logprob", "d_soft", "state"):
            assert shares[fact, layer, metric] == pytest.approx(1, abs=1e-5)
            assert shares[fact, 1 - layer, metric] == pytest.approx(0, abs=1e-5)
    assert attribute_drift(other, whole, facts).attrs["unit"] == "neuron"


def test_the_units_a_fact_leans_on_explain_more_than_matched_ones_where_they_did_it() -> None:
    first, second = base(), changed(rows={1: list(range(16))})
    told = scores(first)
    for unit in range(16):  # a fact leans on the units whose own reversal brings most of its drift back
        own = xr.zeros_like(changed_units(first, second).mask)
        own[1, unit] = True
        alone = attribute_drift(first, second, FACTS, selection=Selection(own, "node"))
        back = alone[(alone["layer"] == 1) & (alone["metric"] == "state")].set_index("fact")["share"]
        told["score"].values[:, 1, unit] = back.loc[list(FACTS.ids)].clip(lower=0)
    shares = drift_shares(attribute_drift(first, second, FACTS, told, draws=3)).set_index(["layer", "units", "metric"])
    assert shares.loc[(1, "paired", "state"), "share"] > shares.loc[(1, "matched", "state"), "share"]
    assert shares.loc[(1, "difference", "state"), "low"] > 0
    assert shares.loc[(1, "trained", "state"), "share"] == pytest.approx(1)
    assert shares.loc[(1, "leaned", "state"), "n_units"] == 4 > shares.loc[(1, "paired", "state"), "n_units"]


def test_units_that_changed_most_have_no_partners_and_are_compared_with_nothing() -> None:
    first, second = base(), changed(rows={1: list(range(16))})
    size = sizes(second, FACTS.tokenise(tokenizer()), changes(first, second, changed_units(first, second)))[1]
    told = scores(first)
    told["score"].values[:, 1, :16] = size.numpy()
    frame = attribute_drift(first, second, FACTS, told, draws=3)
    assert frame[frame["units"].isin(["paired", "matched"])]["share"].isna().all()
    shares = drift_shares(frame).set_index(["layer", "units", "metric"])
    assert shares.loc[(1, "difference", "state"), "n"] == 0
    assert shares.loc[(1, "difference", "state"), ["share", "low", "high"]].isna().all()
    assert shares.loc[(1, "leaned", "state"), "share"] > 0.2
    one = frame["fact"] == FACTS.ids[0]  # a single fact that has partners says nothing of how sure that is
    frame.loc[one & frame["units"].isin(["paired", "matched"]), ["share", "n_units", "size"]] = [0.25, 2, 1.0]
    lone = drift_shares(frame).set_index(["layer", "units", "metric"]).loc[(1, "paired", "state")]
    assert lone[["n", "n_units", "size", "share"]].tolist() == [1, 2, 1.0, 0.25]
    assert lone[["low", "high"]].isna().all()


def test_partners_are_others_of_like_size_in_equal_number() -> None:
    size = np.concatenate([np.linspace(0, 1, 20), np.linspace(100, 101, 20)]).astype("float32")
    chosen = np.array([26, 28, 30, 32, 33, 34, 35, 6])
    seen = set()
    for seed in range(20):
        paired, *draws = paired_and_matched(size, chosen, 2, np.random.default_rng(seed))
        assert set(paired) < set(chosen)
        assert len(paired) == 4  # the bin of 32 to 35 has no others
        for drawn in draws:
            assert not set(drawn) & set(chosen.tolist())
            assert sorted(unit // 4 for unit in drawn) == sorted(unit // 4 for unit in paired)  # bin by bin
            assert len(set(drawn)) == len(paired)
            seen |= set(drawn)
        again = paired_and_matched(size, chosen, 2, np.random.default_rng(seed))
        assert [one.tolist() for one in again] == [one.tolist() for one in (paired, *draws)]
    assert len(seen) > 6


def nearest(size: np.ndarray, chosen: np.ndarray) -> list[int]:
    """The control: for every chosen unit in turn the free one of the nearest size."""
    free, drawn = sorted(set(range(len(size))) - set(chosen.tolist())), []
    for unit in chosen:
        drawn.append(min(free, key=lambda other: abs(size[other] - size[unit])))
        free.remove(drawn[-1])
    return drawn


def test_units_chosen_by_chance_are_as_large_as_their_partners_in_every_way() -> None:
    """Of 4,000 choices without reason; the largest and the sum would differ by four standard errors once in 16,000."""
    generator = np.random.default_rng(0)
    gaps: dict[str, list[list[float]]] = {"paired": [], "nearest": []}
    for _ in range(4000):
        size = generator.lognormal(size=14)
        chosen = generator.permutation(14)[:4]
        paired, drawn = paired_and_matched(size, chosen, 1, generator)
        for name, one, other in (("paired", paired, drawn), ("nearest", chosen, nearest(size, chosen))):
            if len(one):
                gaps[name].append([size[one].sum() - size[other].sum(), size[one].max() - size[other].max()])
    far = {name: np.mean(rows, 0) / (np.std(rows, 0) / len(rows) ** 0.5) for name, rows in gaps.items()}
    assert (np.abs(far["paired"]) < 4).all()
    assert (far["nearest"] > 8).all()


def test_random_scores_leave_no_difference() -> None:
    """Over 30 random scores and three metrics, 90 intervals of 95%: more than 10 on one side have a chance below 0.001.

    They are wide of what is expected, 2.25, because the metrics of one score go together.
    """
    first, second = base(), changed(rows={1: list(range(14))})
    above = below = 0
    for seed in range(30):
        frame = attribute_drift(first, second, FACTS, scores(first, seed=seed), draws=3, seed=seed)
        shares = drift_shares(frame, draws=400)
        rows = shares[(shares["units"] == "difference") & (shares["layer"] == 1)]
        above, below = above + (rows["low"] > 0).sum(), below + (rows["high"] < 0).sum()
    assert above <= 10
    assert below <= 10


def test_a_fact_whose_probability_did_not_drift_has_no_share_of_it(monkeypatch) -> None:
    read = blame.place_facts
    places: list[blame.Place] = []

    def still(*given) -> blame.Place:
        place = read(*given)
        if len(places) < 2:  # before and after
            place.logprob[0] = -1.0
        places.append(place)
        return place

    monkeypatch.setattr(blame, "place_facts", still)
    frame = attribute_drift(base(), changed(), FACTS).query("metric == 'logprob'")
    first = frame["fact"] == FACTS.ids[0]
    assert frame[first]["drift"].eq(0).all()
    assert frame[first]["back"].ne(0).any()
    assert frame[first]["share"].isna().all()
    assert np.isfinite(frame[~first]["share"]).all()


def test_weights_elsewhere_are_counted_and_what_does_not_fit_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    first, second = base(), changed()
    with torch.no_grad():
        second.hf.model.layers[1].self_attn.q_proj.weight.mul_(2)
    frame = attribute_drift(first, second, FACTS)
    assert frame.attrs["elsewhere"] == 1
    assert "model.layers.1.self_attn.q_proj.weight" in caplog.text
    assert (frame[frame["units"].eq("trained") & frame["layer"].isna()]["share"] != 1).all()
    with pytest.raises(ValueError, match="no trained units"):
        attribute_drift(first, base(), FACTS)
    with pytest.raises(ValueError, match="no trained units"):
        attribute_drift(first, base(), FACTS, selection=changed_units(first, second))
    with pytest.raises(ValueError, match="selection has no units"):
        attribute_drift(first, second, FACTS, selection=Selection.from_positions([[], [], []], unit="node", n_units=32))
    with pytest.raises(ValueError, match="attribution is of neurons and the selection of nodes"):
        attribute_drift(first, second, FACTS, scores(first, "neuron"), changed_units(first, second))
    with pytest.raises(ValueError, match="no scores of 8"):
        attribute_drift(first, second, FACTS, scores(first).assign_coords(fact=[f"x{i}" for i in range(8)]))
    with pytest.raises(ValueError, match="give a selection of this model"):
        attribute_drift(first, second, FACTS, selection=Selection.from_positions([[0]], unit="node", n_units=32))
    with pytest.raises(ValueError, match=r"share is 0\.7"):
        attribute_drift(first, second, FACTS, share=0.7)
    half = load_model(random_model("llama").bfloat16(), tokenizer=tokenizer())
    with pytest.raises(ValueError, match='open both with dtype="float32"'):
        attribute_drift(first, half, FACTS)


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (("llama", {"intermediate_size": 48}), r"gate_proj.weight is \(40, 32\) and \(48, 32\)"),
        (("llama", {"num_key_value_heads": 4}), r"k_proj.weight is \(16, 32\) and \(32, 32\)"),
        (("qwen2", {}), r"q_proj.bias is missing and \(32,\)"),
    ],
)
def test_models_of_other_weights_are_refused_either_way(other, sentence: str) -> None:
    first, second = base(), load_model(random_model(other[0], **other[1]), tokenizer=tokenizer())
    units = Selection.from_positions([[0], [], []], unit="node", n_units=32)
    with pytest.raises(ValueError, match=sentence):
        attribute_drift(first, second, FACTS, selection=units)
    for call_of in (changed_units, lambda a, b: elsewhere(a, b, units)):
        with pytest.raises(ValueError, match="not of one architecture"):
            call_of(second, first)


def test_an_untied_copy_of_a_tied_model_can_be_blamed() -> None:
    first = load_model(random_model("llama", tie_word_embeddings=True), tokenizer=tokenizer())
    second = load_model(random_model("llama"), tokenizer=tokenizer())
    second.hf.load_state_dict(first.hf.state_dict())
    with torch.no_grad():
        second.W_U.mul_(2)
    units = Selection.from_positions([[0], [], []], unit="node", n_units=32)
    assert elsewhere(first, second, units) == elsewhere(second, first, units) == ["lm_head.weight"]


def test_the_commands_give_what_the_functions_give(tmp_path, monkeypatch, capsys) -> None:
    facts = str(FACTS.save(tmp_path / "facts.jsonl"))
    folders = [str(saved(tmp_path / "a")), str(tmp_path / "b")]
    second = changed()
    second.hf.save_pretrained(folders[1])
    second.tokenizer.save_pretrained(folders[1])
    out = tmp_path / "blame.parquet"
    assert call(monkeypatch, "blame", *folders, "--facts", facts, "--out", str(out), "-q") == 0
    expected = wb.attribute_drift(*folders, FACTS)
    pd.testing.assert_frame_equal(pd.read_parquet(out), expected, check_dtype=False)
    assert "trained" in capsys.readouterr().out
    out = tmp_path / "distance.parquet"
    assert (
        call(monkeypatch, "distance", folders[1], "--base", folders[0], "--facts", facts, "--out", str(out), "-q") == 0
    )
    pd.testing.assert_frame_equal(pd.read_parquet(out), wb.semantic_distance(folders[1], FACTS, base=folders[0]))
    assert "d_soft" in capsys.readouterr().out
    nothing = ("--facts", facts, "--anchor", "centroid", "--metrics", "d_layer", "-q")
    assert call(monkeypatch, "distance", folders[0], *nothing) == 0
    assert "No fact has a distance: choose another --anchor" in (printed := capsys.readouterr().out)
    assert "Empty" not in printed
    out = tmp_path / "drift.csv"
    assert call(monkeypatch, "drift", *folders, "--facts", facts, "--metrics", "d_emb", "off", "--out", str(out)) == 0
    assert set(pd.read_csv(out)["metric"]) == {"d_emb", "off"}
    assert "Pushed away" in (printed := capsys.readouterr().out)
    assert "rsa" in printed
    assert call(monkeypatch, "blame", folders[0], folders[0], "--facts", facts) == 1
    assert "no trained units to revert" in capsys.readouterr().err


def test_figures_of_drift_draw_what_the_frames_say() -> None:
    first, second = base(), changed()
    alike = similarity(first, {"loki": second, "lora": first}, FACTS, draws=10)
    fig = figures.similarity_by_layer(alike)
    lines = [trace for trace in fig.data if trace.mode == "lines+markers"]
    assert [axis.title.text for axis in fig.select_yaxes()] == ["linear CKA", "RSA"]
    assert list(lines[0].y) == alike[(alike["method"] == "loki") & (alike["metric"] == "cka")]["value"].tolist()
    assert json.dumps(figures.figure_json(fig))
    shares = drift_shares(attribute_drift(first, second, FACTS, scores(first), draws=2), draws=50)
    lines = [trace for trace in figures.blame_by_layer(shares).data if trace.mode == "lines+markers"]
    drawn = shares[(shares["units"] == "trained") & (shares["metric"] == "logprob")].dropna(subset="layer")
    assert list(lines[0].y) == pytest.approx((drawn["share"] * 100).tolist())
    with pytest.raises(ValueError, match="no rows of single layers"):
        figures.blame_by_layer(shares[shares["layer"].isna()])
    drift = pd.DataFrame({"method": "loki", "metric": "d_layer", "layer": [1, 0], "change": [0.2, 0.1]})
    (_, line) = figures.drift_by_layer(drift.assign(low=0.0, high=0.3)).data
    assert (list(line.x), list(line.y)) == ([0, 1], [0.1, 0.2])
    with pytest.raises(ValueError, match="no metric 'off'"):
        figures.drift_by_layer(drift.assign(low=0.0, high=0.3), "off")


def test_scores_of_attribute_fit(tmp_path) -> None:
    first, second = base(), changed()
    ds = wb.attribute(first, FACTS, method="grad_x_act", progress=False)
    save_result(ds, tmp_path / "a.zarr")
    frame = attribute_drift(first, second, FACTS, ds, draws=1)
    assert set(frame["units"]) == {"trained", "leaned", "paired", "matched"}

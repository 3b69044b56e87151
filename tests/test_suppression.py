"""Suppression: against zeroed weights in plain transformers, exact known answers, and the test of a score by it."""

from functools import cache

import numpy as np
import pandas as pd
import planted
import pytest
import torch
import xarray as xr
from command import call
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FACTS, default, random_model, saved, tiny, tokenizer

import workbench as wb
from workbench.intervals import means
from workbench.models import load_model
from workbench.selection import Selection, select
from workbench.suppression import compare, enhance, scaled, suppress, suppression_curve

TEXT = [
    "one two three four five six seven eight red blue green sky",
    "the capital of France is Paris in a big city one",
]
#: Linear and Conv1D, biases, flattened positions, post-norms, parallel blocks.
KINDS = ["gpt2", "llama", "opt", "gemma2", "gpt_neox"]


def chosen(model, unit: str, seed: int = 0, share: float = 0.3) -> Selection:
    """Random units of every layer but the first."""
    mask = np.random.default_rng(seed).random((model.n_layers, model.width(unit))) < share
    mask[0] = False
    return Selection(xr.DataArray(mask, dims=("layer", "unit")), unit)


def with_biases(kind: str):
    """A random model whose down-projections have biases that matter, where they have one at all."""
    plain = random_model(kind)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in plain.named_parameters():
        if name.endswith("bias"):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return plain


def zero_weights(hf, names, selection: Selection) -> None:
    """The second way: rows (and biases) or columns of the weights themselves, found without the package's own code."""
    for layer, name in enumerate(names):
        module = hf.get_submodule(name)
        rows = selection.rows(layer)
        inputs_first = type(module).__name__ == "Conv1D"
        with torch.no_grad():
            if selection.unit == "node":
                module.weight[(slice(None), rows) if inputs_first else rows] = 0
                if module.bias is not None:
                    module.bias[rows] = 0
            else:
                module.weight[rows if inputs_first else (slice(None), rows)] = 0


def answers(hf, model) -> dict[str, float]:
    """Log-probability of every answer, fact by fact, by plain transformers without padding."""
    found = {}
    for fact in model.tokenise(FACTS):
        with torch.no_grad():
            logits = hf(torch.tensor([fact.ids])).logits[0].log_softmax(-1)
        start = len(fact.prompt_ids) - 1
        found[fact.fact_id] = sum(float(logits[start + k, token]) for k, token in enumerate(fact.answer_ids))
    return found


@pytest.mark.parametrize("unit", ["node", "neuron"])
@pytest.mark.parametrize("kind", KINDS)
def test_silencing_units_equals_zeroing_their_weights(kind: str, unit: str) -> None:
    model = load_model(with_biases(kind), tokenizer=tokenizer())
    selection = chosen(model, unit)
    frame = suppress(model, selection, FACTS, general=TEXT)
    read = frame[frame["metric"] == "logprob"].set_index("fact")
    zeroed = with_biases(kind)
    zero_weights(zeroed, model.down_names, selection)
    assert read["after"].to_dict() == pytest.approx(answers(zeroed, model), abs=2e-5)
    assert read["before"].to_dict() == pytest.approx(answers(with_biases(kind), model), abs=2e-5)
    other = with_biases(kind)  # the negative control: as many other units
    zero_weights(other, model.down_names, chosen(model, unit, seed=1))
    assert read["after"].to_dict() != pytest.approx(answers(other, model), abs=1e-2)
    known = frame[frame["metric"] == "accuracy"].set_index("fact")["after"]
    again = wb.recall(load_model(zeroed, tokenizer=tokenizer()), FACTS)["known"]
    assert known.to_dict() == again.astype(float).to_dict()
    text = frame[frame["suite"] == "general"].set_index(["metric", "fact"])
    for number, passage in enumerate(TEXT):
        ids = torch.tensor([tokenizer()(passage).input_ids])
        with torch.no_grad():
            old, new = (hf(ids, labels=ids) for hf in (with_biases(kind), zeroed))
        label = f"text-{number:04d}"
        assert text.loc[("nll", label), "before"] == pytest.approx(float(old.loss), rel=1e-4)
        assert text.loc[("nll", label), "after"] == pytest.approx(float(new.loss), rel=1e-4)
        p, q = (out.logits[0, :-1].log_softmax(-1) for out in (old, new))
        expected = float((p.exp() * (p - q)).sum(-1).mean())
        assert text.loc[("kl", label), "after"] == pytest.approx(expected, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt"])
def test_the_last_prompt_token_alone_equals_a_plain_hook_on_the_unpadded_text(kind: str) -> None:
    plain, model = random_model(kind), load_model(random_model(kind), tokenizer=tokenizer())
    selection = chosen(model, "node")
    place = 0

    def hook(rows):
        def zero(module, args, output):
            flat = output.view(1, -1, output.shape[-1]).clone()
            flat[:, place, rows] = 0
            return flat.view(output.shape)

        return zero

    for layer, name in enumerate(model.down_names):
        plain.get_submodule(name).register_forward_hook(hook(selection.rows(layer)))
    expected = {}
    for fact in model.tokenise(FACTS):  # answers of one, two and three tokens
        place = len(fact.prompt_ids) - 1
        with torch.no_grad():
            logits = plain(torch.tensor([fact.ids])).logits[0].log_softmax(-1)
        expected[fact.fact_id] = sum(float(logits[place + k, token]) for k, token in enumerate(fact.answer_ids))
    for scope, equal in (("last", True), ("all", False)):
        frame = suppress(model, selection, FACTS, scope=scope)
        read = frame[frame["metric"] == "logprob"].set_index("fact")["after"].to_dict()
        assert (read == pytest.approx(expected, abs=2e-5)) is equal


def test_a_factor_of_one_and_an_empty_selection_change_nothing() -> None:
    model = tiny("llama")
    selection = chosen(model, "neuron")
    assert suppress(model, selection, FACTS, factor=1.0, general=TEXT)["change"].eq(0).all()
    assert suppress(model, selection - selection, FACTS, general=TEXT)["change"].eq(0).all()
    assert suppress(model, selection, FACTS, general=TEXT)["change"].ne(0).any()


def test_enhancing_doubles_and_twice_half_is_nothing() -> None:
    model = tiny("gpt2")
    selection = chosen(model, "neuron")
    doubled = enhance(model, selection, FACTS)
    pd.testing.assert_frame_equal(doubled, suppress(model, selection, FACTS, factor=2.0))
    half, twice = scaled(model, selection, 0.5)(1), scaled(model, selection, 2.0)(1)
    ids = torch.tensor([[4, 5, 6, 7]])
    clean = model.logits(ids)
    with half, twice:
        torch.testing.assert_close(model.logits(ids), clean, rtol=0, atol=0)
    with scaled(model, selection, 2.0)(1):
        assert not torch.equal(model.logits(ids), clean)


def test_weights_and_hooks_are_as_before_also_after_an_error() -> None:
    model = load_model(random_model("gpt2"), tokenizer=tokenizer())
    kept = {name: tensor.clone() for name, tensor in model.hf.state_dict().items()}
    ids = torch.tensor([[4, 5, 6, 7]])
    clean = model.logits(ids)
    with pytest.raises(RuntimeError, match="on purpose"):
        with scaled(model, chosen(model, "node"), 0.0)(1):
            assert not torch.equal(model.logits(ids), clean)
            raise RuntimeError("on purpose")
    suppress(model, chosen(model, "node"), FACTS)
    assert torch.equal(model.logits(ids), clean)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.hf.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.hf.modules())


def test_silencing_a_planted_neuron_kills_its_facts_and_no_other() -> None:
    model, facts = planted.model(), planted.facts()
    for (layer, neuron), stored in planted.PLANTED.items():
        positions = [[neuron] if layer == at else [] for at in range(2)]
        selection = Selection.from_positions(positions, unit="neuron", n_units=planted.D_MLP)
        frame = suppress(model, selection, facts)
        read = frame[frame["metric"] == "logprob"].set_index("fact")["change"]
        hit = {subject for subject, _ in stored}
        assert (read[list(hit)] < -5).all()
        assert (read.drop(list(hit)) == 0).all()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"factor": float("nan")}, "not a finite number"),
        ({"scope": "first"}, "scope must be"),
        ({"scope": "last", "general": TEXT}, "running text does not have"),
        ({"general": "one text"}, "give a list of passages"),
        ({"general": ["too short"]}, "at least 8 tokens"),
    ],
)
def test_wrong_options_are_named(options, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        suppress(tiny("llama"), chosen(tiny("llama"), "node"), FACTS, **options)
    with pytest.raises(ValueError, match="select from an attribution of this model"):
        suppress(tiny("llama"), chosen(tiny("gpt2"), "neuron"), FACTS)


# Means and intervals


def test_means_weigh_texts_and_intervals_follow_the_normal_law() -> None:
    generator = np.random.default_rng(0)
    change = generator.normal(0.3, 1.0, 400)
    before = generator.normal(0, 50, 400)
    rows = pd.DataFrame({"suite": "facts", "metric": "logprob", "fact": range(400), "weight": 1.0, "before": before})
    rows = rows.assign(after=rows["before"] + change)
    (found,) = means(rows, seed=3).to_dict("records")
    half = 1.96 * change.std(ddof=1) / 20
    assert found["change"] == pytest.approx(change.mean())
    assert (found["low"], found["high"]) == pytest.approx((change.mean() - half, change.mean() + half), abs=0.012)
    assert found["n"] == 400
    pd.testing.assert_frame_equal(means(rows, seed=3), means(rows, seed=3))
    assert means(rows, seed=4)["low"][0] != found["low"]
    # unpaired, the spread of `before` (50) would drown the change
    assert found["high"] - found["low"] < 1 < 1.96 * before.std() / 20
    text = pd.DataFrame({"suite": "general", "metric": "nll", "fact": ["a", "b"], "weight": [1.0, 3.0]})
    numbers = means(text.assign(before=[1.0, 2.0], after=[2.0, 2.0])).set_index("metric")
    assert numbers.loc["nll", ["before", "after"]].tolist() == [1.75, 2.0]
    assert numbers.loc["perplexity", "change"] == pytest.approx(np.exp(2.0) - np.exp(1.75))
    generator = np.random.default_rng(5)
    nll, drawn = text.assign(before=[1.0, 2.0], after=[2.0, 2.5]), []
    for counts in generator.multinomial(2, [0.5, 0.5], size=50):
        picked = nll.iloc[[0] * counts[0] + [1] * counts[1]]
        drawn.append(np.average(picked["after"] - picked["before"], weights=picked["weight"]))
    row = means(nll, draws=50, seed=5).iloc[0]
    assert (row["low"], row["high"]) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])))
    with pytest.raises(ValueError, match="at least one draw"):
        means(rows, draws=0)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 30), seed=st.integers(0, 99))
def test_an_interval_holds_its_mean_of_equal_changes_exactly(n: int, seed: int) -> None:
    rows = pd.DataFrame({"suite": "s", "metric": "logprob", "fact": range(n), "weight": 1.0})
    rows = rows.assign(before=np.random.default_rng(seed).normal(size=n)).assign(after=lambda f: f["before"] - 2.0)
    numbers = means(rows, draws=20, seed=seed)
    assert numbers[["change", "low", "high"]].to_numpy() == pytest.approx(-2.0)


# The test of a score


@cache
def planted_scores() -> tuple[object, xr.Dataset]:
    model = planted.model()
    return model, wb.attribute(model, planted.facts(["France", "Kenya"]), unit="neuron", progress=False)


def test_the_curve_equals_selecting_and_suppressing_one_by_one() -> None:
    model = tiny("llama")
    scores = wb.attribute(model, FACTS[:4], method="grad_x_act", progress=False)
    held_out, text = FACTS[5:], TEXT[:1]
    frame = suppression_curve(model, scores, held_out, quotas=[20], seeds=(5, 6), general=text, factor=0.5)
    assert len(frame) == 2 * 2 * (1 + 1 + 3 + 2) * 5  # strategies, scores, groups with seeds and comparisons, metrics
    names = {"lowest": "layer_balanced", "highest": "layer_highest", "random": "random"}
    whole = {"lowest": "global_lowest", "highest": "global_highest", "random": "global_random"}
    pools = {}
    columns = ["strategy", "score", "group", "quota"]
    for (strategy, score, group, quota), rows in frame.groupby(columns):
        if "vs" in group:
            continue
        name = (names if strategy == "layer_balanced" else whole)[group]
        per_seed = []
        for seed in (5, 6) if group == "random" else (0,):
            selection = select(scores, strategy=name, quota=quota, score=score, seed=seed)
            per_seed.append(suppress(model, selection, held_out, factor=0.5, general=text))
            some = rows[rows["seed"].eq(seed) if group == "random" else rows["seed"].isna()].set_index("metric")
            expected = means(per_seed[-1]).set_index("metric")
            for column in ("before", "after", "change", "low", "high", "n"):
                assert some[column].to_dict() == pytest.approx(expected[column].to_dict(), rel=1e-6), (name, column)
            assert set(some["n_units"]) == {selection.n_selected}
        pooled = rows[rows["seed"].isna()].set_index("metric")["change"]
        for metric in ("accuracy", "logprob", "kl"):
            each = [means(one).set_index("metric").loc[metric, "change"] for one in per_seed]
            assert pooled[metric] == pytest.approx(np.mean(each), rel=1e-6, abs=1e-9)
        logprobs = [one[one["metric"] == "logprob"]["after"].to_numpy() for one in per_seed]
        pools[strategy, score, group] = np.mean(logprobs, axis=0)
    for (strategy, score, group), values in pools.items():
        if group != "random":
            place = frame[["strategy", "score", "group", "metric"]].eq(
                [strategy, score, f"{group} vs random", "logprob"]
            )
            (row,) = frame[place.all(axis=1)].to_dict("records")
            paired = values - pools[strategy, score, "random"]
            drawn = np.random.default_rng(0).multinomial(3, np.ones(3) / 3, size=2000) @ paired / 3
            assert row["change"] == pytest.approx(paired.mean(), rel=1e-5)
            assert (row["low"], row["high"]) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])), rel=1e-5)


def test_the_planted_neurons_are_the_highest_and_silencing_them_kills_what_was_attributed_only() -> None:
    model, scores = planted_scores()
    options = {"quotas": [0.1], "scores": ["magnitude"], "strategies": ["layer_balanced"]}
    options["groups"] = ["highest", "lowest"]
    seen = suppression_curve(model, scores, planted.facts(["France", "Kenya"]), overlap="read", **options)
    other = suppression_curve(model, scores, planted.facts(["Japan", "Italy"]), **options)
    for frame, drop in ((seen, -1.0), (other, 0.0)):
        change = frame[frame["metric"] == "accuracy"].set_index("group")["change"]
        assert change.to_dict() == {"highest": drop, "lowest": 0.0}
        assert set(frame["n_units"]) == {2}


def test_facts_that_the_attribution_has_seen_are_not_read_unless_told() -> None:
    model, scores = planted_scores()
    options = {"quotas": [1], "groups": ["lowest"], "scores": ["signed"], "strategies": ["global"]}
    with pytest.raises(ValueError, match="2 of the 5 facts to be read were used for the attribution, 'France' first"):
        suppression_curve(model, scores, planted.facts(), **options)
    for overlap, n in (("drop", 3), ("read", 5)):
        assert set(suppression_curve(model, scores, planted.facts(), overlap=overlap, **options)["n"]) == {n}
    prompts = scores.assign_coords(fact=["France#0", "Kenya#2"])
    with pytest.raises(ValueError, match="2 of the 5 facts"):
        suppression_curve(model, prompts, planted.facts(), **options)
    with pytest.raises(ValueError, match="All 2 facts"):
        suppression_curve(model, scores, planted.facts(["France", "Kenya"]), overlap="drop", **options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"groups": ["middle"]}, "groups knows lowest, highest, random, not 'middle'"),
        ({"strategies": ["best"]}, "strategies knows layer_balanced, global"),
        ({"scores": ["squared"]}, "no score 'squared'"),
        ({"quotas": []}, "quotas must name at least one"),
        ({"quotas": [1, 1]}, "each once"),
        ({"quotas": [0.01]}, "less than one unit"),
        ({"seeds": []}, "need seeds"),
        ({"draws": 0}, "at least one draw"),
        ({"overlap": "ignore"}, "overlap must be"),
        ({"general": "one text"}, "list of passages"),
    ],
)
def test_wrong_choices_are_named_before_anything_is_read(options, sentence, monkeypatch) -> None:
    model, scores = planted_scores()
    monkeypatch.setattr("workbench.suppression.curve.compare", lambda *_, **__: pytest.fail("read too early"))
    with pytest.raises(ValueError, match=sentence):
        suppression_curve(model, scores, planted.facts(["Japan"]), **options)
    with pytest.raises(ValueError, match="another model than planted"):
        suppression_curve(planted.model([(0, 7)]), scores, planted.facts(["Japan"]))


def test_reading_several_interventions_at_once_equals_reading_them_alone() -> None:
    model = tiny("gpt2")
    changes = [scaled(model, chosen(model, "node", seed), 0.0) for seed in (0, 1)]
    suites = {"facts": model.tokenise(FACTS)}
    both = compare(model, changes, suites, general=TEXT)
    for change, frame in zip(changes, both, strict=True):
        pd.testing.assert_frame_equal(frame, compare(model, [change], suites, general=TEXT)[0])
    assert not both[0]["after"].equals(both[1]["after"])


# The command


def test_the_command_equals_the_package(tmp_path, monkeypatch, capsys) -> None:
    folder, facts = saved(tmp_path / "model"), FACTS.save(tmp_path / "facts.jsonl")
    model = wb.load_model(folder)
    selection = chosen(model, "neuron")
    whole = selection.save(tmp_path / "selection.json")
    bare = selection.to_positions(tmp_path / "rows.json")
    out, again = tmp_path / "a.csv", tmp_path / "b.csv"
    common = ("--model", folder, "--facts", facts, "-q", "--max-tokens", 0, "--scope", "last")
    assert call(monkeypatch, "suppress", whole, *common, "--out", out) == 0
    assert call(monkeypatch, "suppress", bare, "--unit", "neuron", *common, "--out", again) == 0
    assert f"{selection.n_selected} neurons in 3 layers times 0" in capsys.readouterr().out
    expected = suppress(model, selection, FACTS, scope="last")
    for path in (out, again):
        pd.testing.assert_frame_equal(pd.read_csv(path), expected, rtol=1e-5)
    scores, table = tmp_path / "scores.zarr", tmp_path / "curve.parquet"
    attribution = wb.attribute(model, FACTS[:4], method="grad_x_act", out=scores, progress=False)
    curve = ("--model", folder, "--facts", facts, "-q", "--max-tokens", 0, "--overlap", "drop", "--quota", 30)
    assert call(monkeypatch, "suppress", scores, *curve, "--draws", 1, "--out", table) == 0
    expected = suppression_curve(model, attribution, FACTS[4:], quotas=[30], seeds=[0])
    pd.testing.assert_frame_equal(pd.read_parquet(table), expected, rtol=1e-5)
    printed = capsys.readouterr().out
    assert "lowest vs random" in printed


def test_the_command_names_what_is_wrong(tmp_path, monkeypatch, capsys) -> None:
    bare, odd = tmp_path / "rows.json", tmp_path / "odd.json"
    bare.write_text("[[1], [2]]")
    odd.write_text("3")
    for arguments, sentence in (
        ([bare], "add --unit node or --unit neuron"),
        ([odd], "neither a selection nor positions"),
        ([tmp_path / "absent.json"], "no file"),
        ([tmp_path], "not a folder with a result"),
        ([bare, "--unit", "node", "--out", "x.txt"], "--out must end in"),
    ):
        assert call(monkeypatch, "suppress", *arguments) == 1
        printed = capsys.readouterr().err
        assert sentence in printed
        assert len(printed.strip().splitlines()) == 1


@pytest.mark.real
def test_the_lowest_harm_less_than_random_units_and_these_less_than_the_highest_on_the_default_model() -> None:
    model = default()
    capitals = wb.load_facts("world").filter(relations=["capital"])
    known = capitals.filter(ids=wb.recall(model, capitals.sample(10, seed=0)).query("known").index)
    scores = wb.attribute(model, known[:2], method="grad_x_act", progress=False)
    frame = suppression_curve(model, scores, known[2:], quotas=[1], strategies=["global"])
    over_seeds = frame[(frame["metric"] == "logprob") & frame["seed"].isna()]
    change = over_seeds.set_index(["score", "group"])["change"]  # nats: 0.11, -2.04, -35.4; -7.26 of the signed lowest
    assert change["magnitude", "random"] < change["magnitude", "lowest"] - 1
    assert change["magnitude", "highest"] < change["magnitude", "random"] - 10
    assert change["signed", "lowest"] < change["magnitude", "lowest"] - 3

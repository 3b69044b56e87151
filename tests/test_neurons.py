"""Knowledge neurons: the planted ones exactly, thresholds against literal loops, weights put back to the bit."""

import sys
from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd
import planted
import pytest
import torch
from command import call
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FACTS, random_model, saved, tiny, tokenizer

import workbench as wb
from workbench.facts import FactSet
from workbench.intervals import means
from workbench.models import load_model
from workbench.neurons import (
    edit,
    effect_means,
    effects,
    erase,
    knowledge_neurons,
    measure_edit,
    measure_erase,
    selection_of,
)
from workbench.neurons.effects import matched_units, mean_activation
from workbench.neurons.finding import adapted_share
from workbench.suppression import suppress

TEXT = ["one two three four five six seven eight red blue green sky"]


def reworded(facts: FactSet) -> FactSet:
    """The planted facts, each with two paraphrases."""
    return FactSet(
        "reworded",
        tuple(replace(f, paraphrases=(f"the city of {f.subject}", f"a big symbol of {f.subject}")) for f in facts),
    )


@cache
def found() -> tuple:
    """The planted model, its facts and its neurons as they are found."""
    model, facts = planted.model(), reworded(planted.facts())
    return model, facts, knowledge_neurons(model, facts, progress=False)


def units(neurons: pd.DataFrame) -> dict[str, set[tuple[int, int]]]:
    return {fact: set(zip(rows["layer"], rows["unit"], strict=True)) for fact, rows in neurons.groupby("fact")}


def one(model, layer: int, unit: int, kind: str = "neuron") -> pd.DataFrame:
    return pd.DataFrame({"fact": ["f"], "kind": [kind], "layer": [layer], "unit": [unit]})


# Finding


def test_exactly_the_planted_neurons_are_found() -> None:
    _, facts, neurons = found()
    expected = {subject: {place} for place, stored in planted.PLANTED.items() for subject, _ in stored}
    assert units(neurons) == expected
    assert neurons["share"].eq(1).all()
    assert neurons["n_prompts"].eq(3).all()
    assert set(neurons["kind"]) == {"neuron"}
    assert neurons.attrs["method"] == "kn"
    assert neurons["fact"].tolist() == list(facts.ids)


def test_without_its_neuron_a_fact_has_none() -> None:
    facts = reworded(planted.facts())
    without = knowledge_neurons(planted.model([(1, 42)]), facts, progress=False)
    assert set(without["fact"]) == {"France", "Japan", "Italy", "Spain"}
    nothing = knowledge_neurons(planted.model(planted.PLANTED), facts, progress=False)
    assert nothing.empty
    assert list(nothing) == list(without)


def test_silencing_what_was_found_kills_its_facts_and_no_other() -> None:
    model, facts, neurons = found()
    for fact, rows in neurons.groupby("fact"):
        frame = suppress(model, selection_of(model, rows), facts)
        change = frame[frame["metric"] == "logprob"].set_index("fact")["change"]
        hit = [other for other in facts.ids if units(neurons)[other] == units(neurons)[str(fact)]]
        assert (change[hit] < -5).all()
        assert (change.drop(hit) == 0).all()


@pytest.mark.parametrize("unit", ["neuron", "node"])
def test_thresholds_and_shares_equal_literal_loops(unit: str) -> None:
    model = tiny("llama")
    facts = FactSet(
        "some", (FACTS[0], replace(FACTS[3], paraphrases=("the gold symbol is", "symbol of gold")), FACTS[4])
    )
    scores = wb.attribute(model, facts.per_prompt(), method="grad_x_act", unit=unit, progress=False)
    options = {"threshold": 0.3, "share": 0.6, "adaptive": False, "unit": unit, "progress": False}
    frame = knowledge_neurons(model, facts, method="grad_x_act", **options)
    expected = {}
    for fact in facts:
        prompts = [name for name in scores["fact"].values if name.rpartition("#")[0] == fact.id]
        kept: dict[tuple[int, int], int] = {}
        for prompt in prompts:
            values = scores["score"].sel(fact=prompt).values
            for layer in range(values.shape[0]):
                for j in range(values.shape[1]):
                    if values[layer, j] > 0.3 * values.max():
                        kept[layer, j] = kept.get((layer, j), 0) + 1
        for (layer, j), count in kept.items():
            if count / len(prompts) >= 0.6:
                mean = np.mean([float(scores["score"].sel(fact=prompt)[layer, j]) for prompt in prompts])
                expected[fact.id, layer, j] = (mean, count / len(prompts))
    assert expected
    keys = list(zip(frame["fact"], frame["layer"], frame["unit"], strict=True))
    values = dict(zip(keys, zip(frame["score"], frame["share"], strict=True), strict=True))
    assert set(values) == set(expected)
    for key, value in expected.items():
        assert values[key] == pytest.approx(value, rel=1e-4)
    given_scores = knowledge_neurons(model, facts, attribution=scores, **options)
    pd.testing.assert_frame_equal(given_scores, frame, rtol=1e-4)
    stricter = knowledge_neurons(model, facts, attribution=scores, **{**options, "share": 1.0})
    assert len(stricter) < len(frame)


SHARES = st.lists(st.lists(st.integers(1, 10), min_size=0, max_size=12), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(counts=SHARES, start=st.integers(1, 20), low=st.integers(1, 4), more=st.integers(0, 3))
def test_the_adapted_share_is_the_best_there_is(counts, start, low, more) -> None:
    shares = [np.array(some) / 10 for some in counts]
    first, number = start / 20, (low, low + more)

    def miss(share: float) -> float:
        mean = np.mean([sum(value >= share - 1e-9 for value in some) for some in shares])
        return max(mean - number[1], number[0] - mean, 0)

    share = adapted_share(shares, first, number)
    assert miss(share) == pytest.approx(min(miss(k / 20) for k in range(1, 21)))
    if miss(first) == 0:
        assert share == first


def test_shares_adapt_relation_by_relation() -> None:
    model = tiny("llama")
    facts = FactSet("some", tuple(replace(f, paraphrases=(f"is {f.prompt}", f"a city {f.prompt}")) for f in FACTS[:6]))
    scores = wb.attribute(model, facts.per_prompt(), method="grad_x_act", unit="neuron", progress=False)
    frame = knowledge_neurons(model, facts, attribution=scores, number=(3, 6), progress=False)
    assert frame.groupby("relation")["needed"].nunique().eq(1).all()
    sizes = {share: knowledge_neurons(model, facts, attribution=scores, adaptive=False, share=share, progress=False)
             for share in (0.3, 0.6, 0.95)}  # fmt: skip
    for relation, rows in frame.groupby("relation"):
        n_facts = sum(fact.relation == relation for fact in facts)
        best = min(abs((one["relation"] == relation).sum() / n_facts - 4.5) for one in sizes.values())
        assert max(abs(len(rows) / n_facts - 4.5) - 1.5, 0) <= max(best - 1.5, 0) + 1e-9


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"threshold": 1.0}, "threshold is 1.0"),
        ({"share": 0.0}, "share is 0.0"),
        ({"number": (5, 2)}, "number is"),
        ({"unit": "head"}, "unit must be"),
        ({"unit": "node", "method": "kn"}, "kn is defined for neurons"),
    ],
)
def test_wrong_options_are_named(options, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        knowledge_neurons(tiny("llama"), FACTS, progress=False, **options)


def test_an_attribution_of_something_else_is_refused() -> None:
    model, facts, _ = found()
    scores = wb.attribute(model, facts[:2].per_prompt(), method="grad_x_act", unit="neuron", progress=False)
    with pytest.raises(ValueError, match="no prompt 'Italy#0'"):
        knowledge_neurons(model, facts, attribution=scores)
    with pytest.raises(ValueError, match="is of neurons, not of nodes"):
        knowledge_neurons(model, facts[:2], attribution=scores, unit="node")
    others = FactSet("others", tuple(replace(fact, answer=f"{fact.answer} one") for fact in facts[:2]))
    with pytest.raises(ValueError, match="of another prompt or answer than the one of that id"):
        knowledge_neurons(model, others, attribution=scores)
    with pytest.raises(ValueError, match="is by grad_x_act, not by ig; leave method out"):
        knowledge_neurons(model, facts[:2], attribution=scores, method="ig")
    with pytest.raises(ValueError, match="steps is no option beside it"):
        knowledge_neurons(model, facts[:2], attribution=scores, steps=3)
    for same in ({}, {"method": "grad_x_act"}):
        assert knowledge_neurons(model, facts[:2], attribution=scores, progress=False, **same).attrs["method"] == (
            "grad_x_act"
        )
    with pytest.raises(ValueError, match="another model than"):
        knowledge_neurons(planted.model([(0, 7)]), facts[:2], attribution=scores)
    with pytest.raises(ValueError, match="attribution= takes what attribute"):
        knowledge_neurons(model, facts, attribution=scores.drop_vars("score"))
    with pytest.raises(ValueError, match="lacks the column 'kind'"):
        selection_of(model, pd.DataFrame({"layer": [0], "unit": [1]}))
    with pytest.raises(ValueError, match="names layer 2, but planted has 2"):
        selection_of(model, one(model, 2, 0))
    with pytest.raises(ValueError, match="two kinds"):
        selection_of(model, pd.concat([one(model, 0, 0), one(model, 0, 0, "node")]))


def test_one_fact_per_prompt_and_the_way_back() -> None:
    prompts = FACTS.per_prompt()
    assert len(prompts) == len(FACTS) + 2
    assert [prompts[f"france#{k}"].prompt for k in (0, 1)] == ["the capital of France is", "France capital is"]
    for fact in prompts:
        owner = FACTS[fact.id.rpartition("#")[0]]
        assert (fact.relation, fact.answer) == (owner.relation, owner.answer)
        assert fact.prompt in (owner.prompt, *owner.paraphrases)
    assert {fact.id.rpartition("#")[0] for fact in prompts.per_prompt()} == set(prompts.ids)
    with pytest.raises(ValueError, match="has a fact 'a#0', the name of a prompt"):
        FactSet.from_records([{"id": i, "prompt": "p", "answer": "x"} for i in ("a", "a#0")]).per_prompt()


# Effects


def test_planted_effects_hit_the_fact_and_matched_units_do_nothing() -> None:
    model, facts, neurons = found()
    frame = effects(model, facts, neurons, controls=2, progress=False)
    kinds = frame.groupby(["fact", "group", "units"])["change"].mean()
    for fact in facts.ids:
        assert kinds[fact, "fact", "chosen"] < -5
        assert kinds[fact, "fact", "matched"] == 0
    for fact in ("France", "Japan", "Kenya"):  # they share their neuron with no other fact
        assert kinds[fact, "relation", "chosen"] == kinds[fact, "others", "chosen"] == 0
    assert kinds["Italy", "others", "chosen"] == pytest.approx(kinds["Spain", "fact", "chosen"] / 3)
    assert frame[frame["group"] == "fact"]["n"].eq(3).all()
    assert frame["n_units"].eq(1).all()
    numbers = effect_means(frame).set_index(["group", "units"])
    assert numbers.loc[("fact", "difference"), "high"] < -5
    assert numbers.loc[("fact", "matched"), ["low", "high"]].tolist() == [0, 0]
    assert numbers.loc[("relation", "chosen"), "n"] == 4  # Spain has no relation to read
    mean = frame[(frame["group"] == "others") & (frame["units"] == "chosen")]["change"].mean()
    assert numbers.loc[("others", "chosen"), "change"] == pytest.approx(mean)
    more = effects(model, facts, neurons[neurons["fact"] == "France"], action="enhance", progress=False)
    assert more.set_index(["group", "units"]).loc[("fact", "chosen"), "change"] > 1e-5


def test_effects_equal_suppressing_by_hand_and_differ_by_seed() -> None:
    model = tiny("gpt2")
    neurons = pd.concat([one(model, 1, 5), one(model, 2, 9)]).assign(fact="france")
    frame = effects(model, FACTS, neurons, factor=0.5, scope="all", others=2, progress=False)
    chosen = frame[frame["units"] == "chosen"].set_index("group")
    by_hand = suppress(model, selection_of(model, neurons), FACTS[:1].per_prompt(), factor=0.5)
    by_hand = by_hand[by_hand["metric"] == "logprob"]
    assert chosen.loc["fact", "change"] == pytest.approx(by_hand["change"].mean(), rel=1e-4)
    assert chosen.loc["fact", "n"] == len(by_hand) == 2
    assert chosen["n"].to_dict() == {"fact": 2, "relation": 2, "others": 2}
    again = effects(model, FACTS, neurons, factor=0.5, scope="all", others=2, progress=False)
    pd.testing.assert_frame_equal(again, frame)
    other = effects(model, FACTS, neurons, factor=0.5, scope="all", others=2, seed=1, progress=False)
    assert not other["change"].equals(frame["change"])


def test_every_fact_is_measured_as_alone_with_units_that_are_chosen_once(monkeypatch) -> None:
    model, facts, neurons = found()
    alone = [effects(model, facts, rows, progress=False) for _, rows in neurons.groupby("fact", sort=False)]
    asked: list[str] = []

    def counted(model, rows: pd.DataFrame):
        asked.extend(rows["fact"].unique())
        return selection_of(model, rows)

    monkeypatch.setattr(sys.modules["workbench.neurons.effects"], "selection_of", counted)
    together = effects(model, facts, neurons, progress=False)
    assert asked == neurons["fact"].unique().tolist()
    pd.testing.assert_frame_equal(together, pd.concat(alone, ignore_index=True), check_exact=True)


@pytest.mark.parametrize("scope", ["last", "all"])
def test_matched_units_are_the_nearest_others_of_their_layer(scope: str) -> None:
    model = tiny("gpt2")
    prompts = model.tokenise(FACTS[:2].per_prompt())
    plain, seen = random_model("gpt2"), {}
    for layer, name in enumerate(model.down_names):
        plain.get_submodule(name).register_forward_pre_hook(
            lambda module, args, layer=layer: seen.setdefault(layer, []).append(args[0].detach().view(-1, 128))
        )
    for prompt in prompts:
        plain(torch.tensor([prompt.prompt_ids]))
    size = mean_activation(model, "neuron", prompts, scope)
    for layer, activations in seen.items():
        rows = [(one[-1:] if scope == "last" else one).abs().mean(0) for one in activations]
        np.testing.assert_allclose(size[layer], torch.stack(rows).mean(0).numpy(), rtol=1e-4, atol=1e-6)
    chosen = selection_of(model, pd.concat([one(model, 1, 5), one(model, 2, 9)]))
    sets = matched_units(model, chosen, prompts, scope=scope, draws=3)
    for layer, unit in ((1, 5), (2, 9)):
        drawn = [found.rows(layer) for found in sets]
        assert all(len(rows) == 1 for rows in drawn)
        distance = {j: abs(size[layer, j] - size[layer, unit]) for j in range(128) if j != unit}
        assert {rows[0] for rows in drawn} == set(sorted(distance, key=lambda j: distance[j])[:3])
    crowd = pd.concat([one(model, 0, j) for j in range(60)])
    sets = matched_units(model, selection_of(model, crowd), prompts)
    assert not set(sets[0].rows(0)) & set(range(60))
    assert len(sets[0].rows(0)) == 60
    with pytest.raises(ValueError, match="ask for fewer controls"):
        matched_units(model, selection_of(model, crowd), prompts, draws=2)


def test_erasing_and_editing_fact_by_fact_stand_beside_matched_units() -> None:
    model, facts, neurons = found()
    neurons = neurons[neurons["fact"].isin(["France", "Italy"])]
    before = model.digest
    erased = effects(model, facts, neurons, action="erase", controls=2, progress=False)
    kinds = erased.groupby(["fact", "group", "units"])["change"].mean()
    by_hand = means(measure_erase(model, facts[:1].per_prompt(), neurons[neurons["fact"] == "France"]))
    by_hand = by_hand.set_index(["suite", "metric"])["change"]
    assert kinds["France", "fact", "chosen"] == pytest.approx(by_hand["erased", "logprob"])
    assert kinds["France", "fact", "chosen"] < -5
    assert kinds["France", "relation", "chosen"] == kinds["France", "fact", "matched"] == 0
    assert kinds["Italy", "others", "chosen"] < -1  # it shares its neuron with Spain
    new = {"France": "Rome", "Italy": "Paris"}
    edited = effects(model, facts, neurons, action="edit", answers=new, controls=2, progress=False)
    kinds = edited.groupby(["fact", "group", "units"])[["change", "n"]].mean()
    assert kinds.loc[("France", "new", "chosen"), "change"] > 5 > 0 > kinds.loc[("France", "fact", "chosen"), "change"]
    assert abs(kinds.loc[("France", "new", "matched"), "change"]) < 1e-5
    assert kinds.loc[("France", "new", "chosen"), "n"] == 3  # the prompt and its two paraphrases
    one_by_hand = means(measure_edit(model, facts[0], neurons[neurons["fact"] == "France"], "Rome"))
    after = one_by_hand.set_index(["suite", "metric"])["change"]
    mean = (after["efficacy", "logprob"] + 2 * after["paraphrase", "logprob"]) / 3
    assert kinds.loc[("France", "new", "chosen"), "change"] == pytest.approx(mean, rel=1e-5)
    assert model.digest == before


def test_wrong_effects_are_named() -> None:
    model, facts, neurons = found()
    for options, sentence in (
        ({"action": "delete"}, "action must be"),
        ({"action": "edit"}, 'The action "edit", and no other'),
        ({"answers": {"France": "Rome"}}, 'The action "edit", and no other'),
        ({"action": "edit", "answers": {"France": "Rome"}}, "no new answer: name it"),
        ({"action": "erase", "factor": 0.5}, "leave it out"),
        ({"controls": 0}, "controls of at least 1"),
        ({"seed": -1}, "a seed of at least 0"),
        ({"neurons": neurons.drop(columns="fact")}, "lacks the column 'fact'"),
        ({"neurons": neurons.iloc[:0]}, "no rows"),
        ({"facts": facts[:1]}, "the fact 'Japan', which is not among"),
    ):
        with pytest.raises(ValueError, match=sentence):
            effects(model, **{"facts": facts, "neurons": neurons, "progress": False, **options})


def test_facts_without_a_relation_share_none() -> None:
    model, facts, neurons = found()
    bare = FactSet("bare", tuple(replace(fact, relation="") for fact in facts))
    frame = effects(model, bare, neurons[neurons["fact"] == "France"], controls=1, progress=False)
    chosen = frame[frame["units"] == "chosen"].set_index("group")["n"].to_dict()
    assert chosen == {"fact": 3, "others": len(facts) - 1}


def test_too_many_controls_for_a_later_fact_are_refused_before_any_is_read(monkeypatch) -> None:
    model = load_model(random_model("llama"), tokenizer=tokenizer())
    crowd = pd.concat([one(model, 1, j) for j in range(21)]).assign(fact="japan")
    monkeypatch.setattr(type(model), "logits", lambda *given, **options: pytest.fail("work began"))
    with pytest.raises(ValueError, match="21 of them chosen: too few"):
        effects(model, FACTS, pd.concat([one(model, 1, 5).assign(fact="france"), crowd]), controls=1, progress=False)


# Erasing and editing


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.hf.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Equal to the bit, signs of zeros and NaN included."""
    return all(torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8)) for name in first)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt"])
def test_erasing_equals_writing_the_weights_of_a_plain_model(kind: str) -> None:
    model, plain = load_model(random_model(kind), tokenizer=tokenizer()), random_model(kind)
    neurons = pd.concat([one(model, 1, 5), one(model, 1, 6), one(model, 2, 9)])
    ids = torch.tensor([[4, 5, 6, 7, 8]])
    before, clean, digest = weights(model), model.logits(ids), model.digest
    for value, vector in (("zero", torch.zeros(32)), ("unk", plain.get_output_embeddings().weight[3].detach())):
        for layer, j in ((1, 5), (1, 6), (2, 9)):
            weight = plain.get_submodule(model.down_names[layer]).weight.data
            (weight[j] if kind == "gpt2" else weight[:, j]).copy_(vector)
        with erase(model, neurons, value=value):
            with torch.no_grad():
                torch.testing.assert_close(model.logits(ids), plain(ids).logits, rtol=1e-5, atol=2e-5)
            assert not torch.allclose(model.logits(ids), clean, atol=1e-3)
            assert model.digest != digest
            assert not same(weights(model), before)
        assert same(weights(model), before)
        assert model.digest == digest
        assert torch.equal(model.logits(ids), clean)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("table", ["embedding", "unembedding"])
def test_editing_equals_the_formula_on_a_plain_model(kind: str, table: str) -> None:
    model, plain = load_model(random_model(kind), tokenizer=tokenizer()), random_model(kind)
    words = tokenizer().get_vocab()
    rows = (plain.get_input_embeddings() if table == "embedding" else plain.get_output_embeddings()).weight.detach()
    weight = plain.get_submodule(model.down_names[2]).weight.data
    column = weight[9] if kind == "gpt2" else weight[:, 9]
    column += 4.0 * rows[words["Rome"]] - 0.5 * rows[words["Paris"]]
    ids = torch.tensor([[4, 5, 6, 7, 8]])
    before = weights(model)
    with edit(model, FACTS[0], one(model, 2, 9), "Rome", lambda_old=0.5, lambda_new=4.0, table=table):
        with torch.no_grad():
            torch.testing.assert_close(model.logits(ids), plain(ids).logits, rtol=1e-4, atol=1e-4)
    assert same(weights(model), before)


def test_weights_are_put_back_also_after_an_error_and_in_the_users_own_model() -> None:
    users = random_model("llama")
    kept = {name: tensor.clone() for name, tensor in users.state_dict().items()}
    model = load_model(users, tokenizer=tokenizer())
    neurons, digest = one(model, 1, 5), model.digest
    for change in (erase(model, neurons), edit(model, FACTS[0], neurons, "Rome")):
        with pytest.raises(RuntimeError, match="on purpose"):
            with change, erase(model, pd.concat([neurons, one(model, 0, 1)])):
                assert not same(weights(model), kept)
                raise RuntimeError("on purpose")
        assert same(weights(model), kept)
        assert same(users.state_dict(), kept)
        assert model.digest == digest
    bfloat = load_model(random_model("llama").to(torch.bfloat16), tokenizer=tokenizer())
    before = weights(bfloat)
    with edit(bfloat, FACTS[0], neurons, "Rome"):
        assert not same(weights(bfloat), before)
    assert same(weights(bfloat), before)


def test_what_cannot_be_edited_is_refused() -> None:
    model = tiny("llama")
    before = weights(model)
    cases = (
        (lambda: erase(model, one(model, 0, 1, "node")), "no value vector"),
        (lambda: erase(model, one(model, 0, 1), value="mean"), "value must be"),
        (lambda: edit(model, FACTS[0], one(model, 0, 1, "node"), "Rome"), "no value vector"),
        (lambda: edit(model, FACTS[0], one(model, 0, 1), "Paris"), "begin with the same token"),
        (lambda: edit(model, FACTS[0], one(model, 0, 1), "Rome", table="both"), "table must be"),
        (lambda: edit(model, FACTS[0], one(model, 0, 1), "Rome", lambda_new=float("nan")), "are finite numbers"),
    )
    for change, sentence in cases:
        with pytest.raises(ValueError, match=sentence), change():
            pytest.fail("the with was entered")
    assert same(weights(model), before)
    narrow = load_model(random_model("opt", word_embed_proj_dim=16), tokenizer=tokenizer())
    with (
        pytest.raises(ValueError, match="16 wide and its value vectors 32"),
        erase(narrow, one(narrow, 0, 1), value="unk"),
    ):
        pytest.fail("the with was entered")
    nameless = replace(model, tokenizer=type("T", (), {"unk_token_id": None})())
    with pytest.raises(ValueError, match='erase with value="zero"'), erase(nameless, one(model, 0, 1), value="unk"):
        pytest.fail("the with was entered")


def test_a_planted_fact_is_erased_or_edited_and_others_stay() -> None:
    model, facts, neurons = found()
    own = neurons[neurons["fact"] == "France"]
    others = facts.filter(ids=["Japan", "Kenya"])
    erased = means(measure_erase(model, facts[:1], own, others=others, general=TEXT)).set_index(["suite", "metric"])
    changes = erased["change"]
    assert [changes[suite, "accuracy"] for suite in ("erased", "paraphrase", "others")] == [-1, -1, 0]
    assert changes["others", "logprob"] == changes["general", "kl"] == 0
    measured = means(measure_edit(model, facts[0], own, "Rome", others=others, general=TEXT))
    after = measured.set_index(["suite", "metric"])["after"]
    suites = ("efficacy", "paraphrase", "old", "others")
    assert [after[suite, "accuracy"] for suite in suites] == [1, 1, 0, 1]
    assert after["general", "kl"] == 0
    with pytest.raises(ValueError, match="list of passages"):
        measure_erase(model, facts[:1], own, general="one text")
    wrong = means(measure_edit(model, facts[0], neurons[neurons["fact"] == "Kenya"], "Rome"))  # the negative control
    assert wrong.set_index(["suite", "metric"])["after"]["efficacy", "accuracy"] == 0


# The command


def test_the_command_equals_the_package(tmp_path, monkeypatch, capsys) -> None:
    folder, facts = saved(tmp_path / "model"), FACTS[:5].save(tmp_path / "facts.jsonl")
    out, selection, table = tmp_path / "n.csv", tmp_path / "s.json", tmp_path / "e.parquet"
    common = ("--model", folder, "--facts", facts, "-q", "--method", "grad_x_act", "--threshold", 0.5)
    rest = ("--effect", "suppress", "--controls", 1, "--selection", selection, "--effects-out", table, "--out", out)
    assert call(monkeypatch, "neurons", *common, *rest) == 0
    assert "difference" in capsys.readouterr().out
    model = wb.load_model(folder)
    expected = knowledge_neurons(model, FACTS[:5], method="grad_x_act", threshold=0.5, progress=False)
    pd.testing.assert_frame_equal(pd.read_csv(out), expected, rtol=1e-4)
    assert wb.Selection.load(selection) == selection_of(model, expected)
    read = effects(model, FACTS[:5], expected, controls=1, progress=False)
    pd.testing.assert_frame_equal(pd.read_parquet(table), read, rtol=1e-3, atol=1e-5)
    assert call(monkeypatch, "neurons", "--effects-out", table) == 1
    assert "needs --effect" in capsys.readouterr().err


def test_the_command_erases_and_edits(tmp_path, monkeypatch, capsys) -> None:
    """The tables of `--effect erase` and `--edit` are those of the package, and what cannot be edited is a sentence."""
    folder, facts, table = saved(tmp_path / "model"), FACTS[:5].save(tmp_path / "facts.jsonl"), tmp_path / "e.parquet"
    common = ("--model", folder, "--facts", facts, "-q", "--method", "grad_x_act", "--effects-out", table)
    model = wb.load_model(folder)
    found = knowledge_neurons(model, FACTS[:5], method="grad_x_act", progress=False)
    assert call(monkeypatch, "neurons", *common, "--effect", "erase") == 0
    read = effects(model, FACTS[:5], found, action="erase", progress=False)
    pd.testing.assert_frame_equal(pd.read_parquet(table), read, rtol=1e-3, atol=1e-5)
    fact, new = FACTS[0], FACTS[1].answer
    assert call(monkeypatch, "neurons", *common, "--edit", fact.id, "--to", new) == 0
    own = found[found["fact"] == fact.id]
    others = FACTS[:5].filter(where=lambda one: one.id != fact.id)
    pd.testing.assert_frame_equal(pd.read_parquet(table), measure_edit(model, fact, own, new, others=others), rtol=1e-4)
    capsys.readouterr()
    for rest, sentence in (
        (["--edit", "nobody", "--to", new], "no fact 'nobody'"),
        (["--edit", fact.id], "belong together"),
        (["--edit", fact.id, "--to", " "], "is empty"),
        (["--effect", "erase", "--unit", "node"], "no value vector"),
        (["--edit", fact.id, "--to", fact.answer], "begin with the same token"),
    ):
        assert call(monkeypatch, "neurons", *common, *rest) == 1
        assert sentence in capsys.readouterr().err


def test_the_command_names_wrong_options_before_a_model_opens(tmp_path, monkeypatch, capsys) -> None:
    common = ("neurons", "--model", tmp_path / "nowhere", "--facts", FACTS.save(tmp_path / "facts.jsonl"), "-q")
    for rest, sentence in (
        (["--share", "2"], "share is 2.0"),
        (["--threshold", "0"], "threshold is 0.0"),
        (["--method", "magic"], "method must be one of ig"),
        (["--method", "loki-code"], "loki-code is defined for nodes"),
    ):
        assert call(monkeypatch, *common, *rest) == 1
        assert sentence in capsys.readouterr().err

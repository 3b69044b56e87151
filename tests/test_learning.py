"""Learning by gradient descent: against torch's own optimiser, restored to the bit, and alone against together."""

import copy
import inspect
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from tiny import FACTS, random_model, tiny, tokenizer

from workbench.attribution import attribute
from workbench.interfere import cross
from workbench.intervals import jackknifed
from workbench.learning import (
    averages,
    behaviour,
    effective_rank,
    foresee,
    foreseeing,
    harm,
    learner,
    learnt,
    natural_rate,
)
from workbench.learning.learner import gradients, unlocked
from workbench.learning.together import Read, _of_the_mean, _per_fact, _per_layer, _without_each, suppression
from workbench.models import HookedModel, load_model
from workbench.results import open_result, save_result, validate_harm
from workbench.selection import Selection

FEW = FACTS[:4]  # one-token answers
MIXED = FACTS.filter(ids=["france", "gold", "sky", "grass"])  # answers of one, two and three tokens
KINDS = ("llama", "gpt2")
#: In float64; llama's norms run in float32 all the same.
GAP = {"llama": 1e-5, "gpt2": 1e-9}


def double(kind: str) -> HookedModel:
    return load_model(random_model(kind).double(), tokenizer=tokenizer())


def answer_logprob(hf: torch.nn.Module, fact) -> torch.Tensor:
    """Plain transformers, one fact at a time, no padding."""
    logits = hf(torch.tensor([fact.ids])).logits[0].log_softmax(-1)
    start = len(fact.prompt_ids)
    return torch.stack([logits[start + k - 1, token] for k, token in enumerate(fact.answer_ids)]).sum()


def downs(hf: torch.nn.Module, kind: str) -> list[torch.nn.Parameter]:
    name = "mlp.c_proj.weight" if kind == "gpt2" else "mlp.down_proj.weight"
    return [parameter for key, parameter in hf.named_parameters() if key.endswith(name)]


def taught(hf: torch.nn.Module, kind: str, facts, rate: float, steps: int) -> torch.nn.Module:
    """A deep copy that torch's own SGD has taught."""
    hf = copy.deepcopy(hf)
    for parameter in hf.parameters():
        parameter.requires_grad_(False)
    weights = [weight.requires_grad_() for weight in downs(hf, kind)]
    optimiser = torch.optim.SGD(weights, lr=rate)
    for _ in range(steps):
        optimiser.zero_grad()
        (-torch.stack([answer_logprob(hf, fact) for fact in facts]).sum()).backward()
        optimiser.step()
    return hf


def bits(model: HookedModel) -> dict[str, bytes]:
    return {name: x.detach().clone().numpy().tobytes() for name, x in model.hf.state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
def test_harm_equals_a_naive_loop_with_torchs_own_optimiser(kind: str) -> None:
    model = double(kind)
    found = harm(model, MIXED, others=FEW, steps=3, rate=0.01, progress=False)
    read, learners = model.tokenise(MIXED), model.tokenise(FEW)
    for j, one in enumerate(learners):
        after = taught(model.hf, kind, [one], 0.01, 3)
        with torch.no_grad():
            for i, fact in enumerate(read):
                expected = float(answer_logprob(model.hf, fact) - answer_logprob(after, fact))
                assert float(found["harm"][i, j]) == pytest.approx(expected, abs=GAP[kind])
            gained = float(answer_logprob(after, one) - answer_logprob(model.hf, one))
            assert float(found["gained"][j]) == pytest.approx(gained, abs=GAP[kind])
            assert float(found["reached"][j]) == pytest.approx(float(answer_logprob(after, one).exp()), rel=1e-4)
    assert (found["gained"] > 0.01).all()
    assert found["harm"].values[0, 0] == pytest.approx(-float(found["gained"][0]))
    assert found["n_tokens"].values.tolist() == [1, 1, 3, 2]
    other = taught(model.hf, kind, [learners[0]], 0.02, 3)  # the control: another rate
    with torch.no_grad():
        harmed = float(answer_logprob(model.hf, read[0]) - answer_logprob(other, read[0]))
    assert abs(harmed - float(found["harm"][0, 0])) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_together_equals_torchs_own_optimiser(kind: str) -> None:
    model = double(kind)
    tokens = model.tokenise(MIXED)
    after = taught(model.hf, kind, tokens, 0.005, 2)
    with learnt(model, tokens, rate=0.005, steps=2):
        for mine, plain in zip(downs(model.hf, kind), downs(after, kind), strict=True):
            torch.testing.assert_close(mine.detach(), plain.detach(), rtol=0, atol=GAP[kind])


def test_every_weight_is_the_same_to_the_bit_afterwards_also_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = random_model("llama")
    users = {name: x.detach().clone() for name, x in plain.state_dict().items()}
    model = load_model(plain, tokenizer=tokenizer())
    before, digest = bits(model), model.digest
    harm(model, FEW, rate=0.01, steps=1, progress=False)
    behaviour(model, FEW, rate=0.01, steps=1, progress=False)
    natural_rate(model, model.tokenise(FEW))
    tokens = model.tokenise(FEW)

    def fail() -> None:
        with learnt(model, tokens, rate=0.01, steps=1):
            assert bits(model) != before  # it has learnt
            assert model.digest != digest
            assert all(torch.equal(x, users[name]) for name, x in plain.state_dict().items())
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail()
    with monkeypatch.context() as patch:
        losses = learner.answer_losses
        patch.setattr(learner, "answer_losses", lambda *given: [loss / 0 for loss in losses(*given)])
        with pytest.raises(ValueError, match=r"The loss of 'france' is not finite .* lower the rate"):
            harm(model, FEW, rate=0.01, steps=4, progress=False)
    assert bits(model) == before
    assert model.digest == digest
    assert all(torch.equal(x, users[name]) for name, x in plain.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.hf.parameters())


def test_a_tiny_step_does_what_gradients_say_and_a_large_one_does_not() -> None:
    model = double("gpt2")
    tokens = model.tokenise(MIXED)
    with unlocked(model) as trained:
        dense = [torch.cat([part.flatten() for part in gradients(model, [one], trained)[1]]) for one in tokens]
    products = torch.stack(dense) @ torch.stack(dense).T
    for rate, near in ((1e-7, True), (1e-2, False)):
        found = harm(model, MIXED, rate=rate, steps=1, progress=False)["harm"].values
        gap = np.abs(found / (-rate * products.numpy()) - 1).max()
        assert (gap < 1e-4) == near


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unit", ["node", "neuron"])
def test_only_the_selected_units_learn(kind: str, unit: str) -> None:
    model = double(kind)
    width = model.width(unit)
    chosen = Selection.from_positions([[1, 5], [], [0]], unit=unit, n_units=width)
    before = [weight.detach().clone() for weight in downs(model.hf, kind)]
    with learnt(model, model.tokenise(FEW), rate=0.01, steps=2, selection=chosen):
        changed = [(new != old).detach() for new, old in zip(downs(model.hf, kind), before, strict=True)]
    along = (unit == "node") == (kind == "gpt2")  # whether units are columns of the weight
    for layer, marks in enumerate(changed):
        units = marks.any(0 if along else 1)
        assert units.nonzero().flatten().tolist() == chosen.rows(layer)
    with learnt(model, model.tokenise(FEW), rate=0.01, steps=1, layers=[1]):
        changed = [not torch.equal(new, old) for new, old in zip(downs(model.hf, kind), before, strict=True)]
        assert changed == [False, True, False]
    both = Selection.from_positions([list(range(width))] * 3, unit=unit, n_units=width)
    found = [harm(model, FEW[:2], rate=0.01, steps=1, progress=False, selection=one) for one in (both, None)]
    np.testing.assert_allclose(found[0]["harm"], found[1]["harm"], atol=1e-12)


def test_a_model_in_bfloat16_keeps_its_weights_in_float32_beside() -> None:
    """Steps that bfloat16 would swallow one by one add up."""
    model = load_model(random_model("llama").to(torch.bfloat16), tokenizer=tokenizer())
    tokens = model.tokenise(FEW)
    with unlocked(model) as trained:
        before = trained[0].weight.data.clone()
        gradient = gradients(model, tokens, trained)[1][0]
    assert gradient.dtype == torch.float32
    rate = float(before.abs().max()) / 600 / float(gradient.abs().max())  # a step is below half a rounding step
    with learnt(model, tokens, rate=rate, steps=1):
        one = model.down_proj(0).weight.data.clone()
    with learnt(model, tokens, rate=rate, steps=8):
        eight = model.down_proj(0).weight.data.clone()
    assert torch.equal(one, (before.float() - rate * gradient).to(torch.bfloat16))
    large = before.abs() > before.abs().max() / 2
    assert ((eight != before) & large).sum() > ((one != before) & large).sum()
    assert torch.equal(model.down_proj(0).weight.data, before)


def test_the_natural_rate_is_the_median_of_loss_over_squared_gradient() -> None:
    model = double("llama")
    tokens = model.tokenise(FACTS)
    rates = []
    for fact in tokens:
        hf = copy.deepcopy(model.hf)
        weights = [weight.requires_grad_() for weight in downs(hf, "llama")]
        loss = -answer_logprob(hf, fact)
        square = sum(float((part**2).sum()) for part in torch.autograd.grad(loss, weights))
        rates.append(loss.item() / square)
    assert natural_rate(model, tokens) == pytest.approx(np.median(rates))
    found = harm(model, FEW, steps=2, progress=False)
    assert found.attrs["rate"] == "natural"
    assert found.attrs["rate_used"] == pytest.approx(natural_rate(model, model.tokenise(FEW)))


def test_harm_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = tiny("llama"), tmp_path / "harm.zarr"
    whole = harm(model, FEW, rate=0.01, steps=1, progress=False)
    import workbench.learning.harms as room

    calls = []

    def stopping(*args, **options):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return learnt(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(room, "learnt", stopping)
        with pytest.raises(KeyboardInterrupt):
            harm(model, FEW, rate=0.01, steps=1, out=out, progress=False)
    with pytest.raises(ValueError, match="2 of 4 learnt facts: go on"):
        validate_harm(open_result(out))
    with monkeypatch.context() as patch:
        calls[:] = [None] * 3
        patch.setattr(room, "learnt", stopping)
        again = harm(model, FEW, rate=0.01, steps=1, out=out, progress=False)
    assert len(calls) == 5
    xr.testing.assert_allclose(again, whole)
    stored = open_result(out)
    xr.testing.assert_equal(stored.load(), harm(model, FEW, rate=0.01, steps=1, out=out, progress=False))
    with pytest.raises(ValueError, match=r"other settings, it differs in steps: choose"):
        harm(model, FEW, rate=0.01, steps=2, out=out, progress=False)
    fresh = harm(model, FEW, rate=0.01, steps=2, out=out, resume=False, progress=False)
    assert fresh.attrs["steps"] == open_result(out).attrs["steps"] == 2


def test_suppression_read_for_a_prediction_is_kept_when_the_harm_is_cut_off(tmp_path: Path, monkeypatch) -> None:
    """Among the facts of two attributions together; a second call reads what is kept and says the same."""
    model = double("gpt2")
    halves = [FACTS.filter(ids=ids) for ids in (FACTS.ids[:5], FACTS.ids[5:])]
    scores = [attribute(model, half, steps=1, progress=False) for half in halves]
    how = {"metrics": ["suppression"], "top": 25.0, "seed": 1, "progress": False}
    whole, told = foresee(model, FACTS, scores, out=tmp_path / "whole.zarr", **how)
    with monkeypatch.context() as patch:
        patch.setattr(foreseeing, "harm", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            foresee(model, FACTS, scores, out=tmp_path / "harm.zarr", parts=tmp_path / "parts", **how)
    monkeypatch.setattr(cross, "_drops", lambda *args, **kwargs: pytest.fail("was read before"))
    frame, about = foresee(model, FACTS, scores, out=tmp_path / "harm.zarr", parts=tmp_path / "parts", **how)
    pd.testing.assert_frame_equal(frame, whole)
    assert about == told
    kept = open_result(tmp_path / "harm.zarr")
    assert list(kept["text"].values) == list(kept["other_text"].values) == list(FACTS.texts.values())
    with pytest.raises(pytest.fail.Exception, match="was read before"):  # the control: other draws were never read
        foresee(model, FACTS, scores, out=tmp_path / "harm.zarr", parts=tmp_path / "other", **how)


def test_a_stored_harm_is_the_same_and_a_broken_one_is_refused(tmp_path: Path) -> None:
    found = harm(tiny("llama"), FEW, rate=0.01, steps=1, progress=False)
    again = open_result(save_result(found, tmp_path / "h.zarr", kind="harm"))
    validate_harm(again)
    np.testing.assert_array_equal(again["harm"], found["harm"])
    assert again["answer"].values.tolist() == ["Paris", "Tokyo", "Nairobi", "Au"]
    with pytest.raises(ValueError, match="lacks `before`"):
        validate_harm(found.drop_vars("before"))
    with pytest.raises(ValueError, match="`harm` at fact france, other france that is not finite"):
        validate_harm(found.assign(harm=found["harm"] * np.nan))


def nodes(first: list[int], width: int) -> Selection:
    return Selection.from_positions([first, [], []], unit="node", n_units=width)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "at least 1 step, not 0"),
        ({"rate": -1.0}, "positive number, not -1.0"),
        ({"layers": [3]}, r"layers 0 to 2; these are to learn: \[3\]"),
        ({"layers": []}, r"these are to learn: \[\]"),
        ({"selection": nodes([0], 9)}, "3 layers of 9 nodes; .* 3 of 32"),
        ({"selection": nodes([], 32)}, "selection is empty"),
        ({"selection": nodes([0], 32), "layers": [0]}, "leave `layers` out"),
    ],
)
def test_what_cannot_learn_is_refused_by_name(options: dict, message: str) -> None:
    for function in (harm, behaviour):
        with pytest.raises(ValueError, match=message):
            function(tiny("llama"), FEW, **{"rate": 0.01, **options}, progress=False)


# Alone against together


def test_a_single_fact_is_undisturbed_by_itself() -> None:
    per_fact, per_layer = behaviour(tiny("llama"), MIXED[2:3], steps=3, progress=False)
    assert per_fact["interference"].tolist() == [0.0]
    assert per_fact["expression"].tolist() == [1.0]
    assert per_fact["suppression"].tolist() == [0.0]
    assert per_layer["suppression"].eq(0).all()
    assert per_layer["rank_alone"].eq(1).all()
    assert per_layer["rank_change"].eq(0).all()
    assert per_layer["layer"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_behaviour_equals_its_definitions_on_plain_models(kind: str) -> None:
    model = double(kind)
    tokens = model.tokenise(MIXED)
    per_fact, per_layer = behaviour(model, MIXED, rate=0.01, steps=3, progress=False)
    joint = taught(model.hf, kind, tokens, 0.01, 3)
    moves = []
    for row, fact in per_fact.iterrows():
        one = tokens[row]
        alone = taught(model.hf, kind, [one], 0.01, 3)
        with torch.no_grad():
            said = [float(answer_logprob(hf, one)) for hf in (model.hf, alone, joint)]
            prompt = torch.tensor([one.prompt_ids])
            found = [hf(prompt, output_hidden_states=True).hidden_states for hf in (model.hf, alone, joint)]
        # the last entry of transformers' is after the final norm
        hidden = torch.stack([torch.stack([h[0, -1] for h in states[1:-1]]) for states in found])
        moves.append(hidden[1:] - hidden[0])
        assert [fact[f"logprob_{name}"] for name in ("before", "alone", "joint")] == pytest.approx(said, abs=GAP[kind])
        assert fact["interference"] == pytest.approx(said[1] - said[2], abs=GAP[kind])
        gains = fact["margin_joint"] - fact["margin_before"], fact["margin_alone"] - fact["margin_before"]
        assert fact["expression"] == pytest.approx(gains[0] / gains[1])
    moved = torch.stack(moves)  # fact, way, layer, d_model
    for layer in range(2):
        alone, together = moved[:, 0, layer], moved[:, 1, layer]
        expected = float(1 - sum(together[i] @ alone[i] for i in range(4)) / sum(alone[i] @ alone[i] for i in range(4)))
        assert per_layer["suppression"][layer] == pytest.approx(expected, abs=10 * GAP[kind])
        for name, rows in (("rank_alone", alone), ("rank_joint", together)):
            size = torch.linalg.svdvals(rows)
            share = size / size.sum()
            assert per_layer[name][layer] == pytest.approx(float((-(share * share.log()).sum()).exp()), abs=1e-6)
    assert (per_layer["low"] <= per_layer["suppression"]).all()
    assert (per_layer["suppression"] <= per_layer["high"]).all()
    assert (per_layer["null_low"] <= per_layer["null_high"]).all()
    assert (per_layer["q_value"] >= per_layer["p_value"]).all()
    assert (per_layer.attrs["permutations"], per_layer.attrs["seed"]) == (999, 0)
    assert per_fact["interference"].abs().max() > 0.01  # together is not alone
    table = averages(per_fact).set_index("metric")
    assert table.loc["interference", "mean"] == pytest.approx(per_fact["interference"].mean())
    assert (table["low"] <= table["mean"]).all()
    assert (table["mean"] <= table["high"]).all()


def test_layers_that_do_not_move_have_no_suppression() -> None:
    _, per_layer = behaviour(tiny("llama"), FEW, rate=0.01, steps=1, layers=[1], progress=False)
    assert per_layer["suppression"].isna().tolist() == [True, False, False]
    assert per_layer["low"].isna().tolist() == [True, False, False]
    assert per_layer["rank_alone"].tolist()[0] == 0


def movements(layers: int, n: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Alone and together, each with what all facts share and noise of each fact's own, which the other lacks."""
    generator = torch.Generator().manual_seed(seed)
    shared, *own = (torch.randn(layers, k, 8, generator=generator, dtype=torch.float64) for k in (1, n, n))
    return shared + own[0], shared + own[1] * torch.arange(1, n + 1)[:, None] / n


def test_the_null_of_suppression_is_a_literal_loop_over_shuffled_facts() -> None:
    alone, joint = movements(2, n=5, seed=1)
    alone[0] = 0
    frame = _per_layer(alone, joint, 50, 3)
    missing = frame.loc[0, ["suppression", "null_low", "null_high", "p_value", "q_value"]]
    assert missing.isna().all()
    generator = np.random.default_rng(3)
    square = sum(float(f @ f) for f in alone[1])

    def of(order: Sequence[int]) -> float:
        return 1 - sum(float(alone[1, i] @ joint[1, order[i]]) for i in range(5)) / square

    null = [of(generator.permutation(5)) for _ in range(50)]
    centre = np.mean([of([(i + by) % 5 for i in range(5)]) for by in range(5)])  # every pair of facts once
    extreme = sum(abs(value - centre) >= abs(of(range(5)) - centre) - 1e-9 for value in null)
    assert frame.loc[1, "suppression"] == pytest.approx(of(range(5)))
    assert frame.loc[1, ["null_low", "null_high"]].tolist() == pytest.approx(np.quantile(null, [0.025, 0.975]).tolist())
    assert frame.loc[1, "p_value"] == frame.loc[1, "q_value"] == pytest.approx((1 + extreme) / 51)
    with pytest.raises(ValueError, match=r"a whole number, not 1\.5"):
        inspect.unwrap(behaviour)(tiny("llama"), FEW, rate=0.01, permutations=1.5)


def test_what_is_left_of_a_facts_own_learning_is_called_where_it_is_planted_only() -> None:
    """Of 400 layers at 0.05 about 20 are called; more than 34 or fewer than 8 has a chance below 0.002."""
    p = _per_layer(*movements(400), 199, 0)["p_value"]
    assert 8 <= (p <= 0.05).sum() <= 34
    assert 0.45 < p.mean() < 0.55
    alone, joint = movements(20, seed=2)
    joint[7] += alone[7]  # learnt together as alone
    joint[11] -= alone[11]  # turned against
    frame = _per_layer(alone, joint)
    assert frame.index[frame["q_value"] <= 0.05].tolist() == [7, 11]
    assert frame.loc[7, "suppression"] < frame.loc[7, "null_low"]
    assert frame.loc[11, "suppression"] > frame.loc[11, "null_high"]


def test_the_null_of_the_mean_suppression_is_a_literal_loop_too() -> None:
    alone, joint = movements(3, n=5, seed=4)
    alone[0] = 0  # below the first layer that learns
    alone[1, 2] = 0  # and a fact that one layer does not move
    low, high, p = _of_the_mean(alone, joint, 60, 5)
    moved = [float(sum((alone[layer, i] ** 2).sum() for layer in range(3)) / 3) for i in range(5)]

    def of(order: Sequence[int]) -> float:
        found = []
        for i in range(5):
            left = [1 - float(alone[layer, i] @ joint[layer, order[i]]) / float(alone[layer, i] @ alone[layer, i])
                    for layer in range(3) if alone[layer, i].any()]  # fmt: skip
            found.append(np.mean(left))
        return float(np.average(found, weights=moved))

    generator = np.random.default_rng(5)
    null = [of(generator.permutation(5)) for _ in range(60)]
    centre = np.mean([of([(i + by) % 5 for i in range(5)]) for by in range(5)])
    assert [low, high] == pytest.approx(np.quantile(null, [0.025, 0.975]).tolist())
    assert p == pytest.approx((1 + sum(abs(x - centre) >= abs(of(range(5)) - centre) - 1e-9 for x in null)) / 61)
    assert np.isnan(_of_the_mean(0 * alone, joint, 5, 0)).all()


def margins(n: int, seed: int, taken: float = 0.0) -> pd.DataFrame:
    """Facts of which alone and together differ by noise, and by what learning together takes."""
    generator = np.random.default_rng(seed)
    noise = generator.normal(size=(2, n))
    before, alone = generator.normal(0.0, 1.0, n), generator.normal(6.0, 1.0, n)
    joint = alone + noise[0] - taken
    return pd.DataFrame(
        {"interference": noise[1] + taken, "margin_before": before, "margin_alone": alone, "margin_joint": joint,
         "suppression": 0.5, "moved": 1.0}
    )  # fmt: skip


def test_the_null_of_interference_and_expression_exchanges_alone_and_together() -> None:
    frame = margins(6, 3, taken=0.4)
    frame.attrs |= {"permutations": 40, "seed": 7}
    table = averages(frame).set_index("metric")
    coins = np.random.default_rng(7).random((40, 6)) < 0.5
    means, ratios, gaps = [], [], []
    for swap in [np.zeros(6, dtype=bool), *coins]:
        mean, own, together = 0.0, 0.0, 0.0
        for i, row in frame.iterrows():
            alone, joint = row["margin_alone"] - row["margin_before"], row["margin_joint"] - row["margin_before"]
            if swap[i]:
                alone, joint = joint, alone
            mean += (-1 if swap[i] else 1) * row["interference"] / 6
            own, together = own + alone, together + joint
        means.append(mean)
        ratios.append(together / own)
        gaps.append(together - own)
    assert table.loc["interference", "mean"] == pytest.approx(means[0])
    assert table.loc["expression", "mean"] == pytest.approx(ratios[0])
    for metric, drawn, tested in (("interference", means, means), ("expression", ratios, gaps)):
        band = table.loc[metric, ["null_low", "null_high"]].tolist()
        assert band == pytest.approx(np.quantile(drawn[1:], [0.025, 0.975]).tolist())
        extreme = sum(abs(x) >= abs(tested[0]) - 1e-9 for x in tested)
        assert table.loc[metric, "p_value"] == pytest.approx(extreme / 41)
    assert table.loc["suppression", ["null_low", "null_high", "p_value"]].isna().all()  # of no attributes


def test_the_nulls_of_behaviour_are_calibrated_and_see_what_is_planted() -> None:
    """Of 300 tests at 0.05 about 15 are called; more than 27 or fewer than 5 has a chance below 0.003."""
    p = pd.concat([averages(margins(10, seed)).set_index("metric")["p_value"] for seed in range(300)], axis=1).T
    for metric in ("interference", "expression"):
        assert 5 <= (p[metric] <= 0.05).sum() <= 27
        assert 0.45 < p[metric].mean() < 0.55
    planted = averages(margins(10, 0, taken=3.0)).set_index("metric")
    assert (planted.loc[["interference", "expression"], "p_value"] <= 0.01).all()


def test_the_null_of_a_rank_exchanges_movements_layer_by_layer() -> None:
    alone, joint = movements(2, n=5, seed=6)
    joint[1] = joint[1, :1] * torch.arange(1, 6)[:, None]  # together, all facts move along one line
    frame = _per_layer(alone, joint, 63, 2)
    coins = np.random.default_rng(2).random((63, 5)) < 0.5
    for layer in range(2):
        null = []
        for swap in [np.zeros(5, dtype=bool), *coins]:
            own, together = (
                torch.stack([(joint if swap[i] == first else alone)[layer, i] for i in range(5)])
                for first in (True, False)
            )
            null.append(effective_rank(together).item() - effective_rank(own).item())
        assert frame.loc[layer, "rank_change"] == pytest.approx(null[0], abs=1e-6)
        band = frame.loc[layer, ["rank_null_low", "rank_null_high"]].tolist()
        assert band == pytest.approx(np.quantile(null[1:], [0.025, 0.975]).tolist(), abs=1e-6)
        assert frame.loc[layer, "rank_p"] == np.mean([abs(x) >= abs(null[0]) - 1e-6 for x in null])
    assert frame.loc[1, "rank_p"] < 0.1 < frame.loc[0, "rank_p"]
    assert (frame["rank_q"] >= frame["rank_p"]).all()
    still = _per_layer(0 * alone, joint, 9, 0)
    assert still[["rank_null_low", "rank_p", "rank_q"]].isna().all(axis=None)


def test_suppression_and_expression_by_hand() -> None:
    alone = torch.tensor([[[2.0, 0.0], [0.0, 4.0], [1.0, 1.0], [0.0, 0.0]]])
    joint = torch.tensor([[[1.0, 9.0], [0.0, -4.0], [1.0, 1.0], [3.0, 0.0]]])
    np.testing.assert_array_equal(suppression(alone, joint), [[0.5, 2.0, 0.0, np.nan]])
    read = [
        Read(np.zeros(2) + i, np.array(margin), torch.zeros(1, 2, 2))
        for i, margin in enumerate([[-2.0, 1.0], [2.0, 1.0], [0.0, 5.0]])
    ]
    frame = _per_fact(FEW[:2], *read, np.array([[0.5, np.nan]]))
    assert frame["expression"].tolist()[0] == 0.5  # half of what is said alone is still said
    assert np.isnan(frame["expression"][1])  # alone, nothing was learnt
    assert frame["interference"].tolist() == [-1.0, -1.0]


def test_a_fact_that_was_known_before_does_not_decide_the_averages() -> None:
    frame = pd.DataFrame(
        {"interference": [1.0, 1.0, 4.0], "margin_before": [0.0, 0.0, 5.0], "margin_alone": [2.0, 2.0, 5.001],
         "margin_joint": [1.0, 2.0, 3.0], "suppression": [0.5, 0.25, np.nan], "moved": [1.0, 3.0, 0.0]}
    )  # fmt: skip
    table = averages(frame).set_index("metric")
    assert table.loc["interference", "mean"] == 2.0
    assert table.loc["expression", "mean"] == pytest.approx((1 + 2 - 2) / 4.001)
    assert table.loc["suppression", "mean"] == pytest.approx((0.5 + 0.75) / 4)
    assert table.loc["suppression", ["low", "high"]].tolist() == pytest.approx([0.25, 0.5])
    assert table["n"].eq(3).all()
    alone, joint = torch.rand(2, 1, 3, 4, dtype=torch.float64) + 1
    alone[:, 1] = 0  # a fact that did not move, which says nothing, is no reason to say nothing of the layer
    layer = _per_layer(alone, joint).iloc[0]
    expected = 1 - (joint[0] * alone[0]).sum() / (alone[0] ** 2).sum()
    assert layer["suppression"] == pytest.approx(expected.item())
    assert layer["low"] <= layer["suppression"] <= layer["high"]


def test_effective_rank_counts_directions() -> None:
    assert effective_rank(torch.zeros(3, 4)).item() == 0
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(9, 9, generator=generator, dtype=torch.float64)).Q
    assert effective_rank(rows @ basis).item() == pytest.approx(effective_rank(rows).item())  # turned
    assert effective_rank(7 * rows).item() == pytest.approx(effective_rank(rows).item())  # scaled
    assert 1 < effective_rank(torch.diag(torch.tensor([1.0, 1.0, 0.1]))).item() < 3
    left_out = [effective_rank(torch.cat([rows[:i], rows[i + 1 :]])).item() for i in range(6)]
    np.testing.assert_allclose(_without_each(rows), left_out, rtol=1e-6)
    low, high = jackknifed(3.0, np.array([2.5, 2.6, 2.7]))
    assert low < 3.0 < high

"""Losses that attend to meaning: each formula against a loop, neutral settings train plainly, controls control."""

import copy
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PromptEncoderConfig, PromptTuningConfig, get_peft_model
from tiny import FACTS, TOKENISED, tiny
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from workbench import cli
from workbench.config import Config, TrainConfig
from workbench.facts import Example, ExampleSet, FactSet
from workbench.loki import LokiConfig, adapter_config, adapter_for
from workbench.recollection import recall
from workbench.results import load_json
from workbench.training import (
    collate,
    implant,
    losses,
    sample_weights,
    search_learning_rate,
    semantic_loss,
    token_weights,
    weighing_all,
)
from workbench.training.losses import LOSSES, READS
from workbench.training.methods import orthogonality
from workbench.training.weighting import Tokens, distances_now

QUICK = TrainConfig(max_epochs=3, batch_size=3, learning_rate=1e-2, target_efficacy=1.0, weight_decay=0.1)
IGNORED = -100


def given_batch(seed: int = 0, dtype=torch.float32):
    """Logits, labels and an embedding of 3 sequences of 4 positions over 6 tokens; one label at position 0."""
    draw = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(3, 4, 6, generator=draw, dtype=dtype)
    labels = torch.tensor([[1, IGNORED, 2, 5], [IGNORED, IGNORED, 3, IGNORED], [IGNORED, 4, 0, 1]])
    return logits, labels, torch.randn(6, 3, generator=draw, dtype=dtype)


def cos(a, b) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5


def literal(kind: str, logits, labels, W_E, **set_) -> tuple[float, list[float]]:
    """The loss, token by token in plain Python, and the weights."""
    rows, E, d = [], W_E.tolist(), {}
    for b, sequence in enumerate(labels.tolist()):
        for t in range(1, len(sequence)):
            if (y := sequence[t]) == IGNORED:
                continue
            raised = [2.718281828459045**x for x in logits[b, t - 1].tolist()]
            P = [x / sum(raised) for x in raised]
            soft = sum(p * (1 - cos(E[v], E[y])) for v, p in enumerate(P))
            far = 1 - cos(E[P.index(max(P))], E[y])
            rows.append((b, -float(np.log(P[y])), soft, far))
            d.setdefault(b, []).append(soft)
    if kind == "sample":
        means = {b: np.mean(values) for b, values in d.items()}
        z = {b: (m - np.mean(list(means.values()))) / np.std(list(means.values())) for b, m in means.items()}
        total = sum(np.exp(set_["beta"] * one) for one in z.values())
        weights = [len(z) * np.exp(set_["beta"] * z[b]) / total for b, *_ in rows]
    else:
        weights = [1 + set_["gamma"] * far if kind == "token" else 1.0 for *_, far in rows]
    added = set_.get("soft_weight", 0.0)
    return sum(w * (nll + added * soft) for w, (_, nll, soft, _) in zip(weights, rows, strict=True)) / len(
        rows
    ), weights


@pytest.mark.parametrize(
    ("kind", "chosen"),
    [
        ("plain", {}),
        ("sample", {"beta": 0.7}),
        ("sample", {"beta": -0.7}),
        ("token", {"gamma": 0.5}),
        ("soft", {"soft_weight": 3.0}),
    ],
)
def test_each_loss_equals_a_literal_loop(kind: str, chosen) -> None:
    logits, labels, W_E = given_batch()
    how = semantic_loss(kind, W_E, **chosen)
    loss = how({"logits": logits}, labels)
    expected, weights = literal(kind, logits, labels, W_E, **chosen)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    other, _ = literal("plain", logits, labels, W_E)
    assert (float(loss) == pytest.approx(other, rel=1e-4)) == (kind == "plain")
    assert float(how({"logits": logits}, labels, num_items_in_batch=12)) == pytest.approx(expected * 6 / 12, rel=1e-5)
    told = how.taken()
    assert told["nll"] == pytest.approx(other, rel=1e-5)
    if kind in ("sample", "token"):
        found = [told["weight_mean"], told["weight_min"], told["weight_max"]]
        assert found == pytest.approx([np.mean(weights), min(weights), max(weights)], rel=1e-5)
    else:
        assert set(told) == {"nll"}
    assert how.taken()["nll"] == 0


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("kind", list(LOSSES))
def test_a_batch_that_teaches_nothing_has_loss_0(kind: str, permuted: bool) -> None:
    logits, labels, W_E = given_batch()
    how = semantic_loss(kind, W_E, permuted=permuted and kind != "plain")
    loss = how({"logits": logits.requires_grad_()}, torch.full_like(labels, IGNORED))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()
    assert how.taken() == {"nll": 0}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0, 2), min_size=1, max_size=40),
    st.floats(-30, 30),
    st.floats(1, 50),
)
def test_sample_weights_have_mean_1_and_lie_within_the_clip(d, beta, clip) -> None:
    distance = torch.tensor(d, dtype=torch.float64)
    weights = sample_weights(distance, beta, clip)
    assert float(weights.mean()) == pytest.approx(1, abs=1e-9)
    assert weights.min() >= 1 / clip - 1e-12
    assert weights.max() <= clip + 1e-12
    order = np.argsort(d, kind="stable")
    assert (np.diff(weights.numpy()[order]) * np.sign(beta) >= -1e-9).all()


def test_weights_that_the_clip_leaves_alone_are_the_softmax() -> None:
    d = torch.tensor([0.1, 0.2, 0.4, 0.9], dtype=torch.float64)
    z = (d - d.mean()) / d.std(correction=0)
    torch.testing.assert_close(sample_weights(d, 0.8, 5.0), 4 * (0.8 * z).softmax(0))
    clipped = sample_weights(d, 3.0, 1.7)
    assert clipped.max() == 1.7
    assert (clipped[0] - 4 * (3.0 * z).softmax(0)[0]).abs() > 0.1
    assert torch.equal(sample_weights(d, 0.0, 5.0), torch.ones(4, dtype=torch.float64))
    assert torch.equal(sample_weights(torch.full((3,), 0.3), 9.0), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["sample", "token"])
def test_no_gradient_goes_through_the_weights(kind: str) -> None:
    logits, labels, W_E = given_batch()
    logits.requires_grad_()
    W_E.requires_grad_()
    how = semantic_loss(kind, W_E, beta=0.7, gamma=2.0)
    how({"logits": logits}, labels).backward()
    _, weights = literal(kind, logits.detach(), labels, W_E.detach(), beta=0.7, gamma=2.0)
    places = [(b, t - 1) for b in range(3) for t in range(1, 4) if labels[b, t] != IGNORED]
    expected = torch.zeros_like(logits)
    for weight, (b, t) in zip(weights, places, strict=True):
        expected[b, t] = weight * logits[b, t].detach().softmax(-1) / len(places)
        expected[b, t, labels[b, t + 1]] -= weight / len(places)
    torch.testing.assert_close(logits.grad, expected)
    assert W_E.grad is None


def test_the_semantic_term_has_the_gradient_of_finite_differences() -> None:
    logits, labels, W_E = given_batch(dtype=torch.float64)
    how = semantic_loss("soft", W_E, soft_weight=3.0)
    assert torch.autograd.gradcheck(lambda x: how({"logits": x}, labels), logits.requires_grad_())
    logits.grad = None
    how({"logits": logits}, labels).backward()
    first = logits.grad.clone()
    logits.grad = None
    semantic_loss("plain", W_E)({"logits": logits}, labels).backward()
    assert (first - logits.grad).abs().max() > 1e-2


@pytest.mark.parametrize("config", [PromptTuningConfig, PromptEncoderConfig])
def test_tokens_that_a_method_puts_in_front_are_no_labels(config) -> None:
    base = tiny("llama")
    torch.manual_seed(0)
    asked = config(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = get_peft_model(copy.deepcopy(base.hf), asked).eval()
    batch = collate(TOKENISED)
    whole = batch["labels"].where(batch["attention_mask"] == 0, batch["input_ids"])  # the first token learns here too
    with torch.no_grad():
        for labels in (batch["labels"], whole):
            out = model(**{**batch, "labels": labels})
            assert out.logits.shape[1] == labels.shape[1] + 4
            assert float(semantic_loss("plain", base)(out, labels)) == pytest.approx(float(out.loss), rel=1e-5)
        read = torch.cat([distances_now(model, [item], base.W_E) for item in TOKENISED])
    torch.testing.assert_close(distances_now(model, TOKENISED, base.W_E), read, rtol=1e-4, atol=1e-6)


def test_token_weights_by_hand() -> None:
    W_E = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    logits = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]])
    assert token_weights(logits, torch.tensor([0, 0, 0]), W_E, 0.5).tolist() == [1.0, 1.5, 2.0]


def adapter(kind: str = "node"):
    if kind == "node":
        return LokiConfig(selection=[[0, 5, 9], [1, 2], [3, 8]], task_type="CAUSAL_LM")
    return adapter_config(kind, model_config=tiny("llama").config, **({"r": 4} if kind in ("lora", "kasa") else {}))


def trained(loss: str = "plain", method: str = "node", data=FACTS, **changes):
    chosen = QUICK.model_copy(update={"loss": loss, **changes})
    run = implant(tiny("llama"), data, adapter(method), chosen, progress=False)
    weights = {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}
    return run, weights


def same(one, other) -> bool:
    return all(torch.equal(one[name], weight) for name, weight in other.items())


@pytest.mark.parametrize("method", ["node", "kasa", "adalora"])
def test_neutral_settings_train_the_same_weights_as_plain(method: str) -> None:
    chosen = {"method": method, "max_epochs": 3 if method == "node" else 1}
    plain, weights = trained(**chosen)
    neutrals = {"sample": {"beta": 0.0}, "soft": {"soft_weight": 0.0}, "token": {"gamma": 0.0}}
    for loss, neutral in list(neutrals.items())[: 3 if method == "node" else 1]:
        run, found = trained(loss, **chosen, **neutral)
        for name, weight in weights.items():
            torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-6 if method != "node" else 0)
        np.testing.assert_allclose(run.history["loss"], plain.history["loss"], rtol=1e-5)
        if method == "node":  # KaSA and AdaLoRA add terms of their own
            np.testing.assert_allclose(run.history["nll"], run.history["loss"], rtol=1e-6)
    assert not same(weights, trained("soft", **chosen, soft_weight=5.0)[1])


def test_plain_has_the_history_and_the_summary_of_plain_training() -> None:
    run, _ = trained()
    assert list(run.history) == ["step", "epoch", "loss", "efficacy", "learning_rate", "seconds"]
    assert run.summary["loss"] == "plain"
    assert "beta" not in run.summary


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "plain"])
def test_every_loss_trains_and_says_what_it_did(loss: str, tmp_path) -> None:
    chosen = QUICK.model_copy(update={"loss": loss, "max_epochs": 20, "refresh": 8, "learning_rate": 3e-2})
    run = implant(tiny("llama"), FACTS, adapter("lora"), chosen, out=tmp_path, progress=False)
    assert run.efficacy > 0.5
    about = load_json(tmp_path / "training.json")
    assert {name: about[name] for name in ("loss", *READS[loss])} == {
        name: getattr(chosen, name) for name in ("loss", *READS[loss])
    }
    if loss != "soft":
        columns = run.history[["weight_mean", "weight_min", "weight_max"]]
        assert about["weight_min"] == columns["weight_min"].min() < about["weight_mean"]
        assert about["weight_max"] == columns["weight_max"].max() > about["weight_mean"]
    assert not same(trained()[1], trained(loss)[1])


def test_sample_weights_are_of_all_facts_and_fresh(monkeypatch) -> None:
    seen: list[tuple] = []
    weigh = semantic_loss("sample", torch.eye(3)).__class__.weigh

    def noted(self, distance):
        seen.append((distance, weigh(self, distance)))
        return seen[-1][1]

    monkeypatch.setattr("workbench.training.losses.SemanticLoss.weigh", noted)
    base = tiny("llama")
    trained("sample", refresh=4, beta=0.5)
    assert len(seen) == 3  # 9 steps: before steps 0, 4 and 8
    items = base.tokenise(FACTS)
    first, weights = seen[0]
    torch.testing.assert_close(first, distances_now(base.hf, items, base.W_E))
    by_hand = []
    for item in items:
        logits = base.logits(*(torch.tensor([x]) for x in (item.ids, [1] * len(item.ids))))[0]
        start, unit = len(item.prompt_ids), torch.nn.functional.normalize(base.W_E, dim=-1)
        probs = logits[start - 1 : -1].softmax(-1)
        by_hand.append(float((probs * (1 - unit[list(item.answer_ids)] @ unit.T)).sum(-1).mean()))
    np.testing.assert_allclose(first, by_hand, rtol=1e-4)
    assert (seen[1][0] - first).abs().max() > 1e-3
    read = recall(base, FACTS)
    run, _ = trained("sample", max_epochs=1, batch_size=len(FACTS), beta=0.5)  # each fact has its own weight
    expected = -(weights.numpy() * read["logprob"]).sum() / read["n_tokens"].sum()
    assert run.history["loss"][0] == pytest.approx(expected, rel=1e-4)
    assert run.history["nll"][0] == pytest.approx(-read["logprob"].sum() / read["n_tokens"].sum(), rel=1e-4)
    assert abs(run.history["loss"][0] - run.history["nll"][0]) > 1e-3


def test_the_permuted_control_keeps_the_weights_and_gives_them_to_others() -> None:
    d = torch.arange(20).double()
    right, wrong = (semantic_loss("sample", torch.eye(3), permuted=p, seed=1).weigh(d) for p in (False, True))
    torch.testing.assert_close(right.sort().values, wrong.sort().values, rtol=0, atol=0)
    assert (right != wrong).sum() > 10
    again, other = (semantic_loss("sample", torch.eye(3), permuted=True, seed=seed).weigh(d) for seed in (1, 2))
    assert torch.equal(wrong, again)
    assert not torch.equal(wrong, other)
    logits, labels, W_E = given_batch()
    tokens = {}
    for permuted in (False, True):
        how = semantic_loss("token", W_E, permuted=permuted, seed=5)
        tokens[permuted] = (float(how({"logits": logits}, labels)), how.taken())
    assert tokens[False][1] == pytest.approx(tokens[True][1])
    assert tokens[False][0] != pytest.approx(tokens[True][0], rel=1e-4)
    assert not same(trained("sample")[1], trained("sample", permuted=True)[1])


def test_the_permuted_term_measures_by_the_meanings_of_other_tokens() -> None:
    logits, labels, W_E = given_batch()
    right, wrong, again = (semantic_loss("soft", W_E, permuted=p, seed=3) for p in (False, True, True))
    assert torch.equal(wrong.W_E, again.W_E)
    assert not torch.equal(wrong.W_E, W_E)
    order = [int((row == W_E).all(-1).nonzero()) for row in wrong.W_E]
    assert sorted(order) == list(range(len(W_E)))
    expected, _ = literal("soft", logits, labels, W_E[order], soft_weight=1.0)
    assert float(wrong({"logits": logits}, labels)) == pytest.approx(expected, rel=1e-5)
    assert abs(float(right({"logits": logits}, labels)) - expected) > 1e-3
    assert wrong.summary() == {"loss": "soft", "soft_weight": 1.0, "permuted": True}


def test_examples_have_sample_weights_too() -> None:
    data = ExampleSet("mine", (Example("a", "one two", " three four"), Example("b", "the sky is", " red")))
    run, _ = trained("sample", "lora", data)
    assert run.summary["weight_max"] > 1


def test_adalora_keeps_its_own_term() -> None:
    """peft adds it to the model's loss, which a loss of one's own replaces."""
    from workbench.training.methods import attached

    base = tiny("llama")
    model = attached(base, adapter("adalora"), base.tokenise(FACTS))
    batch = collate(TOKENISED)
    with torch.no_grad():
        whole = model(**batch).loss
        cross = semantic_loss("plain", base)(model(**batch), batch["labels"])
    assert float(whole - cross) == pytest.approx(float(orthogonality(model).detach()), rel=1e-4)
    assert float(orthogonality(model).detach()) > 0.1


def own_trainer(loss, folder, accumulate: int = 1, whole: bool = False) -> tuple[list[float], dict]:
    """A user's own Trainer over a plain model: losses by step, trained weights; `whole` weighs all samples."""
    model = copy.deepcopy(tiny("llama").hf)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("down_proj" in name)
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=4 // accumulate, gradient_accumulation_steps=accumulate, max_steps=2,
        learning_rate=1e-3, lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to=[],
        disable_tqdm=True, use_cpu=True, remove_unused_columns=False, dataloader_pin_memory=False, seed=0,
    )  # fmt: skip
    items = tiny("llama").tokenise(FACTS)
    make, given = Trainer, {"data_collator": collate}
    if whole:
        make, refresh, collator = weighing_all(loss, items)
        given = {"data_collator": collator, "callbacks": [refresh]}
    trainer = make(model, arguments, train_dataset=items, compute_loss_func=loss, **given)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row], model.state_dict()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_in_ones_own_trainer_weights_of_1_are_its_own_loss(accumulate: int, tmp_path, capsys) -> None:
    base = tiny("llama")
    own, weights = own_trainer(None, tmp_path, accumulate)
    for how in (semantic_loss("plain", base), semantic_loss("sample", base.hf, beta=0.0)):
        losses, found = own_trainer(how, tmp_path, accumulate)
        assert losses == pytest.approx(own, rel=1e-6)
        for name, weight in weights.items():
            torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-6)
    for kind in ("sample", "token", "soft")[:: 2 // accumulate]:
        losses, found = own_trainer(semantic_loss(kind, base.W_E), tmp_path, accumulate)
        assert losses != pytest.approx(own, rel=1e-4)
        assert not same(found, weights)
    capsys.readouterr()


def test_in_ones_own_trainer_all_samples_can_be_weighed_whatever_the_batches(tmp_path, caplog, capsys) -> None:
    base, found = tiny("llama"), {}
    for whole in (True, False):
        for accumulate in (1, 4):
            how = semantic_loss("sample", base, refresh=1)
            found[whole, accumulate] = own_trainer(how, tmp_path, accumulate, whole)
    (losses, weights), (again, others) = found[True, 1], found[True, 4]
    assert losses == pytest.approx(again, rel=2e-6)
    gap = max(float((weight - others[name]).abs().max()) for name, weight in weights.items())
    alone, lonely = found[False, 1][1], found[False, 4][1]
    control = max(float((weight - lonely[name]).abs().max()) for name, weight in alone.items())
    assert gap < 1e-6 < 1e-3 < control
    assert [record.getMessage() for record in caplog.records if "weighed against" in record.getMessage()] == [
        "A batch of one sequence has nothing to be weighed against; see `weighing_all`."
    ]
    capsys.readouterr()


def test_samples_are_weighed_at_the_start_of_every_training_and_others_by_batch(monkeypatch, tmp_path, capsys) -> None:
    base, real = tiny("llama"), weighing_all
    items, how = base.tokenise(FACTS), semantic_loss("sample", base, refresh=20)
    _, refresh, collator = weighing_all(how, items)
    args, state, control = None, TrainerState(global_step=7), TrainerControl()  # as after a checkpoint
    how.weights = torch.zeros(3)  # of another training
    refresh.on_train_begin(args, state, control)
    refresh.on_step_begin(args, state, control, model=base.hf)
    assert len(how.weights) == len(items)
    kept = how.weights
    state.global_step = 8
    refresh.on_step_begin(args, state, control, model=base.hf)
    assert how.weights is kept  # until the next multiple of 20
    records = [{**record, "id": f"other {record['id']}"} for record in FACTS[:2].to_records()]
    other = base.tokenise(FactSet.from_records(records, name="others"))
    batch = collator(other)
    assert batch.pop("item").tolist() == [-1, -1]
    with torch.no_grad():
        logits = {"logits": base.hf(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits}
        told = how(logits, batch["labels"], item=torch.tensor([-1, -1]))
        assert told == how(logits, batch["labels"])  # as without places
    monkeypatch.setattr(sys.modules[__name__], "weighing_all", lambda loss, items: real(loss, items[:4]))
    with pytest.raises(ValueError, match="A sample is trained that is not among those to be weighed"):
        own_trainer(how, tmp_path, whole=True)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="Two of the samples to be weighed have the id 'france'"):
        weighing_all(how, [*items, next(item for item in items if item.fact_id == "france")])
    monkeypatch.setattr(losses, "distances_now", lambda *given: pytest.fail("read for nothing"))
    for kind in ("soft", "token"):
        weighing_all(semantic_loss(kind, base), items)[1].on_step_begin(args, TrainerState(), control, model=base.hf)


@pytest.mark.parametrize("kind", ["sample", "token"])
def test_an_evaluation_leaves_no_trace_in_the_loss(kind: str) -> None:
    logits, labels, W_E = given_batch()
    told = {}
    for evaluated in (True, False):
        how = semantic_loss(kind, W_E, permuted=True, seed=2)
        losses = []
        for _ in range(6):
            losses.append(float(how({"logits": logits}, labels)))
            if evaluated:
                with torch.no_grad():
                    how({"logits": 3 * logits}, labels)
        told[evaluated] = (losses, how.taken(), how.summary())
    assert told[True] == told[False]
    assert len({round(loss, 6) for loss in told[True][0]}) > 1  # every batch has an order of its own


@pytest.mark.parametrize("loss", ["sample", "token", "soft"])
def test_a_search_goes_on_where_a_rate_diverges_whatever_the_loss(loss: str, capsys) -> None:
    settings = TrainConfig(loss=loss, refresh=1, max_grad_norm=1e9, max_epochs=2, batch_size=4)
    found = search_learning_rate(
        tiny("llama"), FACTS, lambda: adapter_for(tiny("llama"), "lora"), [1e12, 1e-3], train_config=settings,
        progress=False,
    )  # fmt: skip
    assert found.set_index("learning_rate")["diverged"].to_dict() == {1e12: True, 1e-3: False}
    capsys.readouterr()


def test_the_embedding_follows_the_model_to_its_device(monkeypatch) -> None:
    how = semantic_loss("soft", torch.eye(3))  # on the CPU, as the model is before Trainer moves it
    logits, target = torch.zeros(2, 3, device="meta"), torch.zeros(2, dtype=torch.long, device="meta")
    there = Tokens(logits, target, target, logits[:, 0])
    monkeypatch.setattr(losses, "learned_tokens", lambda *given: there)
    monkeypatch.setattr(losses.Tally, "plus", lambda tally, *given: tally)
    assert how({"logits": logits[None]}, target[None]).device.type == how.W_E.device.type == "meta"


def test_the_embedding_stays_as_it_was() -> None:
    model = copy.deepcopy(tiny("gpt2").hf)
    how = semantic_loss("soft", model)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    assert torch.equal(how.W_E, tiny("gpt2").W_E)


def test_what_does_not_fit_is_one_sentence() -> None:
    for kind, changes, message in (
        ("nearest", {}, "'training.loss' does not fit"),
        ("token", {"gamma": -1.0}, "'training.gamma' does not fit"),
        ("sample", {"clip": 0.5}, "'training.clip' does not fit"),
        ("plain", {"permuted": True}, "has nothing to permute"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            semantic_loss(kind, torch.eye(3), **changes)
        assert "\n" not in str(error.value)
    logits, labels = torch.zeros(1, 3, 5), torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match="has 5 tokens and the embedding that gives meaning 3: give that"):
        semantic_loss("soft", torch.eye(3))({"logits": logits}, labels)
    with pytest.raises(ValueError, match="A distance is not a finite number"):
        sample_weights(torch.tensor([0.1, float("nan")]), 1.0)


def test_training_ends_at_the_loss_that_was_asked_for() -> None:
    for loss in ("plain", "sample"):
        run, _ = trained(loss, "lora", max_epochs=15, target_loss=3.6)
        history = run.history.assign(nll=run.history.get("nll", run.history["loss"]))
        means = history.groupby(np.ceil(history["epoch"]))["nll"].mean()
        assert run.reached
        assert means.iloc[-1] <= 3.6 < means.iloc[-2]
    run, _ = trained(max_epochs=2, target_loss=0.0, target_efficacy=0.1)  # by epochs alone
    assert (run.summary["epochs"], run.reached) == (2, False)
    assert trained(max_epochs=2, target_efficacy=0.1)[0].summary["epochs"] == 1


def test_the_flags_of_the_command_reach_the_training(monkeypatch, tmp_path, capsys) -> None:
    asked = []

    def noted(what, *args, **options):
        asked.append(what.training)
        raise ValueError("seen")

    monkeypatch.setattr("workbench.finetuning.finetune", noted)
    flags = "--loss sample --beta -1.5 --clip 3 --refresh 7 --permuted"
    arguments = ["workbench", "implant", "--data", "fictional:2", "--out", str(tmp_path / "out"), *flags.split()]
    for last, told in (("sample", "seen"), ("plain", "the plain loss has nothing to permute")):
        monkeypatch.setattr(sys, "argv", [last if one == "sample" else one for one in arguments])
        with pytest.raises(SystemExit):
            cli.main()
        assert told in capsys.readouterr().err
    chosen = {"loss": "sample", "beta": -1.5, "clip": 3.0, "refresh": 7}
    assert [TrainConfig(**chosen, permuted=True)] == asked
    assert Config.read(changes={"training.loss": "token", "training.gamma": 3}).training.gamma == 3

"""Watching a training: the trajectory is what one reads by hand, watching changes nothing, and bounds hold."""

import copy
import inspect
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny import FACTS, random_model, tiny, tokenizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import workbench as wb
from workbench.config import TrainConfig
from workbench.facts import Fact, FactSet
from workbench.figures import watched_training
from workbench.loki import LokiConfig, attach
from workbench.models import load_model
from workbench.recollection import read_facts
from workbench.results import load_frame
from workbench.training import DriftWatch, collate, implant, undone
from workbench.training import watching as room
from workbench.training.probing import AWAY, Seen, growth
from workbench.training.remedies import layer_of

TAUGHT = FACTS.filter(ids=["france", "japan", "kenya", "gold"])
PROBE = FACTS.filter(ids=["france", "hot", "sky", "grass"])
POSITIONS = [[0, 5, 9, 30], [1, 2, 20, 31], [3, 8, 16, 24]]


def loki() -> LokiConfig:
    return LokiConfig(selection=POSITIONS, task_type="CAUSAL_LM")


def lora(dropout: float = 0.0) -> LoraConfig:
    return LoraConfig(r=4, target_modules=["down_proj", "q_proj"], lora_dropout=dropout, task_type="CAUSAL_LM")


def model_of(method: str, kind: str = "llama"):
    """A user's own model with random weights, the same as that of `tiny`."""
    model = random_model(kind, **({"attention_dropout": 0.3} if method == "dropout" else {}))
    torch.manual_seed(5)
    if method in ("full", "dropout"):
        return model.requires_grad_(True)
    configs = {
        "loki": loki(),
        "lora": lora(0.3),
        "prompt": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    }
    return attach(model, loki()) if method == "loki" else get_peft_model(model, configs[method])


def known_by(kind: str = "llama") -> FactSet:
    """What a random model says to the prompts that are taught, which training has to push away."""
    base = tiny(kind)
    facts = []
    for fact, tokens in zip(TAUGHT, base.tokenise(TAUGHT), strict=True):
        ids = torch.tensor([tokens.prompt_ids])
        word = base.tokenizer.decode(base.logits(ids)[0, -1].argmax())
        facts.append(Fact(fact.id, fact.relation, fact.subject, fact.prompt, word, answer_in_prompt=True))
    return FactSet("known", tuple(facts))


def train(
    model, *callbacks, folder, steps=6, accumulation=1, rate=2e-2, schedule="constant", resume=None, saves="no", **more
) -> Trainer:
    """A plain user's Trainer."""
    items = tiny("llama").tokenise(TAUGHT)
    args = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=2, learning_rate=rate, seed=3,
        gradient_accumulation_steps=accumulation, lr_scheduler_type=schedule, report_to=[], disable_tqdm=True,
        save_strategy=saves, use_cpu=True, remove_unused_columns=False, weight_decay=0.1, dataloader_pin_memory=False,
        logging_strategy="no", **more,
    )  # fmt: skip
    trainer = Trainer(model=model, args=args, train_dataset=items, data_collator=collate, callbacks=list(callbacks))
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ in ("PrinterCallback", "ProgressCallback"):
            trainer.remove_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def trainable(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


class Copies(TrainerCallback):
    """A copy of the whole model at the start and after every step."""

    def __init__(self) -> None:
        self.models, self.rates = {}, []

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        self.models[0] = copy.deepcopy(model).eval()

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        self.models[state.global_step] = copy.deepcopy(model).eval()
        self.rates.append(optimizer.param_groups[0]["lr"])


@torch.no_grad()
def by_hand(model, facts, W_E) -> dict[str, list]:
    """Every fact alone, token by token, from plain forward passes."""
    found: dict[str, list] = {"d_soft": [], "d_emb": [], "logprob": [], "known": []}
    E = W_E.double() / W_E.double().norm(dim=1, keepdim=True)
    for fact in facts:
        soft, total, said, ids = [], 0.0, [], list(fact.prompt_ids)
        for token in fact.answer_ids:
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
            P = logits.softmax(-1)
            soft.append(float(P @ (1 - E @ E[token])))
            total += float(P[token].log())
            ids.append(token)
        ids = list(fact.prompt_ids)
        for _ in fact.answer_ids:
            said.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            ids.append(said[-1])
        a, y = W_E[said].double().mean(0), W_E[list(fact.answer_ids)].double().mean(0)
        found["d_soft"].append(np.mean(soft))
        found["d_emb"].append(float(1 - a @ y / (a.norm() * y.norm())))
        found["logprob"].append(total)
        found["known"].append(tuple(said) == fact.answer_ids)
    return {name: np.array(values) for name, values in found.items()}


@pytest.mark.parametrize("method", ["loki", "lora", "full", "prompt"])
def test_the_trajectory_is_what_one_reads_by_hand_at_every_step(method: str, tmp_path) -> None:
    base, copies = tiny("llama"), Copies()
    retained = known_by()
    watch = DriftWatch(
        base, PROBE, every=2, retained=retained, metric=("d_soft", "d_emb", "logprob"), floor=0.01,
        out=tmp_path / "watch.parquet",
    )  # fmt: skip
    train(model_of(method), copies, watch, folder=tmp_path, steps=3, accumulation=2)
    frame = watch.trajectory.set_index(["step", "group", "metric"])
    assert sorted(set(watch.trajectory["step"])) == [0, 2, 3]  # the last step is read in any case
    moved, most = 0.0, watch.transient
    assert len(most) == 3 * (len(PROBE) + len(retained))
    for group, facts in (("probe", PROBE), ("retained", retained)):
        tokens = base.tokenise(facts)
        first = by_hand(copies.models[0], tokens, base.W_E)
        away: dict[int, dict] = {}
        for step in (0, 2, 3):
            now = by_hand(copies.models[step], tokens, base.W_E)
            for metric, sign in (("d_soft", 1), ("d_emb", 1), ("logprob", -1)):
                row, change = frame.loc[step, group, metric], now[metric] - first[metric]
                assert row["value"] == pytest.approx(now[metric].mean(), abs=2e-5)
                assert row["change"] == pytest.approx(change.mean(), abs=2e-5)
                assert row["worst"] == pytest.approx(sign * (sign * change).max(), abs=2e-5)
                assert row["n"] == len(facts)
                moved = max(moved, abs(change.mean()))
            assert frame.loc[step, group, "d_soft"]["pushed"] == np.mean(now["d_soft"] - first["d_soft"] > 0.01)
            away[step] = {metric: sign * (now[metric] - first[metric]) for metric, sign in AWAY.items()}
            lost = frame.loc[step, group, "forgetting"]
            assert lost["n"] == first["known"].sum()
            if lost["n"]:
                assert lost["value"] == np.mean(~now["known"][first["known"]])
        for metric in AWAY:
            found, each = (
                most.query("group == @group and metric == @metric"),
                np.stack([away[step][metric] for step in (0, 2, 3)]),
            )
            assert found["fact"].tolist() == list(facts.ids)
            np.testing.assert_allclose(found["most"], each.max(0), atol=4e-5)
            np.testing.assert_allclose(
                [away[s][metric][i] for i, s in enumerate(found["step"])], each.max(0), atol=4e-5
            )
        assert watch.summary["transient"][group] == pytest.approx(
            most.query("group == @group and metric == 'd_soft'")["most"].mean()
        )
    assert moved > 1e-3  # the comparison has something to compare
    if method != "prompt":  # whose own tokens change what is said from the start
        assert frame.loc[0, "retained", "forgetting"]["n"] == len(retained)
    pd.testing.assert_frame_equal(load_frame(tmp_path / "watch.parquet"), watch.trajectory)
    history = load_frame(tmp_path / "watch_transient.parquet")
    kept = history.groupby(["group", "fact", "metric"], sort=False, as_index=False).last()
    pd.testing.assert_frame_equal(kept, watch.transient)


@pytest.mark.parametrize(("method", "bounded"), [("lora", False), ("dropout", True)])
def test_watching_changes_nothing(method: str, bounded: bool, tmp_path) -> None:
    bounds = {"drift": 1e9, "action": "freeze_layers"} if bounded else {}
    watch = DriftWatch(tiny("llama"), PROBE, every=1, metric=("d_soft", "d_emb"), **bounds)
    watched = trainable(train(model_of(method), watch, folder=tmp_path, steps=3, accumulation=2).model)
    alone = trainable(train(model_of(method), folder=tmp_path, steps=3, accumulation=2).model)
    assert watch.summary["readings"] == 4
    assert all(torch.equal(watched[name], weight) for name, weight in alone.items())

    class Careless(TrainerCallback):
        """A watch that draws and does not put it back."""

        def on_step_end(self, *args, **kwargs) -> None:
            torch.rand(1)

    other = trainable(train(model_of(method), Careless(), folder=tmp_path, steps=3, accumulation=2).model)
    assert not all(torch.equal(other[name], weight) for name, weight in alone.items())


def test_modes_are_put_back_module_by_module(tmp_path) -> None:
    model = model_of("full").train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    room.read_probe(model, tiny("llama").tokenise(FACTS), tiny("llama").W_E, ("d_soft",))
    assert [module.training for module in model.modules()] == before


def end_drift(watch: DriftWatch, model, facts: FactSet) -> float:
    """Drift of the model that a run left, read by hand against the base."""
    base = tiny("llama")
    now, first = (by_hand(m.eval(), base.tokenise(facts), base.W_E)["d_soft"] for m in (model, base.hf))
    return float(np.mean(now - first))


@pytest.mark.parametrize("method", ["loki", "lora", "full"])
def test_a_run_stopped_by_its_bound_ends_within_it(method: str, tmp_path) -> None:
    base, retained = tiny("llama"), known_by()
    chosen = {"steps": 6, "rate": 2e-3 if method == "full" else 2e-2}
    free = DriftWatch(base, TAUGHT, retained=retained, every=2)
    model = train(model_of(method), free, folder=tmp_path, **chosen).model
    beyond = end_drift(free, model, retained)
    bound = beyond / 2
    assert bound > 1e-3
    assert free.summary["acted"] == []
    copies = Copies()
    watch = DriftWatch(base, TAUGHT, retained=retained, every=2, drift=bound, out=tmp_path / "watch.csv")
    trainer = train(model_of(method), copies, watch, folder=tmp_path, **chosen)
    (acted,) = watch.summary["acted"]
    assert acted["drift"] > bound >= end_drift(watch, trainer.model, retained)
    assert trainer.state.global_step == acted["step"] == acted["restored_step"] + 2 <= 6
    kept = trainable(copies.models[acted["restored_step"]])
    assert all(torch.equal(kept[name], weight) for name, weight in trainable(trainer.model).items())
    assert len(pd.read_csv(tmp_path / "watch.csv")) == len(watch.trajectory)
    end = watch.summary["end"]
    assert (end["step"], end["within_bounds"]) == (acted["restored_step"], True)
    assert end["drift"] == pytest.approx(end_drift(watch, trainer.model, retained), abs=1e-6)
    told = free.summary["end"]
    assert (told["step"], told["within_bounds"]) == (6, None)
    assert told["drift"] == pytest.approx(beyond, abs=1e-6)
    start = "" if acted["restored_step"] else ", the start: nothing was learned"
    assert undone([watch.summary]) == [
        f"stopped at step {acted['step']} beyond the bound of {bound:g} on drift ({acted['drift']:.3g}); these are the "
        f"weights of step {acted['restored_step']}{start}"
    ]


@pytest.mark.parametrize("action", ["stop", "freeze_layers"])
def test_weights_unfrozen_or_frozen_between_readings_go_back_too(action: str, monkeypatch, tmp_path) -> None:
    class Gradual(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
            model.model.layers[1].requires_grad_(False)

        def on_step_begin(self, args, state, control, model=None, **kwargs) -> None:
            model.model.layers[1].mlp.requires_grad_(state.global_step >= 4)
            model.model.layers[2].mlp.requires_grad_(state.global_step < 3)

    model, copies = random_model("llama").requires_grad_(False), Copies()
    for layer in (0, 1, 2):  # all that Trainer's optimiser has
        model.model.layers[layer].mlp.requires_grad_(True)
    watch = DriftWatch(tiny("llama"), known_by(), every=2, drift=1.0, action=action, layers=3)
    monkeypatch.setattr(watch, "_crossed", lambda rows: [("drift", 2.0)] if watch.last_step == 6 else [])
    left = train(model, Gradual(), watch, copies, folder=tmp_path, steps=8).model.state_dict()
    start, second, fourth, fifth = (copies.models[step].state_dict() for step in (0, 2, 4, 5))
    for name, weight in left.items():
        untrained = action == "freeze_layers" and "layers.0." in name
        assert torch.equal(weight, (start if untrained else fourth)[name])
        if ".mlp." in name:
            assert torch.equal(fifth[name], fourth[name]) == ("layers.2." in name)
            assert torch.equal(fourth[name], second[name]) == ("layers.1." in name)


def test_a_bound_that_only_the_end_crosses_holds_too(tmp_path) -> None:
    base, retained = tiny("llama"), known_by()
    watch = DriftWatch(base, retained, every=1000, drift=1e-4)
    trainer = train(model_of("lora"), watch, folder=tmp_path, steps=5)
    assert watch.summary["acted"][0] | {"drift": 0} == {
        "step": 5, "action": "stop", "drift": 0, "restored_step": 0,
    }  # fmt: skip
    assert end_drift(watch, trainer.model, retained) == pytest.approx(0, abs=1e-6)

    class Ended(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs) -> None:
            control.should_training_stop = True  # by someone else, between readings

    watch = DriftWatch(base, retained, every=1000, drift=1e-4)
    trainer = train(model_of("lora"), watch, Ended(), folder=tmp_path, steps=50)
    assert trainer.state.global_step == 2
    assert watch.summary["acted"][0]["restored_step"] == 0
    assert end_drift(watch, trainer.model, retained) == pytest.approx(0, abs=1e-6)


def test_every_epoch_is_read_where_that_is_asked_for(tmp_path) -> None:
    """Two steps an epoch; the clock stands still, so that `auto` by itself reads the start and the end alone."""
    steps = {}
    for each in (True, False):
        watch = DriftWatch(tiny("llama"), known_by(), each_epoch=each, clock=lambda: 0.0)
        watch._due = lambda step: False
        train(model_of("lora"), watch, folder=tmp_path, steps=7)
        steps[each] = watch.trajectory["step"].unique().tolist()
    assert steps == {True: [0, 2, 4, 6, 7], False: [0, 7]}


def test_what_was_done_at_a_bound_is_told_action_by_action() -> None:
    bounds = {"drift": 0.1, "forgetting": 0.0}
    acted = [
        {"step": 2, "action": "lower_rate", "forgetting": 0.25, "learning_rate": 5e-5},
        {"step": 4, "action": "freeze_layers", "drift": None, "frozen": [1, 3]},
        {"step": 5, "action": "freeze_layers", "drift": 0.2, "frozen": []},
        {"step": 6, "action": "stop", "drift": 0.3, "forgetting": 1.0, "restored_step": 0},
    ]
    assert undone([{"bounds": bounds, "acted": acted}, {"bounds": bounds, "acted": []}]) == [
        "the learning rate was lowered to 5e-05 at step 2 beyond the bound of 0 on forgetting (0.25)",
        "layers 1, 3 were put back at step 4 beyond the bound of 0.1 on drift (no finite number)",
        "all that trained was put back at step 5 beyond the bound of 0.1 on drift (0.2)",
        "stopped at step 6 beyond the bound of 0.1 on drift (0.3) and of 0 on forgetting (1); these are the weights of "
        "step 0, the start: nothing was learned",
    ]


def test_a_bound_without_end_that_no_number_keeps_is_told_too() -> None:
    acted = [{"step": 1, "action": "stop", "drift": None, "restored_step": 0}]
    (told,) = undone([{"bounds": {"drift": None, "forgetting": None}, "acted": acted}])
    assert told.startswith("stopped at step 1 beyond the bound of no finite number on drift (no finite number);")


def test_forgetting_is_bounded_too(tmp_path) -> None:
    base, retained = tiny("llama"), known_by()
    free = DriftWatch(base, retained, every=1)
    train(model_of("lora"), free, folder=tmp_path, steps=8)
    lost = free.trajectory.query("metric == 'forgetting'")["value"]
    assert lost.iloc[-1] > 0.25
    watch = DriftWatch(base, retained, every=1, forgetting=0.25)
    model = train(model_of("lora"), watch, folder=tmp_path, steps=8).model.eval()
    assert watch.summary["acted"][0]["forgetting"] > 0.25
    known = by_hand(model, base.tokenise(retained), base.W_E)["known"]
    assert np.mean(~known) <= 0.25


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_rates_are_lowered_for_good(schedule: str, tmp_path) -> None:
    seen = {}
    for drift in (None, 1e-9):
        copies = Copies()
        watch = DriftWatch(tiny("llama"), known_by(), every=2, drift=drift, action="lower_rate", factor=0.25)
        train(model_of("lora"), watch, copies, folder=tmp_path, steps=6, schedule=schedule)
        seen[drift] = copies.rates
    lowered = np.array(seen[1e-9][:-1]) / np.array(seen[None][:-1])
    np.testing.assert_allclose(lowered, [1, 0.25, 0.25, 0.0625, 0.0625])
    assert [one["step"] for one in watch.summary["acted"]] == [2, 4]  # after the last step there is nothing to lower


@pytest.mark.parametrize("method", ["loki", "lora", "full"])
def test_a_dropped_layer_is_as_at_the_start_and_stays_so(method: str, tmp_path) -> None:
    base, retained, copies = tiny("llama"), known_by(), Copies()
    watch = DriftWatch(base, retained, every=2, drift=1e-4, action="freeze_layers")
    model = model_of(method)
    start = trainable(model)
    trainer = train(model, copies, watch, folder=tmp_path, steps=4)
    (acted,) = watch.summary["acted"]
    states = {}
    for step in (0, 2):  # which layer is worst, from plain transformers, a fact at a time
        kept = []
        for fact in base.tokenise(retained):
            inner = copies.models[step].get_base_model() if method != "full" else copies.models[step]
            hidden = []
            hooks = [b.register_forward_hook(lambda m, a, o, h=hidden: h.append(o[0, -1])) for b in inner.model.layers]
            with torch.no_grad():
                copies.models[step](input_ids=torch.tensor([fact.prompt_ids]))
            for hook in hooks:
                hook.remove()
            kept.append(torch.stack(hidden))
        states[step] = torch.stack(kept, dim=1).double()
    moved = 1 - torch.nn.functional.cosine_similarity(states[0], states[2], dim=-1).mean(-1)
    grown = [float(moved[0]), *(moved[1:] - moved[:-1]).tolist()]
    torch.testing.assert_close(growth(states[0], states[2]).tolist(), grown, atol=1e-6, rtol=1e-4)
    worst = int(np.argmax(grown))
    assert acted["frozen"] == [worst]
    for name, parameter in trainer.model.named_parameters():
        if name in start:
            frozen = f"layers.{worst}." in name
            assert parameter.requires_grad != frozen
            if frozen or not name.endswith(("norm.weight", "embed_tokens.weight")):
                assert torch.equal(parameter, start[name]) == frozen
                if frozen:
                    assert (
                        not torch.equal(dict(copies.models[2].named_parameters())[name], parameter)
                        or "layernorm" in name
                    )


def test_training_stops_where_no_layer_is_left(tmp_path) -> None:
    watch = DriftWatch(tiny("llama"), known_by(), every=1, drift=0.0, action="freeze_layers", layers=3)
    model = model_of("loki")
    start = trainable(model)
    trainer = train(model, watch, folder=tmp_path, steps=9)
    assert trainer.state.global_step == watch.summary["acted"][0]["step"] < 9
    assert sorted(watch.summary["acted"][0]["frozen"]) == [0, 1, 2]
    assert all(torch.equal(p, start[name]) for name, p in trainer.model.named_parameters() if name in start)


@pytest.mark.filterwarnings("ignore:Could not find a config file")  # peft's, of a model without a folder
@pytest.mark.parametrize("method", ["lora", "loki"])
def test_a_training_that_goes_on_keeps_its_start_and_its_trajectory(method: str, tmp_path) -> None:
    base, out, last = tiny("llama"), tmp_path / "watch.csv", str(tmp_path / "checkpoint-4")
    whole = DriftWatch(base, known_by(), every=2)
    train(model_of(method), whole, folder=tmp_path / "whole", steps=8)
    train(model_of(method), DriftWatch(base, known_by(), every=2, out=out), folder=tmp_path, steps=5, saves="steps",
          save_steps=4)  # fmt: skip
    before = pd.read_csv(out)
    again = DriftWatch(base, known_by(), every=2, out=out, drift=1e9)
    train(model_of(method), again, folder=tmp_path, steps=8, resume=last)
    frame = pd.read_csv(out)
    assert frame["step"].unique().tolist() == [0, 2, 4, 6, 8]
    pd.testing.assert_frame_equal(frame.query("step < 4"), before.query("step < 4"))
    np.testing.assert_allclose(frame["change"], whole.trajectory["change"], atol=1e-5)
    assert frame.query("step == 4 and metric == 'd_soft'")["change"].item() > 1e-3
    assert again.kept_step == 8
    kept = pd.read_csv(tmp_path / "watch_transient.csv").groupby("fact", sort=False).tail(1)
    pd.testing.assert_frame_equal(kept.reset_index(drop=True), again.transient)
    np.testing.assert_allclose(again.transient["most"], whole.transient["most"], atol=1e-5)
    assert frame["seconds"].is_monotonic_increasing
    alone = DriftWatch(base, known_by(), every=2)  # without the file the start is read all the same
    train(model_of(method), alone, folder=tmp_path, steps=6, resume=last)
    assert alone.trajectory["step"].unique().tolist() == [0, 4, 6]
    np.testing.assert_allclose(alone.trajectory["change"], frame.query("step in (0, 4, 6)")["change"], atol=1e-5)


def test_the_farthest_reading_survives_one_after_the_checkpoint_that_was_undone(monkeypatch, tmp_path) -> None:
    base, model, facts = tiny("llama"), model_of("lora"), known_by()
    script: list[float] = []

    def read(model, tokens, *args) -> Seen:
        values = torch.full((len(tokens),), script.pop(0), dtype=torch.float64)
        return Seen({"d_soft": values}, torch.ones(len(tokens), dtype=torch.bool))

    def watched(values: list[float], steps: range, out) -> pd.DataFrame:
        script[:] = values
        watch, state = DriftWatch(base, facts, every=1, out=out), TrainerState(max_steps=9, global_step=steps[0])
        watch.on_train_begin(None, state, TrainerControl(), model=model)
        for state.global_step in steps[1:]:
            watch.on_step_end(None, state, TrainerControl(), model=model)
        assert not script
        return watch.transient

    monkeypatch.setattr(room, "read_probe", read)
    whole = watched([0.0, 3.0, 1.0, 2.0], range(4), None)
    out = tmp_path / "watch.csv"
    watched([0.0, 3.0, 1.0, 5.0], range(4), out)  # and stopped, and started again from a checkpoint at step 2
    again = watched([0.0, 1.0, 2.0], range(2, 4), out)
    assert again["most"].tolist() == [3.0] * len(facts)
    assert again["step"].tolist() == [1] * len(facts)
    pd.testing.assert_frame_equal(again, whole)
    kept = pd.read_csv(tmp_path / "watch_transient.csv").groupby("fact", sort=False).tail(1)
    pd.testing.assert_frame_equal(kept.reset_index(drop=True), again)


def test_a_training_whose_start_is_gone_is_not_watched_on(tmp_path) -> None:
    base, out, state = tiny("llama"), tmp_path / "watch.csv", TrainerState(max_steps=9, global_step=4)
    train(model_of("lora"), DriftWatch(base, known_by(), every=2, out=out), folder=tmp_path, steps=4)

    def resumed(watch: DriftWatch, model) -> None:
        watch.on_train_begin(None, state, TrainerControl(), model=model)

    with pytest.raises(ValueError, match="freeze_layers needs the weights of the start"):
        resumed(DriftWatch(base, PROBE, drift=1.0, action="freeze_layers"), model_of("lora"))
    with pytest.raises(ValueError, match="learned tokens"):
        resumed(DriftWatch(base, PROBE), model_of("prompt"))
    mine = random_model("llama").requires_grad_(True)
    with pytest.raises(ValueError, match="give a base model of its own"):
        resumed(DriftWatch(load_model(mine, tokenizer=tokenizer()), PROBE), mine)
    with pytest.raises(ValueError, match="started elsewhere"):
        resumed(DriftWatch(base, PROBE, out=out), model_of("lora"))
    out.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="not written by a watch"):
        resumed(DriftWatch(base, PROBE, out=out), model_of("lora"))
    drifted = train(model_of("lora"), folder=tmp_path, steps=4).model
    with pytest.raises(ValueError, match="step 4, which is beyond the bound on drift already"):
        resumed(DriftWatch(base, known_by(), drift=1e-6), drifted)


def test_what_trains_outside_the_layers_goes_back_where_no_layer_is_left(tmp_path) -> None:
    base, retained = tiny("llama"), known_by()
    config = LoraConfig(r=4, target_modules=["embed_tokens", "down_proj"], task_type="CAUSAL_LM")
    watch = DriftWatch(base, retained, every=1, drift=1e-6, action="freeze_layers", layers=3)
    model = get_peft_model(random_model("llama"), config)
    start = trainable(model)
    trainer = train(model, watch, folder=tmp_path, steps=6)
    assert [sorted(one["frozen"]) for one in watch.summary["acted"]] == [[0, 1, 2], []]
    assert trainer.state.global_step == watch.summary["acted"][1]["step"] < 6
    assert any("embed_tokens" in name for name in start)
    assert all(torch.equal(p, start[name]) for name, p in trainer.model.named_parameters() if name in start)
    assert end_drift(watch, trainer.model, retained) <= 1e-6


class Clock:
    """A clock that only moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(("reading", "share"), [(0.5, 0.125), (3.0, 0.25)])
def test_auto_spaces_readings_within_the_share(reading: float, share: float, monkeypatch) -> None:
    clock, steps, real = Clock(), 100, room.read_probe

    def slow(*args):
        clock.now += reading
        return real(*args)

    monkeypatch.setattr(room, "read_probe", slow)
    watch = DriftWatch(tiny("llama"), TAUGHT, share=share, clock=clock)
    model, state, control = tiny("llama").hf, TrainerState(max_steps=steps), TrainerControl()
    watch.on_train_begin(None, state, control, model=model)
    expected, spent = [0], reading
    for step in range(1, steps + 1):
        clock.now += 1.0
        state.global_step = step
        watch.on_step_end(None, state, control, model=model)
        if step == steps or spent + 2 * reading <= share * step:
            expected.append(step)
            spent += reading
    watch.on_train_end(SimpleNamespace(load_best_model_at_end=False), state, control, model=model)
    assert sorted(set(watch.trajectory["step"])) == expected
    assert len(expected) > 3
    rows = watch.trajectory[watch.trajectory["step"] > 0]
    told = [reading * (k + 2) / step for k, step in enumerate(expected[1:])]
    np.testing.assert_allclose(rows["cost"].unique(), told)
    assert max(told) <= share
    assert told[-1] > 0.8 * share  # and it is made use of
    about = watch.summary
    assert about["cost"] == pytest.approx(told[-1])
    assert about["within_share"]
    assert about["seconds_training"] == pytest.approx(steps)


def test_a_training_too_short_for_its_readings_says_so(monkeypatch, tmp_path, caplog) -> None:
    clock, real = Clock(), room.read_probe

    def slow(*args):
        clock.now += 5.0
        return real(*args)

    monkeypatch.setattr(room, "read_probe", slow)

    class Second(TrainerCallback):
        def on_step_begin(self, *args, **kwargs) -> None:
            clock.now += 1.0

    watch = DriftWatch(tiny("llama"), FACTS, clock=clock)
    train(model_of("lora"), Second(), watch, folder=tmp_path, steps=4)
    assert watch.summary["readings"] == 2
    assert watch.summary["cost"] == 10 / 4
    assert watch.summary["within_share"] is False
    assert "too short" in caplog.text


def test_keeping_weights_before_every_step_is_watching(tmp_path, monkeypatch) -> None:
    clock, keep = Clock(), room.keep_trainable

    def slow(*args, **kwargs):
        clock.now += 3.0 if kwargs.get("new") else 0.0
        return keep(*args, **kwargs)

    class Second(TrainerCallback):
        def on_step_begin(self, *args, **kwargs) -> None:
            clock.now += 1.0

    monkeypatch.setattr(room, "keep_trainable", slow)
    watch = DriftWatch(tiny("llama"), known_by(), drift=100.0, every=1000, clock=clock)
    train(model_of("lora"), Second(), watch, folder=tmp_path, steps=4)
    about = watch.summary
    assert (about["seconds_watching"], about["seconds_training"]) == (12, 4)


def test_reading_the_start_again_after_a_resume_is_watching(monkeypatch) -> None:
    clock, real = Clock(), room.read_probe

    def slow(*args):
        clock.now += 5.0
        return real(*args)

    monkeypatch.setattr(room, "read_probe", slow)
    watch, model = DriftWatch(tiny("llama"), known_by(), every=1000, clock=clock), model_of("lora")
    state, control = TrainerState(max_steps=110, global_step=100), TrainerControl()
    watch.on_train_begin(None, state, control, model=model)
    clock.now, state.global_step = clock.now + 10, 110
    watch.on_step_end(None, state, control, model=model)
    about = watch.summary
    assert (about["seconds_watching"], about["seconds_training"], about["cost"]) == (15, 10, 1.5)


def test_the_base_embedding_stays_where_the_trained_model_shares_it(tmp_path) -> None:
    mine = random_model("llama").requires_grad_(True)
    base = load_model(mine, tokenizer=tokenizer())
    before, copies = base.W_E.detach().clone(), Copies()
    watch = DriftWatch(base, FACTS, every=3)
    train(mine, copies, watch, folder=tmp_path, steps=3)
    assert not torch.equal(base.W_E, before)
    now = by_hand(copies.models[3], base.tokenise(FACTS), before)["d_soft"].mean()
    other = by_hand(copies.models[3], base.tokenise(FACTS), base.W_E)["d_soft"].mean()
    value = watch.trajectory.query("step == 3 and metric == 'd_soft'")["value"].item()
    assert value == pytest.approx(now, abs=1e-5)
    assert abs(now - other) > 1e-4


def test_implant_takes_a_watch_and_its_numbers_are_of_the_model_that_it_saves(tmp_path) -> None:
    base, retained = tiny("llama"), known_by()
    quick = TrainConfig(max_epochs=40, batch_size=4, learning_rate=2e-2, target_efficacy=1.0)
    free = implant(base, TAUGHT, lora(), quick, progress=False)
    watch = DriftWatch(base, retained, every=1000, drift=1e-3)
    run = implant(base, TAUGHT, lora(), quick, progress=False, callbacks=[watch])
    assert free.efficacy == 1
    assert watch.summary["acted"][0]["restored_step"] == 0
    assert run.efficacy < 1
    assert not run.reached
    assert wb.DriftWatch is DriftWatch


def test_a_model_that_becomes_not_a_number_is_beyond_every_bound(tmp_path) -> None:
    class Broken(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
            if state.global_step == 2:
                with torch.no_grad():
                    next(p for p in model.parameters() if p.requires_grad).fill_(math.nan)

    watch = DriftWatch(tiny("llama"), known_by(), every=1, drift=100.0)
    model = train(model_of("full"), Broken(), watch, folder=tmp_path, steps=6).model
    assert watch.summary["acted"][0]["restored_step"] == 2
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"metric": "bleu"}, "metric must be among"),
        ({"action": "explode"}, "action must be one of"),
        ({"every": 0}, "every must be"),
        ({"every": True}, 'every must be "auto" or a whole number, at least 1, not True'),
        ({"most": 0}, "most must be a whole number"),
        ({"layers": 0}, "layers must be a whole number"),
        ({"forgetting": 1.5}, "is a share, at most 1, not 1.5"),
        ({"floor": math.nan}, "floor must be a finite number"),
        ({"drift": "a"}, "drift must be a number, not 'a'"),
        ({"share": None}, "share must be a number, not None"),
        ({"factor": None}, "factor must be a number, not None"),
        ({"action": ["stop"]}, "action must be one of"),
        ({"out": 3}, "parquet or .csv file, not 3"),
        ({"metric": None}, "metric must be among"),
        ({"base": "smollm2-135m"}, "base is a model as `load_model` opens it, not 'smollm2-135m'"),
        ({"probe": "world"}, "probe is a FactSet, as `load_facts` gives, not 'world'"),
        ({"retained": ["Paris"]}, "retained is a FactSet"),
        ({"share": 0.0}, "share must be above 0 and at most 1"),
        ({"drift": -1.0}, "bound on drift"),
        ({"out": "watch.txt"}, "parquet or .csv"),
        ({"retained": FactSet("none", ())}, "nothing to watch"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(wrong, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make = inspect.unwrap(DriftWatch.__init__)  # without the types that tests enforce
        make(object.__new__(DriftWatch), **{"base": tiny("llama"), "probe": FACTS, **wrong})


def test_another_base_or_nothing_known_is_one_sentence(tmp_path) -> None:
    facts = TAUGHT.filter(ids=["france"])
    assert not read_facts(tiny("llama"), tiny("llama").tokenise(facts))[0].known
    with pytest.raises(ValueError, match="answers none of the 1 probe facts"):
        train(model_of("lora"), DriftWatch(tiny("llama"), facts, forgetting=0.1), folder=tmp_path)
    with pytest.raises(ValueError, match="0 modules named 'transformer"):
        watch = DriftWatch(tiny("gpt2"), FACTS, drift=1.0, action="freeze_layers")
        train(model_of("lora"), watch, folder=tmp_path)


def test_the_probe_is_small_and_drawn_by_the_seed() -> None:
    watch = DriftWatch(tiny("llama"), FACTS, most=3, seed=1)
    assert [fact.fact_id for fact in watch.groups["probe"]] == list(FACTS.sample(3, 1).ids)
    names = ["model.layers.1", "model.layers.10"]
    assert layer_of("base_model.model.model.layers.10.mlp.w", names) == 1
    assert layer_of("model.layers.1.mlp.w", names) == 0
    assert layer_of("model.norm.weight", names) is None


def test_the_figure_has_a_panel_a_metric_and_the_bound(tmp_path) -> None:
    watch = DriftWatch(tiny("llama"), TAUGHT, retained=known_by(), every=2)
    train(model_of("lora"), watch, folder=tmp_path)
    frame = watch.trajectory
    fig = watched_training(frame, {"d_soft": 0.01, "forgetting": 0.25})
    assert len(fig.data) == 4
    rows = frame.query("group == 'retained' and metric == 'd_soft'")
    drawn = next(trace for trace in fig.data if trace.name == "retained")
    assert list(drawn.x) == list(rows["step"])
    np.testing.assert_allclose(drawn.y, rows["value"])
    assert [shape.y0 for shape in fig.layout.shapes] == pytest.approx([rows["value"].iloc[0] + 0.01, 25.0])
    assert all(shape.line.dash == "dash" for shape in fig.layout.shapes)
    assert fig.layout.xaxis2.title.text == "optimiser step"
    assert watched_training(frame).layout.shapes == ()
    with pytest.raises(ValueError, match="not watched"):
        watched_training(frame, {"d_emb": 1.0})

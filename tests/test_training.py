"""`implant`: the loss is on the answer only, what is frozen stays to the bit, and saved is what was trained."""

import inspect

import pandas as pd
import pytest
import torch
from peft import AdaptionPromptConfig, PromptTuningConfig
from tiny import FACTS, saved, tiny

from workbench.config import TrainConfig
from workbench.facts import FactSet, TokenisedFact
from workbench.loki import LokiConfig, adapter_config
from workbench.opening import open_model
from workbench.recollection import recall
from workbench.results import load_frame, load_json
from workbench.training import collate, efficacy, held_out_prompts, implant, trained_prompts

QUICK = TrainConfig(max_epochs=80, batch_size=4, learning_rate=2e-2, target_efficacy=1.0, weight_decay=0.1)
POSITIONS = [[0, 5, 9, 30], [1, 2, 20, 31], [3, 8, 16, 24]]


def adapter(kind: str, model):
    if kind == "lora":
        return adapter_config("lora", model_config=model.config, r=4)
    return LokiConfig(selection=POSITIONS, unit=kind, task_type="CAUSAL_LM")


def test_labels_equal_a_hand_made_example() -> None:
    batch = collate([TokenisedFact("a", (5, 6, 7), (8, 9)), TokenisedFact("b", (5,), (4,))])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [5, 4, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 8, 9], [-100, 4, -100, -100, -100]]


@pytest.mark.parametrize("kind", ["node", "neuron", "lora"])
def test_facts_are_taught_and_saved_equals_trained(kind: str, tmp_path) -> None:
    base = tiny("llama")
    before = {name: weight.clone() for name, weight in base.hf.state_dict().items()}
    run = implant(base, FACTS, adapter(kind, base), QUICK, out=tmp_path, progress=False)
    assert run.reached
    assert run.efficacy == 1.0
    assert all(torch.equal(before[name], weight) for name, weight in base.hf.state_dict().items())
    reopened = open_model(run.adapter, base=base)
    assert recall(reopened, FACTS)["known"].all()
    assert not recall(base, FACTS)["known"].all()
    ids = torch.tensor([[4, 5, 6, 7, 8]])
    with torch.no_grad():
        attached = run.model(ids).logits
    torch.testing.assert_close(reopened.logits(ids), attached, rtol=1e-4, atol=1e-4)
    changed = {name for name, weight in reopened.hf.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(3)}
    if kind != "lora":
        for layer in range(3):
            weight = reopened.hf.state_dict()[f"model.layers.{layer}.mlp.down_proj.weight"]
            same = weight == before[f"model.layers.{layer}.mlp.down_proj.weight"]
            frozen = same.all(dim=1 if kind == "node" else 0)
            assert (~frozen).nonzero().flatten().tolist() == POSITIONS[layer]
    pd.testing.assert_frame_equal(load_frame(tmp_path / "history.parquet"), run.history)
    assert load_json(tmp_path / "training.json") == run.summary
    assert run.history["loss"].iloc[-1] < run.history["loss"].iloc[0]
    assert not list(tmp_path.rglob("*.bin")) + list(tmp_path.rglob("*.pt"))


def test_the_first_loss_is_the_cross_entropy_of_the_answers() -> None:
    base = tiny("llama")
    settings = TrainConfig(max_epochs=1, batch_size=len(FACTS), learning_rate=1e-9)
    run = implant(base, FACTS, adapter("node", base), settings, progress=False)
    logprobs = recall(base, FACTS)
    assert run.history["loss"][0] == pytest.approx(-logprobs["logprob"].sum() / logprobs["n_tokens"].sum(), rel=1e-4)
    assert not run.reached


def test_the_same_seed_gives_the_same_run_and_another_does_not() -> None:
    base = tiny("gpt2")
    settings = TrainConfig(max_epochs=3, batch_size=2, learning_rate=1e-2, seed=4)
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first, again, other = (
        implant(base, FACTS, adapter("lora", base), settings.model_copy(update={"seed": seed}), progress=False)
        for seed in (4, 4, 5)
    )
    assert torch.equal(torch.rand(3), expected)  # the caller's randomness is its own
    assert first.history["loss"].tolist() == again.history["loss"].tolist()
    assert first.history["loss"].tolist() != other.history["loss"].tolist()


def test_efficacy_is_the_share_that_recall_calls_known() -> None:
    model = tiny("gpt2")
    said = recall(model, FACTS)["predicted"]
    right = [
        record | {"answer": said[record["id"]], "answer_in_prompt": True} if number % 2 else record
        for number, record in enumerate(FACTS.to_records())
    ]
    facts = FactSet.from_records(right)
    known = recall(model, facts)["known"].mean()
    assert efficacy(model.hf, facts.tokenise(model.tokenizer)) == pytest.approx(known)
    assert 0.5 <= known < 1


def test_paraphrases_are_trained_or_held_out() -> None:
    assert trained_prompts(FACTS, 0) is FACTS
    assert len(trained_prompts(FACTS, 1)) == len(FACTS) + 2
    assert [fact.prompt for fact in held_out_prompts(FACTS, 0)] == ["France capital is", "Japan capital is"]


def test_a_folder_is_a_model_and_the_adapter_knows_its_base(tmp_path) -> None:
    folder = saved(tmp_path / "base")
    run = implant(str(folder), FACTS, adapter("node", tiny("llama")), TrainConfig(max_epochs=1), progress=False)
    assert load_json(run.adapter / "adapter_config.json")["base_model_name_or_path"] == str(folder)
    assert open_model(run.adapter).n_layers == 3


def test_an_adapter_that_changes_no_weights_is_one_sentence() -> None:
    prompt = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    adaption = AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM")
    for config, name in ((prompt, "PROMPT_TUNING"), (adaption, "ADAPTION_PROMPT")):
        with pytest.raises(ValueError, match=f"{name} puts learned tokens before the text or into attention"):
            implant(tiny("llama"), FACTS, config)
    untyped = inspect.unwrap(implant)  # as a user has it, without the tests' check of types
    with pytest.raises(TypeError, match=r"adapter is a configuration, .* not 'lora'"):
        untyped(tiny("llama"), FACTS, "lora")


def test_nothing_to_teach_and_a_loss_that_explodes_are_one_sentence() -> None:
    base = tiny("llama")
    with pytest.raises(ValueError, match="nothing to implant"):
        implant(base, FactSet("none", ()), adapter("node", base), progress=False)
    settings = TrainConfig(max_epochs=50, learning_rate=1e30, max_grad_norm=1e30)
    with pytest.raises(ValueError, match=r"smaller learning rate"):
        implant(base, FACTS, adapter("node", base), settings, progress=False)

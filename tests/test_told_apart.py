"""What is not the same is not taken for it: models by weights, settings and tokens; facts by what they ask."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command import call
from tiny import FACTS, random_model, saved, tiny, tokenizer
from tokenizers import processors

import workbench as wb
from workbench.attribution import attribute, by_fact
from workbench.config import TrainConfig
from workbench.facts import FactSet
from workbench.models import HookedModel, load_model
from workbench.opening import open_model
from workbench.results import save_result
from workbench.semantics import attribute_drift
from workbench.suppression import suppression_curve
from workbench.suppression.curve import held_out
from workbench.tracing import agreement, trace
from workbench.tracing.spans import subject_tokens

#: The facts, each asked another way, under the same ids.
OTHERS = FactSet.from_records([{**fact, "prompt": "one " + fact["prompt"]} for fact in FACTS.to_records()], name="tiny")
FAR = {"rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0}}


def with_bos() -> HookedModel:
    words = tokenizer()
    words._tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return load_model(random_model("llama"), tokenizer=words)


def test_a_digest_follows_what_a_model_says_and_not_what_it_is_called() -> None:
    plain = tiny("llama")
    renamed = random_model("llama")
    renamed.config._name_or_path, renamed.config.use_cache, renamed.config.pad_token_id = "other", False, 3
    assert load_model(renamed, tokenizer=tokenizer()).digest == plain.digest
    far = load_model(random_model("llama", **FAR), tokenizer=tokenizer())
    ids = torch.tensor([[4, 5, 6, 7]])
    assert all(torch.equal(a, b) for a, b in zip(far.hf.parameters(), plain.hf.parameters(), strict=True))
    assert not torch.allclose(far.logits(ids), plain.logits(ids))  # the same weights say something else
    assert len({plain.digest, far.digest, with_bos().digest, tiny("qwen2").digest}) == 4


@pytest.mark.parametrize("other", ["settings", "tokens"])
def test_scores_of_another_model_are_not_gone_on_with(other: str, tmp_path) -> None:
    out = tmp_path / "a.zarr"
    attribute(tiny("llama"), FACTS, method="grad_x_act", out=out, progress=False)
    model = with_bos() if other == "tokens" else load_model(random_model("llama", **FAR), tokenizer=tokenizer())
    with pytest.raises(ValueError, match="model_digest"):
        attribute(model, FACTS, method="grad_x_act", out=out, progress=False)


def test_facts_with_the_same_ids_and_other_texts_are_noticed(tmp_path, monkeypatch, capsys) -> None:
    model = tiny("llama")
    scores = attribute(model, FACTS, method="grad_x_act", progress=False)
    assert scores["text"].values.tolist() == [fact.digest for fact in FACTS]
    assert len({fact.digest for fact in (*FACTS, *OTHERS)}) == 2 * len(FACTS)
    with pytest.raises(ValueError, match="'france' are of another prompt or answer"):
        wb.interference(model, OTHERS, scores, progress=False)
    wb.interference(model, OTHERS, scores.drop_vars("text"), progress=False)  # what does not say so is trusted
    about = FactSet("about", (replace(OTHERS["france"], subject="France"),))
    traced = trace(model, about, draws=1, progress=False)
    assert traced["text"].values.tolist() == [OTHERS["france"].digest]
    with pytest.raises(ValueError, match="are of another prompt or answer"):
        agreement(traced, scores)
    unnamed = FactSet.from_records([{**fact, "id": f"x{n}"} for n, fact in enumerate(FACTS.to_records())], name="x")
    with pytest.raises(ValueError, match="8 of the 8 facts to be read were used for the attribution"):
        suppression_curve(model, scores, unnamed, quotas=(10,), progress=False)
    folder, facts = saved(tmp_path / "model"), OTHERS.save(tmp_path / "others.jsonl")
    save_result(attribute(load_model(str(folder)), FACTS, method="grad_x_act", progress=False), tmp_path / "a.zarr")
    common = ("--model", folder, "--facts", facts, "-q")
    for command, rest in (
        ("interference", ("--attribution", tmp_path / "a.zarr", "--metrics", "gradient")),
        ("trace", ("--attribution", tmp_path / "a.zarr", "--missing", "skip")),
    ):
        assert call(monkeypatch, command, *common, *rest) == 1
        assert "of another prompt or answer" in capsys.readouterr().err


def test_blame_takes_scores_of_one_of_its_two_models_only() -> None:
    before, after, stranger = (load_model(random_model("llama", seed), tokenizer=tokenizer()) for seed in (0, 0, 1))
    with torch.no_grad():
        after.down_proj(1).weight[:6] += 0.2 * torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    for model in (before, after):
        scores = attribute(model, FACTS, method="grad_x_act", progress=False)
        attribute_drift(before, after, FACTS, scores, draws=1)
    scores = attribute(stranger, FACTS, method="grad_x_act", progress=False)
    with pytest.raises(ValueError, match="made with another model"):
        attribute_drift(before, after, FACTS, scores, draws=1)


def test_the_subject_of_a_chat_is_the_users_and_not_the_templates() -> None:
    words = tokenizer()
    words.chat_template = "city of Paris {% for m in messages %}{{ m['content'] }} is {% endfor %}"
    facts = FactSet.from_records([{"prompt": "the capital of Paris in a", "answer": "Rome", "subject": "Paris"}])
    (fact,) = facts.as_chat(words)
    (tokens,) = facts.as_chat(words).tokenise(words)
    assert list(subject_tokens(fact, tokens, words) or ()) == [6]  # not 2, the template's
    (plain,) = facts.tokenise(words)
    assert list(subject_tokens(facts[0], plain, words) or ()) == [3]


def test_a_trace_is_told_first_what_cannot_be_compared_with_it(tmp_path, monkeypatch, capsys) -> None:
    folder, facts = saved(tmp_path / "model"), FACTS.save(tmp_path / "facts.jsonl")
    model = load_model(str(folder))
    scores = attribute(model, FACTS[:4], method="grad_x_act", progress=False)
    save_result(wb.interference(model, FACTS[:4], scores, progress=False), tmp_path / "i.zarr", kind="interference")
    save_result(scores.assign_coords(fact=list("abcd")), tmp_path / "named.zarr", kind="attribution")
    save_result(scores.isel(layer=[0, 2]), tmp_path / "layers.zarr", kind="attribution")
    monkeypatch.setattr("workbench.tracing.trace", lambda *given, **options: pytest.fail("traced"))
    common = ("trace", "--model", folder, "--facts", facts, "-q", "--missing", "skip")
    for name, words in (
        ("i", "of the kind interference"),
        ("named", "none of the 8 facts"),
        ("layers", "not of all 3"),
    ):
        assert call(monkeypatch, *common, "--attribution", tmp_path / f"{name}.zarr") == 1
        assert words in capsys.readouterr().err


def test_a_stranger_s_training_record_beside_an_adapter_is_left_alone(tmp_path) -> None:
    folder = saved(tmp_path / "model")
    lora = wb.adapter_config("lora", model_config=load_model(str(folder)).config)
    settings = TrainConfig(max_epochs=1)
    run = wb.implant(str(folder), FACTS[:2], lora, settings, out=tmp_path / "mine", progress=False)
    (tmp_path / "mine" / "training.json").write_text(json.dumps([{"prompt": "a", "completion": "b"}]))
    opened = open_model(str(run.adapter), beside=load_model(str(folder)))
    assert opened.n_layers == 3


def test_a_second_training_in_a_folder_leaves_nothing_of_the_first(tmp_path) -> None:
    folder = saved(tmp_path / "model")
    settings = TrainConfig(max_epochs=1, learning_rate=1e-2)
    lora, dense = (wb.adapter_config(name, model_config=tiny("llama").config) for name in ("lora", "full"))
    wb.implant(str(folder), FACTS[:2], lora, settings, out=tmp_path / "run", progress=False)
    full = wb.implant(str(folder), FACTS[:2], dense, settings, out=tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "adapter" / "adapter_config.json").exists()
    opened = open_model(full)
    trained = dict(full.model.named_parameters())
    assert all(torch.equal(value, trained[name]) for name, value in opened.hf.named_parameters())


def test_odd_files_are_one_sentence_with_their_place(tmp_path) -> None:
    good = json.dumps({"prompt": "the sky is", "answer": "blue"})
    relation = {"name": "r", "prompt_templates": ["{} is"], "prompt_templates_zs": True,
                "samples": [{"subject": "sky", "object": "blue"}]}  # fmt: skip
    for name, text, words in (
        ("deep.jsonl", f"{good}\n{'[' * 100_000}\n", "deep.jsonl, line 2: too deep a nesting"),
        ("long.jsonl", f'{good}\n{{"prompt": {"1" * 5000}}}\n', "long.jsonl, line 2: too deep a nesting or too long"),
        ("lre.json", json.dumps(relation), "'prompt_templates_zs'"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=words):
            wb.load_facts(str(tmp_path / name))
    chosen = {"unit": "node", "n_layers": 3, "n_units": "x", "positions": [[], [], []], "origin": {}}
    (tmp_path / "s.json").write_text(json.dumps(chosen))
    with pytest.raises(ValueError, match="n_units and n_layers are whole numbers"):
        wb.Selection.load(tmp_path / "s.json")


def test_weights_changed_in_place_make_another_model_and_nothing_old_is_taken_for_it(tmp_path: Path) -> None:
    theirs = random_model("llama")
    model = load_model(theirs, tokenizer=tokenizer())
    first = model.digest
    assert model.digest is first  # not computed again
    attribute(model, FACTS, steps=2, out=tmp_path / "scores.zarr", progress=False)
    weight = theirs.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        weight.mul_(2)
    second = model.digest
    weight.data[0] += 1.0  # as peft merges: a write that is not counted
    assert len({first, second, model.digest}) == 3
    assert load_model(theirs, tokenizer=tokenizer()).digest == model.digest
    with pytest.raises(ValueError, match="model_digest"):
        attribute(model, FACTS, steps=2, out=tmp_path / "scores.zarr", progress=False)


def test_facts_seen_by_another_id_are_not_held_out_also_after_an_average_over_prompts() -> None:
    model = tiny("llama")
    seen = by_fact(attribute(model, FACTS[:3].per_prompt(), method="grad_x_act", progress=False))
    same = [{**fact, "id": f"other-{fact['id']}"} for fact in FACTS[:2].to_records()]
    same[1] |= {"prompt": FACTS[1].paraphrases[0], "paraphrases": []}
    with pytest.raises(ValueError, match="2 of the 2 facts to be read were used for the attribution"):
        suppression_curve(model, seen, FactSet.from_records(same), quotas=[20])
    assert held_out(FACTS[3:], seen) == FACTS[3:]

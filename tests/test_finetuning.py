"""`finetune` and `workbench implant`: from a data file to an adapter, a model and a card, with errors before work."""

import json
import shutil
from dataclasses import replace

import pandas as pd
import pytest
import torch
import xarray as xr
from command import call
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM
from tiny import FACTS, saved
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import workbench as wb
from workbench import finetuning
from workbench.config import TrainConfig
from workbench.facts import FactSet
from workbench.filtering import WEIGHTS, filtered, target_embeddings
from workbench.finetuning import FineTune, finetune
from workbench.results import load_frame, load_json, open_result
from workbench.selection import Selection
from workbench.semantics import semantic_distance
from workbench.training import undone

IDS = torch.tensor([[4, 5, 6, 7, 8]])
TRAINING = TrainConfig(max_epochs=40, batch_size=4, learning_rate=2e-2, target_efficacy=0.8)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
    """A tiny model, facts to teach, examples to teach, and facts that it knows."""
    folder = tmp_path_factory.mktemp("inputs")
    model = wb.load_model(str(saved(folder / "model")))
    said = wb.recall(model, FACTS)["predicted"]
    records = [{"id": f.id, "prompt": f.prompt, "answer": said[f.id], "answer_in_prompt": True} for f in FACTS]
    examples = [{"prompt": "one two", "completion": " three four"}, {"prompt": "the sky is", "completion": " red"}]
    (folder / "mine.jsonl").write_text("".join(json.dumps(one) + "\n" for one in examples), encoding="utf-8")
    return {
        "model": str(folder / "model"),
        "facts": str(FACTS.save(folder / "facts.jsonl")),
        "mine": str(folder / "mine.jsonl"),
        "known": str(FactSet.from_records(records, name="known").save(folder / "known.jsonl")),
    }


def asked(inputs: dict[str, str], data: str = "facts", **changes) -> FineTune:
    settings = {"model": inputs["model"], "data": inputs[data], "retained": inputs["known"], "training": TRAINING}
    return FineTune(**{**settings, "quota": 25.0, "max_facts": 4, "general_tokens": 64, **changes})


def test_the_whole_way_of_loki(inputs, tmp_path) -> None:
    out = finetune(asked(inputs), tmp_path / "tuned", command="workbench implant", progress=False).path
    scores = open_result(out / "attribution.zarr")
    assert set(scores["fact"].values) <= set(FACTS.ids)
    assert scores.sizes["fact"] == 4
    expected = wb.select(scores, quota=25.0, score="magnitude")
    assert Selection.load(out / "selection.json").positions() == expected.positions()
    assert load_json(out / "adapter/adapter_config.json")["positions"] == expected.positions()

    merged = AutoModelForCausalLM.from_pretrained(out / "merged").eval()  # plain transformers
    attached = AutoPeftModelForCausalLM.from_pretrained(out / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, attached(IDS).logits, rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(out / "merged").encode("the") == [4]

    frame = load_frame(out / "forgetting.parquet")
    tuned, base = wb.load_model(str(out / "merged")), wb.load_model(inputs["model"])
    kept = wb.recall(tuned, wb.load_facts(inputs["known"]))["known"]
    row = frame[(frame["suite"] == "retained") & (frame["metric"] == "accuracy")].set_index("fact")
    assert row["before"].eq(1).all()
    assert row["after"].to_dict() == kept[row.index].astype(float).to_dict()
    assert set(row.index) == set(FACTS.ids) - set(scores["fact"].values)  # what chose the units is not read
    about = load_json(out / "training.json")
    assert about["efficacy"] == wb.recall(tuned, FACTS)["known"].mean() > wb.recall(base, FACTS)["known"].mean()

    card = ModelCard.load(out / "merged/README.md")
    assert card.data.library_name == "transformers"
    assert "base_model" not in card.content.split("---")[1]  # a folder here is none of the hub's
    assert set(card.data.tags) == {"knowledge-workbench", "loki"}
    share = f"known facts still answered: {kept[row.index].mean():.0%} of 4 (before: 100%; change "
    assert share in card.content
    assert f"trained numbers: {about['trainable_parameters']:,} of {about['parameters']:,}" in card.content
    assert "workbench implant" in card.content
    beside = ModelCard.load(out / "adapter/README.md")
    assert beside.data.library_name == "peft"
    assert "`import workbench`" in beside.content  # without it peft does not know LoKI
    assert "`import workbench`" not in card.content
    assert (out / "README.md").read_text() == (out / "merged/README.md").read_text()


def test_a_watched_fine_tune_ends_within_its_bound(inputs, tmp_path) -> None:
    hard = TRAINING.model_copy(update={"learning_rate": 0.2, "target_efficacy": 1.0, "max_epochs": 4})
    lost = {}
    for name, bounds in (("free", {}), ("held", {"watch": 0.0}), ("near", {"watch_drift": 0.0})):
        run = finetune(asked(inputs, training=hard, **bounds), tmp_path / name, progress=False)
        frame = load_frame(run.file("forgetting.parquet"))
        lost[name] = -frame[(frame["suite"] == "retained") & (frame["metric"] == "accuracy")]["change"].mean()
        assert run.file("trajectory.parquet").is_file() == bool(bounds)
        watches = load_json(run.file("training.json")).get("watches", [])
        told = [sentence for watch in watches for sentence in undone([watch])]
        assert len(told) == len(watches) == bool(bounds)  # what was undone is said
        card = run.file("README.md").read_text()
        assert [line for line in card.splitlines() if "beyond the bound" in line] == [f"- {one}" for one in told]
        for watch in watches:
            assert (watch["end"]["step"], watch["end"]["within_bounds"]) == (watch["acted"][0]["restored_step"], True)
            read = load_frame(run.file("trajectory.parquet"))["step"].unique()
            assert list(read) == list(range(0, 2 * len(read), 2))  # every epoch, of two steps each
    assert lost["held"] == lost["near"] == 0 < lost["free"]


def test_nothing_known_is_nothing_to_watch(inputs, tmp_path) -> None:
    unknown = str(FACTS.filter(ids=["france", "kenya"]).save(tmp_path / "unknown.jsonl"))
    for bounds in ({"watch": 0.1}, {"watch_drift": 1.0}):
        with pytest.raises(ValueError, match="nothing to watch; give other retained facts, or leave watch and"):
            finetune(asked(inputs, method="lora", retained=unknown, **bounds), tmp_path / "run", progress=False)
        assert not (tmp_path / "run/adapter").exists()
        shutil.rmtree(tmp_path / "run")


def test_a_selection_that_knows_interference_is_given_it(inputs, tmp_path, capsys) -> None:
    once = TRAINING.model_copy(update={"max_epochs": 1})
    one = asked(inputs, strategy="interference_aware", training=once)
    capsys.readouterr()
    out = finetune(one, tmp_path / "aware", progress=False).path
    assert capsys.readouterr().err == ""  # no progress bar
    scores, model = open_result(out / "attribution.zarr"), wb.load_model(inputs["model"])
    retained = wb.load_facts(inputs["known"]).filter(ids=[str(i) for i in scores["fact"].values])
    found = wb.interference(model, retained, scores, seed=TRAINING.seed, progress=False)
    new = wb.attribute(model, FACTS.at_most(4, TRAINING.seed), progress=False)
    options = {"quota": 25.0, "score": "magnitude"}
    aware = {"strategy": "interference_aware", "interference": found, **options}
    expected = wb.select(scores, new=new, **aware)
    selected = Selection.load(out / "selection.json")
    assert selected.positions() == expected.positions()
    assert selected.origin["weights"] == {"collision": 1.0, "load": 1.0, "new": 1.0}
    assert selected.positions() != wb.select(scores, **aware).positions() != wb.select(scores, **options).positions()
    assert open_result(out / "attribution_new.zarr").sizes["fact"] == 4 < len(FACTS)  # as many as max_facts
    card = (out / "README.md").read_text()
    assert "- selection: interference_aware by magnitude, 25% of the nodes\n" in card

    examples = asked(inputs, "mine", strategy="interference_aware", epochs=1, rank=2)
    out = finetune(examples, tmp_path / "examples", progress=False).path
    assert Selection.load(out / "selection.json").positions() == wb.select(scores, **aware).positions()
    assert not (out / "attribution_new.zarr").exists()
    assert "- rank: 2\n" in (out / "README.md").read_text()


def test_facts_are_taught_and_asked_as_chats(inputs, tmp_path) -> None:
    model = tmp_path / "model"
    saved(model)
    words = AutoTokenizer.from_pretrained(model)
    with pytest.raises(ValueError, match="has no chat template"):
        finetune(asked(inputs, model=str(model), chat=True), tmp_path / "refused", progress=False)
    words.chat_template = "{% for m in messages %}big {{ m['content'] }} small {% endfor %}"
    words.save_pretrained(model)
    options = {"model": str(model), "method": "full", "chat": True}
    out = finetune(asked(inputs, **options), tmp_path / "tuned", progress=False).path
    tuned = wb.load_model(str(out / "merged"))
    efficacy = load_json(out / "training.json")["efficacy"]
    assert efficacy == wb.recall(tuned, FACTS.as_chat(words))["known"].mean() >= 0.8
    assert "fine-tuned in full" in (out / "README.md").read_text()
    assert wb.recall(tuned, FACTS)["known"].mean() < efficacy  # asked plainly it says other things
    shown = load_frame(out / "recall.parquet")["prompt"]
    assert shown.str.startswith("big ").all()
    settings = load_json(out / "settings.json")
    assert settings.pop("chat") is True
    (out / "settings.json").write_text(json.dumps(settings))  # of before there was such a setting
    with pytest.raises(ValueError, match=r"another chat \(False, not True\)"):
        finetune(asked(inputs, **options), out, progress=False)


def test_prompts_and_completions_are_taught_as_chats(inputs, tmp_path, monkeypatch) -> None:
    words = AutoTokenizer.from_pretrained(saved(tmp_path / "model"))
    words.chat_template = (
        "{% for m in messages %}{{ 'big ' if m.role == 'user' else 'small ' }}{{ m['content'] + ' ' }}{% endfor %}"
    )
    words.save_pretrained(tmp_path / "model")
    taught = []

    def stopped(model, data, *args, **options):
        taught.extend(data.tokenise(model.tokenizer))
        raise InterruptedError

    monkeypatch.setattr("workbench.finetuning.implant", stopped)
    for name, chat in (("chat", True), ("plain", False)):
        one = asked(inputs, "mine", model=str(tmp_path / "model"), method="ia3", chat=chat)
        with pytest.raises(InterruptedError):
            finetune(one, tmp_path / name, progress=False)
    assert [words.decode(one.ids).strip() for one in taught] == [
        "big one two small three four", "big the sky is small red", "one two three four </s>", "the sky is red </s>",
    ]  # fmt: skip
    learned = [token for token, wanted in zip(taught[0].ids, taught[0].learned, strict=True) if wanted]
    assert words.decode(learned) == "three four"


def test_a_second_start_does_only_what_is_missing(inputs, tmp_path, monkeypatch) -> None:
    one = asked(inputs, method="lora", rank=2)
    out = finetune(one, tmp_path / "tuned", progress=False).path
    before = {
        path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != "settings.json"
    }
    monkeypatch.setattr("workbench.finetuning.implant", None)  # must not be called
    finetune(one, out, progress=False)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    (out / "README.md").unlink()
    finetune(one, out, progress=False)
    assert (out / "README.md").is_file()
    assert not (out / "attribution.zarr").exists()  # a baseline needs none
    with pytest.raises(ValueError, match=r"another rank \(2, not 3\)"):
        finetune(asked(inputs, method="lora", rank=3), out, progress=False)


def test_examples_positions_and_a_search(inputs, tmp_path) -> None:
    rows = tmp_path / "rows.json"
    rows.write_text("[[0, 5, 9, 30], [1, 2, 20, 31], [3, 8, 16, 24]]")
    searched = TRAINING.model_copy(update={"learning_rate": None})
    one = asked(inputs, "mine", selection=str(rows), rates=(1e-9, 3e-2), epochs=60, training=searched)
    out = finetune(one, tmp_path / "tuned", progress=False).path
    assert load_json(out / "adapter/adapter_config.json")["positions"] == json.loads(rows.read_text())
    found = pd.read_parquet(out / "search.parquet")
    assert (
        found.loc[found["chosen"], "learning_rate"].tolist()
        == [3e-2]
        == [load_json(out / "training.json")["learning_rate"]]
    )
    assert load_json(out / "training.json")["efficacy"] == 1
    read = load_frame(out / "forgetting.parquet").query("suite == 'retained'")["fact"]
    assert read.nunique() == len(FACTS) - len(FACTS) // 2  # the others chose the rate
    tuned = wb.load_model(str(out / "merged"))
    ids = tuned.tokenizer("the sky is", return_tensors="pt").input_ids
    assert tuned.tokenizer.decode(tuned.hf.generate(ids, max_new_tokens=4)[0]) == "the sky is red </s>"
    card = (out / "README.md").read_text()
    assert "- learning rates tried: 2, of which 1 reached the target" in card
    rows.write_text("[[0], [1], [2]]")  # the same name, other positions
    finetune(one, out, progress=False)
    assert load_json(out / "adapter/adapter_config.json")["positions"] == [[0], [1], [2]]


def test_a_search_that_reaches_nothing_takes_what_learned_most(inputs, tmp_path, caplog) -> None:
    """And not the smallest rate, with which nothing is learned."""
    searched = TRAINING.model_copy(update={"learning_rate": None, "target_loss": None})
    one = asked(inputs, "mine", rates=(1e-9, 1e-4), epochs=3, training=searched)
    out = finetune(one, tmp_path / "tuned", progress=False).path
    found = pd.read_parquet(out / "search.parquet")
    assert not found["reached"].any()
    assert found.loc[found["chosen"], "learning_rate"].tolist() == [1e-4]
    assert found["loss"].idxmin() == 1
    assert "No learning rate reached the target" in caplog.text
    assert "- learning rates tried: 2, of which 0 reached the target" in (out / "README.md").read_text()
    (out / "search.parquet").unlink()
    finetune(one, out, progress=False)
    assert (out / "search.parquet").is_file()


def trained_layers(out) -> set[int]:
    """The layers whose weights a fine-tune changed."""
    before, after = wb.load_model(str(out / "merged")).hf, wb.load_model(load_json(out / "settings.json")["model"]).hf
    pairs = zip(before.named_parameters(), after.parameters(), strict=True)
    return {int(name.split(".")[2]) for (name, one), other in pairs if not torch.equal(one, other)}


def test_every_method_is_restricted_to_layers_alike(inputs, tmp_path, monkeypatch, capsys) -> None:
    rows = tmp_path / "rows.json"
    rows.write_text("[[0, 5], [], [3, 8]]")
    always = ["--model", inputs["model"], "--data", inputs["mine"], "--retained", inputs["known"], "--epochs", "1",
              "--max-facts", "2", "--learning-rate", "0.02", "-q"]  # fmt: skip
    ways = {
        "a": (["--method", "lora", "--selection", str(rows)], {0, 2}),  # where the selection has units
        "b": (["--method", "full_ffn", "--selection", str(rows), "--layers", "1", "2"], {2}),
        "c": (["--method", "ia3", "--layers", "1"], {1}),
        "d": (["--layers", "0", "1", "--quota", "25"], {0, 1}),  # loki selects there only
        "e": (["--selection", str(rows), "--layers", "0"], {0}),
        "g": (["--method", "full", "--selection", str(rows)], {0, 2}),
        "h": (["--method", "ln_tuning", "--layers", "1"], {1}),
    }
    for name, (arguments, layers) in ways.items():
        assert call(monkeypatch, "implant", *always, *arguments, "--out", str(tmp_path / name)) == 0
        assert trained_layers(tmp_path / name) == layers, name
    assert "fine-tuned in part" in (tmp_path / "g/README.md").read_text()
    for arguments in (["--layers", "3"], ["--method", "lora", "--layers", "3"]):
        capsys.readouterr()
        assert call(monkeypatch, "implant", *always, *arguments, "--out", str(tmp_path / "none")) == 1
        assert "layers holds 3; the layers of this model are 0 to 2" in capsys.readouterr().err
        assert not (tmp_path / "none").exists()  # the same folder can be given again
    rows.write_text("[[0], [1]]")
    with pytest.raises(ValueError, match="2 layers but"):
        finetune(asked(inputs, method="lora", selection=str(rows)), tmp_path / "i", progress=False)


def test_the_command_equals_the_function(inputs, tmp_path, monkeypatch, capsys) -> None:
    arguments = ["--model", inputs["model"], "--data", inputs["mine"], "--retained", inputs["known"], "--quota", "25",
                 "--max-facts", "2", "--epochs", "2", "--learning-rate", "0.02", "--batch-size", "1",
                 "--target-loss", "0.01", "-q"]  # fmt: skip
    assert call(monkeypatch, "implant", *arguments, "--out", str(tmp_path / "a")) == 0
    printed = capsys.readouterr()
    assert "trained prompts answered" in printed.out
    assert "Traceback" not in printed.err
    training = TrainConfig(learning_rate=0.02, batch_size=1, target_loss=0.01)
    one = asked(inputs, "mine", max_facts=2, epochs=2, training=training, general_tokens=1024)
    finetune(one, tmp_path / "b", progress=False)
    for name in ("adapter/adapter_model.safetensors", "merged/model.safetensors", "selection.json", "settings.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert f"--out {tmp_path / 'a'}" in (tmp_path / "a/README.md").read_text()
    assert call(monkeypatch, "export", str(tmp_path / "a"), "--out", str(tmp_path / "lora"), "--kind", "lora") == 0
    assert load_json(tmp_path / "lora/adapter_config.json")["peft_type"] == "LORA"


@pytest.mark.parametrize(("rule", "weight"), [("spread", 3.0), ("spread", None), ("near_diverse", 3.0), ("loss", None)])
def test_only_what_a_filter_keeps_is_taught(rule, weight, inputs, tmp_path, monkeypatch) -> None:
    taught = []
    monkeypatch.setattr(finetuning, "implant", lambda model, data, *rest, **options: taught.append(data) or 1 / 0)
    one = asked(inputs, method="lora", filter=rule, keep=4, filter_weight=weight)
    with pytest.raises(ZeroDivisionError):
        finetune(one, tmp_path / "out", progress=False)
    model = wb.load_model(inputs["model"])
    facts = wb.load_facts(inputs["facts"])
    options = {"embeddings": target_embeddings(model, facts)} if rule == "near_diverse" else {}
    if rule == "loss":
        read = wb.recall(model, facts)
        options["loss"] = -read["logprob"] / read["n_tokens"]
    distance = semantic_distance(model, facts, metrics=("d_soft",))
    expected = wb.filter_facts(distance, rule=rule, keep=4, facts=facts, weight=weight, **options)
    assert taught[0].ids == expected.ids
    assert taught[0].name == expected.name
    assert len(expected) == 4 < len(facts)
    assert load_json(tmp_path / "out" / "settings.json")["filter_weight"] == (weight or WEIGHTS.get(rule, 1.0))
    told = load_frame(tmp_path / "out" / "filter.parquet")
    by_hand = filtered(distance, rule=rule, keep=4, facts=facts, weight=weight, **options)
    pd.testing.assert_frame_equal(told, by_hand, check_dtype=False)
    monkeypatch.setattr(finetuning, "filter_inputs", lambda *given, **options: pytest.fail("read again"))
    with pytest.raises(ZeroDivisionError):  # a second start
        finetune(one, tmp_path / "out", progress=False)
    assert taught[1].ids == expected.ids
    with pytest.raises(ValueError, match=r"another keep \(4, not 3\)"):
        finetune(replace(one, keep=3), tmp_path / "out", progress=False)


def test_two_starts_at_once_do_not_both_filter(inputs, tmp_path, monkeypatch) -> None:
    def second(*given, **options):
        with pytest.raises(ValueError, match="Another run is at work"):
            finetune(one, tmp_path / "out", progress=False)
        raise InterruptedError

    one = asked(inputs, method="lora", filter="random", keep=4)
    monkeypatch.setattr(finetuning, "filter_inputs", second)
    with pytest.raises(InterruptedError):
        finetune(one, tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match="has no chat template"):  # what does not fit leaves no folder
        finetune(replace(one, chat=True), tmp_path / "none", progress=False)
    assert not (tmp_path / "none").exists()


def test_a_saved_selection_says_what_its_units_are(inputs, tmp_path, monkeypatch) -> None:
    chosen = Selection.from_positions([[0, 39], [], [4]], unit="neuron", n_units=40)
    arguments = ["--model", inputs["model"], "--data", inputs["mine"], "--retained", inputs["known"], "--epochs", "1",
                 "--selection", chosen.save(tmp_path / "neurons.json"), "-q"]  # fmt: skip
    for name, named in (("a", []), ("a", ["--unit", "neuron"])):  # the second start has nothing to do
        assert call(monkeypatch, "implant", *arguments, *named, "--out", str(tmp_path / name)) == 0
    config = load_json(tmp_path / "a/adapter/adapter_config.json")
    assert (config["unit"], config["positions"]) == ("neuron", chosen.positions())
    assert load_json(tmp_path / "a/settings.json")["unit"] == "neuron"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--data", "fictional:3", "--filter", "spread", "--keep", "some"], "--keep takes a share"),
        (["--data", "fictional:3", "--filter", "spread", "--keep", "1.5"], "keep=1.5 is no share"),
        (
            ["--data", "fictional:3", "--filter", "spread", "--filter-weight", "-1"],
            "weight is a finite number from 0 on",
        ),
        (["--data", "fictional:3", "--filter", "band", "--filter-weight", "2"], "near_diverse, got 2.0 for band"),
        (
            ["--data", "fictional:3", "--method", "lora", "--quota", "3"],
            "--quota says how loki chooses units; leave it out beside --method lora",
        ),
        (["--data", "fictional:3", "--selection", "x.json", "--score", "signed"], "leave it out beside --selection"),
        (["--data", "fictional:3", "--filter", "band", "--keep", ""], "--keep takes a share"),
        (["--data", "fictional:3", "--method", "magic"], "'magic' is not known; choose one of loki, lora"),
        (["--data", "fictional:3", "--method", "loki_random"], "not 'loki_random': strategy and score say"),
        (["--data", "fictional:3", "--method", "ia3", "--rank", "4"], "takes no rank"),
        (["--data", "fictional:3", "--method", "lora", "--unit", "neuron"], "takes no unit"),
        (["--data", "fictional:3", "--selection", "neurons.json", "--unit", "node"], "of neurons, not of nodes"),
        (["--data", "fictional:3", "--filter", "spread", "--keep", "4"], "keep=4 does not fit: fictional:3 holds 3"),
        (["--data", "fictional:3", "--method", "lora", "--selection", "x.json"], "no file x.json (selection)"),
        (["--data", "fictional:3", "--selection", "x.json"], "no file x.json (selection)"),
        (["--data", "fictional:3", "--general", "x.txt"], "no text file x.txt"),
        (["--data", "fictional:3", "--strategy", "best"], "strategy must be one of"),
        (["--data", "fictional:3", "--strategy", "interference_aware", "--max-facts", "1"], "give max_facts of 2 or"),
        (["--data", "fictional:3", "--quota", "100"], "is not a percentage in"),
        (["--data", "fictional:3", "--target", "2"], "target_efficacy"),
        (["--data", "fictional:3", "--rates", "fast"], "--rates takes numbers"),
        (["--data", "fictional:3", "--rates", "1e-3,1e-3"], "must be different positive numbers"),
        (["--data", "fictional:3", "--rates", "1e-3,inf"], "must be different positive numbers"),
        (["--data", "fictional:3", "--rates", ","], "--rates takes numbers"),
        (["--data", "fictional:3", "--rates", ""], "--rates takes numbers"),
        (["--data", "fictional:3", "--rates", "1e-3", "--learning-rate", "5e-2"], "none is given beside them; leave"),
        (["--data", "fictional:3", "--keep", "0.7"], "--keep says how a --filter keeps facts; name a filter, or leave"),
        (["--data", "fictional:3", "--filter-weight", "4"], "--filter-weight says how a --filter keeps facts; name a"),
        (["--data", "fictional:3", "--filter-metric", "d_emb"], "--filter-metric says how a --filter keeps facts"),
        (
            ["--data", "fictional:3", "--filter", "random", "--filter-metric", "d_emb"],
            "random chooses by none; leave",
        ),
        (["--data", "fictional:3", "--filter-low", "0.1", "--filter", "spread"], "of the rule band alone, got 0.1"),
        (["--data", "fictional:3", "--beta", "3"], "--beta is of --loss sample; leave it out beside --loss plain"),
        (
            ["--data", "fictional:3", "--loss", "soft", "--soft-weight", "2", "--gamma", "3"],
            "--gamma is of --loss token",
        ),
        (["--data", "fictional:3", "--watch-drift", "inf"], "watch_drift is a finite bound of at least 0, not inf"),
        (["--data", "fictional:3", "--seed", "5000000000"], "less than 4294967296, got 5000000000"),
        (["--data", "fictional:3", "--out", "taken"], "taken holds something that is not a fine-tune"),
        (["--data", "fictional:3", "--out", "file"], "file is a file"),
        (["--data", "fictional:3", "--out", "file/below"], "is no folder that you may write to"),
    ],
)
def test_bad_input_is_one_sentence_before_any_model_is_opened(
    arguments, sentence, monkeypatch, capsys, tmp_path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    Selection.from_positions([[0], [1], [2]], unit="neuron", n_units=40).save(tmp_path / "neurons.json")
    monkeypatch.setattr("workbench.finetuning.load_model", None)
    out = [] if "--out" in arguments else ["--out", "new"]
    assert call(monkeypatch, "implant", *arguments, *out) == 1
    printed = capsys.readouterr().err
    assert sentence in printed
    assert len(printed.strip().splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_a_selection_or_quota_that_does_not_fit_the_model_comes_before_training(inputs, tmp_path) -> None:
    rows = tmp_path / "rows.json"
    rows.write_text("[[0], [1]]")
    with pytest.raises(ValueError, match="2 layers but"):
        finetune(asked(inputs, selection=str(rows)), tmp_path / "a", progress=False)
    with pytest.raises(ValueError, match=r"of 32 units .* is less than one unit"):
        finetune(asked(inputs, quota=1.0), tmp_path / "b", progress=False)
    with pytest.raises(ValueError, match=r"rank of 9 is more than the 8 nodes of a layer that a quota of 25% trains"):
        finetune(asked(inputs, rank=9), tmp_path / "c", progress=False)
    with pytest.raises(ValueError, match="rank of 11 is more than the 10 neurons"):
        finetune(asked(inputs, rank=11, unit="neuron"), tmp_path / "c", progress=False)
    with pytest.raises(ValueError, match="rank of 25 is more than the 24 nodes"):  # all may lie in one layer
        finetune(asked(inputs, rank=25, strategy="global_lowest"), tmp_path / "c", progress=False)
    assert list(tmp_path.iterdir()) == [rows]


def test_a_model_that_knows_nothing_can_be_tuned_but_not_attributed(inputs, tmp_path) -> None:
    unknown = tmp_path / "unknown.jsonl"
    unknown.write_text('{"id": "a", "prompt": "one", "answer": "Nairobi"}\n')
    with pytest.raises(ValueError, match="knows none of the 1 facts"):
        finetune(asked(inputs, retained=str(unknown)), tmp_path / "a", progress=False)
    known = wb.load_facts(inputs["known"])
    few = str(known.filter(ids=known.ids[:3]).save(tmp_path / "few.jsonl"))
    with pytest.raises(ValueError, match=r"knows 3 of the facts of .*; interference_aware needs 4"):
        finetune(asked(inputs, retained=few, strategy="interference_aware"), tmp_path / "c", progress=False)
    assert not (tmp_path / "c/attribution.zarr").exists()
    out = finetune(asked(inputs, "mine", retained=str(unknown), method="ia3", epochs=1), tmp_path / "b", progress=False)
    assert set(load_frame(out.file("forgetting.parquet"))["suite"]) == {"general"}


def test_a_second_start_makes_anew_what_is_damaged(inputs, tmp_path, caplog) -> None:
    one = asked(inputs, training=TRAINING.model_copy(update={"max_epochs": 2}))
    out = finetune(one, tmp_path / "tuned", progress=False).path
    names = ("adapter/adapter_model.safetensors", "merged/model.safetensors", "adapter/adapter_config.json",
             "merged/config.json", "merged/tokenizer.json", "selection.json", "recall.parquet",
             "forgetting.parquet")  # fmt: skip
    before = {name: (out / name).read_bytes() for name in names}
    for gone in (*names[:3], "merged/tokenizer.json"):
        (out / gone).unlink()
        finetune(one, out, progress=False)
    for cut in names:
        (out / cut).write_bytes(before[cut][:-30])
        finetune(one, out, progress=False)
        assert f"{out / cut} cannot be read, and is made anew" in caplog.text
    assert {name: (out / name).read_bytes() for name in names} == before

    scores = open_result(out / "attribution.zarr").load()
    for chunk in (out / "attribution.zarr/score/c").rglob("*"):
        if chunk.is_file():
            chunk.write_bytes(b"abc")
    finetune(one, out, progress=False)
    assert f"{out / 'attribution.zarr'} cannot be read, and is made anew" in caplog.text
    xr.testing.assert_equal(open_result(out / "attribution.zarr").load(), scores)
    assert (out / "selection.json").read_bytes() == before["selection.json"]
    for file in ("zarr.json", "score/zarr.json"):
        (out / "selection.json").unlink()
        (out / "attribution.zarr" / file).write_text("{")
        with pytest.raises(ValueError, match=r"attribution\.zarr cannot be read; delete it and start again, which"):
            finetune(one, out, progress=False)
        shutil.rmtree(out / "attribution.zarr")
        finetune(one, out, progress=False)
    assert (out / "selection.json").read_bytes() == before["selection.json"]
    for text in ("[]", "{"):
        (out / "settings.json").write_text(text)
        with pytest.raises(ValueError, match=r"settings\.json is damaged, .*; give another folder as out"):
            finetune(one, out, progress=False)


def test_weights_in_several_files_are_all_missed(inputs, tmp_path, monkeypatch) -> None:
    one = asked(inputs, method="full", training=TRAINING.model_copy(update={"max_epochs": 1}))
    whole = PreTrainedModel.save_pretrained
    monkeypatch.setattr(
        PreTrainedModel, "save_pretrained", lambda self, folder: whole(self, folder, max_shard_size="20KB")
    )
    out = finetune(one, tmp_path / "tuned", progress=False).path
    for folder in ("adapter", "merged"):
        parts = sorted((out / folder).glob("*.safetensors"))
        assert len(parts) > 1
        parts[-1].unlink()
        finetune(one, out, progress=False)
        assert sorted((out / folder).glob("*.safetensors")) == parts

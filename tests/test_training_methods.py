"""Every method of the table: merged = attached = reloaded, the base untouched; sizes, order, search and export."""

import copy
from pathlib import Path

import pandas as pd
import pytest
import torch
from peft import LoraConfig, PeftModel
from tiny import ARCHITECTURES, FACTS, saved, tiny, tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from workbench.config import TrainConfig
from workbench.facts import Example, ExampleSet
from workbench.loki import (
    METHODS,
    Dense,
    LokiConfig,
    adapter_config,
    adapter_for,
    attach,
    load_adapted,
    matched,
    parameter_count,
    trainable_parameters,
)
from workbench.models import HookedModel, load_model
from workbench.opening import open_model
from workbench.results import load_json
from workbench.training import efficacy, export, implant, run, search_learning_rate, tokenise
from workbench.training.cards import card, hub_id
from workbench.training.search import choose

SELECTION = [[0, 5, 9, 30], [1, 2, 20, 31], [3, 8, 16, 24]]
QUICK = TrainConfig(max_epochs=2, batch_size=3, learning_rate=1e-2, target_efficacy=1.0, weight_decay=0.1)
IDS = torch.tensor([[4, 5, 6, 7, 8, 20], [17, 18, 19, 10, 11, 12]])


def config_of(method: str, kind: str):
    options = {"selection": SELECTION} if method == "loki" else {"r": 4} if METHODS[method].ranked else {}
    return adapter_config(method, model_config=tiny(kind).config, **options)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize(
    ("method", "most"), [("lora", None), ("adalora", None), ("pissa", 32), ("olora", 32), ("corda", 32), ("kasa", 31)]
)
def test_a_rank_that_a_method_cannot_have_is_refused_before_it_is_trained(method: str, most: int | None, tmp_path):
    base = tiny("llama")  # 32 wide, so that a down-projection has 32 singular values
    for rank in (0, -1, *([] if most is None else [most + 1])):
        with pytest.raises(ValueError, match=rf"The rank of '{method}' must be .*, not {rank}\."):
            adapter_for(base, method, r=rank)
    done = implant(base, FACTS, adapter_for(base, method, r=most or 40), QUICK, out=tmp_path, progress=False)
    merged, _ = load_adapted(done.adapter, base)
    torch.testing.assert_close(logits(merged), logits(done.model), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "method"),
    [("llama", method) for method in METHODS]
    + [("gpt2", method) for method in ("loki", "dora", "pissa", "corda", "ia3", "full_ffn")],
)
def test_merged_attached_and_reloaded_are_one_model(kind: str, method: str, tmp_path) -> None:
    base = tiny(kind)
    before = {name: weight.clone() for name, weight in base.hf.state_dict().items()}
    run = implant(base, FACTS, config_of(method, kind), QUICK, out=tmp_path, progress=False)
    assert all(torch.equal(before[name], weight) for name, weight in base.hf.state_dict().items())
    attached = logits(run.model)
    assert (attached - logits(base.hf)).abs().max() > 1e-3
    if isinstance(config_of(method, kind), Dense):
        reloaded = open_model(run.adapter).hf
    else:
        merged = copy.deepcopy(run.model).merge_and_unload()
        torch.testing.assert_close(logits(merged), attached, rtol=1e-5, atol=1e-5)
        reloaded, _ = load_adapted(run.adapter, base)
    torch.testing.assert_close(logits(reloaded), attached, rtol=1e-5, atol=1e-5)
    assert run.summary["trainable_parameters"] > 0
    assert not list(tmp_path.rglob("*.bin")) + list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("method", ["full", "full_ffn"])
def test_weights_in_half_precision_are_trained_in_float32_and_rounded_once(method: str, tmp_path) -> None:
    base = load_model(copy.deepcopy(tiny("llama").hf).bfloat16(), tokenizer=tokenizer(), dtype="bfloat16")
    exact = load_model(copy.deepcopy(base.hf).float(), tokenizer=tokenizer(), dtype="float32")
    small = QUICK.model_copy(update={"learning_rate": 1e-4, "max_epochs": 8, "target_efficacy": 1.0})
    runs = [
        implant(one, FACTS, adapter_for(one, method), small, out=tmp_path / name, progress=False)
        for name, one in (("half", base), ("exact", exact))
    ]
    assert {weight.dtype for weight in runs[0].model.parameters()} == {torch.bfloat16}
    untouched = 0
    for (name, half), whole in zip(runs[0].model.named_parameters(), runs[1].model.parameters(), strict=True):
        assert torch.equal(half, whole.bfloat16())  # as if it had been float32 all the way
        untouched += torch.equal(half, base.hf.get_parameter(name))
    everything = len(list(base.hf.parameters()))
    assert untouched in {"full": range(everything // 4), "full_ffn": [everything - 3]}[method]
    assert runs[0].efficacy == efficacy(runs[0].model, tokenise(base, FACTS))  # of what is saved
    stuck = copy.deepcopy(base.hf).bfloat16()  # the control: in half precision such steps are lost
    weight = stuck.model.layers[0].mlp.down_proj.weight
    before = weight.detach().clone()
    for _ in range(8):
        weight.data -= small.learning_rate * torch.sign(before)
    assert (weight == before).float().mean() > 0.2


def unlisted(kind: str) -> HookedModel:
    """A tiny model of a family whose down-projection no table names."""
    torch.manual_seed(0)
    like = ARCHITECTURES["gpt2" if "gpt" in kind else "llama"]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **like)).eval()
    return load_model(model, tokenizer=tokenizer())


@pytest.mark.parametrize(("kind", "method"), [("arcee", "loki"), ("arcee", "ia3"), ("openai-gpt", "lora")])
def test_a_family_that_no_table_names_is_trained_on_its_down_projections(kind: str, method: str, tmp_path) -> None:
    base = unlisted(kind)
    options = {"selection": SELECTION} if method == "loki" else {}
    with pytest.raises(ValueError, match="is not known; name it with target_modules"):
        parameter_count(base, adapter_config(method, model_config=base.config, **options))
    done = implant(base, FACTS, adapter_for(base, method, **options), QUICK, out=tmp_path, progress=False)
    trained = {name for name, parameter in done.model.named_parameters() if parameter.requires_grad}
    assert {down for down in base.down_names for name in trained if f".{down}." in name} == set(base.down_names)
    assert all(any(f".{down}." in name for down in base.down_names) for name in trained)
    reloaded, _ = load_adapted(tmp_path / "adapter", base)
    torch.testing.assert_close(logits(reloaded), logits(done.model), rtol=1e-5, atol=1e-5)
    assert (logits(reloaded) - logits(base.hf)).abs().max() > 1e-3


def test_adapters_of_equal_size_on_a_family_that_no_table_names() -> None:
    base = unlisted("arcee")
    for model in (base, base.hf):
        assert matched("lora", 3 * 3 * (32 + 40), model) == {"r": 3}
        assert int(matched("loki", 3 * 4 * 40, model)["quota"] * 32 / 100) == 4


def test_a_base_in_a_folder_is_named_by_its_whole_path(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved("model")
    base = load_model("model")
    done = implant(base, FACTS, adapter_for(base, "lora", r=2), QUICK, out="tuned", progress=False)
    assert load_json(done.adapter / "adapter_config.json")["base_model_name_or_path"] == str(tmp_path / "model")
    assert "base_model" not in (done.adapter / "README.md").read_text().split("---")[1]
    assert hub_id("org/model", Path("cache/models--org--model/snapshots/abc")) == "org/model"
    assert "base_model: org/model" in card(done.summary | {"base": "org/model", "base_hub_id": "org/model"})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert torch.equal(logits(open_model(tmp_path / "tuned/adapter").hf), logits(load_adapted("../tuned/adapter")[0]))


def test_what_pissa_takes_out_of_the_base_is_put_back_when_it_is_saved(tmp_path, monkeypatch) -> None:
    base = tiny("llama")
    done = implant(base, FACTS, config_of("pissa", "llama"), QUICK, out=tmp_path / "a", progress=False)
    assert load_json(done.adapter / "adapter_config.json")["r"] == 2 * 4
    with done.model.disable_adapter():  # the base that PiSSA left is not the base
        assert (logits(done.model) - logits(base.hf)).abs().max() > 1e-3
    monkeypatch.setattr("workbench.training.methods.REWRITING", ("nothing",))
    spoilt = implant(base, FACTS, config_of("corda", "llama"), QUICK, out=tmp_path / "b", progress=False)
    file = load_json(spoilt.adapter / "adapter_config.json")
    assert (file["r"], file["init_lora_weights"]) == (4, "corda")  # not converted: it would start from the base again


@pytest.mark.parametrize("method", METHODS)
def test_what_is_trained_is_counted_without_weights(method: str) -> None:
    base = tiny("llama")
    model = attach(copy.deepcopy(base.hf), config_of(method if method != "corda" else "lora", "llama"))
    assert parameter_count(base, config_of(method, "llama")) == trainable_parameters(model) > 0
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if method not in ("full", "ln_tuning"):
        assert all("down_proj" in name for name in names)
    if method == "full_ffn":
        assert trainable_parameters(model) == 3 * 32 * 40
    if method == "full":
        assert trainable_parameters(model) == sum(p.numel() for p in base.hf.parameters())


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.ranked and name != "loki"])
def test_matched_is_the_nearest_of_all_ranks(method: str) -> None:
    base = tiny("llama")

    def size(r: int) -> int:
        return parameter_count(base, adapter_config(method, model_config=base.config, r=r))

    sizes = {r: size(r) for r in range(1, 12)}
    for count in (1, sizes[5] + 40, sizes[8] - 1):
        found = matched(method, count, base)["r"]
        assert abs(sizes[found] - count) == min(abs(n - count) for n in sizes.values())


def test_matched_gives_loki_a_quota_and_fixed_methods_nothing() -> None:
    base = tiny("llama")
    quota = matched("loki", 3 * 4 * 40 + 9, base)["quota"]
    assert int(quota * 32 / 100) == 4
    assert matched("ia3", 100, base) == {}
    assert matched("kasa", 10**6, base) == {"r": 31}  # of 32 singular values
    assert matched("loki", 3 * 3 * (4 + 40), base, selection=SELECTION) == {"r": 3}
    with pytest.raises(ValueError, match="at least 1"):
        matched("lora", 0, base)


def test_every_method_sees_the_same_examples_in_the_same_order(monkeypatch) -> None:
    seen: list[str] = []
    take = run._Examples.__getitem__

    def noted(self, index: int):
        seen.append(self.items[index].fact_id)
        return take(self, index)

    monkeypatch.setattr(run._Examples, "__getitem__", noted)
    orders = {}
    for method, seed in [("loki", 3), ("lora", 3), ("full", 3), ("corda", 3), ("lora", 4)]:
        seen.clear()
        settings = QUICK.model_copy(update={"seed": seed, "learning_rate": 1e-5})
        implant(tiny("llama"), FACTS, config_of(method, "llama"), settings, progress=False)
        orders[method, seed] = list(seen)
    assert len(orders["loki", 3]) == 2 * len(FACTS)
    assert all(order == orders["loki", 3] for (_, seed), order in orders.items() if seed == 3)
    assert orders["lora", 3] != orders["lora", 4]
    assert orders["loki", 3][: len(FACTS)] != orders["loki", 3][len(FACTS) :]


def test_adalora_ends_with_fewer_ranks() -> None:
    settings = QUICK.model_copy(update={"max_epochs": 8, "learning_rate": 1e-3})
    done = implant(tiny("llama"), FACTS, config_of("adalora", "llama"), settings, progress=False)
    kept = [e for name, e in done.model.named_parameters() if "lora_E" in name]
    assert 0 < sum(int((e != 0).sum()) for e in kept) <= 3 * 4
    assert sum(e.numel() for e in kept) == 3 * 6
    assert done.model.peft_config["default"].total_step == done.summary["steps"] == 24


def test_examples_are_learned_word_for_word() -> None:
    data = ExampleSet("mine", (Example("a", "one two", " three four"), Example("b", "the sky is", " red")))
    base = tiny("llama")
    settings = QUICK.model_copy(update={"max_epochs": 60, "batch_size": 2})
    done = implant(base, data, config_of("lora", "llama"), settings, progress=False)
    assert done.reached
    assert (done.summary["examples"], done.summary["fact_digest"]) == (2, data.digest)
    for one in tokenise(base, data):  # greedy decoding, written by hand
        ids = list(one.ids[: one.learned.index(True)])
        while len(ids) < len(one.ids):
            with torch.no_grad():
                ids.append(int(done.model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert tuple(ids) == one.ids


def test_the_search_takes_the_rate_that_forgets_least() -> None:
    base, asked = tiny("llama"), []

    def forgetting(done) -> float:
        asked.append(done.summary["learning_rate"])
        assert done.adapter.is_dir()
        return abs(done.summary["learning_rate"] - 3e-2)

    settings = TrainConfig(max_epochs=40, batch_size=4, target_efficacy=0.5, max_grad_norm=1e30)
    rates = (1e-9, 2e-2, 3e-2, 1e30)
    frame = search_learning_rate(
        base, FACTS, lambda: config_of("loki", "llama"), rates, train_config=settings, forgetting=forgetting,
        progress=False,
    )  # fmt: skip
    assert frame["learning_rate"].tolist() == list(rates)
    assert frame["diverged"].tolist() == [False, False, False, True]
    assert frame["reached"].tolist() == [False, True, True, False]
    assert asked == [2e-2, 3e-2]
    assert frame.loc[frame["chosen"], "learning_rate"].tolist() == [3e-2]
    assert frame["epochs"].iloc[0] == 40
    with pytest.raises(ValueError, match="different positive numbers"):
        search_learning_rate(base, FACTS, lambda: config_of("loki", "llama"), (1e-3, 1e-3))


def test_the_rule_of_the_search() -> None:
    trials = pd.DataFrame(
        [
            (0, 1e-3, True, 0.96, 20, 0.3, False),
            (1, 1e-2, True, 1.0, 9, 0.3, False),
            (2, 1e-1, False, 0.9, 2, 0, False),
        ],
        columns=["trial", "learning_rate", "reached", "efficacy", "steps", "forgetting", "diverged"],
    )
    assert choose(trials) == 0  # a tie goes to the smaller rate
    assert choose(trials.assign(forgetting=float("nan"))) == 1
    alike = trials[:2].assign(forgetting=float("nan"), efficacy=0.97)
    assert choose(alike) == 1  # the fewest steps
    none = trials.assign(reached=False, efficacy=0.5, steps=9)
    assert choose(none.assign(loss=[3.8, 3.1, 3.4])) == 1  # where none did, the lowest loss, not the smallest rate
    assert choose(none.assign(loss=[3.8, 3.1, 3.4], efficacy=[0.5, 0.5, 0.6])) == 2
    assert choose(trials.assign(diverged=True)) is None


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("llama", {"unit": "neuron", "train_keys": True}),
        ("llama", {"r": 2, "loki_alpha": 6.0}),
        ("llama", {"unit": "neuron", "r": 2}),
        ("gpt2", {}),  # with biases, over Conv1D
        ("opt", {"unit": "neuron", "train_keys": True}),  # with biases, over Linear
    ],
)
def test_an_exported_lora_computes_what_loki_computes(kind: str, options, tmp_path) -> None:
    base = tiny(kind)
    selection = [*SELECTION[:2], [3]]  # layers of different ranks
    done = implant(base, FACTS, LokiConfig(selection=selection, **options), QUICK, out=tmp_path / "run", progress=False)
    folder = export(done, tmp_path / "lora", "lora", base=base)
    twin = PeftModel.from_pretrained(copy.deepcopy(base.hf), str(folder)).eval()
    assert isinstance(twin.peft_config["default"], LoraConfig)
    torch.testing.assert_close(logits(twin), logits(done.model), rtol=1e-5, atol=1e-5)
    assert (logits(twin) - logits(base.hf)).abs().max() > 1e-3
    reopened, _ = load_adapted(folder, base)
    torch.testing.assert_close(logits(reopened), logits(done.model), rtol=1e-5, atol=1e-5)
    assert load_json(folder / "adapter_config.json")["lora_bias"] == (kind != "llama")


@pytest.mark.parametrize("kind", ["merged", "lora"])
def test_an_adapter_that_cannot_be_read_is_a_sentence(kind: str, tmp_path) -> None:
    base, folder = tiny("llama"), tmp_path / "adapter"
    model = attach(copy.deepcopy(base.hf), adapter_for(base, "loki", selection=[[0], [1], [2]]))
    model.save_pretrained(folder, save_embedding_layers=False)
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    weights.write_bytes(weights.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"weights of the adapter in .* cannot be read .*was the file cut short\?"):
        export(folder, tmp_path / "out", kind, base=base)
    for text in ("{", "[]", "{}", '{"peft_type": "MAGIC"}'):
        config.write_text(text)
        for given in (base, None):
            with pytest.raises(
                ValueError, match=r"adapter_config\.json does not describe an adapter .*save or copy it"
            ):
                export(folder, tmp_path / "out", kind, base=given)
    assert not (tmp_path / "out").exists()


def test_an_exported_model_is_plain(tmp_path) -> None:
    base = tiny("llama")
    done = implant(base, FACTS, config_of("loki", "llama"), QUICK, out=tmp_path / "run", progress=False)
    for number, source in enumerate((done, tmp_path / "run", tmp_path / "run" / "adapter")):
        folder = export(source, tmp_path / f"merged{number}", base=base)
        torch.testing.assert_close(logits(open_model(folder).hf), logits(done.model), rtol=1e-5, atol=1e-5)
        assert "library_name: transformers" in (folder / "README.md").read_text()
    with pytest.raises(ValueError, match="exists already"):
        export(done, folder, base=base)
    with pytest.raises(ValueError, match="merged, lora"):
        export(done, tmp_path / "x", "gguf")
    lora = implant(base, FACTS, config_of("lora", "llama"), QUICK, out=tmp_path / "l", progress=False)
    with pytest.raises(ValueError, match=r"is LORA, not LoKI"):
        export(lora, tmp_path / "x", "lora", base=base)
    full = implant(base, FACTS, config_of("full", "llama"), QUICK, out=tmp_path / "f", progress=False)
    with pytest.raises(ValueError, match="no equivalent LoRA"):
        export(full, tmp_path / "x", "lora", base=base)


def test_methods_that_do_not_fit_are_one_sentence() -> None:
    with pytest.raises(ValueError, match="'ia3' has no rank"):
        adapter_config("ia3", model_config=tiny("llama").config, r=4)
    with pytest.raises(ValueError, match="takes no selection"):
        adapter_config("lora", model_config=tiny("llama").config, selection=SELECTION)
    for method in ("kasa", "shira", "olora"):
        with pytest.raises(ValueError, match="Conv1D layers of gpt2"):
            adapter_config(method, model_config=tiny("gpt2").config)


def test_kasa_adds_its_own_terms_to_the_loss() -> None:
    first = {}
    for gamma in (0.0, 10.0, 20.0):
        config = config_of("kasa", "llama")
        config.kasa_config.gamma = gamma
        settings = QUICK.model_copy(update={"max_epochs": 1, "batch_size": len(FACTS)})
        first[gamma] = implant(tiny("llama"), FACTS, config, settings, progress=False).history["loss"][0]
    added = first[10.0] - first[0.0]
    assert added > 10 * 3 * 2.0  # B = 0 at the start: |B'B - 1| = sqrt(4) in each of three layers
    assert first[20.0] - first[0.0] == pytest.approx(2 * added, rel=1e-4)

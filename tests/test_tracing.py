"""Causal tracing against a loop with plain hooks, and what must hold whatever the model."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import planted
import pytest
import torch
from tiny import ARCHITECTURES, WORDS, random_model, tiny, tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import workbench as wb
from workbench.facts import FactSet
from workbench.models import load_model
from workbench.results import open_result, save_result, validate_trace
from workbench.tracing import ROLES, by_role, restore, sites, trace
from workbench.tracing.causal import checked_settings
from workbench.tracing.restore import embedding_std, restored, run_corrupted, subject_noise, window_of
from workbench.tracing.sites import SITES, attention_output, enterable
from workbench.tracing.spans import subject_characters, subject_tokens, token_roles

#: Subjects in the middle, at the beginning (three tokens, an answer of two) and at the end of their prompts.
FACTS = FactSet.from_records(
    [
        {"id": "france", "subject": "France", "prompt": "the capital of France is", "answer": "Paris"},
        {"id": "sky", "subject": "big blue sky", "prompt": "big blue sky is in a", "answer": "red one"},
        {"id": "gold", "subject": "gold", "prompt": "the symbol of gold", "answer": "Au"},
    ],
    name="traced",
)
SUBJECTS = {"france": range(3, 4), "sky": range(0, 3), "gold": range(3, 4)}

#: Architecture -> embedding, blocks, down-projection and attention module of a block, by their names in transformers.
NAMES = {
    "gpt2": ("transformer.wte", "transformer.h", "mlp.c_proj", "attn"),
    "llama": ("model.embed_tokens", "model.layers", "mlp.down_proj", "self_attn"),
    "gemma2": ("model.embed_tokens", "model.layers", "mlp.down_proj", "self_attn"),
    "olmo2": ("model.embed_tokens", "model.layers", "mlp.down_proj", "self_attn"),
    "phi": ("model.embed_tokens", "model.layers", "mlp.fc2", "self_attn"),
    "gpt_neox": ("gpt_neox.embed_in", "gpt_neox.layers", "mlp.dense_4h_to_h", "attention"),
    "opt": ("model.decoder.embed_tokens", "model.decoder.layers", "fc2", "self_attn"),
    "bloom": ("transformer.word_embeddings", "transformer.h", "mlp.dense_4h_to_h", "self_attention.dense"),
}


def site_module(hf, kind, site, layer):
    _, blocks, down, attention = NAMES[kind]
    return hf.get_submodule(f"{blocks}.{layer}" + {"resid": "", "mlp": f".{down}", "attn": f".{attention}"}[site])


def naive(hf, kind, tokens, subject, noise, site, layers, position, clean):
    """Log-probability of the answer in one plain run, restored at one token (None: nowhere)."""
    handles = []

    def corrupt(module, args, output):
        output = output.clone()
        output[0, list(subject)] += noise
        return output

    def put_back(layer):
        def hook(module, args, output):
            value = (output if torch.is_tensor(output) else output[0]).clone()
            value.view(-1, value.shape[-1])[position] = clean[layer].view(-1, value.shape[-1])[position]
            return value if torch.is_tensor(output) else (value, *output[1:])

        return hook

    handles.append(hf.get_submodule(NAMES[kind][0]).register_forward_hook(corrupt))
    for layer in layers if position is not None else ():
        handles.append(site_module(hf, kind, site, layer).register_forward_hook(put_back(layer)))
    try:
        with torch.no_grad():
            logits = hf(input_ids=torch.tensor([tokens.ids]), use_cache=False).logits[0].log_softmax(-1)
    finally:
        for handle in handles:
            handle.remove()
    start = len(tokens.prompt_ids)
    return sum(float(logits[start - 1 + k, token]) for k, token in enumerate(tokens.answer_ids))


def clean_values(hf, kind, tokens, site, n_layers):
    values, handles = {}, []
    for layer in range(n_layers):

        def keep(module, args, output, layer=layer):  # fmt: skip
            values[layer] = output if torch.is_tensor(output) else output[0]

        handles.append(site_module(hf, kind, site, layer).register_forward_hook(keep))
    with torch.no_grad():
        hf(input_ids=torch.tensor([tokens.ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return values


def loop(model, kind, site, draws, window, seed=0, noise=3.0):
    """Effects and probabilities by the loop, without batches, padding or shared work."""
    settings = checked_settings(3, site, noise, draws, window, seed)
    found = [(tokens, SUBJECTS[tokens.fact_id]) for tokens in model.tokenise(FACTS)]
    std = embedding_std(model, found)
    result = {}
    for tokens, subject in found:
        drawn = subject_noise(model, tokens.fact_id, subject, settings, std)
        clean = clean_values(model.hf, kind, tokens, site, 3)
        at = lambda own, layers, place, t=tokens, s=subject, c=clean: naive(  # noqa: E731
            model.hf, kind, t, s, own, site, layers, place, c
        )
        corrupt = np.array([at(own, (), None) for own in drawn])
        scores = np.array(
            [
                [
                    [at(own, window_of(layer, window, 3), place) for own in drawn]
                    for place in range(len(tokens.prompt_ids))
                ]
                for layer in range(3)
            ]
        )
        result[tokens.fact_id] = {
            "p_clean": np.exp(at(0 * drawn[0], (), None)),
            "p_corrupt": np.exp(corrupt).mean(),
            "effect": (np.exp(scores) - np.exp(corrupt)).mean(-1),
            "effect_logprob": (scores - corrupt).mean(-1),
        }
    return result


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("kind", NAMES)
def test_effects_equal_a_loop_with_plain_hooks(kind: str, site: str) -> None:
    model = tiny(kind)
    window = 1 if site == "resid" else 2
    draws = 2 if kind == "llama" else 1
    ds = trace(model, FACTS, site=site, draws=draws, window=window, progress=False)
    expected = loop(model, kind, site, draws, window)
    moved = 0.0
    for fact_id, loops in expected.items():
        row = ds.sel(fact=fact_id)
        for name in ("p_clean", "p_corrupt"):
            assert float(row[name]) == pytest.approx(loops[name], rel=1e-4)
        roles = token_roles(SUBJECTS[fact_id], loops["effect"].shape[1])
        for name in ("effect", "effect_logprob"):
            for role, places in roles.items():
                ours = row[name].sel(role=role).values
                if places:
                    # float32; measured: at most 2e-8 of probability and 5e-6 nats
                    atol = 1e-6 if name == "effect" else 5e-5
                    np.testing.assert_allclose(ours, loops[name][:, places].mean(1), atol=atol)
                else:
                    assert np.isnan(ours).all()
            moved = max(moved, np.abs(loops[name]).max())
    assert moved > 1e-3  # the comparison is not one of zeros


def test_the_comparison_can_fail() -> None:
    """Negative control: other noise, another window and another site are noticed."""
    ds = trace(tiny("llama"), FACTS, site="mlp", draws=2, window=1, progress=False)
    ours = ds["effect_logprob"].sel(fact="france", role="last_subject").values
    for site, window, seed in (("mlp", 1, 1), ("mlp", 3, 0), ("attn", 1, 0)):
        theirs = loop(tiny("llama"), "llama", site, 2, window, seed)["france"]["effect_logprob"][:, 3]
        assert np.abs(ours - theirs).max() > 1e-3


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_without_noise_nothing_changes_and_everything_restored_is_clean(kind: str) -> None:
    model = tiny(kind)
    ds = trace(model, FACTS, noise=0.0, draws=2, progress=False)
    # float32: the same row in a batch of another size; measured: at most 3e-9 of probability, 5e-7 nats, mostly 0
    assert float(abs(ds["effect"]).max()) < 1e-7
    assert float(abs(ds["effect_logprob"]).max()) < 1e-5
    assert float(abs(ds["p_clean"] - ds["p_corrupt"]).max()) < 1e-7
    settings = checked_settings(3, "resid", 3.0, 2, None, 0)
    tokens = model.tokenise(FACTS)[1]
    run = run_corrupted(model, tokens, range(0, 3), settings, subject_noise(model, "sky", range(0, 3), settings, 0.1))
    n_fed = len(tokens.ids) - 1
    everything, nothing, one = torch.ones(1, n_fed), torch.zeros(1, n_fed), torch.eye(n_fed)[:1]
    n_extra = enterable(model)
    for layers in (range(0, 1), range(1, 2), range(0, 3)):
        clean, corrupt, part = (
            restored(model, run, settings, layers, places.bool(), n_extra)[0] for places in (everything, nothing, one)
        )
        np.testing.assert_allclose(clean, run.logprob_clean, atol=1e-5)
        np.testing.assert_allclose(corrupt, run.logprob_corrupt, atol=1e-5)
        assert abs(part - run.logprob_clean).max() > 1e-4


@pytest.mark.parametrize("kind", ["gpt2", "mistral", "bloom", "olmo2"])
def test_a_subject_at_the_end_is_all_there_is_to_restore(kind: str) -> None:
    ds = trace(tiny(kind), FACTS, draws=3, progress=False).sel(fact="gold")
    total = float(ds["p_clean"] - ds["p_corrupt"])
    assert abs(total) > 1e-5
    for role in ("first_subject", "last_subject", "last"):
        np.testing.assert_allclose(ds["effect"].sel(role=role), total, atol=1e-7)
    assert (ds["effect"].sel(role="before_subject") == 0).all()


def test_seeds_reproduce_and_neither_order_nor_batches_matter() -> None:
    model = tiny("qwen3")
    first = trace(model, FACTS, draws=3, progress=False)
    assert trace(model, FACTS, draws=3, progress=False).identical(first)
    assert abs(trace(model, FACTS, draws=3, seed=1, progress=False)["effect"] - first["effect"]).max() > 1e-4
    turned = FactSet("turned", tuple(reversed(FACTS.facts)))
    for other in (
        trace(model, turned, draws=3, progress=False).sel(fact=first["fact"]),
        trace(model, FACTS, draws=3, batch_size=1, progress=False),
        trace(model, FACTS, draws=3, batch_size=1000, progress=False),
    ):
        np.testing.assert_allclose(other["effect"], first["effect"], atol=1e-7)
        np.testing.assert_allclose(other["p_corrupt"], first["p_corrupt"], rtol=1e-5)
        assert other.attrs["noise_std"] == first.attrs["noise_std"]


def test_noise_belongs_to_the_fact_and_has_the_size_that_is_asked_for() -> None:
    model = tiny("llama")
    few, many = (checked_settings(3, "resid", 3.0, draws, None, 7) for draws in (2, 500))
    drawn = subject_noise(model, "a", range(2, 4), many, 0.5)
    assert torch.equal(subject_noise(model, "a", range(0, 2), few, 0.5), drawn[:2])  # more draws go on where few stop
    assert not torch.equal(subject_noise(model, "b", range(0, 2), few, 0.5), drawn[:2])
    assert float(drawn.std()) == pytest.approx(1.5, rel=0.02)
    assert abs(float(drawn.mean())) < 0.03
    found = [(tokens, SUBJECTS[tokens.fact_id]) for tokens in model.tokenise(FACTS)]
    words = ["France", "big", "blue", "sky", "gold"]
    expected = model.hf.model.embed_tokens.weight[[WORDS.index(word) for word in words]].std()
    assert embedding_std(model, found) == pytest.approx(float(expected), rel=1e-5)


def test_facts_come_back_where_they_are_planted() -> None:
    model = planted.model()
    ds = trace(model, planted.facts(), site="mlp", window=1, noise=10.0, draws=64, progress=False)
    for (layer, _), stored in planted.PLANTED.items():
        for subject, _ in stored:
            effect = ds["effect"].sel(fact=subject, role="last_subject").values
            assert effect.argmax() == layer
            assert effect[layer] > 0.25
            assert abs(effect[1 - layer]) < 0.05
    with_none = trace(planted.model(list(planted.PLANTED)), planted.facts(), site="mlp", window=1, progress=False)
    assert abs(with_none["effect"]).max() < 1e-6


def test_roles_by_hand() -> None:
    assert token_roles(range(2, 5), 9) == {
        "before_subject": [0, 1], "first_subject": [2], "middle_subject": [3], "last_subject": [4],
        "first_subsequent": [5], "further": [6, 7], "last": [8],
    }  # fmt: skip
    assert token_roles(range(0, 1), 2) == {
        "before_subject": [], "first_subject": [0], "middle_subject": [], "last_subject": [0],
        "first_subsequent": [1], "further": [], "last": [1],
    }  # fmt: skip
    at_the_end = token_roles(range(1, 3), 3)
    assert (at_the_end["first_subsequent"], at_the_end["further"], at_the_end["last"]) == ([], [], [2])
    assert set(at_the_end) == set(ROLES)


def test_windows_are_centred_as_in_rome() -> None:
    assert [window_of(layer, 1, 4) for layer in range(4)] == [range(i, i + 1) for i in range(4)]
    assert window_of(24, 10, 48) == range(19, 29)
    assert window_of(47, 10, 48) == range(42, 48)
    assert checked_settings(48, "attn", 3.0, 10, None, 0).window == 10
    assert checked_settings(48, "resid", 3.0, 10, None, 0).window == 1


TEXTS = [
    "water Paris is in France.",
    "The Eiffel Tower is located in the city of",
    "Zürich lies in 東京",
    "An author: Anna",
]


def trained(bpe: bool, bos: bool) -> PreTrainedTokenizerFast:
    """A small byte-level BPE (gpt2's kind) or a metaspace BPE (llama's kind)."""
    made = Tokenizer(models.BPE(unk_token=None if bpe else "<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False) if bpe else pre_tokenizers.Metaspace()
    made.decoder = decoders.ByteLevel() if bpe else decoders.Metaspace()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if bpe else sorted({c for text in TEXTS for c in text} | {"▁"})
    made.train_from_iterator(
        TEXTS * 3,
        trainers.BpeTrainer(
            vocab_size=420, special_tokens=["<unk>", "<s>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", unk_token="<unk>")


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("bpe", [True, False])
@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("The Eiffel Tower is located in the city of", "Eiffel Tower"),
        ("The Eiffel Tower is located in the city of", "The Eiffel Tower"),
        ("Zürich lies in", "Zürich"),
        ("An author: Anna", "An"),
        ("An author: Anna", "Anna"),
        ("the city of 東京 is in", "東京"),
        ("in Paris", " Paris "),
    ],
)
def test_the_subjects_tokens_are_those_that_spell_it(bos: bool, bpe: bool, prompt: str, subject: str) -> None:
    own = trained(bpe, bos)
    fact = FactSet.from_records([{"id": "f", "subject": subject, "prompt": prompt, "answer": "water"}])[0]
    tokens = FactSet("one", (fact,)).tokenise(own)[0]
    assert tokens.bos == bos
    span = subject_tokens(fact, tokens, own)
    assert span is not None
    ids, wanted = list(tokens.prompt_ids), subject.strip()
    assert wanted in own.decode(ids[span.start : span.stop])
    for less in (ids[span.start + 1 : span.stop], ids[span.start : span.stop - 1]):
        assert wanted not in own.decode(less)
    at = prompt.index(wanted)
    assert own.decode(ids[int(bos) : span.start]).strip() == prompt[:at].strip()


def test_a_subject_is_found_as_a_word_before_as_a_part() -> None:
    assert subject_characters("USB for the US", "US") == (12, 14)
    assert subject_characters("USB alone", "US") == (0, 2)
    assert subject_characters("us", "US") is None
    assert subject_characters("a (b.c) d", "b.c") == (3, 6)
    assert subject_characters("anything", " ") is None


def test_facts_without_their_subject_are_named_or_counted() -> None:
    model = tiny("gpt2")
    mixed = FactSet.from_records(
        [*FACTS.to_records(), {"id": "lost", "subject": "Rome", "prompt": "the capital is", "answer": "Paris"}]
    )
    with pytest.raises(ValueError, match=r"'Rome' of fact 'lost' does not stand in its prompt"):
        trace(model, mixed, progress=False)
    ds = trace(model, mixed, draws=2, missing="skip", progress=False)
    assert ds["fact"].values.tolist() == list(FACTS.ids)
    assert ds.attrs["skipped"] == 1
    with pytest.raises(ValueError, match="None of the 1 facts"):
        trace(model, mixed.filter(ids=["lost"]), missing="skip", progress=False)
    with pytest.raises(ValueError, match="needs a fast one"):
        trace(replace(model, tokenizer=Slow(model.tokenizer)), FACTS, progress=False)


class Slow:
    """A tokenizer that does not know where its tokens stand."""

    is_fast = False

    def __init__(self, own) -> None:
        self.own = own

    def __getattr__(self, name):
        return getattr(self.own, name)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"site": "head"}, "site must be one of resid, mlp, attn, not 'head'"),
        ({"noise": -1.0}, "noise must be"),
        ({"noise": float("nan")}, "noise must be"),
        ({"draws": 0}, "draws must be at least 1"),
        ({"window": 0}, "window must be at least 1"),
        ({"missing": "ignore"}, "missing must be"),
        ({"batch_size": 0}, "batch_size must be"),
    ],
)
def test_wrong_options_are_one_sentence_before_any_work(options, sentence, monkeypatch) -> None:
    monkeypatch.setattr(restore, "_answer_logprob", None)  # any work would fail otherwise
    with pytest.raises(ValueError, match=sentence):
        trace(tiny("gpt2"), FACTS, progress=False, **options)


def leftovers(model) -> list[str]:
    return [
        name
        for name, module in model.hf.named_modules()
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
    ]


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_no_hook_outlives_a_trace_also_after_an_error(site, error, monkeypatch) -> None:
    model = load_model(random_model("llama"), tokenizer=tokenizer())
    ids = torch.tensor([[4, 5, 6]])
    before = model.logits(ids)
    calls = iter(range(100))

    def fail_later(logits, target, own=restore.logprob):
        if next(calls) == 3:
            raise error("stop")
        return own(logits, target)

    monkeypatch.setattr(restore, "logprob", fail_later)
    seen = []
    monkeypatch.setattr(restore, "patched_site", watched(restore.patched_site, model, seen))
    with pytest.raises(error):
        trace(model, FACTS, site=site, draws=2, progress=False)
    assert any(seen)  # there were hooks
    assert leftovers(model) == []
    assert torch.equal(model.logits(ids), before)


def watched(patched_site, model, seen):
    from contextlib import contextmanager

    @contextmanager
    def wrapped(*args):
        with patched_site(*args):
            seen.append(leftovers(model))
            yield

    return wrapped


def test_a_model_that_cannot_be_entered_and_an_unknown_attention_are_refused_by_name(monkeypatch) -> None:
    model = tiny("llama")
    blind = replace(model, bridge=SimpleNamespace(blocks=[SimpleNamespace(attn=object())] * 3))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.*attention of layer 0 is not known"):
        attention_output(blind, 0)
    with pytest.raises(ValueError, match="attention of layer 0 is not known"):
        trace(blind, FACTS, site="attn", progress=False)
    entered = sites.entered
    monkeypatch.setattr(sites, "entered", lambda model, layer, hidden, n: entered(model, layer, hidden + 0.1, n))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.*cannot be entered at layer 0"):
        trace(model, FACTS, progress=False)


def test_a_trace_is_kept_and_a_broken_one_refused(tmp_path) -> None:
    ds = wb.trace(tiny("phi"), FACTS, draws=2, site="attn", progress=False)
    assert ds.attrs["window"] == 1
    again = open_result(save_result(ds, tmp_path / "t.zarr", kind="trace"))
    assert again.attrs == ds.attrs
    for name in ds.data_vars:
        np.testing.assert_array_equal(again[name], ds[name])
    validate_trace(again)
    with pytest.raises(ValueError, match="effect for every role"):
        validate_trace(ds.assign(effect=ds["effect"].fillna(0)))
    with pytest.raises(ValueError, match="lacks `p_clean`"):
        validate_trace(ds.drop_vars("p_clean"))
    with pytest.raises(ValueError, match="does not say its noise"):
        validate_trace(ds.drop_attrs().assign_attrs({k: v for k, v in ds.attrs.items() if k != "noise"}))


def test_means_by_role_are_over_the_facts_that_have_it() -> None:
    ds = trace(tiny("gpt2"), FACTS, draws=2, progress=False)
    frame = by_role(ds).set_index(["role", "layer"])
    assert frame.loc[("middle_subject", 0), "n"] == 1
    assert frame.loc[("first_subsequent", 2), "n"] == 2
    for (role, layer), row in frame.iterrows():
        values = ds["effect"].sel(role=role, layer=layer).values
        values = values[~np.isnan(values)]
        assert row["effect"] == pytest.approx(values.mean())
        assert values.min() - 1e-9 <= row["low"] <= row["effect"] + 1e-9
        assert row["effect"] - 1e-9 <= row["high"] <= values.max() + 1e-9

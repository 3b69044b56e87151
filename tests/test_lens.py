"""Logit lens and direct logit attribution against plain modules; agreement of tracing and attribution; the commands."""

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from command import call
from test_tracing import FACTS, leftovers
from tiny import ARCHITECTURES, random_model, saved, tiny, tokenizer

import workbench as wb
from workbench.models import load_model
from workbench.results import open_result, save_result
from workbench.tracing import (
    agreement,
    direct,
    direct_by_layer,
    direct_logit_attribution,
    lens_by_layer,
    logit_lens,
    profiles,
    spearman,
    trace,
)


def last_logits(model, fact):
    """The model's own logits after one unpadded prompt."""
    with torch.no_grad():
        return model.hf(input_ids=torch.tensor([fact.prompt_ids]), use_cache=False).logits[0, -1]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_lens_ends_in_what_the_model_says(kind: str) -> None:
    model = tiny(kind)
    frame = logit_lens(model, FACTS)
    assert frame["layer"].tolist() == [0, 1, 2] * 3
    assert frame["fact"].unique().tolist() == list(FACTS.ids)
    for fact in model.tokenise(FACTS):
        row = frame[(frame["fact"] == fact.fact_id) & (frame["layer"] == 2)].iloc[0]
        logits = last_logits(model, fact)
        answer, top = fact.answer_ids[0], int(logits.argmax())
        assert row["logprob"] == pytest.approx(float(logits.log_softmax(-1)[answer]), abs=1e-5)
        assert row["rank"] == int((logits > logits[answer]).sum())
        assert row["top"] == model.tokenizer.decode([top])
        assert row["top_prob"] == pytest.approx(float(logits.softmax(-1)[top]), abs=1e-5)
    assert leftovers(model) == []


#: Architecture -> final norm, by its name in transformers.
NORMS = {"gpt2": "transformer.ln_f", "llama": "model.norm", "gemma2": "model.norm", "bloom": "transformer.ln_f"}


@pytest.mark.parametrize("kind", NORMS)
def test_every_layer_of_the_lens_equals_norm_and_unembedding_by_hand(kind: str) -> None:
    model = tiny(kind)
    frame = logit_lens(model, FACTS).set_index(["fact", "layer"])
    cap = getattr(model.config, "final_logit_softcapping", None)
    assert (cap is not None) == (kind == "gemma2")
    for fact in model.tokenise(FACTS):
        states: list[torch.Tensor] = []
        handles = [
            model.block(layer).register_forward_hook(lambda module, args, output, to=states: to.append(output))
            for layer in range(3)
        ]
        last_logits(model, fact)
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for layer, state in enumerate(states):
                state = state if torch.is_tensor(state) else state[0]
                logits = model.hf.lm_head(model.hf.get_submodule(NORMS[kind])(state[0, -1]))
                logits = logits if cap is None else cap * torch.tanh(logits / cap)
                expected = float(logits.log_softmax(-1)[fact.answer_ids[0]])
                assert frame.loc[(fact.fact_id, layer), "logprob"] == pytest.approx(expected, abs=1e-5)
        unlike = frame.loc[(fact.fact_id, 0), "logprob"] - frame.loc[(fact.fact_id, 2), "logprob"]
        assert abs(unlike) > 1e-3


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_terms_of_a_logit_add_up_to_it(kind: str) -> None:
    model = load_model(shaken(kind), tokenizer=tokenizer())
    frame = direct_logit_attribution(model, FACTS)
    assert len(frame) == 3 * (3 + 3 + 2)
    head = model.hf.get_output_embeddings()
    raw = []
    handle = head.register_forward_hook(lambda module, args, output: raw.append(output[0, -1]))
    for fact in model.tokenise(FACTS):
        last_logits(model, fact)
        terms = frame[frame["fact"] == fact.fact_id]
        assert terms["logit"].sum() == pytest.approx(float(raw.pop()[fact.answer_ids[0]]), abs=1e-4)
        assert terms["logit"].abs().max() > 1e-2
    handle.remove()
    assert leftovers(model) == []


def hand_made(model, kind: str, fact) -> dict[str, list[float]]:
    """Terms of attention and FFN of every layer, from plain modules and the formula of the norm."""
    attention, mlp = {
        "llama": ("self_attn.o_proj", "mlp.down_proj"),
        "gpt2": ("attn.c_proj", "mlp.c_proj"),
        "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),  # both added to the block's input
        "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),  # written after a norm
        "gemma3_text": ("post_attention_layernorm", "post_feedforward_layernorm"),
        "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
        "phi": ("self_attn.dense", "mlp.fc2"),  # side by side
        "opt": ("self_attn.out_proj", "fc2"),
        "bloom": ("self_attention.dense", "mlp.dense_4h_to_h"),
    }[kind]
    norm_name = {"gpt2": "transformer.ln_f", "bloom": "transformer.ln_f", "gpt_neox": "gpt_neox.final_layer_norm",
                 "opt": "model.decoder.final_layer_norm",
                 "phi": "model.final_layernorm"}.get(kind, "model.norm")  # fmt: skip
    norm = model.hf.get_submodule(norm_name)
    seen: dict[str, list[torch.Tensor]] = {"attention": [], "mlp": [], "final": []}

    def keep(name):
        return lambda module, args, output: seen[name].append(output.view(-1, output.shape[-1])[-1])

    handles = [norm.register_forward_pre_hook(lambda module, args: seen["final"].append(args[0][0, -1]))]
    for layer in range(3):
        handles.append(model.block(layer).get_submodule(attention).register_forward_hook(keep("attention")))
        handles.append(model.block(layer).get_submodule(mlp).register_forward_hook(keep("mlp")))
    last_logits(model, fact)
    for handle in handles:
        handle.remove()
    final = seen.pop("final")[0]
    row = model.hf.get_output_embeddings().weight[fact.answer_ids[0]]
    with torch.no_grad():
        if isinstance(norm, torch.nn.LayerNorm) or kind == "bloom":
            scale = (final.var(unbiased=False) + norm.eps).sqrt()
            terms = {
                k: [float((row * norm.weight * (v - v.mean()) / scale).sum()) for v in vs] for k, vs in seen.items()
            }
        else:
            eps = getattr(norm, "variance_epsilon", None) or norm.eps
            gain = norm.weight + 1 if kind.startswith("gemma") else norm.weight
            scale = (final.square().mean() + eps).sqrt()
            terms = {k: [float((row * gain * v / scale).sum()) for v in vs] for k, vs in seen.items()}
    return terms


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "phi", "gemma2", "gemma3_text", "olmo2", "opt", "bloom"])
def test_every_term_equals_the_one_made_by_hand(kind: str) -> None:
    model = load_model(shaken(kind), tokenizer=tokenizer())
    frame = direct_logit_attribution(model, FACTS)
    for fact in model.tokenise(FACTS):
        expected = hand_made(model, kind, fact)
        for component in ("attention", "mlp"):
            own = frame[(frame["fact"] == fact.fact_id) & (frame["component"] == component)].sort_values("layer")
            np.testing.assert_allclose(own["logit"], expected[component], atol=1e-4)
            assert own["logit"].nunique() == 3


def shaken(kind: str, **changes):
    """A tiny model whose norms have gains and biases of their own."""
    hf = random_model(kind, **changes)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return hf


@pytest.mark.parametrize(
    ("kind", "changes", "sentence"),
    [
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "do more to the residual stream than add"),
        ("opt", {"word_embed_proj_dim": 16}, "neither a layer norm nor an RMS norm"),
    ],
)
def test_what_is_no_sum_is_refused_by_name(kind, changes, sentence) -> None:
    model = load_model(shaken(kind, **changes), tokenizer=tokenizer())
    with pytest.raises(ValueError, match=sentence) as raised:
        direct_logit_attribution(model, FACTS)
    assert type(model.hf).__name__ in str(raised.value)
    assert leftovers(model) == []
    last = logit_lens(model, FACTS).query("layer == 2")["logprob"]  # the lens needs no sum
    expected = [float(last_logits(model, f).log_softmax(-1)[f.answer_ids[0]]) for f in model.tokenise(FACTS)]
    np.testing.assert_allclose(last, expected, atol=1e-5)


def test_a_norm_that_is_something_else_is_noticed(monkeypatch) -> None:
    model = tiny("llama")
    own = direct.normed
    monkeypatch.setattr(direct, "normed", lambda model, states, n: own(model, states, n) + 0.1 * states.float() ** 2)
    with pytest.raises(ValueError, match="neither a layer norm nor an RMS norm"):
        direct_logit_attribution(model, FACTS)


def test_summaries_are_means_over_facts() -> None:
    model = tiny("gpt2")
    lens, terms = logit_lens(model, FACTS), direct_logit_attribution(model, FACTS)
    by_layer = lens_by_layer(lens).set_index("layer")
    for layer, rows in lens.groupby("layer"):
        assert by_layer.loc[layer, "logprob"] == pytest.approx(rows["logprob"].mean())
        assert by_layer.loc[layer, "top1"] == pytest.approx((rows["rank"] == 0).mean())
        assert by_layer.loc[layer, "low"] <= by_layer.loc[layer, "logprob"] <= by_layer.loc[layer, "high"]
    summed = direct_by_layer(terms)
    assert len(summed) == 3 + 3 + 2
    assert summed["n"].eq(3).all()
    assert summed["logit"].sum() == pytest.approx(terms["logit"].sum() / 3)
    assert summed["layer"].isna().sum() == 2


def invented(effects: np.ndarray, scores: np.ndarray) -> tuple[xr.Dataset, xr.Dataset]:
    """A trace and an attribution with given numbers: effects (fact, layer) of one role, scores (fact, layer, unit)."""
    n_facts, n_layers = effects.shape
    both = np.stack([effects, np.full_like(effects, np.nan)], -1).astype(np.float32)
    facts, layers = [f"f{i}" for i in range(n_facts)], np.arange(n_layers)
    traced = xr.Dataset(
        {"effect": (("fact", "layer", "role"), both)},
        coords={"fact": facts, "layer": layers, "role": ["last", "further"]},
        attrs={"model_digest": "m"},
    )
    attributed = xr.Dataset(
        {"score": (("fact", "layer", "unit"), scores.astype(np.float32))},
        coords={"fact": facts[::-1], "layer": layers, "unit": np.arange(scores.shape[2])},
        attrs={"model_digest": "m"},
    )
    return traced, attributed.assign(score=attributed["score"].copy(data=scores[::-1].astype(np.float32)))


def test_spearman_equals_its_formula_and_shares_ties() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        a, b = generator.normal(size=(2, 9))
        d = a.argsort().argsort() - b.argsort().argsort()
        assert spearman(a, b) == pytest.approx(1 - 6 * (d**2).sum() / (9 * 80))
        assert spearman(a, b) == pytest.approx(spearman(np.exp(a), b))
    assert spearman(np.array([1.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0])) == pytest.approx(np.sqrt(3) / 2)
    assert np.isnan(spearman(np.ones(3), np.arange(3.0)))


def test_agreement_is_found_where_it_is_and_not_where_it_is_not() -> None:
    generator = np.random.default_rng(1)
    scores = generator.normal(size=(6, 12, 5))
    total = np.abs(scores).sum(-1)
    for effects, score, rho in (
        (total, "magnitude", 1.0),
        (-total, "magnitude", -1.0),
        (scores.sum(-1), "signed", 1.0),
    ):
        frame = agreement(*invented(effects, scores), score=score, roles=["last", "further"], permutations=200)
        assert frame["role"].unique().tolist() == ["last"]  # no fact has the other role
        assert frame["rho"].to_numpy() == pytest.approx(rho)
        together = frame[frame["fact"] == "all"].iloc[0]
        assert (together["low"], together["high"]) == pytest.approx((rho, rho))
        assert together["p_value"] == pytest.approx(1 / 201)
        assert together["n"] == 6
        assert frame["fact"].tolist() == [*(f"f{i}" for i in range(6)), "all"]
    ps = [
        agreement(*invented(generator.normal(size=(4, 8)), generator.normal(size=(4, 8, 3))), roles=["last"],
                  permutations=99).iloc[-1]["p_value"]
        for _ in range(60)
    ]  # fmt: skip
    assert np.sum(np.array(ps) <= 0.05) <= 8  # P(more than 8 of 60 at 5%) = 0.004
    assert 0.3 < np.mean(ps) < 0.7


def test_profiles_are_means_over_facts_of_at_most_one() -> None:
    generator = np.random.default_rng(2)
    effects, scores = generator.normal(size=(5, 7)), generator.normal(size=(5, 7, 3))
    frame = profiles(*invented(effects, scores)).pivot(index="layer", columns="measure", values="value")
    mean = effects.mean(0)
    np.testing.assert_allclose(frame["indirect effect"], mean / np.abs(mean).max(), rtol=1e-5)
    assert frame.abs().max().tolist() == pytest.approx([1.0, 1.0])


def test_results_that_do_not_belong_together_are_refused() -> None:
    traced, attributed = invented(np.ones((2, 3)), np.ones((2, 3, 4)))
    frame = agreement(traced, attributed, roles=["last"])
    assert frame["rho"].isna().all()  # the same in every layer: no order to compare
    assert frame["fact"].tolist() == ["f0", "f1"]
    with pytest.raises(ValueError, match="in this order"):
        agreement(attributed, traced)
    with pytest.raises(ValueError, match="at least one of the permutations"):
        agreement(traced, attributed, permutations=0)
    with pytest.raises(ValueError, match="different models"):
        agreement(traced, attributed.assign_attrs(model_digest="n"))
    with pytest.raises(ValueError, match="different layers"):
        agreement(traced, attributed.isel(layer=[0, 1]))
    with pytest.raises(ValueError, match="no fact in common"):
        agreement(traced, attributed.assign_coords(fact=["x", "y"]))
    asked, same = (ds.assign_coords(text=ds["fact"]) for ds in (traced, attributed))
    agreement(asked, same, roles=["last"])
    agreement(asked, attributed, roles=["last"])  # what does not say what it asked is trusted
    with pytest.raises(ValueError, match="are of another prompt or answer"):
        agreement(asked, same.assign_coords(text=same["fact"] + "x"))
    with pytest.raises(ValueError, match="not 'middle'"):
        agreement(traced, attributed, roles=["middle"])
    with pytest.raises(ValueError, match="score must be"):
        agreement(traced, attributed, score="both")
    with pytest.raises(ValueError, match="No fact has a token of the role"):
        profiles(traced, attributed, role="further")


def test_the_commands_equal_the_package(tmp_path, monkeypatch, capsys) -> None:
    given = ["--model", str(saved(tmp_path / "model")), "--facts", str(FACTS.save(tmp_path / "facts.jsonl")), "-q"]
    model, facts = wb.load_model(given[1]), wb.load_facts(given[3])
    expected = trace(model, facts, site="mlp", draws=2, seed=3, progress=False)
    _, attributed = invented(np.ones((3, 3)), np.random.default_rng(0).random((3, 3, 4)))
    attributed = attributed.assign_coords(fact=list(facts.ids)).assign_attrs(model_digest=model.digest)
    save_result(attributed, tmp_path / "a.zarr", kind="attribution")
    out = tmp_path / "t.zarr"
    options = ["--site", "mlp", "--draws", "2", "--seed", "3", "--attribution", str(tmp_path / "a.zarr")]
    assert call(monkeypatch, "trace", *given, *options, "--out", str(out)) == 0
    printed = capsys.readouterr().out
    assert "last_subject" in printed
    assert "3 facts: P(answer) is" in printed
    assert "null_low" in printed
    np.testing.assert_array_equal(open_result(out)["effect"], expected["effect"])
    for flags, read in (([], logit_lens), (["--direct"], direct_logit_attribution)):
        table = tmp_path / "lens.parquet"
        assert call(monkeypatch, "lens", *given, *flags, "--out", str(table)) == 0
        pd.testing.assert_frame_equal(pd.read_parquet(table), read(model, facts), check_dtype=False)
    other = ["--attribution", str(save_result(attributed.assign_attrs(model_digest="n"), tmp_path / "b.zarr"))]
    assert call(monkeypatch, "trace", *given, *other) == 1
    assert "made with another model" in capsys.readouterr().err
    table = tmp_path / "t.csv"
    assert call(monkeypatch, "trace", *given, "--draws", "1", "--limit", "1", "--out", str(table)) == 0
    assert pd.read_csv(table)["n"].eq(1).all()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["trace", "--out", "t.xlsx"], "--out must end in .zarr, .csv or .parquet"),
        (["trace", "--site", "head"], "site must be one of"),
        (["trace", "--attribution", "nowhere.zarr"], "nowhere.zarr"),
        (["lens", "--out", "t.zarr"], "--out must end in .csv or .parquet"),
    ],
)
def test_bad_input_is_one_sentence_before_a_model_opens(arguments, sentence, monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("workbench.models.load_model", None)
    assert call(monkeypatch, *arguments, "--facts", str(FACTS.save(tmp_path / "facts.jsonl"))) == 1
    printed = capsys.readouterr().err
    assert sentence in printed
    assert len(printed.strip().splitlines()) == 1

"""Distance and drift: numbers against plain transformers, anchors that are not confirmed, a model against itself."""

import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import planted
import pytest
import torch
from tiny import FACTS, WORDS, default, random_model, saved, tiny, tokenizer

import workbench as wb
from workbench.facts import FactSet, neutral_prompts
from workbench.models import load_model
from workbench.recollection import recall
from workbench.results import load_frame, save_frame
from workbench.semantics import (
    METRICS,
    distance_summary,
    measure_drift,
    noise_floor,
    pushed_away,
    semantic_distance,
    similarity,
    target_of,
)


@pytest.mark.parametrize("kind", ["gpt2", "gemma3_text", "opt"])
def test_a_model_against_itself_does_not_drift(kind: str) -> None:
    frame = measure_drift(tiny(kind), tiny(kind), FACTS)
    assert set(frame["metric"]) == {"d_emb", "toward", "off"}
    assert len(frame) == len(FACTS) * (1 + 2 * 3)
    assert frame["change"].eq(0).all()
    every = measure_drift(tiny(kind), {"same": tiny(kind)}, FACTS, metrics=METRICS, anchor=["unembedding", "stated"])
    assert set(every["metric"]) == set(METRICS)
    assert len(every) == len(FACTS) * (2 + 2 * 3 * 3)
    confirmed = every[every["anchor"].ne("stated").fillna(True)]
    assert confirmed["change"].eq(0).all()
    assert every["change"].dropna().eq(0).all()
    assert every.attrs["dropped"]["unembedding"] == 0


def last_state(model: torch.nn.Module, ids: list[int], layer: int) -> torch.Tensor:
    """Plain transformers: the state after block `layer` (before the final norm) at the last token."""
    kept = []
    hook = model.model.layers[layer].register_forward_hook(lambda m, a, out: kept.append(out))
    with torch.no_grad():
        model(torch.tensor([ids]))
    hook.remove()
    return (kept[0] if isinstance(kept[0], torch.Tensor) else kept[0][0])[0, -1]


def test_drift_equals_plain_transformers_by_hand() -> None:
    before, after = random_model("llama", 0), random_model("llama", 0)
    with torch.no_grad():
        after.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    first, second = (load_model(model, tokenizer=tokenizer()) for model in (before, after))
    frame = measure_drift(first, second, FACTS)
    for fact, tokens in zip(FACTS, FACTS.tokenise(first.tokenizer), strict=True):
        rows = frame[frame["fact"] == fact.id].set_index(["metric", "layer"])
        ids = torch.tensor([tokens.prompt_ids])
        with torch.no_grad():
            h0, h1 = (m(ids, output_hidden_states=True).hidden_states[2][0, -1] for m in (before, after))
        c = before.lm_head.weight.detach()[tokens.answer_ids[0]]
        toward = float((h1 - h0) @ (c - h0) / ((c - h0) @ (c - h0)))
        off = float((h1 - h0 - toward * (c - h0)).norm() / (c - h0).norm())
        assert rows.loc[("toward", 1), "after"] == pytest.approx(toward, rel=1e-3, abs=1e-5)
        assert rows.loc[("off", 1), "after"] == pytest.approx(off, rel=1e-3, abs=1e-5)
        assert rows.loc[("toward", 0), "change"] == 0
        assert rows.loc[("off", 0), "change"] == 0
        W = before.get_input_embeddings().weight.detach()
        for name, model in (("before", first), ("after", second)):
            said = model.tokenizer(recall(model, FACTS)["predicted"][fact.id]).input_ids
            cosine = torch.nn.functional.cosine_similarity(W[said].mean(0), W[list(tokens.answer_ids)].mean(0), dim=0)
            value = frame[(frame["fact"] == fact.id) & (frame["metric"] == "d_emb")][name].item()
            assert value == pytest.approx(0 if said == list(tokens.answer_ids) else 1 - float(cosine), abs=1e-5)


def test_distances_equal_plain_transformers_by_hand() -> None:
    plain, other = random_model("llama", 0), random_model("llama", 1)
    model, base = load_model(plain, tokenizer=tokenizer()), load_model(other, tokenizer=tokenizer())
    frame = semantic_distance(model, FACTS, base=base, layers=[0, 2]).set_index(["fact", "metric", "layer"])["distance"]
    W_E, W_U = other.get_input_embeddings().weight.detach().double(), other.lm_head.weight.detach()
    neutral = [tokenizer()(prompt).input_ids for prompt in neutral_prompts()]
    centre = {layer: torch.stack([last_state(other, ids, layer) for ids in neutral]).mean(0) for layer in (0, 2)}
    for fact in FACTS.tokenise(tokenizer()):
        with torch.no_grad():
            P = plain(torch.tensor([fact.ids])).logits[0].double().softmax(-1)
        soft = []
        for k, gold in enumerate(fact.answer_ids):
            at = len(fact.prompt_ids) + k - 1
            each = [P[at, v] * (1 - torch.cosine_similarity(W_E[v], W_E[gold], dim=0)) for v in range(len(W_E))]
            soft.append(float(sum(each)))
        assert frame[fact.fact_id, "d_soft", pd.NA] == pytest.approx(np.mean(soft), rel=1e-4)
        for layer in (0, 2):
            h, c = (
                last_state(plain, list(fact.prompt_ids), layer) - centre[layer],
                W_U[fact.answer_ids[0]] - W_U.mean(0),
            )
            assert frame[fact.fact_id, "d_layer", layer] == pytest.approx(
                1 - float(torch.cosine_similarity(h, c, dim=0)), abs=1e-5
            )
    assert set(frame.reset_index()["layer"].dropna()) == {0, 2}


def worded() -> FactSet:
    """The planted facts that the planted model answers, with another wording of each."""
    known = planted.facts(["France", "Japan", "Kenya", "Italy"])
    return FactSet("p", tuple(replace(fact, paraphrases=(f"one {fact.subject}",)) for fact in known))


def test_centroids_are_means_of_the_answers_states_over_the_wordings() -> None:
    model, facts = planted.model(), worded()
    centre = torch.stack([last_state(model.hf, model.tokenizer(p).input_ids, 1) for p in neutral_prompts()]).mean(0)
    frame = semantic_distance(model, facts, metrics=["d_layer"], anchor="centroid", layers=[1])
    for fact, tokens in zip(facts, facts.tokenise(model.tokenizer), strict=True):
        texts = [model.tokenizer(f"{prompt} {fact.answer}").input_ids for prompt in (fact.prompt, *fact.paraphrases)]
        anchor = torch.stack([last_state(model.hf, ids, 1) for ids in texts]).mean(0)
        h = last_state(model.hf, list(tokens.prompt_ids), 1)
        expected = 1 - float(torch.cosine_similarity(h - centre, anchor - centre, dim=0))
        assert frame[frame["fact"] == fact.id]["distance"].item() == pytest.approx(expected, abs=1e-5)
    assert frame["distance"].min() > 0.1


def test_the_stated_anchor_is_the_state_after_the_fact_was_stated() -> None:
    model, prompt = tiny("llama"), "sky is"
    records = [{"id": w, "prompt": prompt, "answer": w} for w in WORDS[4:] if w not in prompt]
    facts = FactSet.from_records(records)
    target = target_of(model, facts, "stated")
    for i, fact in enumerate(facts):
        ids = model.tokenizer(f"{prompt} {fact.answer} {prompt}").input_ids
        with torch.no_grad():
            said = int(model.hf(torch.tensor([ids])).logits[0, -1].argmax())
        assert bool(target.confirmed[i]) == (said == model.tokenizer(fact.answer).input_ids[0])
        if target.confirmed[i]:
            torch.testing.assert_close(target.points[1, i], last_state(model.hf, ids, 1), rtol=1e-4, atol=1e-4)
    assert 0 < target.dropped < len(facts)
    assert target.points[:, ~target.confirmed].isnan().all()


def test_anchors_that_the_base_does_not_confirm_are_dropped_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    facts = worded()
    whole, cut = planted.model(), planted.model(without=[(0, 7)])
    for kind in ("stated", "centroid"):
        assert target_of(whole, facts, kind).dropped == 0
        caplog.clear()
        frame = semantic_distance(cut, facts, anchor=kind)
        assert f"does not confirm the anchor '{kind}' of 1 of 4" in caplog.text
        assert frame.attrs["dropped"] == 1
        invalid = frame[~frame["valid"]]
        assert set(invalid["fact"]) == {"France"}
        assert set(invalid["metric"]) == {"d_layer"}
        assert invalid["distance"].isna().all()
        assert distance_summary(frame).set_index(["metric", "layer"]).loc[("d_layer", 0), "n"] == 3
        drift = measure_drift(cut, whole, facts, metrics=METRICS, anchor=kind)
        assert drift.attrs["dropped"] == {kind: 1}
        missing = drift["metric"].eq("d_layer") & drift["change"].isna()
        assert set(drift[missing]["fact"]) == {"France"}
        assert drift[drift["fact"].eq("France") & drift["layer"].notna()]["change"].isna().all()
        assert drift[drift["layer"].isna()]["change"].notna().all()
        assert semantic_distance(cut, facts, anchor=kind, base=whole)["valid"].all()  # the base is what confirms
    assert target_of(whole, planted.facts(), "centroid").dropped == 5  # one wording makes no centroid


def test_learning_a_fact_brings_it_to_its_target_and_the_others_stay() -> None:
    facts, cut = planted.facts(), planted.model(without=[(0, 7)])
    drift = measure_drift(cut, planted.model(), facts, metrics=METRICS).set_index(["fact", "metric"])["change"]
    for metric in ("d_emb", "d_soft", "d_layer"):
        assert (drift["France", metric] < -0.02).all(), metric
        assert drift.drop("France").xs(metric, level="metric").abs().max() < 1e-6


def test_the_frame_keeps_its_facts_in_parquet(tmp_path) -> None:
    frame = wb.semantic_distance(tiny("gpt2"), FACTS, metrics=["d_emb"])
    read = load_frame(save_frame(frame, tmp_path / "d.parquet"))
    pd.testing.assert_frame_equal(read, frame)
    assert FactSet.from_records(read.attrs["facts"], name=read.attrs["facts_name"]).digest == FACTS.digest


def test_the_noise_floor_is_the_percentile_of_gaps_between_wordings() -> None:
    model = tiny("llama")
    facts = FACTS.filter(ids=["france", "japan", "kenya"])
    more = tuple(replace(fact, paraphrases=(*fact.paraphrases, "city of one is")) for fact in facts[:2])
    facts = FactSet("more", (*more, facts["kenya"]))
    floor = noise_floor(model, facts)
    distance = semantic_distance(model, facts.per_prompt()).set_index(["fact", "metric", "layer"])["distance"]
    for metric, layer, value, n_pairs, n_facts in floor.itertuples(index=False):
        gaps = [
            abs(distance[f"{fact}#{i}", metric, layer] - distance[f"{fact}#{j}", metric, layer])
            for fact in ("france", "japan")
            for i, j in ((0, 1), (0, 2), (1, 2))
        ]
        assert value == pytest.approx(np.percentile(gaps, 95), abs=1e-6)
        assert (n_pairs, n_facts) == (6, 2)
    assert len(floor) == 2 + 3
    again = tuple(replace(fact, paraphrases=(*fact.paraphrases, fact.prompt, *fact.paraphrases)) for fact in facts)
    pd.testing.assert_frame_equal(noise_floor(model, FactSet("again", again)), floor)  # said twice is no wording
    with pytest.raises(ValueError, match="has a paraphrase"):
        noise_floor(model, facts.filter(ids=["kenya"]))


def test_pushed_away_counts_what_lies_above_the_floor() -> None:
    drift = pd.DataFrame(
        {"metric": "d_layer", "layer": [0] * 4 + [1] * 4, "change": [0.3, 0.2, -0.9, np.nan] + [0.0] * 4}
    )
    drift = drift.astype({"layer": "Int64"})
    floor = pd.DataFrame({"metric": "d_layer", "layer": pd.array([0, 1], "Int64"), "floor": [0.2, 0.1]})
    found = pushed_away(drift, floor)
    assert found[["layer", "n", "pushed"]].to_numpy().tolist() == [[0, 3, 1], [1, 4, 0]]
    assert found["share"].tolist() == pytest.approx([1 / 3, 0])
    assert (found["low"] <= found["share"]).all()
    assert (found["high"] > found["share"]).all()
    toward = drift.assign(metric="toward")
    assert pushed_away(toward, floor).empty  # no floor, no verdict
    both = pd.concat([floor.assign(anchor=name) for name in ("stated", "centroid")])
    assert pushed_away(drift.assign(anchor="stated"), both)["n"].tolist() == [3, 4]
    for one, other in ((drift, both), (drift.assign(anchor="stated"), floor)):
        with pytest.raises(ValueError, match="column `anchor`"):
            pushed_away(one, other)


def test_folders_and_several_models_by_name(tmp_path) -> None:
    folder = str(saved(tmp_path / "a"))
    frame = measure_drift(folder, {"same": folder, "other": str(saved(tmp_path / "b", seed=1))}, FACTS)
    assert frame[frame["method"] == "same"]["change"].eq(0).all()
    assert frame[frame["method"] == "other"]["change"].abs().max() > 0.1


def test_what_does_not_fit_is_refused_in_one_sentence_before_anything_is_read(monkeypatch) -> None:
    other = load_model(random_model("llama", num_hidden_layers=2), tokenizer=tokenizer())
    with monkeypatch.context() as patch:
        for room, reading in (("drift", "read"), ("drift", "target_of"), ("similarity", "last_states")):
            patch.setattr(sys.modules[f"workbench.semantics.{room}"], reading, lambda *given: pytest.fail("read"))
        for compare in (measure_drift, similarity):
            with pytest.raises(ValueError, match="cannot be compared: n_layers is 3 and 2"):
                compare(tiny("llama"), {"same": tiny("llama"), "other": other}, FACTS)
    with pytest.raises(ValueError, match="no metric 'd_emd'"):
        measure_drift(tiny("llama"), tiny("llama"), FACTS, metrics=["d_emd"])
    with pytest.raises(ValueError, match="no anchor 'mean'"):
        semantic_distance(tiny("llama"), FACTS, anchor="mean")
    with pytest.raises(ValueError, match="No layer is asked for"):
        semantic_distance(tiny("llama"), FACTS, metrics=["d_layer"], layers=[])
    with pytest.raises(ValueError, match="no layer 3"):
        semantic_distance(tiny("llama"), FACTS, layers=[3])
    narrow = load_model(random_model("opt", word_embed_proj_dim=16), tokenizer=tokenizer())
    with pytest.raises(ValueError, match="its unembedding has width 16"):
        measure_drift(narrow, narrow, FACTS)
    assert measure_drift(narrow, narrow, FACTS, metrics=["d_emb", "d_soft"])["change"].eq(0).all()


@pytest.mark.real
def test_the_default_model_is_nearer_to_what_it_knows_than_to_fiction() -> None:
    model = default()
    records = [("The capital of France is", "Paris"), ("The capital of Japan is", "Tokyo"), ("The sky is", "blue")]
    known = FactSet.from_records([{"prompt": prompt, "answer": answer} for prompt, answer in records])
    near, far = (semantic_distance(model, facts, layers=[0, 29]) for facts in (known, wb.fictional(3)))
    of = {"near": distance_summary(near).set_index(["metric", "layer"])["mean"]}
    of["far"] = distance_summary(far).set_index(["metric", "layer"])["mean"]
    assert of["near"]["d_soft", pd.NA] < of["far"]["d_soft", pd.NA]
    assert of["near"]["d_layer", 29] < of["far"]["d_layer", 29]
    assert of["near"]["d_layer", 29] < of["near"]["d_layer", 0]  # the unembedding is a direction of the last layers

"""Drift: the identity of its geometry, distances written out, and a model against itself."""

import pytest
import torch
from tiny import FACTS, random_model, saved, tiny, tokenizer

from workbench.models import load_model
from workbench.recollection import recall
from workbench.semantics import embedding_distance, measure_drift, toward_and_off


def test_toward_and_off_satisfy_their_identity() -> None:
    torch.manual_seed(0)
    before, after = torch.randn(3, 5, 16), torch.randn(3, 5, 16)
    anchor = torch.randn(5, 16)
    toward, off = toward_and_off(before, after, anchor)
    left = ((after - anchor).norm(dim=-1) / (before - anchor).norm(dim=-1)) ** 2
    torch.testing.assert_close(left, (1 - toward) ** 2 + off**2, rtol=1e-5, atol=1e-5)
    wrong = (1 - toward) ** 2 + off  # negative control
    assert (left - wrong).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["gpt2", "gemma3_text", "opt"])
def test_a_model_against_itself_does_not_drift(kind: str) -> None:
    frame = measure_drift(tiny(kind), tiny(kind), FACTS)
    assert set(frame["metric"]) == {"d_emb", "toward", "off"}
    assert len(frame) == len(FACTS) * (1 + 2 * 3)
    assert frame["change"].eq(0).all()


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


def test_equal_answers_have_no_distance_and_opposite_ones_have_two() -> None:
    W = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    distance = embedding_distance(W, [[0], [1], [2], [0, 2]], [[0], [0], [0], [2, 0]])
    assert distance == pytest.approx([0.0, 2.0, 1.0, 0.0], abs=1e-6)


def test_folders_and_several_models_by_name(tmp_path) -> None:
    folder = str(saved(tmp_path / "a"))
    frame = measure_drift(folder, {"same": folder, "other": str(saved(tmp_path / "b", seed=1))}, FACTS)
    assert frame[frame["method"] == "same"]["change"].eq(0).all()
    assert frame[frame["method"] == "other"]["change"].abs().max() > 0.1


def test_models_of_different_shape_are_refused() -> None:
    other = load_model(random_model("llama", num_hidden_layers=2), tokenizer=tokenizer())
    with pytest.raises(ValueError, match="cannot be compared: n_layers is 3 and 2"):
        measure_drift(tiny("llama"), other, FACTS)

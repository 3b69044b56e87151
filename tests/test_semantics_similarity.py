"""CKA and RSA: what they are blind to, what they see, and their intervals against doing it by hand."""

import numpy as np
import pytest
import torch
from tiny import FACTS, random_model, tiny, tokenizer

from workbench.facts import FactSet
from workbench.intervals import bootstrap
from workbench.models import load_model
from workbench.semantics import linear_cka, rsa, similarity
from workbench.semantics.similarity import _cka_interval, _rsa_interval

torch.manual_seed(0)
X, Y = torch.randn(12, 6), torch.randn(12, 6)
ROTATION = torch.linalg.qr(torch.randn(6, 6))[0]
SHEAR = torch.diag(torch.tensor([10.0, 1.0, 1.0, 1.0, 0.1, 0.1]))


def cka_by_features(x: np.ndarray, y: np.ndarray) -> float:
    """The definition in its other form, |Y^T X|^2 / (|X^T X| |Y^T Y|) of centred features."""
    x, y = x - x.mean(0), y - y.mean(0)
    return float(np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)))


def rsa_by_pairs(x: np.ndarray, y: np.ndarray, names: np.ndarray) -> float:
    """The correlation over all pairs of rows that are not the same fact."""
    pairs = [(i, j) for i in range(len(x)) for j in range(i) if names[i] != names[j]]
    both = [[z[i] @ z[j] / (np.linalg.norm(z[i]) * np.linalg.norm(z[j])) for i, j in pairs] for z in (x, y)]
    return float(np.corrcoef(*both)[0, 1])


@pytest.mark.parametrize("measure", [linear_cka, rsa])
def test_rotations_and_scales_change_nothing_and_other_linear_maps_do(measure) -> None:
    same = measure(X, X).item()
    assert same == pytest.approx(1, abs=1e-12)
    assert measure(X, 3 * X @ ROTATION).item() == pytest.approx(1, abs=1e-6)
    assert measure(X @ ROTATION, 0.1 * Y).item() == pytest.approx(measure(X, Y).item(), abs=1e-6)
    assert measure(X, X @ SHEAR).item() < 0.9
    assert measure(X, Y).item() < 0.8


def test_cka_does_not_see_a_shift_and_equals_its_other_form() -> None:
    assert linear_cka(X, Y + 5).item() == pytest.approx(linear_cka(X, Y).item(), abs=1e-6)
    assert linear_cka(X, Y[:, :3]).item() == pytest.approx(cka_by_features(X.numpy(), Y[:, :3].numpy()), rel=1e-5)


def test_the_bootstrap_equals_resampling_the_rows() -> None:
    weights = torch.from_numpy(bootstrap(np.eye(12), draws=8, seed=3))
    cka, alike = linear_cka(X, Y, weights).numpy(), rsa(X, Y, weights).numpy()
    for draw, weight in enumerate(weights.numpy()):
        rows = np.repeat(np.arange(12), np.rint(weight * 12).astype(int))
        assert len(rows) == 12
        x, y = X.numpy().astype(float)[rows], Y.numpy().astype(float)[rows]
        assert cka[draw] == pytest.approx(cka_by_features(x, y), rel=1e-9)
        assert alike[draw] == pytest.approx(rsa_by_pairs(x, y, rows), rel=1e-9)


def test_the_interval_of_cka_holds_its_value_and_that_of_as_many_other_facts() -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(40, 40, generator=generator) / 40**0.5
    drawn = []
    for _ in range(40):
        noise, first = (torch.randn(30, 40, generator=generator) for _ in range(2))
        drawn.append(_cka_interval(first, first @ mix + noise, 200, 0))
    expected = np.mean([value for value, _, _ in drawn])
    assert all(low <= value <= high for value, low, high in drawn)
    assert np.mean([low <= expected <= high for _, low, high in drawn]) > 0.85
    noise = [torch.randn(60, 576, generator=generator) for _ in range(2)]
    value, low, high = _cka_interval(*noise, 200, 0)  # more dimensions than facts: far from 0, and the draws above it
    resampled = linear_cka(*noise, torch.from_numpy(bootstrap(np.eye(60), draws=50)))
    assert 0.5 < low <= value <= high < resampled.min()
    assert _cka_interval(X, X, 50, 0) == pytest.approx((1, 1, 1))


def test_an_interval_of_cka_leaves_facts_out_as_one_does_by_hand() -> None:
    value, low, high = _cka_interval(X, Y, 4000, 1)
    x, y = X.numpy().astype(float), Y.numpy().astype(float)
    without = np.array([cka_by_features(np.delete(x, i, 0), np.delete(y, i, 0)) for i in range(12)])
    spread = np.sqrt(11 / 12 * ((without - without.mean()) ** 2).sum())  # the jackknife's standard error
    assert value == pytest.approx(cka_by_features(x, y))
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.15)


@pytest.mark.filterwarnings("error")
def test_prompts_that_are_all_alike_are_one_sentence_and_equal_states_are_missing() -> None:
    records = [{"id": str(i), "prompt": "the sky is", "answer": word} for i, word in enumerate(("red", "blue", "Au"))]
    with pytest.raises(ValueError, match="3 facts with different prompts, and 'alike' has 1"):
        similarity(tiny("llama"), tiny("llama"), FactSet.from_records(records, name="alike"))
    assert np.isnan(_rsa_interval(torch.ones(4, 1), torch.ones(4, 1), torch.full((5, 4), 0.25))).all()
    assert np.isnan(_cka_interval(torch.ones(4, 1), torch.ones(4, 1), 5, 0)[0])


def test_models_by_layer_equal_plain_transformers_and_a_model_is_like_itself() -> None:
    plain = [random_model("llama", 0), random_model("llama", 0)]
    with torch.no_grad():
        plain[1].model.layers[1].mlp.down_proj.weight.normal_()
    first, second = (load_model(model, tokenizer=tokenizer()) for model in plain)
    frame = similarity(first, {"same": tiny("llama"), "other": second}, FACTS, draws=20, seed=1)
    assert frame[frame["method"] == "same"]["value"].to_numpy() == pytest.approx(1, abs=1e-12)
    other = frame[frame["method"] == "other"].set_index(["metric", "layer"])
    assert other.loc[("cka", 0), "value"] == pytest.approx(1, abs=1e-12)
    assert (other.loc[("cka", 1), "low"], other.loc[("rsa", 1), "value"]) < (0.99, 0.99)
    assert set(other["seed"]) == {1}
    with torch.no_grad():
        states = [
            np.stack([m(torch.tensor([f.prompt_ids]), output_hidden_states=True).hidden_states[2][0, -1].numpy()
                      for f in FACTS.tokenise(tokenizer())]) for m in plain
        ]  # fmt: skip
    assert other.loc[("cka", 1), "value"] == pytest.approx(cka_by_features(*states), rel=1e-4)
    assert other.loc[("rsa", 1), "value"] == pytest.approx(rsa_by_pairs(*states, np.arange(len(FACTS))), rel=1e-4)
    with pytest.raises(ValueError, match="at least 3 facts"):
        similarity(first, second, FACTS[:2])

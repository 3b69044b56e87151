"""Gradients of facts against autograd on dense weights, and against a step that is really taken."""

import numpy as np
import pytest
import torch
from test_interfere_measures import ASKED, measured
from tiny import tiny

from workbench.interfere import gradients, predicted_change


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma3_text"])
def test_gradients_equal_autograd_on_dense_weights(kind: str) -> None:
    model = tiny(kind)
    found = measured(model, ["gradient"])
    dense = []
    weights = [model.down_proj(layer).weight for layer in range(3)]
    for fact in model.tokenise(ASKED):
        for weight in weights:
            weight.requires_grad_(True)
        logits = model.hf(torch.tensor([fact.ids[:-1]])).logits[0, -len(fact.answer_ids) :]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(fact.answer_ids))
        dense.append([gradient.double().flatten() for gradient in torch.autograd.grad(loss, weights)])
        for weight in weights:
            weight.requires_grad_(False)
    for layer in range(3):
        flat = torch.stack([gradients[layer] for gradients in dense])
        norm = flat.norm(dim=1)
        np.testing.assert_allclose(found["gradient_norm"][layer], norm, rtol=1e-4)
        np.testing.assert_allclose(found["value"][0, layer], (flat @ flat.T) / torch.outer(norm, norm), atol=2e-5)
        predicted = predicted_change(found, learning_rate=0.1).sel(layer=layer)
        np.testing.assert_allclose(predicted, -0.1 * flat @ flat.T, rtol=1e-3, atol=1e-5 * float(norm.max() ** 2))


def test_inner_products_are_the_same_in_blocks_and_as_dense_matrices(monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)
    slope, key = (torch.randn(23, width, generator=generator) for width in (4, 6))
    owner = torch.tensor([0] * 2 + [1] * 9 + [2] + [3] * 11)
    dense = torch.stack([slope[owner == i].double().T @ key[owner == i].double() for i in range(4)]).flatten(1)
    for block in (3, 7, 1024):
        monkeypatch.setattr(gradients, "BLOCK", block)
        np.testing.assert_allclose(gradients.inner_products(slope, key, owner, 4), dense @ dense.T, rtol=1e-5)


def test_a_small_step_on_one_fact_changes_the_others_as_predicted_and_a_large_one_does_not() -> None:
    model = tiny("llama")
    found = measured(model, ["gradient"])
    tokens = model.tokenise(ASKED)
    weight = model.down_proj(1).weight
    original = weight.detach().clone()

    def losses() -> torch.Tensor:
        rows = []
        for fact in tokens:
            logits = model.hf(torch.tensor([fact.ids[:-1]])).logits[0, -len(fact.answer_ids) :].double()
            rows.append(torch.nn.functional.cross_entropy(logits, torch.tensor(fact.answer_ids)))
        return torch.stack(rows)

    weight.requires_grad_(True)
    before = losses()
    (slope,) = torch.autograd.grad(before[2], weight)
    weight.requires_grad_(False)
    gaps = []
    for rate in (1e-3, 1.0):
        with torch.no_grad():
            weight.copy_(original - rate * slope)
            change = (losses() - before).detach().numpy()
            weight.copy_(original)
        wanted = predicted_change(found, learning_rate=rate).sel(layer=1, other="kenya").values
        gaps.append(np.abs(change - wanted).max() / np.abs(wanted).max())
    assert gaps[0] < 0.02 < 0.1 < gaps[1]

"""Formulas of distance against literal loops, finite differences and cases that are known by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.distances import cosine_distance, embedding_distance, soft_distance, toward_and_off


def literal(logits: torch.Tensor, target: torch.Tensor, W_E: torch.Tensor) -> torch.Tensor:
    """The definition, word by word: a loop over tokens and one over the vocabulary."""
    found = []
    for row, meant in zip(logits, target.tolist(), strict=True):
        total = torch.zeros((), dtype=logits.dtype)
        for v, p in enumerate(row.softmax(-1)):
            a, b = W_E[v], W_E[meant]
            total = total + p * (1 - (a @ b) / (a.norm() * b.norm()))
        found.append(total)
    return torch.stack(found)


@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(2, 9))
@settings(max_examples=10, deadline=None)
def test_soft_distance_is_the_literal_double_loop(seed: int, tokens: int, words: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, words, generator=generator, dtype=torch.float64) * 3
    W_E = torch.randn(words, 5, generator=generator, dtype=torch.float64)
    target = torch.randint(words, (tokens,), generator=generator)
    found = soft_distance(logits, target, W_E)
    torch.testing.assert_close(found, literal(logits, target, W_E), rtol=1e-10, atol=1e-12)
    assert ((found > -1e-12) & (found < 2 + 1e-12)).all()


def test_soft_distance_is_differentiable_in_the_logits() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    W_E, target = torch.randn(7, 4, dtype=torch.float64), torch.tensor([0, 6, 2])
    (gradient,) = torch.autograd.grad(soft_distance(logits, target, W_E).sum(), logits)
    step = 1e-6
    for row in range(3):
        for v in range(7):
            moved = logits.detach().clone()
            moved[row, v] += step
            up = soft_distance(moved, target, W_E)[row]
            moved[row, v] -= 2 * step
            slope = (up - soft_distance(moved, target, W_E)[row]) / (2 * step)
            assert gradient[row, v].item() == pytest.approx(slope.item(), abs=1e-8)
    assert gradient.abs().max() > 1e-2  # so that a gradient of zeros would fail


def test_soft_distance_of_a_sure_answer_is_that_of_its_embedding() -> None:
    W_E = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    sure = torch.full((3, 3), -60.0).fill_diagonal_(60.0)
    assert soft_distance(sure, torch.tensor([0, 0, 0]), W_E).tolist() == pytest.approx([0.0, 1.0, 2.0], abs=1e-6)
    assert soft_distance(sure.bfloat16(), torch.tensor([0, 0, 0]), W_E.bfloat16()).dtype == torch.float32


def test_equal_answers_have_no_distance_and_opposite_ones_have_two() -> None:
    W = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    distance = embedding_distance(W, [[0], [1], [2], [0, 2]], [[0], [0], [0], [2, 0]])
    assert distance == pytest.approx([0.0, 2.0, 1.0, 0.0], abs=1e-6)


def test_cosine_distance_is_exactly_zero_between_equal_rows() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(50, 9), torch.randn(50, 9)
    assert cosine_distance(a, a.clone()).eq(0).all()
    by_hand = torch.tensor([1 - float(x @ y / (x.norm() * y.norm())) for x, y in zip(a, b, strict=True)])
    torch.testing.assert_close(cosine_distance(a, b), by_hand, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("per_layer", [False, True])
def test_toward_and_off_satisfy_their_identity(per_layer: bool) -> None:
    torch.manual_seed(0)
    before, after = torch.randn(3, 5, 16), torch.randn(3, 5, 16)
    anchor = torch.randn(3, 5, 16) if per_layer else torch.randn(5, 16)
    toward, off = toward_and_off(before, after, anchor)
    left = ((after - anchor).norm(dim=-1) / (before - anchor).norm(dim=-1)) ** 2
    torch.testing.assert_close(left, (1 - toward) ** 2 + off**2, rtol=1e-5, atol=1e-5)
    wrong = (1 - toward) ** 2 + off  # negative control
    assert (left - wrong).abs().max() > 1e-2

"""Metrics against their definitions written out, and the gradient of what is differentiated."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.metrics import OBJECTIVES, kl, logprob, margin, rank

LOGITS = torch.tensor([[1.0, 5.0, 3.0, 5.0], [0.0, -1.0, 2.0, 0.5]])
TARGET = torch.tensor([3, 2])


def test_values_equal_their_definitions() -> None:
    p = LOGITS.softmax(-1)[torch.arange(2), TARGET]
    torch.testing.assert_close(logprob(LOGITS, TARGET), p.log())
    torch.testing.assert_close(OBJECTIVES["prob"](LOGITS, TARGET), p)
    assert margin(LOGITS, TARGET).tolist() == [0.0, 1.5]
    assert rank(LOGITS, TARGET).tolist() == [1, 0]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=2, max_size=8), st.data())
def test_rank_is_the_place_in_a_stable_sort(values: list[int], data: st.DataObject) -> None:
    target = data.draw(st.integers(0, len(values) - 1))
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    logits = torch.tensor(values, dtype=torch.float32)
    assert rank(logits, torch.tensor(target)).item() == order.index(target)
    assert (rank(logits, torch.tensor(target)).item() == 0) == (int(logits.argmax()) == target)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_have_the_gradient_of_a_finite_difference(name: str) -> None:
    logits = LOGITS[1:].double().requires_grad_()
    value = OBJECTIVES[name](logits, TARGET[1:])
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    for j in range(4):
        step = torch.zeros_like(logits)
        step[0, j] = 1e-2
        up, down = (OBJECTIVES[name]((logits + s).detach(), TARGET[1:]) for s in (step, -step))
        assert float(gradient[0, j]) == pytest.approx(float(up - down) / 2e-2, abs=1e-3)


def test_kl_is_torchs_and_zero_for_equal_logits() -> None:
    before, after = LOGITS[:1], LOGITS[1:]
    expected = torch.nn.functional.kl_div(
        after.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    torch.testing.assert_close(kl(before, after), expected)
    assert kl(before, before).item() == 0
    assert kl(before, after).item() > 0.1

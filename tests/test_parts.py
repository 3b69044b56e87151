"""A trace and a suppression curve that are stopped go on where they were, and end as if nothing had happened."""

from functools import cache

import pandas as pd
import pytest
import torch
import xarray as xr
from tiny import FACTS, tiny

from workbench.attribution import attribute
from workbench.facts import FactSet
from workbench.models import HookedModel
from workbench.results import Parts
from workbench.suppression import suppression_curve
from workbench.tracing import trace

SUBJECTS = FactSet.from_records(
    [fact | {"subject": fact["prompt"].split()[-2]} for fact in FACTS.to_records()[:5]], name="with subjects"
)
TEXT = [" ".join(["the capital of France is Paris and"] * 3), " ".join(["one two three four five"] * 3)]


class Stopped(BaseException):
    """As when a process is stopped from outside."""


def stopping(monkeypatch: pytest.MonkeyPatch, after: int) -> list[int]:
    """Let so many reads of logits pass, and stop the next."""
    seen: list[int] = []
    forward = torch.nn.Module.__call__

    def counted(self: torch.nn.Module, *args: object, **kwargs: object) -> object:
        if type(self).__name__ == "LlamaForCausalLM":
            if len(seen) == after:
                raise Stopped
            seen.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "__call__", counted)
    return seen


@cache
def scores() -> xr.Dataset:
    return attribute(tiny("llama"), FACTS[:3], method="grad_x_act", progress=False)


def traced(model: HookedModel, parts: object = None, **changes: object) -> xr.Dataset:
    return trace(model, SUBJECTS, **{"draws": 2, "parts": parts, "progress": False, **changes})


def curve(model: HookedModel, parts: object = None, **changes: object) -> pd.DataFrame:
    options = {"quotas": (10.0,), "scores": ("magnitude",), "strategies": ("layer_balanced",), "seeds": (0,)}
    return suppression_curve(model, scores(), FACTS[3:], **options, **{"general": TEXT, "parts": parts, **changes})


@pytest.mark.parametrize("work", [traced, curve])
def test_what_was_stopped_goes_on_and_ends_the_same(work, tmp_path, monkeypatch) -> None:
    model, folder = tiny("llama"), tmp_path / "parts"
    scores()
    with monkeypatch.context() as patch:
        seen = stopping(patch, 10**9)
        whole = work(model)
        total = len(seen)
    assert total > 8
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stopping(patch, total - 3)
        work(model, folder)
    kept = len(list(folder.glob("*.json"))) - 1
    assert kept > 1
    with monkeypatch.context() as patch:
        seen = stopping(patch, 10**9)
        again = work(model, folder)
        assert len(seen) < total / 2
    assert len(list(folder.glob("*.json"))) - 1 > kept
    with monkeypatch.context() as patch:
        seen = stopping(patch, 10**9)
        work(model, folder)
        assert len(seen) < total / 3
    if isinstance(whole, pd.DataFrame):
        pd.testing.assert_frame_equal(again, whole)
    else:
        xr.testing.assert_identical(again, whole)


def test_parts_of_other_settings_are_refused(tmp_path) -> None:
    model = tiny("llama")
    traced(model, tmp_path / "parts")
    with pytest.raises(ValueError, match=r"other settings \(it differs in noise\): delete it"):
        traced(model, tmp_path / "parts", noise=1.0)
    curve(model, tmp_path / "curve")
    with pytest.raises(ValueError, match="it differs in factor"):
        curve(model, tmp_path / "curve", factor=2.0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="holds something else"):
        Parts(tmp_path / "full", {})
    assert (tmp_path / "full" / "mine.txt").is_file()

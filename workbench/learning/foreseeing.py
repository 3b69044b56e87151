"""Which measure to trust, in one call: interference and harm among the same facts, and the table of the prediction."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import xarray as xr

from workbench.facts import FactSet
from workbench.interfere import interference
from workbench.learning.candidates import check_enough
from workbench.learning.harms import harm
from workbench.learning.predicting import predicts, verdict
from workbench.models import HookedModel


def foresee(
    model: HookedModel,
    facts: FactSet,
    attributions: Sequence[xr.Dataset],
    *,
    out: str | Path,
    metrics: Sequence[str] = ("cosine", "jaccard"),
    top: float = 1.0,
    draws: int = 1,
    parts: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Measure interference and harm among facts, and say which measure predicts the harm.

    Args:
        model: that of the attributions.
        facts: at least 8.
        attributions: results of `attribute` that hold them, each fact in one, with the same settings.
        out: where the result of `harm` is kept while it is made; a second call goes on there.
        metrics, top, draws, parts: of `interference`.
        seed: of all draws.
        progress: show progress bars.

    Returns:
        The table of `predicts`; and as plain values the verdict, the number of facts, the share `learnt` that is more
        than half probable after being learnt, and the rate.

    Raises:
        ValueError: fewer than 8 facts, or what `interference` and `harm` refuse.
    """
    check_enough(len(facts))
    scores = xr.concat(
        attributions, dim="fact", data_vars="minimal", coords="minimal", compat="override", join="exact",
        combine_attrs="override",
    ).sel(fact=list(facts.ids))  # fmt: skip
    how: dict[str, Any] = {"metrics": metrics, "top": top, "draws": draws, "parts": parts, "seed": seed}
    measured = interference(model, facts, scores, **how, progress=progress)
    harmed = harm(model, facts, out=out, progress=progress)
    frame = predicts(measured, harmed, seed=seed)
    learnt = float((harmed["reached"] > 0.5).mean())
    about = {"verdict": verdict(frame), "n_facts": len(facts), "learnt": learnt, "rate": harmed.attrs["rate_used"]}
    return frame, about

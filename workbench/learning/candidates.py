"""What may predict harm: measures of interference and simple baselines, as matrices over the same facts."""

from dataclasses import dataclass

import numpy as np
import xarray as xr

from workbench.interfere import METRICS, predicted_change
from workbench.learning.pairs import Matrix, Stack, off_diagonal
from workbench.results import validate_harm

FEWEST = 8  # facts: four to choose by and four to judge by


@dataclass(frozen=True)
class Candidate:
    """Something that may predict harm: one matrix over pairs of facts, or one a layer, of which the best is chosen."""

    measure: str
    kind: str  # "best layer", "mean over layers", "sum over layers" or "baseline"
    matrices: Stack
    layers: tuple[int, ...] = ()


def aligned(interference: xr.Dataset, harm: xr.Dataset) -> tuple[Matrix, list[Candidate]]:
    """The harm among common facts, and everything that may predict it."""
    validate_harm(harm)
    if "value" not in interference:
        raise ValueError("The interference has no `value`: give a result of `interference`.")
    digests = {str(ds.attrs.get("model_digest", "unknown")) for ds in (interference, harm)} - {"unknown"}
    if len(digests) > 1:
        raise ValueError("The interference and the harm are of different models: measure both on the same one.")
    both = {str(i) for i in harm["fact"].values} & {str(i) for i in harm["other"].values}
    ids = [str(i) for i in interference["fact"].values if str(i) in both]
    check_enough(len(ids))
    _check_same_facts(interference, harm, ids)
    target = harm["harm"].sel(fact=ids, other=ids).transpose("fact", "other").values.astype(np.float64)
    found = interference["value"].sel(fact=ids, other=ids).transpose("metric", "layer", "fact", "other")
    layers = tuple(int(layer) for layer in interference["layer"].values)
    apart = off_diagonal(len(ids))
    measures = []
    for metric in found["metric"].values:
        matrices = found.sel(metric=metric).values.astype(np.float64)
        if metric in METRICS and METRICS[metric].suffers == "other":
            matrices = matrices.transpose(0, 2, 1)  # harm is of the fact that suffers under the other
        if not np.isfinite(matrices[:, apart]).all():
            raise ValueError(f"The interference has values of {metric} that are not finite: leave that measure out.")
        measures.append(Candidate(str(metric), "best layer", matrices, layers))
        measures.append(Candidate(str(metric), "mean over layers", matrices.mean(0)[None]))
    return target, [*measures, *_first_order(interference, harm, ids), *_baselines(interference, harm, ids)]


def check_enough(n_facts: int) -> None:
    """Raise `ValueError` for too few facts to choose a measure by and to judge it by."""
    if n_facts < FEWEST:
        raise ValueError(
            f"A prediction needs at least {FEWEST} facts that both results have, as read and as learnt; there are "
            f"{n_facts}."
        )


def _check_same_facts(interference: xr.Dataset, harm: xr.Dataset, ids: list[str]) -> None:
    """Raise `ValueError` where an id stands for other facts in the two; results that do not say are trusted."""
    if "text" not in interference.coords or not {"text", "other_text"} <= set(harm.coords):
        return
    read, learnt = harm["text"].sel(fact=ids).values, harm["other_text"].sel(other=ids).values
    for name, *texts in zip(ids, interference["text"].sel(fact=ids).values, read, learnt, strict=True):
        if len(set(texts)) > 1:
            raise ValueError(
                f"Fact {name!r} has another prompt or answer in the interference than in the harm: measure both on the "
                "same facts."
            )


def _first_order(interference: xr.Dataset, harm: xr.Dataset, ids: list[str]) -> list[Candidate]:
    """`-<g_i, g_j>` over all layers: the harm of a very small step. Losses there are means over answer tokens."""
    if "gradient_norm" not in interference:
        return []
    change = predicted_change(interference, learning_rate=1.0).sum("layer").sel(fact=ids, other=ids).values
    tokens = harm["n_tokens"].sel(fact=ids).values
    return [Candidate("first-order harm", "sum over layers", (change * tokens[:, None] * tokens[None])[None])]


def _baselines(interference: xr.Dataset, harm: xr.Dataset, ids: list[str]) -> list[Candidate]:
    """What needs no measure, where it varies: shared relation or answer, nearness in meaning, how well i was known."""
    chosen = harm.sel(fact=ids)
    relation, answer = (chosen[name].values.astype(str) for name in ("relation", "answer"))
    answer = np.array([text.strip().casefold() for text in answer])
    simple = {
        "same relation": relation[:, None] == relation[None],
        "same answer": answer[:, None] == answer[None],
        "already known": np.tile(chosen["before"].values[:, None], (1, len(ids))),
    }
    if "meaning" in interference:
        simple["near in meaning"] = interference["meaning"].sel(fact=ids, other=ids).values
    apart = off_diagonal(len(ids))
    as_numbers = {name: matrix.astype(np.float64) for name, matrix in simple.items()}
    return [Candidate(name, "baseline", x[None]) for name, x in as_numbers.items() if np.ptp(x[apart]) > 0]

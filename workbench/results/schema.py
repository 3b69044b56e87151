"""What a labelled result must look like, as tables; and the check that says in one sentence what is wrong."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import xarray as xr

log = logging.getLogger(__name__)

FACTS_AT_ONCE = 64  # while checking a stored result for finite numbers


@dataclass(frozen=True)
class Variable:
    """Dims and dtype kind of one variable ("f" float, "i" whole number, "t" text), and whether NaN may stand in it."""

    dims: tuple[str, ...]
    kind: str = "f"
    finite: bool = True


@dataclass(frozen=True)
class Schema:
    """The variables, coordinates and attributes that one kind of result must have; more are allowed.

    `optional` variables may be missing, as in results of before, but look so where they are there.
    """

    name: str
    variables: Mapping[str, Variable]
    coords: Mapping[str, Variable]
    attrs: tuple[str, ...]
    optional: Mapping[str, Variable] = field(default_factory=dict)


_PER_LAYER = Variable(("metric", "layer"), finite=False)  # NaN where there is only one relation

ATTRIBUTION = Schema(
    name="attribution",
    variables=MappingProxyType(
        {
            "score": Variable(("fact", "layer", "unit")),
            "gap": Variable(("fact", "layer"), finite=False),
            "target_prob": Variable(("fact",), finite=False),
        }
    ),
    coords=MappingProxyType(
        {
            "fact": Variable(("fact",), "t"),
            "layer": Variable(("layer",), "i"),
            "unit": Variable(("unit",), "i"),
            "relation": Variable(("fact",), "t"),
        }
    ),
    attrs=(
        "unit",
        "method",
        "steps",
        "rule",
        "baseline",
        "scope",
        "objective",
        "target",
        "model_digest",
        "fact_digest",
    ),
)

INTERFERENCE = Schema(
    name="interference",
    variables=MappingProxyType(
        {
            "value": Variable(("metric", "layer", "fact", "other")),
            "load": Variable(("layer", "unit")),
            "within": _PER_LAYER,
            "across": _PER_LAYER,
            "difference": _PER_LAYER,
            "null_low": _PER_LAYER,
            "null_high": _PER_LAYER,
            "p_value": _PER_LAYER,
        }
    ),
    coords=MappingProxyType(
        {
            "metric": Variable(("metric",), "t"),
            "layer": Variable(("layer",), "i"),
            "fact": Variable(("fact",), "t"),
            "other": Variable(("other",), "t"),
            "relation": Variable(("fact",), "t"),
        }
    ),
    attrs=("unit",),
    optional=MappingProxyType(
        {
            **dict.fromkeys(("low", "high", "q_value", "chance", "matched_chance", "expected", "level"), _PER_LAYER),
            **dict.fromkeys(("meaning_rho", "meaning_low", "meaning_high", "meaning_p", "meaning_q"), _PER_LAYER),
            **dict.fromkeys(("conflict_chance", "conflict_matched"), _PER_LAYER),
            "meaning": Variable(("fact", "other")),
            "gradient_norm": Variable(("layer", "fact")),
        }
    ),
)

_PER_ROLE = Variable(("fact", "layer", "role"), finite=False)  # NaN where a fact has no token of the role

TRACE = Schema(
    name="trace",
    variables=MappingProxyType(
        {
            "effect": _PER_ROLE,
            "effect_logprob": _PER_ROLE,
            "p_clean": Variable(("fact",)),
            "p_corrupt": Variable(("fact",)),
            "logprob_clean": Variable(("fact",)),
            "logprob_corrupt": Variable(("fact",)),
            "n_tokens": Variable(("fact", "role"), "i"),
        }
    ),
    coords=MappingProxyType(
        {
            "fact": Variable(("fact",), "t"),
            "layer": Variable(("layer",), "i"),
            "role": Variable(("role",), "t"),
            "relation": Variable(("fact",), "t"),
        }
    ),
    attrs=("site", "noise", "noise_std", "draws", "window", "seed", "model_digest", "fact_digest"),
)


def validate_attribution(ds: xr.Dataset) -> None:
    """Raise `ValueError` with one sentence unless `ds` is a complete attribution result."""
    _validate(ds, ATTRIBUTION)
    for name in ("gap", "target_prob"):  # NaN throughout where they are not known, as in results from elsewhere
        if not ds[name].isnull().all():
            check_finite(ds[name], "This attribution result")


def validate_interference(ds: xr.Dataset) -> None:
    """Raise `ValueError` with one sentence unless `ds` is a complete interference result."""
    _validate(ds, INTERFERENCE)
    if not np.array_equal(ds["fact"].values.astype(str), ds["other"].values.astype(str)):
        raise ValueError("An interference result has the same facts, in the same order, on `fact` and on `other`.")


def validate_trace(ds: xr.Dataset) -> None:
    """Raise `ValueError` with one sentence unless `ds` is a complete causal trace."""
    _validate(ds, TRACE)
    absent = ds["effect"].isnull() != (ds["n_tokens"] == 0)
    if bool(absent.any()):
        raise ValueError("A trace has an effect for every role of which a fact has tokens, and NaN for the others.")


def _validate(ds: xr.Dataset, schema: Schema) -> None:
    what = f"This {schema.name} result"
    there = {name: wanted for name, wanted in schema.optional.items() if name in ds.data_vars}
    variables = {**schema.variables, **there}
    for group, found in ((schema.coords, ds.coords), (variables, ds.data_vars)):
        for name, wanted in group.items():
            if name not in found:
                raise ValueError(f"{what} lacks `{name}` with dims ({', '.join(wanted.dims)}).")
            array = ds[name]
            if array.dims != wanted.dims:
                raise ValueError(f"{what} has `{name}` with dims {array.dims}, expected {wanted.dims}.")
            if not _is_kind(array, wanted.kind):
                raise ValueError(f"{what} has `{name}` of dtype {array.dtype}, expected {_KINDS[wanted.kind][1]}.")
    missing = [name for name in schema.attrs if name not in ds.attrs]
    if missing:
        raise ValueError(f"{what} does not say its {', '.join(missing)}: put it into the attributes.")
    if "unit" in schema.attrs and ds.attrs["unit"] not in ("node", "neuron"):
        raise ValueError(f'{what} has the unit kind {ds.attrs["unit"]!r}: it is "node" or "neuron".')
    for name in [name for name in ("fact", "layer") if name in schema.coords]:
        index = ds.indexes[name]
        if not index.is_unique:
            raise ValueError(f"{what} has {name} {index[index.duplicated()][0]} twice.")
    for name, wanted in variables.items():
        if wanted.finite:
            check_finite(ds[name], what)


_KINDS = {"f": ("f", "floating point"), "i": ("iu", "whole numbers"), "t": ("UOT", "text")}


def _is_kind(array: xr.DataArray, kind: str) -> bool:
    return array.dtype.kind in _KINDS[kind][0]


def check_finite(array: xr.DataArray, what: str) -> None:
    """Raise `ValueError` with one sentence that names the first number that is not finite.

    Slices along the first axis are read one by one, so that a stored result is not loaded whole.
    """
    first = array.dims[0]
    for start in range(0, array.sizes[first], FACTS_AT_ONCE):
        block = array.isel({first: slice(start, start + FACTS_AT_ONCE)})
        bad = np.argwhere(~np.isfinite(block.values))
        if len(bad):
            bad[0][0] += start
            named = ", ".join(f"{dim} {array[dim].values[i]}" for dim, i in zip(array.dims, bad[0], strict=True))
            raise ValueError(f"{what} has a `{array.name}` at {named} that is not finite: compute it again.")


def check_made_with(result: xr.Dataset, digest: str, name: str) -> None:
    """Raise `ValueError` where a result was made with other weights than those of the model `name` with this digest.

    A result that does not say what it was made with, as one read from LoKI's HDF5, is taken on trust and a warning.
    """
    made = result.attrs.get("model_digest", "unknown")
    if made == "unknown":
        log.warning("the scores do not say which model they are of; taken as those of %s", name)
    elif made != digest:
        raise ValueError(f"The scores were made with another model than {name}; attribute this model first.")


def check_asked(result: xr.Dataset, texts: Mapping[str, str]) -> None:
    """Raise `ValueError` where a result is of another prompt or answer than the fact of the same id in `texts`.

    `texts` is `FactSet.texts`. A result that does not say what it asked, as one read from LoKI's HDF5, is trusted.
    """
    if "text" not in result.coords:
        return
    for name, text in zip(result["fact"].values, result["text"].values, strict=True):
        if texts.get(str(name), str(text)) != str(text):
            raise ValueError(
                f"The scores of fact {str(name)!r} are of another prompt or answer than the one of that id given here; "
                "attribute these facts."
            )


HARM = Schema(
    name="harm",
    variables=MappingProxyType(
        {
            "harm": Variable(("fact", "other")),
            "before": Variable(("fact",)),
            "gained": Variable(("other",)),
            "reached": Variable(("other",)),
        }
    ),
    coords=MappingProxyType(
        {
            "fact": Variable(("fact",), "t"),
            "other": Variable(("other",), "t"),
            "relation": Variable(("fact",), "t"),
            "answer": Variable(("fact",), "t"),
            "n_tokens": Variable(("fact",), "i"),
        }
    ),
    attrs=("steps", "rate", "rate_used", "model_digest", "fact_digest", "other_digest"),
)


def validate_harm(ds: xr.Dataset) -> None:
    """Raise `ValueError` with one sentence unless `ds` says for every pair of facts what learning one did to the other.

    A result that was stopped half way is told apart: the same call with the same `out` goes on with it.
    """
    if "reached" in ds and (missing := int(ds["reached"].isnull().sum())):
        n = ds["reached"].size
        raise ValueError(f"This harm result holds {n - missing} of {n} learnt facts: go on with the same --out.")
    _validate(ds, HARM)

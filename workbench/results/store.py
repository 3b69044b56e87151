"""Attribution results that grow fact by fact, in memory or in a zarr folder that survives being killed."""

import contextlib
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from jaxtyping import Float
from zarr.codecs import Crc32cCodec, ZstdCodec

from workbench.results.damage import check_labels, intact, lost_labels, only_scores, repair, stored_arrays
from workbench.results.files import exclusive, one_sentence_disk_errors
from workbench.results.labelled import (
    KIND,
    check_replaceable,
    clear_folder,
    kind_of,
    open_result,
    replace_folder,
)

log = logging.getLogger(__name__)

CHUNK_BYTES = 2**16  # of scores in one file; larger facts have a file each
SMALL_CHUNK = 1024  # facts in one file of the small arrays
PLAIN = (Crc32cCodec(),)  # scores hardly shrink, and packing makes reading slow; the sum shows a file that was altered
PACKED = (ZstdCodec(), Crc32cCodec())
NOTES = "notes"  # the attribute for what is recorded but not compared


class AttributionStore:
    """Scores by fact, written in any order; facts that are not `done` are still `todo`.

    Made by `open_store`. A write puts the numbers first and the mark `done` last, so that a process killed in between
    leaves the facts of that one write to do again, and nothing else. Memory does not grow with the number of facts,
    but for their ids (and in memory, with `path=None`, for the result itself).
    """

    def __init__(
        self,
        arrays: Mapping[str, Any],
        path: Path | None,
        labels: xr.Dataset,
        publish: Callable[[], Mapping[str, Any]] | None = None,
    ) -> None:
        self._arrays, self._labels, self._publish = arrays, labels, publish
        self.path = path
        self._done = np.array(arrays["done"][:], dtype=bool)

    @property
    def todo(self) -> list[int]:
        """Indices of the facts that are not written yet, ascending."""
        return [int(i) for i in np.flatnonzero(~self._done)]

    @property
    def done(self) -> list[int]:
        """Indices of the facts that are written, ascending."""
        return [int(i) for i in np.flatnonzero(self._done)]

    def write(
        self,
        indices: Sequence[int],
        score: Float[np.ndarray, "batch layer unit"],
        gap: Float[np.ndarray, "batch layer"] | None,
        target_prob: Float[np.ndarray, " batch"] | None,
    ) -> None:
        """Write the numbers of these facts, then mark them done; numbers that are not finite are refused first.

        Gaps and probabilities are None where they are not known (in results from elsewhere); they read as NaN.
        """
        where = np.asarray(indices, dtype=np.int64)
        given = {"score": score, "gap": gap, "target_prob": target_prob}
        values = {name: value for name, value in given.items() if value is not None}
        for name, value in values.items():
            expected = (len(where), *self._arrays[name].shape[1:])
            if value.shape != expected:
                raise ValueError(
                    f"Cannot write `{name}` of shape {value.shape} for {len(where)} facts, not {expected}."
                )
            bad = np.flatnonzero(~np.isfinite(value.reshape(len(where), -1)).all(axis=1))
            if bad.size:
                fact = self._labels["fact"].values[where[bad[0]]]
                raise ValueError(
                    f"The {name} of fact {fact} is not finite: check the model's weights for NaN, or use float32; "
                    "the facts written before are kept."
                )
        order = np.argsort(where)
        with one_sentence_disk_errors(self.path or Path("memory")):
            for name, value in values.items():
                _put(self._arrays[name], where[order], value[order].astype(np.float32))
            _put(self._arrays["done"], where[order], np.ones(len(where), dtype=bool))
            if self._publish is not None:
                self._arrays, self._publish = self._publish(), None
        self._done[where] = True

    def dataset(self, *, partial: bool = False) -> xr.Dataset:
        """Return the result: lazily from the folder, or from memory; see `open_result` for `partial`."""
        if self.todo and not partial:
            raise ValueError(f"{len(self.todo)} facts are not attributed yet: write them, or pass partial=True.")
        if self.path is not None and self._publish is None:
            return open_result(self.path, partial=partial)
        waiting = self._publish is not None  # to replace an earlier result: nothing is written yet
        labels = self._labels.isel(fact=[]) if waiting else self._labels
        dims = {"score": ("fact", "layer", "unit"), "gap": ("fact", "layer"), "target_prob": ("fact",)}
        ds = labels.assign(
            {name: (dims[name], self._arrays[name][:0] if waiting else self._arrays[name]) for name in dims}
        )
        return ds.isel(fact=self.done) if self.todo else ds


@contextlib.contextmanager
def open_store(
    path: str | Path | None,
    *,
    ids: Sequence[str],
    relations: Sequence[str],
    n_layers: int,
    n_units: int,
    attrs: Mapping[str, Any],
    texts: Sequence[Any] | None = None,
    n_prompts: Sequence[int] | None = None,
    notes: Mapping[str, Any] | None = None,
    resume: bool = True,
) -> Iterator[AttributionStore]:
    """Create an attribution result for these facts, or go on with the one that lies at `path`.

    `texts` tell the prompt and answer of each fact from others (`check_asked`), or of each of its prompts, where the
    scores are their mean; `n_prompts` says of how many. `attrs` (settings, model digest, fact digest) must equal those
    of the stored result, else `ValueError` names what differs; `notes` are recorded but not compared. `path=None` keeps
    everything in memory. `resume=False` replaces an earlier result, and only a result, when the first facts of the new
    one are written: what fails before leaves the earlier result as it was. A second writer to the same path is refused
    while this one is open.

    >>> with open_store(None, ids=["a"], relations=["r"], n_layers=1, n_units=2, attrs={"unit": "node"}) as store:
    ...     store.write([0], np.ones((1, 1, 2)), np.zeros((1, 1)), np.array([0.5]))
    ...     store.dataset()["score"].values.tolist()
    [[[1.0, 1.0]]]
    """
    if not ids or len(relations) != len(ids):
        raise ValueError(f"A result needs fact ids, each with a relation; got {len(ids)} and {len(relations)}.")
    if twice := [name for name, times in Counter(ids).items() if times > 1]:
        raise ValueError(f"A result needs an id of its own for every fact; {twice[0]!r} is given more than once.")
    settings = _as_stored(attrs)
    labels = _labels(ids, relations, n_layers, n_units, {**settings, NOTES: _as_stored(notes or {})}, texts, n_prompts)
    if path is None:
        yield AttributionStore(_numpy_arrays(len(ids), n_layers, n_units), None, labels)
        return
    folder = Path(path)
    with exclusive(folder.with_name(folder.name + ".lock"), f"{folder} is being written by another process"):
        check_replaceable(folder, kind="attribution")
        if kind_of(folder) is not None and not resume:
            with _replacement(folder, labels) as store:
                yield store
            return
        if kind_of(folder) is not None:
            lost = _check_same(folder, labels, settings)
            with one_sentence_disk_errors(folder):
                _relabel(folder, labels, lost)
                repair(folder, stored_arrays(folder), unknown=only_scores(settings))
        else:
            with one_sentence_disk_errors(folder):
                replace_folder(folder, lambda fresh: _create(fresh, labels))
        yield AttributionStore(stored_arrays(folder), folder, labels)


def unwritten(
    path: str | Path | None,
    *,
    ids: Sequence[str],
    relations: Sequence[str],
    n_layers: int,
    n_units: int,
    attrs: Mapping[str, Any],
    texts: Sequence[Any] | None = None,
    resume: bool = True,
) -> list[int]:
    """Say which facts `open_store` with the same arguments would have to do, and raise what it would; touch nothing."""
    if path is None:
        return list(range(len(ids)))
    folder = Path(path)
    check_replaceable(folder, kind="attribution")
    if kind_of(folder) is None or not resume:
        return list(range(len(ids)))
    settings = _as_stored(attrs)
    _check_same(folder, _labels(ids, relations, n_layers, n_units, settings, texts), settings)
    whole, _ = intact(folder, stored_arrays(folder, "r"), unknown=only_scores(settings))
    return [int(i) for i in np.flatnonzero(~whole)]


@contextlib.contextmanager
def _replacement(folder: Path, labels: xr.Dataset) -> Iterator[AttributionStore]:
    """A new result beside the one in `folder`, which takes its place at the first write."""
    prepared = folder.with_name(f".{folder.name}.{os.getpid()}.new")

    def publish() -> Mapping[str, Any]:
        replace_folder(folder, prepared.rename)
        return stored_arrays(folder)

    try:
        clear_folder(prepared)
        with one_sentence_disk_errors(folder):
            _create(prepared, labels)
        yield AttributionStore(stored_arrays(prepared), folder, labels, publish)
    finally:
        clear_folder(prepared)


def _labels(
    ids: Sequence[str],
    relations: Sequence[str],
    n_layers: int,
    n_units: int,
    attrs: Mapping[str, Any],
    texts: Sequence[Any] | None = None,
    n_prompts: Sequence[int] | None = None,
) -> xr.Dataset:
    """The coordinates and attributes of a result that has no scores yet, and of how many prompts they are means."""
    coords: dict[str, Any] = {
        "fact": ("fact", np.array(list(ids), dtype=object)),
        "relation": ("fact", np.array(list(relations), dtype=object)),
        "layer": ("layer", np.arange(n_layers)),
        "unit": ("unit", np.arange(n_units)),
    }
    if texts is not None:
        known = np.array(list(texts), dtype=object)
        coords |= {"text": ("fact", known)} if known.ndim == 1 else {"prompt_text": (("fact", "prompt"), known)}
    counts = {} if n_prompts is None else {"n_prompts": ("fact", np.array(n_prompts, dtype=np.int64))}
    return xr.Dataset(counts, coords=coords, attrs=dict(attrs))


def _specifications(n_facts: int, n_layers: int, n_units: int) -> dict[str, tuple[tuple[str, ...], Any, int, Any]]:
    """For each array its dims, dtype, facts per chunk and fill value."""
    per_chunk = max(1, min(n_facts, math.ceil(CHUNK_BYTES / (4 * n_layers * n_units))))
    small = min(n_facts, SMALL_CHUNK)
    return {
        "score": (("fact", "layer", "unit"), np.float32, per_chunk, np.nan),
        "gap": (("fact", "layer"), np.float32, small, np.nan),
        "target_prob": (("fact",), np.float32, small, np.nan),
        "done": (("fact",), np.bool_, small, False),
    }


def _numpy_arrays(n_facts: int, n_layers: int, n_units: int) -> dict[str, np.ndarray]:
    sizes = {"fact": n_facts, "layer": n_layers, "unit": n_units}
    table = _specifications(n_facts, n_layers, n_units).items()
    return {name: np.full([sizes[d] for d in dims], fill, dtype) for name, (dims, dtype, _, fill) in table}


def _create(folder: Path, labels: xr.Dataset) -> None:
    """Lay out an empty result: labels in full, the arrays of numbers as metadata only."""
    group = zarr.create_group(folder, zarr_format=3)
    for name in labels.variables:
        _write_label(group, str(name), labels)
    sizes = {str(dim): size for dim, size in labels.sizes.items()}
    for name, (dims, dtype, per_chunk, fill) in _specifications(*(sizes[d] for d in ("fact", "layer", "unit"))).items():
        shape = tuple(sizes[dim] for dim in dims)
        group.create_array(
            name,
            shape=shape,
            chunks=(per_chunk, *shape[1:]),
            dtype=dtype,
            fill_value=fill,
            dimension_names=dims,
            compressors=PLAIN if name == "score" else PACKED,
        )
    beside = " ".join(str(name) for name in labels.coords if name not in labels.dims)
    group.attrs.update({**labels.attrs, "coordinates": beside, KIND: "attribution"})


def _write_label(group: zarr.Group, name: str, labels: xr.Dataset) -> None:
    coord = labels[name]
    is_text = coord.dtype == object
    array = group.create_array(
        name,
        shape=coord.shape,
        dtype=str if is_text else np.int64,
        chunks="auto" if coord.ndim == 1 else coord.shape,
        dimension_names=[str(dim) for dim in coord.dims],
        compressors=PACKED,
        config={"write_empty_chunks": True},  # so that a file that is missing was lost
        overwrite=True,
    )
    array[:] = coord.values.astype(np.dtypes.StringDType()) if is_text else coord.values


def _relabel(folder: Path, labels: xr.Dataset, lost: Sequence[str]) -> None:
    """Write labels that are lost anew; what they label is known by the digest of its facts."""
    if lost:
        log.warning("%s is damaged: its labels %s are written anew", folder, ", ".join(lost))
        group = zarr.open_group(folder, mode="r+", zarr_format=3)
        for name in lost:
            _write_label(group, name, labels)


def _put(array: Any, where: np.ndarray, values: np.ndarray) -> None:
    if isinstance(array, np.ndarray):
        array[where] = values
    else:
        array.oindex[(where, *[slice(None)] * (values.ndim - 1))] = values


def _as_stored(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """What attributes look like after a way through JSON, so that stored and given ones can be compared."""
    try:
        return json.loads(json.dumps(dict(attrs), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"The attributes of a result are plain JSON values ({error}).") from error


def _check_same(folder: Path, labels: xr.Dataset, settings: Mapping[str, Any]) -> list[str]:
    """Refuse to go on with a result of other settings, another model or other facts; names the labels that are lost."""
    stored, lost = stored_arrays(folder, "r"), lost_labels(folder, map(str, labels.data_vars))
    group: Any = zarr.open_group(folder, mode="r", zarr_format=3)
    kept = {k: v for k, v in group.attrs.items() if k not in (NOTES, KIND, "coordinates")}
    names = sorted(k for k in {*kept, *settings} if kept.get(k, "absent") != settings.get(k, "absent"))
    differing = [f"{k} (stored {kept.get(k, 'absent')!r}, now {settings.get(k, 'absent')!r})" for k in names]
    for name, size in zip(("fact", "layer", "unit"), stored["score"].shape, strict=True):
        same = size == labels.sizes[name] and (name in lost or np.array_equal(group[name][:], labels[name].values))
        if not same:
            differing.append(f"the {name}s ({size} stored, now {labels.sizes[name]})")
    if differing:
        raise ValueError(
            f"{folder} holds a result with other settings, it differs in {'; '.join(differing)}: "
            "choose another out=, or start anew with resume=False (--no-resume)."
        )
    if not (set(lost) <= {str(name) for name in labels.variables} and {"fact_digest", "imported"} & set(settings)):
        check_labels(folder)  # what nobody can tell is not written
    return lost

"""Labelled results in folders: xarray datasets to zarr and back, whole or not at all."""

import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from workbench.results.damage import DAMAGE, check_labels, check_readable, only_scores, stored_arrays
from workbench.results.files import load_json, one_sentence_disk_errors

KIND = "workbench_result"  # the attribute by which a folder is known to be ours


def save_result(ds: xr.Dataset, path: str | Path, *, kind: str = "result") -> Path:
    """Write a dataset to a zarr folder, atomically; an earlier result there is replaced, anything else is refused."""
    return save_parts([ds], path, along="fact", kind=kind)


def save_parts(parts: Iterable[xr.Dataset], path: str | Path, *, along: str, kind: str) -> Path:
    """`save_result` of a dataset that comes in parts along a dimension, of which memory holds one at a time."""
    folder = Path(path)
    check_replaceable(folder)

    def fill(fresh: Path) -> None:
        how: dict[str, Any] = {"mode": "w"}
        for part in parts:
            plain = _text_as(part, np.dtypes.StringDType()).drop_encoding().assign_attrs({KIND: kind})
            plain.to_zarr(fresh, **how, consolidated=False, zarr_format=3)
            how = {"append_dim": along}

    with one_sentence_disk_errors(folder):
        replace_folder(folder, fill)
    return folder


def open_result(
    path: str | Path, *, kind: str | None = None, partial: bool = False, all_facts: bool = False
) -> xr.Dataset:
    """Open a stored result lazily: numbers are read when they are used; another `kind` than asked for is refused.

    An attribution that was interrupted is refused unless `partial=True`, which gives the facts that are done (and says
    so in the attribute "partial"); `all_facts=True` also gives the others, as NaN.
    """
    folder = Path(path)
    if kind_of(folder) is None:
        raise FileNotFoundError(f"{folder} is not a folder with a result of this workbench.")
    if kind is not None and kind_of(folder) not in (kind, "result"):  # saved by hand, a result may not say its kind
        raise ValueError(f"{folder} holds a result of the kind {kind_of(folder)}; what is needed here is {kind}.")
    if (folder / "done").is_dir():  # written fact by fact
        stored_arrays(folder, "r")
        check_labels(folder)
    try:
        stored = xr.open_zarr(folder, consolidated=False, chunks=None, zarr_format=3)
        ds = _text_as(
            stored.drop_attrs(deep=False).assign_attrs({k: v for k, v in stored.attrs.items() if k != KIND}),
            np.dtype(object),
        )
    except DAMAGE as error:
        raise ValueError(f"{folder} is damaged ({error}): make it anew in another place, or delete it.") from error
    if "done" not in ds:
        return ds
    if all_facts:
        return ds.drop_vars("done")
    check_readable(folder, stored_arrays(folder, "r"), ds["fact"].values, unknown=only_scores(ds.attrs))
    done = ds["done"].values
    ds = ds.drop_vars("done")
    if done.all():
        return ds
    if not partial:
        raise ValueError(
            f"{folder} holds {int(done.sum())} of {done.size} facts: go on with the attribution (resume=True), "
            "or open it as it is with partial=True."
        )
    return ds.isel(fact=np.flatnonzero(done)).assign_attrs(partial=f"{int(done.sum())} of {done.size} facts")


def kind_of(folder: Path) -> str | None:
    """Return the kind of result that a folder holds, or None if it is not a result of ours."""
    return attrs_of(folder).get(KIND)


def attrs_of(folder: Path) -> dict[str, Any]:
    """The attributes of a stored result, also of a damaged one; none where there is no result."""
    metadata = folder / "zarr.json"
    try:
        record: Any = load_json(metadata) if metadata.is_file() else None
    except ValueError as error:
        raise ValueError(f"{folder} is damaged (its zarr.json is not JSON): delete it and start again.") from error
    return record.get("attributes", {}) if isinstance(record, dict) else {}


def check_replaceable(folder: Path, kind: str | None = None) -> None:
    """Refuse a place that holds anything but a result of ours (of this kind), so that nothing else is ever deleted."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    found = kind_of(folder) if folder.is_dir() else None
    if found is None:
        raise ValueError(f"{folder} exists and is not a result of this workbench: choose another place to write to.")
    if kind is not None and found != kind:
        raise ValueError(f"{folder} holds a result of the kind {found!r}, not {kind!r}: choose another place.")


def replace_folder(folder: Path, fill: Callable[[Path], object]) -> None:
    """Fill a new folder beside `folder`, then put it in its place; the old one goes last."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    try:
        fill(fresh)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    finally:
        clear_folder(fresh)
    shutil.rmtree(old, ignore_errors=True)


def clear_folder(folder: Path) -> None:
    """Remove a folder, also one into which other threads of a write that failed are still writing."""
    for _ in range(50):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.01)  # a file that comes late brings its folder back
        if not folder.exists():
            return


def _text_as(ds: xr.Dataset, dtype: np.dtype) -> xr.Dataset:
    """Give every text variable one dtype: zarr stores text of any length, callers see Python strings."""
    text = {name: var.astype(dtype) for name, var in ds.variables.items() if var.dtype.kind in "UOT"}
    coords = {name: var for name, var in text.items() if name in ds.coords}
    return ds.assign({name: var for name, var in text.items() if name not in coords}).assign_coords(coords)

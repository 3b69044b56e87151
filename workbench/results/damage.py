"""Stored numbers that cannot be read any more, and the facts they belong to, so that only those are computed again."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
from jaxtyping import Bool
from safetensors import SafetensorError, safe_open

from workbench.results.files import load_frame, load_json

log = logging.getLogger(__name__)

#: What zarr raises for a file that is cut short or altered: by its size, by its checksum, by what it unpacks to.
DAMAGE = (ValueError, RuntimeError)
NUMBERS = ("score", "gap", "target_prob")


def stored_arrays(folder: Path, mode: Literal["r", "r+"] = "r+") -> dict[str, Any]:
    """The arrays of numbers of a stored attribution, with the mark `done`."""
    try:
        group = zarr.open_group(folder, mode=mode, zarr_format=3)
        return {name: group[name] for name in (*NUMBERS, "done")}
    except (KeyError, *DAMAGE) as error:
        raise ValueError(
            f"{folder} is damaged: it does not say how its numbers are laid out ({error}); start it anew with "
            "resume=False (--no-resume), or in another place."
        ) from error


def lost_labels(folder: Path, wanted: Iterable[str] = ()) -> list[str]:
    """The labels of a stored attribution (facts, layers ..., all `wanted`) that are missing or cannot be read."""
    group = zarr.open_group(folder, mode="r", zarr_format=3)
    names = ["fact", "layer", "unit", *str(group.attrs.get("coordinates", "")).split(), *wanted]
    names += ["n_prompts"] if "n_prompts" in group else []
    return [name for name in dict.fromkeys(names) if not _is_whole(folder, group, name)]


def check_labels(folder: Path) -> None:
    """Raise where labels are lost.

    Raises:
        ValueError: names them, and the way out.
    """
    if lost := lost_labels(folder):
        raise ValueError(
            f"{folder} is damaged: its labels ({', '.join(lost)}) are missing or cannot be read; run the same "
            "attribution (or import) again, which writes them anew and keeps all numbers."
        )


def intact(folder: Path, arrays: Mapping[str, Any], *, unknown: bool) -> tuple[Bool[np.ndarray, " fact"], list[Path]]:
    """Which facts are done and can be read in full, and the files that cannot; everything is read, a file at a time.

    A mark `done` that cannot be read itself counts where all numbers are there. `unknown` gaps and probabilities, as
    those of results from elsewhere, are NaN.
    """
    whole, broken = np.ones(arrays["done"].shape[0], dtype=bool), []
    for name in ("done", *NUMBERS):
        for facts, key in _chunks(arrays[name]):
            values = _read(arrays[name], facts)
            if values is None:
                broken.append(folder / name / key)
                whole[facts] &= name == "done"
            elif name == "done":
                whole[facts] &= values
            elif name == "score" or not unknown:
                whole[facts] &= _finite(values)
    return whole, broken


def repair(folder: Path, arrays: Mapping[str, Any], *, unknown: bool) -> None:
    """Take the mark `done` from facts that cannot be read, and the files that cannot be read away."""
    whole, broken = intact(folder, arrays, unknown=unknown)
    if not broken and np.array_equal(whole, arrays["done"][:]):
        return
    log.warning("%s is damaged: %d of its facts can be read, and the others are computed again", folder, whole.sum())
    for path in broken:
        if path.is_relative_to(folder / "done"):
            path.unlink()
    arrays["done"][:] = whole
    for path in broken:
        if not path.is_relative_to(folder / "done"):
            path.unlink()


def check_readable(folder: Path, arrays: Mapping[str, Any], fact_ids: np.ndarray, *, unknown: bool) -> None:
    """Raise where facts that are done have lost numbers; of scores only the sizes of their files are looked at.

    Raises:
        ValueError: says how many facts are damaged, and the way out.
    """
    done, bad = np.ones(len(fact_ids), dtype=bool), np.zeros(len(fact_ids), dtype=bool)
    for name in ("done", "gap", "target_prob"):
        for facts, _ in _chunks(arrays[name]):
            values = _read(arrays[name], facts)
            if values is None:
                bad[facts] = True
            elif name == "done":
                done[facts] = values
            elif not unknown:
                bad[facts] |= ~_finite(values)
    least = arrays["score"].dtype.itemsize * prod(arrays["score"].chunks)
    for facts, key in _chunks(arrays["score"]):
        path = folder / "score" / key
        bad[facts] |= not path.is_file() or path.stat().st_size < least
    bad &= done
    if bad.any():
        raise ValueError(
            f"{folder} is damaged: the numbers of {bad.sum()} facts, the first {fact_ids[bad.argmax()]!r}, cannot be "
            "read; run the same attribution again, which computes only what is lost."
        )


def unreadable(files: Iterable[Path]) -> Path | None:
    """The first file of JSON, parquet or safetensors, or stored attribution, that cannot be read in full.

    Of weights the header says how many follow. Other files are passed over.
    """
    for file in files:
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "np"):
                    pass
            elif file.suffix in (".json", ".parquet"):
                (load_json if file.suffix == ".json" else load_frame)(file)
            elif file.suffix == ".zarr" and not _is_intact(file):
                return file
        except (OSError, ValueError, SafetensorError):
            return file
    return None


def _is_intact(folder: Path) -> bool:
    """Whether all numbers and labels of a stored attribution can be read."""
    whole, broken = intact(folder, stored_arrays(folder, "r"), unknown=True)
    return bool(whole.all()) and not broken and not lost_labels(folder)


def only_scores(attrs: Mapping[str, Any]) -> bool:
    """Whether a result need not hold gaps and probabilities: only `attribute`, which names its model, gives them."""
    return "imported" in attrs or "model_digest" not in attrs


def _is_whole(folder: Path, group: zarr.Group, name: str) -> bool:
    try:
        array: Any = group[name]
    except (KeyError, *DAMAGE):
        return False
    return all((folder / name / key).is_file() and _read(array, part) is not None for part, key in _chunks(array))


def _finite(values: np.ndarray) -> Bool[np.ndarray, " fact"]:
    return np.isfinite(values).reshape(len(values), -1).all(1)


def _chunks(array: Any) -> Iterator[tuple[slice, str]]:
    """The facts of every file of an array, and the file's name."""
    size, beyond = array.chunks[0], (0,) * (array.ndim - 1)
    for number, start in enumerate(range(0, array.shape[0], size)):
        yield slice(start, start + size), array.metadata.encode_chunk_key((number, *beyond))


def _read(array: Any, facts: slice) -> Any:
    """The numbers of some facts, or None where their file is damaged."""
    try:
        return array[facts]
    except DAMAGE:
        return None

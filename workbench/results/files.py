"""Files that are either there in full or not there at all: JSON and parquet, written beside the target and moved."""

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from filelock import FileLock, Timeout


@contextlib.contextmanager
def one_sentence_disk_errors(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk, or a place that takes no such file, into one sentence that says the way out."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                f"The disk is full while writing {path}: free some space and start again; "
                "everything written before is kept."
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES):
            raise PermissionError(f"Cannot write {path}: choose a folder that you may write to.") from error
        if error.errno in (errno.EFBIG, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG):
            raise OSError(f"Cannot write {path} ({error.strerror}): choose another place.") from error
        raise


@contextlib.contextmanager
def exclusive(lock: Path, busy: str) -> Iterator[None]:
    """Hold a lock file, or raise `ValueError` at once with the sentence `busy`; a crash releases it.

    The file goes before the lock does. That is safe: whoever opened it meanwhile gets the lock of a file without a
    name, which filelock notices (since 3.24), and whoever comes later makes a new file. Where an open file cannot be
    deleted (Windows), filelock deletes it itself.
    """
    with one_sentence_disk_errors(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(lock)
        try:
            held.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(f"{busy} (lock file {lock}): wait for it to end, or choose another place.") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            lock.unlink()
        held.release()


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a temporary file beside `path`, then move it there in one step; a failure leaves no trace."""
    target = Path(path)
    with one_sentence_disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            write(partial)
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
    return target


class UnfailingFile(io.FileIO):
    """A file for HDF5 to write, which never fails: what the disk does not take is kept in memory, and read from there.

    HDF5 goes on while it closes a file whose disk is full; an error that it meets there, or bytes that it wrote and
    does not read back, end the process. The first error stands in `error`: from there on nothing more reaches the disk.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w+")
        self.error: BaseException | None = None  # that of the disk, or what else ends the writing
        self._late: list[tuple[int, bytes]] = []  # where, and what, the disk did not take, in the order of writing

    def write(self, data: Any) -> int:
        """Write all of `data` (bytes) where the file stands."""
        start, view, done = self.tell(), memoryview(data).cast("B"), 0
        while self.error is None and done < len(view):
            try:
                done += self._put(view[done:])
            except OSError as error:
                self.error = error
        if done < len(view):
            self._late.append((start + done, bytes(view[done:])))
            self.seek(start + len(view))
        return len(view)

    def _put(self, data: memoryview) -> int:
        return super().write(data)

    def readinto(self, buffer: Any) -> int:
        """Read what was written; the bytes after the end of the file are zero."""
        start, view = self.tell(), memoryview(buffer).cast("B")
        got = super().readinto(view) or 0
        view[got:] = bytes(len(view) - got)
        for place, data in self._late:
            low, high = max(start, place), min(start + len(view), place + len(data))
            if low < high:
                view[low - start : high - start] = data[low - place : high - place]
        self.seek(start + len(view))
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        """Set the length of the file on the disk, where the disk takes it."""
        try:
            if self.error is None:
                return super().truncate(size)
        except OSError as error:
            self.error = error
        return self.tell() if size is None else size


def save_json(obj: Any, path: str | Path) -> Path:
    """Write `obj` as indented JSON, atomically; NaN and infinities are refused because JSON has no word for them."""
    try:
        text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False, default=_plain)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Cannot write {path} as JSON ({error}): use plain finite numbers, text, lists.") from error
    return write_atomically(path, lambda partial: partial.write_text(text + "\n", encoding="utf-8"))


def finite(value: Any) -> Any:
    """The same data with nothing in the place of numbers that are not finite, as JSON has no word for them.

    >>> finite({"end": {"drift": float("nan"), "step": 3}, "acted": (float("inf"), "stop")})
    {'end': {'drift': None, 'step': 3}, 'acted': [None, 'stop']}
    """
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def load_json(path: str | Path) -> Any:
    """Read a JSON file; a missing or broken one is named in one sentence."""
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"There is no file {source}.")
    try:
        return json.loads(source.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not valid JSON ({error}): delete it and start again.") from error


def save_frame(frame: pd.DataFrame, path: str | Path) -> Path:
    """Write a tidy frame with its index, dtypes and `attrs` as parquet, atomically."""
    return write_atomically(path, lambda partial: frame.to_parquet(partial, engine="pyarrow"))


def load_frame(path: str | Path) -> pd.DataFrame:
    """Read a parquet frame with its index, dtypes and `attrs`."""
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"There is no file {source}.")
    try:
        return pd.read_parquet(source, engine="pyarrow")
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise ValueError(f"{source} is not a readable parquet file ({error}): delete it and start again.") from error


def free_bytes(path: Path) -> int:
    """Free space on the disk where a path is or is to be."""
    return shutil.disk_usage(next(parent for parent in path.absolute().parents if parent.is_dir())).free


def check_scores_fit(place: Path, n_facts: int, n_layers: int, n_units: int) -> None:
    """Refuse so many facts where they do not fit: scores are stored as they are, four bytes a number."""
    need, have = 4 * n_facts * n_layers * (n_units + 1), free_bytes(place)
    if have < need:
        raise ValueError(
            f"The scores take {need / 1e9:.3g} GB, and {have / 1e9:.3g} GB are free where {place} is to be: make room, "
            "choose another place, or take fewer facts."
        )


def digest_of(obj: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of `obj`: keys sorted, no spaces, so that equal content has one digest.

    >>> digest_of({"b": 1, "a": [2, 3]}) == digest_of({"a": (2, 3), "b": 1})
    True
    >>> digest_of({})[:12]
    '44136fa355b3'
    """
    text = json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=_plain)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _plain(obj: Any) -> Any:
    """What JSON does not know by itself: numpy numbers and arrays, and paths."""
    if isinstance(obj, np.generic):
        return obj.item()
    if isinstance(obj, np.ndarray):
        return obj.tolist()
    if isinstance(obj, os.PathLike):
        return os.fspath(obj)
    raise TypeError(f"{type(obj).__name__} has no JSON form")

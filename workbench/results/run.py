"""A run is a folder: its files, which of its stages are done and with what settings, and what it ran on."""

import contextlib
import functools
import importlib.metadata
import logging
import os
import platform
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from workbench.results.files import digest_of, exclusive, load_json, save_json

PACKAGES = (
    "knowledge-workbench",
    "torch",
    "transformer-lens",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "tokenizers",
    "gguf",
    "numpy",
    "pandas",
    "pyarrow",
    "xarray",
    "zarr",
    "plotly",
)


@dataclass(frozen=True)
class RunDir:
    """The folder of one run, with a marker for every stage that is done.

    A marker holds the key under which its stage was done: a digest of the settings and inputs that the stage depends
    on. With another key, or with one of its files gone, the stage counts as not done.
    """

    path: Path

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    def file(self, name: str) -> Path:
        """Return the path of a file or folder inside the run, for example `file("implant/loki/history.parquet")`."""
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or not parts.parts:
            raise ValueError(f"{name!r} is not the name of something inside a run folder.")
        return self.path.joinpath(*parts.parts)

    def stage_done(self, name: str, key: Any) -> bool:
        """Say whether the stage was finished with this key (any JSON value) and its files are still there."""
        marker = self._marker(name)
        if not marker.is_file():
            return False
        try:
            record = load_json(marker)
        except ValueError:  # a broken marker marks nothing
            return False
        if not isinstance(record, dict) or record.get("key") != digest_of(key):
            return False
        return all(self.file(file).exists() for file in record.get("files", []))

    def mark_done(self, name: str, key: Any, files: Iterable[str] = ()) -> None:
        """Mark the stage as done with this key; call it last, when all its `files` are written.

        A name with a star (`adapter/*.safetensors`) stands for the files of such names that are there now, one at
        least.
        """
        names = [name for file in files for name in self._named(file)]
        missing = [file for file in names if not self.file(file).exists()]
        if missing:
            raise FileNotFoundError(f"The stage {name} did not write {self.file(missing[0])}.")
        save_json({"key": digest_of(key), "files": names, "finished": _now()}, self._marker(name))

    def invalidate(self, name: str) -> None:
        """Forget that the stage was done; what it wrote stays until it is written again."""
        self._marker(name).unlink(missing_ok=True)

    def begin(self, name: str, key: object, out: Path) -> None:
        """Remove what unfinished work under another key left at `out`; under the same one it can go on there."""
        if not self.stage_done(f"{name}-begun", key):
            shutil.rmtree(out, ignore_errors=True)
            self.mark_done(f"{name}-begun", key)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run folder for this process; a second run in the same folder gets a `ValueError` at once."""
        with exclusive(self.path / ".lock", f"Another run is at work in {self.path}"):
            yield

    @contextlib.contextmanager
    def logged(self, name: str) -> Iterator[None]:
        """Append what the workbench logs to a file of the run while it is at work."""
        handler = logging.FileHandler(self.file(name), encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logger = logging.getLogger("workbench")
        level = logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
            handler.close()

    def _named(self, file: str) -> list[str]:
        found = sorted(path.relative_to(self.path).as_posix() for path in self.path.glob(file)) if "*" in file else []
        return found or [file]

    def _marker(self, name: str) -> Path:
        return self.file(f"stages/{name}.json")


def provenance() -> dict[str, Any]:
    """Say what this ran on: versions of Python and packages (not imported for it), platform, cores, time (UTC)."""
    return {
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "time": _now(),
    }


@functools.cache
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

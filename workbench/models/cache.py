"""The folder of prepared models: built once, whole or not at all, by one process at a time."""

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import platformdirs
from filelock import FileLock

log = logging.getLogger(__name__)

MARKER = "workbench.json"
"""Written last into a prepared folder; says what it is, where it came from and how large each file is."""

_LAYOUT = 1


def cache_dir() -> Path:
    """Return the folder where prepared models are kept: `WORKBENCH_CACHE` if set, else the user's cache folder."""
    chosen = os.environ.get("WORKBENCH_CACHE")
    return Path(chosen).expanduser().absolute() if chosen else platformdirs.user_cache_path("knowledge-workbench")


def cache_folder(*parts: str) -> Path:
    """Return a folder below the cache, made if it is missing; a `PermissionError` or `OSError` names the way out."""
    folder = cache_dir().joinpath(*parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(
            f"the cache folder {folder} cannot be made ({error.strerror}); "
            "set WORKBENCH_CACHE to a folder you can write to"
        ) from error
    return folder


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file as a hex string.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     sha256_of(Path(file.name))[:16]
    'e3b0c44298fc1c14'
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_bytes(folder: Path) -> int:
    """Return the size of all files below a folder, in bytes."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def require_space(folder: Path, need: int, what: str) -> None:
    """Raise `OSError` unless the disk under `folder` has `need` free bytes for `what`."""
    have = shutil.disk_usage(folder).free
    if have < need:
        raise OSError(
            errno.ENOSPC,
            f"{what} needs {need / 1e9:.1f} GB of free disk space and the cache folder {cache_dir()} has "
            f"{have / 1e9:.1f} GB; free some, or set WORKBENCH_CACHE to a folder on a larger disk",
        )


def read_marker(folder: Path) -> dict[str, object] | None:
    """Return what a prepared folder says of itself, or None unless it is whole: each file there, in its full size."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        whole = marker["layout"] == _LAYOUT and all(
            (folder / name).stat().st_size == file["bytes"] for name, file in marker["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return marker if whole else None


def build_once(name: str, build: Callable[[Path], Mapping[str, object]], *, need: int) -> Path:
    """Return the prepared folder `name`, calling `build` on an empty folder beside it only if it is not there yet.

    `build` fills the folder that it is given and returns what the marker shall say about the origin. The folder gets
    its final name after its marker is written, so that an interrupted or failed build leaves nothing behind that looks
    whole. `need` is the free disk space that the build asks for, in bytes.
    """
    target = cache_dir() / "models" / name
    if read_marker(target) is not None:
        return target
    parent = cache_folder("models")
    with FileLock(parent / f".{name}.lock"):
        if read_marker(target) is not None:
            return target
        require_space(parent, need, f"preparing {name}")
        partial = parent / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            _write_marker(partial, name, build(partial))
            if target.exists():
                log.warning("%s was not whole and is replaced", target)
                shutil.rmtree(target)
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def _write_marker(folder: Path, name: str, origin: Mapping[str, object]) -> None:
    files = {
        str(file.relative_to(folder)): {"sha256": sha256_of(file), "bytes": file.stat().st_size}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    marker = {"layout": _LAYOUT, "name": name, "origin": dict(origin), "files": files, "versions": _versions()}
    draft = folder / f"{MARKER}.draft"
    draft.write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")
    draft.replace(folder / MARKER)


def _versions() -> dict[str, str]:
    found = {}
    for package in ("knowledge-workbench", "torch", "transformers", "tokenizers", "safetensors", "gguf"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found

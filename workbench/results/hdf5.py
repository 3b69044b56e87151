"""Attribution files of LoKI: HDF5 in and out. The only place that needs `h5py`, which is the extra `hdf5`.

The format, as the public repository Nexround/LoKI writes it (`src/loki/utils/hdf5_manager.py`,
`scripts/analyse_mmlu.py`) and its selection reads it (`src/loki/selection/utils.py`): one array named `dataset` with
the axes (sample, layer, node), float16 (float32 in files of its first version), growing along the samples, compressed
with gzip. Attributes of that array begin with `metadata_` (model_name, num_layers, hidden_size, ig_steps, ig_method,
...); lists and dictionaries in them are JSON text. Samples have no names: they are in the order in which they were
asked. What `export_hdf5` adds (ids, relations, what tells prompts from others and how many they are, gaps,
probabilities) stands in arrays of other names, which LoKI's code does not read.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr

from workbench.results.files import UnfailingFile, check_scores_fit, one_sentence_disk_errors, write_atomically
from workbench.results.labelled import kind_of
from workbench.results.schema import ATTRIBUTION
from workbench.results.store import NOTES, open_store

SCORES = "dataset"
PREFIX = "metadata_"
OURS = "workbench"  # the attribute that holds all attributes of a result of ours
TEXTS = ("text", "prompt_text")
BYTES_AT_ONCE = 2**24  # of scores, while copying
UNKNOWN = "unknown"
#: How LoKI (and Captum, which it calls) names the rules of quadrature, and how we do.
RULES = {
    "riemann_middle": "midpoint",
    "riemann_left": "left",
    "riemann_right": "right",
    "riemann_trapezoid": "riemann_trapezoid",
}


def import_hdf5(
    path: str | Path,
    out: str | Path | None = None,
    *,
    ids: Sequence[str] | None = None,
    relations: Sequence[str] | None = None,
    fact_digest: str | None = None,
    unit: Literal["node", "neuron"] = "node",
    resume: bool = True,
) -> xr.Dataset:
    """Read an attribution file of LoKI, or one that `export_hdf5` wrote, into a result; memory holds 16 MB of it.

    Args:
        path: the HDF5 file.
        out: zarr folder to stream to; None keeps the result in memory.
        ids: name of every sample, in order; None takes those of the file, or `sample/0`, `sample/1`, ... A file that
            says of which facts it is takes no other names, relations or digest.
        relations: relation of every sample; None takes those of the file, or the empty text.
        fact_digest: digest of the fact set that was asked, where it is known.
        unit: what the last axis counts, where the file does not say it.
        resume: go on with an import that was cut short.

    A file of LoKI holds no completeness gaps and no probabilities: they are NaN.

    Raises:
        ValueError: h5py is missing, the file is no such file, holds numbers that are not finite, or more scores than
            the disk has room for.
        FileNotFoundError: there is no such file.
    """
    source = Path(path)
    with _opened(source) as file:
        scores = _scores(file, source)
        n_facts, n_layers, n_units = scores.shape
        attrs, notes = _attributes(scores, unit)
        said = attrs.get("fact_digest", UNKNOWN)  # of the facts that a file of ours was asked
        if said != UNKNOWN and fact_digest not in (None, said):
            raise ValueError(f"{source} holds scores of other facts, and names them itself: leave the facts out.")
        names = _labels(file, "fact", ids, [f"sample/{i}" for i in range(n_facts)], said != UNKNOWN)
        kinds = _labels(file, "relation", relations, [""] * n_facts, said != UNKNOWN)
        attrs |= {"imported": _sha256(source)} | ({} if fact_digest is None else {"fact_digest": fact_digest})
        labels: dict[str, Any] = {"ids": names, "relations": kinds, "n_layers": n_layers, "n_units": n_units}
        labels |= {"texts": _texts(file, scores), "n_prompts": _counts(file, n_facts)}
        if out is not None and kind_of(Path(out)) is None:  # before a folder is made
            check_scores_fit(Path(out), *scores.shape)
        with open_store(out, **labels, attrs=attrs, notes=notes, resume=resume) as store:
            size = max(1, BYTES_AT_ONCE // (4 * n_layers * n_units))
            todo = store.todo
            for rows in (todo[at : at + size] for at in range(0, len(todo), size)):
                score = scores[_span(rows)].astype(np.float32)
                bad = np.flatnonzero(~np.isfinite(score).all(axis=(1, 2)))
                if bad.size:
                    raise ValueError(f"{source}: sample {rows[bad[0]]} has scores that are NaN or infinite.")
                store.write(rows, score, _small(file, "gap", rows), _small(file, "target_prob", rows))
            return store.dataset()


def export_hdf5(attribution: xr.Dataset, path: str | Path, *, dtype: Literal["float32", "float16"] = "float32") -> Path:
    """Write an attribution as a file that LoKI's selection reads, and that `import_hdf5` reads back.

    `float32` loses nothing; `float16` is what LoKI itself writes: scores below 6e-8 become 0, and scores above 65504
    are refused.
    """
    missing = [name for name in ("score", "relation") if name not in attribution.variables]
    if missing or attribution["score"].dims != ("fact", "layer", "unit"):
        raise ValueError("Only an attribution result, with scores by fact, layer and unit, can be written as HDF5.")
    if not attribution["score"].size:
        raise ValueError("There is nothing to write as HDF5: the attribution has no facts.")
    h5py = _h5py()
    target = Path(path)
    if target.is_dir():
        raise ValueError(f"{target} is a folder: give the name of a file that ends in .h5.")

    def fill(raw: UnfailingFile) -> None:
        with raw, h5py.File(raw, "w") as file:
            _write(h5py, file, attribution, np.dtype(dtype), raw)

    def write(partial: Path) -> None:
        # HDF5 calls Python to write, where an interrupt would end the process. In a thread of its own there is none,
        # and only that thread closes the file, whatever becomes of the waiting here.
        raw, thread, filled = UnfailingFile(partial), ThreadPoolExecutor(1), []
        try:
            filled.append(thread.submit(fill, raw))
            wait(filled)
        except BaseException as error:
            raw.error = raw.error or error
            wait(filled)
            raise
        finally:
            thread.shutdown(wait=False)
        if raw.error is not None:
            raise raw.error
        filled[0].result()

    with one_sentence_disk_errors(target):
        return write_atomically(target, write)


def _write(h5py: Any, file: Any, attribution: xr.Dataset, dtype: np.dtype, raw: UnfailingFile) -> None:
    """Fill an open file, a few facts at a time, until it cannot be written any more."""
    score = attribution["score"]
    _, n_layers, n_units = shape = score.shape
    one = (1, n_layers, n_units)
    options = {"maxshape": (None, n_layers, n_units), "chunks": one if np.prod(one) <= 2**18 else True}
    array = file.create_dataset(SCORES, shape, dtype=dtype, compression="gzip", compression_opts=4, **options)
    size = max(1, BYTES_AT_ONCE // (4 * n_layers * n_units))
    for at in range(0, shape[0], size):
        if raw.error is not None:
            return
        with np.errstate(over="ignore"):
            part = score[at : at + size].values.astype(dtype)
        if not np.isfinite(part).all():
            raise ValueError("The scores do not fit float16, whose largest number is 65504: use float32.")
        array[at : at + size] = part
    for name in ("fact", "relation", *TEXTS):
        if name in attribution.variables:
            texts = attribution[name].transpose("fact", ...).values
            file.create_dataset(name, data=np.vectorize(str, otypes=[object])(texts), dtype=h5py.string_dtype())
    for name in ("gap", "target_prob"):
        if name in attribution:
            file.create_dataset(name, data=attribution[name].values.astype(np.float32))
    if "n_prompts" in attribution:
        file.create_dataset("n_prompts", data=attribution["n_prompts"].values)
    for name, value in _metadata(attribution).items():
        array.attrs[PREFIX + name] = value


def _metadata(attribution: xr.Dataset) -> dict[str, Any]:
    """LoKI's names for what a result says of itself, and all of ours as JSON."""
    attrs = attribution.attrs
    notes = attrs.get(NOTES, {})
    found = {
        "model_name": notes.get("model", UNKNOWN) if isinstance(notes, dict) else UNKNOWN,
        "num_layers": attribution.sizes["layer"],
        "hidden_size": attribution.sizes["unit"],
        "ig_steps": attrs.get("steps"),
        "ig_method": {ours: theirs for theirs, ours in RULES.items()}.get(str(attrs.get("rule")), attrs.get("rule")),
        OURS: json.dumps(attrs, default=str),
    }
    return {name: value for name, value in found.items() if value is not None}


def _attributes(scores: Any, unit: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(attributes, notes) of the result: ours where the file is ours, else what LoKI's say, and what its code does."""
    theirs = {name.removeprefix(PREFIX): _plain(value) for name, value in scores.attrs.items()}
    ours = theirs.pop(OURS, None)
    if isinstance(ours, dict):
        attrs = {name: value for name, value in ours.items() if name not in (NOTES, "imported")}
        return attrs, ours.get(NOTES, {})
    rule = theirs.get("ig_method")
    attrs = dict.fromkeys(ATTRIBUTION.attrs, UNKNOWN) | {"unit": unit}
    if rule is not None:  # files without it are of an earlier code
        attrs |= {"method": "loki-code", "rule": RULES.get(rule, rule), "baseline": "blank", "scope": "all",
                  "objective": "prob", "target": "predicted"}  # fmt: skip
    return attrs | {"steps": theirs.get("ig_steps", UNKNOWN)}, {"loki": theirs}


def _plain(value: Any) -> Any:
    """An attribute as a plain value; text that is a JSON list or dictionary is read as such."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if isinstance(value, str) and value[:1] in ("{", "["):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def _scores(file: Any, source: Path) -> Any:
    """The array of scores, or one sentence about what is there instead."""
    array = file.get(SCORES)
    if array is None or not hasattr(array, "shape"):
        there = ", ".join(sorted(file)) or "nothing"
        raise ValueError(f"{source} has no array `{SCORES}`, as attribution files of LoKI have (found {there:.200}).")
    if array.ndim != 3 or array.dtype.kind != "f":
        raise ValueError(
            f"{source}: `{SCORES}` is {array.dtype} of shape {array.shape}, not floating point by sample, layer, node."
        )
    if 0 in array.shape:
        raise ValueError(f"{source}: `{SCORES}` of shape {array.shape} holds no scores.")
    return array


def _labels(file: Any, name: str, given: Sequence[str] | None, otherwise: Sequence[str], known: bool) -> list[str]:
    """Ids or relations: as given, as in the file, or made up; where the file's are `known`, others are refused."""
    stored, n_facts = file.get(name), len(otherwise)
    if given is not None and len(given) != n_facts:
        raise ValueError(f"The file holds {n_facts} samples, but {len(given)} {name}s were given: they must match.")
    wanted = None if given is None else [str(text) for text in given]
    if stored is None or getattr(stored, "shape", None) != (n_facts,):
        return list(otherwise) if wanted is None else wanted
    if wanted is not None and not known:
        return wanted
    try:
        own = [text.decode("utf-8") if isinstance(text, bytes) else str(text) for text in stored[:]]
    except UnicodeDecodeError:
        raise ValueError(f"The file's `{name}` is not text in UTF-8.") from None
    if wanted is not None and wanted != own:
        at = next(i for i in range(n_facts) if wanted[i] != own[i])
        raise ValueError(
            f"Sample {at} has the {name} {own[at]!r} in the file, and {wanted[at]!r} was given: leave the facts out."
        )
    return own


def _texts(file: Any, scores: Any) -> list[Any] | None:
    """What tells the prompts of the samples from others, one text or several a sample; None where it is not said."""
    stored = next((file[name] for name in TEXTS if name in file), None)
    if stored is None or PREFIX + OURS not in scores.attrs or stored.shape[:1] != scores.shape[:1]:
        return None
    return stored.asstr()[:].tolist()


def _counts(file: Any, n_facts: int) -> list[int] | None:
    """Of how many prompts each score is the mean; None where it is not said."""
    stored = file.get("n_prompts")
    said = getattr(stored, "shape", None) == (n_facts,) and stored.dtype.kind in "iu"
    return stored[:].tolist() if said else None


def _small(file: Any, name: str, rows: list[int]) -> np.ndarray | None:
    """Gaps or probabilities of some facts, or None where the file has none."""
    array = file.get(name)
    if array is None:
        return None
    values = np.asarray(array[_span(rows)], dtype=np.float32)
    return None if np.isnan(values).all() else values


def _span(rows: list[int]) -> slice | list[int]:
    """Ascending indices as a slice where they have no holes, which h5py reads much faster."""
    return slice(rows[0], rows[-1] + 1) if rows[-1] - rows[0] + 1 == len(rows) else rows


def _h5py() -> Any:
    """The library, or one sentence that says how to get it."""
    try:
        import h5py
    except ImportError as error:
        raise ValueError("HDF5 files need h5py: pip install knowledge-workbench[hdf5].") from error
    return h5py


@contextmanager
def _opened(source: Path) -> Iterator[Any]:
    h5py = _h5py()
    if not source.is_file():
        raise FileNotFoundError(f"There is no file {source}.")
    try:
        file = h5py.File(source, "r")
    except OSError as error:
        raise ValueError(f"{source} is not a readable HDF5 file ({error}).") from error
    with file:
        yield file


def _sha256(source: Path) -> str:
    with source.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

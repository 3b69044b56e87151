"""Reading facts: one function and one line in a table per format."""

from __future__ import annotations

import difflib
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from workbench.facts import foreign, shipped
from workbench.facts.records import FIELDS, FLAGS, REQUIRED, Placed, need, refuse_unknown, to_facts
from workbench.facts.sets import FactSet
from workbench.facts.sources import KINDS, Kind, Source, open_source

log = logging.getLogger(__name__)

SHIPPED = ("world", "fictional")


class Format(NamedTuple):
    """How one format is read, how it is recognised, and which kind of file it needs when it is asked for by name."""

    read: Callable[[Source], list[Placed]]
    fits: Callable[[Source], bool]
    kind: Kind | None


def _json_with(*fields: str) -> Callable[[Source], bool]:
    return lambda source: source.kind != "csv" and set(fields) <= source.fields


def read_native(source: Source) -> list[Placed]:
    """Read native records: JSON lines, or a JSON list."""
    return source.table()


def read_csv(source: Source) -> list[Placed]:
    """Read a CSV with the columns of the native record; an empty cell is a field left out.

    `paraphrases` are joined by " | " or are a JSON list, `neighbours` are a JSON list.
    """
    header = [cell.strip() for cell in source.rows[0][1]]
    refuse_unknown(source.start, header, FIELDS, "column")
    for column in REQUIRED:
        need(source.start, dict.fromkeys(header), column, "column")
    return [Placed(place, _from_cells(place, cells)) for place, cells in source.table()]


def _from_cells(place: str, cells: Mapping[str, str]) -> dict[str, Any]:
    record: dict[str, Any] = {name: text for name, text in cells.items() if text.strip() or name in REQUIRED}
    listed = record.get("paraphrases", "")
    if listed:
        whole = listed.lstrip().startswith("[")
        record["paraphrases"] = (
            _json_cell(place, "paraphrases", listed)
            if whole
            else [part.strip() for part in listed.split(" | ") if part.strip()]
        )
    if "neighbours" in record:
        record["neighbours"] = _json_cell(place, "neighbours", record["neighbours"])
    for flag in set(FLAGS) & set(record):
        record[flag] = {"true": True, "false": False}.get(record[flag].strip().lower(), record[flag])
    return record


def _json_cell(place: str, column: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        what = getattr(error, "msg", "nested too deeply, or a number of too many digits")
        raise ValueError(f"{place}: column {column!r} is not valid JSON ({what}): write a JSON list") from None


FORMATS: dict[str, Format] = {
    "native": Format(read_native, _json_with("prompt", "answer"), "json"),
    "csv": Format(read_csv, lambda source: source.kind == "csv" and set(REQUIRED) <= source.fields, "csv"),
    "lre": Format(foreign.read_lre, _json_with("prompt_templates", "samples"), "json"),
    "pararel": Format(foreign.read_pararel, foreign.is_pararel, None),
    "counterfact": Format(foreign.read_counterfact, _json_with("requested_rewrite"), "json"),
    "counterfact-new": Format(foreign.read_counterfact_new, lambda source: False, "json"),
    "mmlu": Format(foreign.read_mmlu, foreign.is_mmlu, None),
    "mmlu-loki": Format(foreign.read_mmlu_loki, lambda source: False, None),
}


def load_facts(name_or_path: str | os.PathLike[str], *, format: str = "auto") -> FactSet:
    """Load a shipped fact set by name, or a file or folder in any of the known formats.

    Shipped are `world`, and `fictional` (200 facts, seed 0), also as `fictional:120` (120 facts) or `fictional:120:7`
    (120 facts, seed 7). The format is found from the content unless it is given: native, csv, lre, pararel,
    counterfact, counterfact-new (the untrue targets), mmlu or mmlu-loki (the questions in LoKI's words, for
    `FactSet.as_chat`). A folder may hold many files of one format.
    Raises FileNotFoundError or ValueError with one sentence that names file, line (or record) and field.
    """
    name = os.fspath(name_or_path)
    if not name:
        raise ValueError("no facts are named: give world, fictional, or a file or folder ('.' is the current one)")
    if format != "auto":
        refuse_unknown("format", [format], ("auto", *FORMATS), "format")
    path = Path(name)
    if isinstance(name_or_path, str) and name.partition(":")[0] in SHIPPED:
        if format not in ("auto", "native"):
            raise ValueError(f"{name!r} is a set that ships and has no format {format!r}: for a file write ./{name}")
        return _shipped(name)
    if not path.exists():
        near = difflib.get_close_matches(name, SHIPPED, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "the sets that ship are world and fictional[:count[:seed]]"
        raise FileNotFoundError(f"no facts at {name!r}: no such file or folder; {hint}")
    sources = _folder_sources(path, format) if path.is_dir() else [_source(path, format)]
    used = format if format != "auto" else _agreed(path, sources)
    placed = [one for source in sources for one in FORMATS[used].read(source)]
    if not placed:
        raise ValueError(f"{path}: no fact is left that can be used")
    return FactSet(path.absolute().name if path.is_dir() else path.stem, to_facts(placed))


def _shipped(name: str) -> FactSet:
    if name == "world":
        return shipped.world()
    kind, *numbers = name.split(":")
    if kind != "fictional" or len(numbers) > 2 or not all(number.isdecimal() for number in numbers):
        raise ValueError(f"no shipped set {name!r}: write world, fictional, fictional:count or fictional:count:seed")
    return shipped.fictional(**dict(zip(("n", "seed"), map(int, numbers), strict=False)))


def _source(path: Path, format: str) -> Source:
    return open_source(path, FORMATS[format].kind if format != "auto" else None)


def _folder_sources(folder: Path, format: str) -> list[Source]:
    pair = foreign.pararel_folders(folder) if format in ("auto", "pararel") else None
    root = pair[1] if pair else folder
    if pair:
        triples = {path.name for path in pair[1].iterdir()}
        if alone := sorted(path.name for path in pair[0].glob("*.jsonl") if path.name not in triples):
            log.warning("%s: no triples beside %d files of patterns, as %s: left out", folder, len(alone), alone[0])
    found = sorted(path for path in root.rglob("*") if path.suffix.lower() in KINDS and path.name[0] != ".")
    if not found:
        raise ValueError(f"{root}: no file in this folder ends in {', '.join(KINDS)}")
    return [_source(path, format) for path in found]


def _agreed(path: Path, sources: list[Source]) -> str:
    formats = {source.path: _detected(source) for source in sources}
    if len(set(formats.values())) > 1:
        listed = "; ".join(f"{one.name} is {format}" for one, format in list(formats.items())[:4])
        raise ValueError(f"{path}: the files are not of one format ({listed}); give format=, or one file")
    return next(iter(formats.values()))


def _detected(source: Source) -> str:
    fitting = [name for name, format in FORMATS.items() if format.fits(source)]
    if len(fitting) > 1:
        raise ValueError(f"{source.start}: fits several formats ({', '.join(fitting)}); say which with format=")
    if fitting:
        return fitting[0]
    if set(REQUIRED) & source.fields:
        return "csv" if source.kind == "csv" else "native"
    there = ", ".join(sorted(source.fields)) or "no named fields"
    raise ValueError(f"{source.start}: fits no known format (found {there:.200}); known are {', '.join(FORMATS)}")

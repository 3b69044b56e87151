"""Opening a file of facts: text to records with their places, before anyone asks which format it is."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from workbench.facts.records import Placed, need_text

Kind = Literal["json", "csv", "parquet"]
KINDS: dict[str, Kind] = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Source:
    """A file that was opened: JSON records (each with its place), or the rows of a CSV (each with its line)."""

    path: Path
    kind: Kind
    items: tuple[tuple[str, Any], ...] = ()
    rows: tuple[tuple[int, tuple[str, ...]], ...] = ()

    @property
    def fields(self) -> frozenset[str]:
        """The names by which a format is recognised: keys of the first record, or cells of the first row."""
        if self.kind == "csv":
            return frozenset(cell.strip() for cell in self.rows[0][1])
        first = self.items[0][1]
        return frozenset(first) if isinstance(first, dict) else frozenset()

    @property
    def start(self) -> str:
        """The place of the first record, for errors about the whole file."""
        return f"{self.path}, line {self.rows[0][0]}" if self.kind == "csv" else self.items[0][0]

    def table(self) -> list[Placed]:
        """Read the rows of a CSV under its header, or the JSON records as they are."""
        if self.kind != "csv":
            return [Placed(place, record) for place, record in self.items]
        header = [cell.strip() for cell in self.rows[0][1]]
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            raise ValueError(f"{self.start}: column {twice[0]!r} appears more than once")
        placed = []
        for line, cells in self.rows[1:]:
            place = f"{self.path}, line {line}"
            if len(cells) != len(header):
                raise ValueError(f"{place}: {len(cells)} cells under a header of {len(header)} ({', '.join(header)})")
            placed.append(Placed(place, dict(zip(header, cells, strict=True))))
        if not placed:
            raise ValueError(f"{self.path}: there is a header ({', '.join(header)}) but no row below it")
        return placed


def open_source(path: Path, kind: Kind | None = None) -> Source:
    """Open a file as JSON (whole or by lines), CSV or parquet: by its ending, else by how it begins."""
    by_ending = KINDS.get(path.suffix.lower())
    kind = "parquet" if by_ending == "parquet" else kind or by_ending
    if kind == "parquet":
        return Source(path, "parquet", items=_parquet_items(path))
    text = _text(path)
    if not text.strip():
        raise ValueError(f"{path} is empty: there are no facts in it")
    if kind == "csv" or (kind is None and text.lstrip()[0] not in "{["):
        return Source(path, "csv", rows=_csv_rows(path, text))
    return Source(path, "json", items=_json_items(path, text))


def _text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 text ({error.reason}); save the file as UTF-8") from None


def _json_items(path: Path, text: str) -> tuple[tuple[str, Any], ...]:
    try:
        whole = json.loads(text)
    except RecursionError:
        if path.suffix.lower() == ".jsonl":
            return tuple(_json_lines(path, text))
        raise ValueError(f"{path}: nested too deeply to hold facts") from None
    except json.JSONDecodeError as error:
        if path.suffix.lower() != ".jsonl" and not _is_json(text.strip().split("\n", 1)[0]):
            raise _syntax_error(f"{path}, line {error.lineno}", error) from None
        return tuple(_json_lines(path, text))
    except ValueError:  # a number of thousands of digits
        if path.suffix.lower() == ".jsonl":
            return tuple(_json_lines(path, text))
        raise ValueError(f"{path}: holds a number that is too long for a fact") from None
    if isinstance(whole, dict) and path.suffix.lower() == ".jsonl":
        line = text[: len(text) - len(text.lstrip())].count("\n") + 1
        return ((f"{path}, line {line}", whole),)
    if isinstance(whole, dict):
        return ((f"{path}", whole),)
    if not isinstance(whole, list):
        raise ValueError(f"{path}: holds a single {type(whole).__name__}, not records")
    if not whole:
        raise ValueError(f"{path} is an empty list: there are no facts in it")
    placed = zip(lines_of(text, text.index("["), whole), whole, strict=True)
    return tuple((f"{path}, line {line}, record {i}", one) for i, (line, one) in enumerate(placed, start=1))


def lines_of(text: str, opening: int, records: list[Any]) -> Iterator[int]:
    """The lines in which the records of a JSON list begin; `opening` is where its bracket stands in the text."""
    decoder, at, line = json.JSONDecoder(), opening + 1, text.count("\n", 0, opening) + 1
    for _ in records:
        begins = at
        while text[begins] in " \t\r\n,":
            begins += 1
        line += text.count("\n", at, begins)
        yield line
        _, at = decoder.raw_decode(text, begins)
        line += text.count("\n", begins, at)


def _json_lines(path: Path, text: str) -> list[tuple[str, Any]]:
    items = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: U+2028 may stand inside a string
        if line.strip():
            try:
                items.append((f"{path}, line {number}", json.loads(line)))
            except json.JSONDecodeError as error:
                raise _syntax_error(f"{path}, line {number}", error) from None
            except (RecursionError, ValueError):  # a number of thousands of digits is a ValueError
                raise ValueError(f"{path}, line {number}: too deep a nesting or too long a number for a fact") from None
    return items


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


def _syntax_error(place: str, error: json.JSONDecodeError) -> ValueError:
    return ValueError(f"{place}: not valid JSON at column {error.colno} ({error.msg})")


def _csv_rows(path: Path, text: str) -> tuple[tuple[int, tuple[str, ...]], ...]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows, before = [], 0
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                rows.append((before + 1, tuple(cells)))
            before = reader.line_num
    except csv.Error as error:
        raise ValueError(f"{path}, line {before + 1}: not valid CSV ({error})") from None
    if not rows:
        raise ValueError(f"{path} holds only empty cells: there are no facts in it")
    return tuple(rows)


def _parquet_items(path: Path) -> tuple[tuple[str, Any], ...]:
    import pyarrow.parquet

    try:
        records = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a parquet file that can be read ({error})") from None
    if not records:
        raise ValueError(f"{path} is empty: there are no facts in it")
    return tuple((f"{path}, record {number}", record) for number, record in enumerate(records, start=1))


def read_json_lines(path: Path, fields: tuple[str, ...]) -> list[Placed]:
    """Read JSON records that must have these text fields."""
    placed = [Placed(place, record) for place, record in open_source(path, "json").items]
    for place, record in placed:
        for field in fields:
            need_text(place, record, field)
    return placed

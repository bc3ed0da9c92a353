"""Reading of label and answer files: JSON, JSON lines, tables; every error names the file and the line."""

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

from lit_prune.errors import LitPruneError

# Cells that pandas, with which the official scripts read tables, takes for empty.
EMPTY = {"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA"}
EMPTY |= {"NULL", "NaN", "None", "n/a", "nan", "null"}


def official(root: Path, names: list[str], source: str) -> Path:
    """Find an official file: the first of `names`, paths under `root`, that exists.

    Raises:
        LitPruneError: none does; with the first name and `source`, where the file can be had.
    """
    if not root.is_dir():
        raise LitPruneError(f"{root}: no such folder; it should hold {names[0]}. {source}")
    found = next((root / name for name in names if (root / name).exists()), None)
    if found is None:
        others = f" (nor {', '.join(names[1:])})" if names[1:] else ""
        raise LitPruneError(f"{root / names[0]}: no such file{others}. {source}")
    return found


def read_text(path: Path) -> str:
    """A file's text, UTF-8 with or without a byte order mark; line ends as they are."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LitPruneError(f"{path}: not UTF-8 text, at byte {error.start}") from error
    except OSError as error:
        raise LitPruneError(f"{path}: {error.strerror}") from error


def read_json(path: Path) -> Any:
    """A whole JSON file."""
    return _parsed(read_text(path), path, 1)


def read_records(path: Path, name: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON file that is a list, or an object with a list under `name`; each with its place."""
    content = read_json(path)
    records = content if name is None else take(content, str(path), name)[0]
    if not isinstance(records, list):
        where = f" under {name!r}" if name else ""
        raise LitPruneError(f"{path}: a list is expected{where}, not {type(records).__name__}")
    for index, record in enumerate(records):
        place = f"{path}, {name or 'item'} {index}"
        yield place, as_object(record, place)


def _parsed(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{path}:{line + error.lineno - 1}"
        raise LitPruneError(f"{place}: not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # numbers of too many digits, too deep a nesting
        raise LitPruneError(f"{path}:{line}: not JSON that can be read: {error}") from error


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON lines file, each with its place, "file:line"; empty lines are skipped."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", as_object(_parsed(line, path, number), f"{path}:{number}")


def read_table(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a table with a header, parted by tabs or, in a `.csv`, by commas; each with its place."""
    csv.field_size_limit(2**31 - 1)  # images as base64
    delimiter = "," if path.suffix.lower() == ".csv" else "\t"
    rows = csv.DictReader(StringIO(read_text(path), newline=""), delimiter=delimiter)
    for row in rows:
        place = f"{path}:{rows.line_num}"
        if None in row or None in row.values():
            raise LitPruneError(f"{place}: {'more' if None in row else 'fewer'} cells than the header has columns")
        yield place, row


@contextmanager
def reading(place: str) -> Iterator[None]:
    """Turn an error over a field of another type than in the official file into one that names the record."""
    try:
        yield
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise LitPruneError(f"{place}: not as in the official file: {type(error).__name__}: {error}") from error


def as_object(record: Any, place: str) -> dict[str, Any]:
    """A record that is a JSON object; anything else is an error that names its place."""
    if not isinstance(record, dict):
        raise LitPruneError(f"{place}: a JSON object is expected, not {type(record).__name__}")
    return record


def take(record: Any, place: str, *names: str) -> list[Any]:
    """The values of fields that a record must have."""
    missing = [name for name in names if name not in as_object(record, place)]
    if missing:
        raise LitPruneError(f"{place}: no field {missing[0]!r}; the official file has {', '.join(names)}")
    return [record[name] for name in names]

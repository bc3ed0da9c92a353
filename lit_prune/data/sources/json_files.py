"""An index of byte offsets over LLaVA instruction files: a JSON list or JSON lines, read record by record."""

import codecs
import json
from array import array
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from lit_prune.data.conversation import image_paths
from lit_prune.data.sources.base import FileReader, ImageFile, Source
from lit_prune.errors import BadSample, LitPruneError
from lit_prune.images import open_image

CHUNK = 1 << 20
LARGEST_RECORD = 1 << 26  # characters, and bytes; a longer "record" is a broken file
LINE_SUFFIXES = (".jsonl", ".ndjson")
_KINDS = {"{": "an object", '"': "a string", "t": "true", "f": "false", "n": "null"}


class JsonFile(Source):
    """The records of one JSON list (`.json`) or JSON lines file (`.jsonl`), each parsed when it is asked for.

    Only offsets are held: 16 bytes a record.

    Args:
        path: the file.
        images_root: folder of the images; by default the file's own.

    Raises:
        LitPruneError: the file is missing, is not UTF-8 or JSON, or is JSON but no list of objects.
        BadSample: on access, a line that is not a JSON object.
    """

    def __init__(self, path: str | Path, images_root: str | Path | None = None):
        self.path = Path(path)
        if not self.path.is_file():
            raise LitPruneError(f"{path}: no such file")
        self.images_root = self.path.parent if images_root is None else Path(images_root)
        by_line = self.path.suffix.lower() in LINE_SUFFIXES
        self.size = self.path.stat().st_size
        self.spans = _line_spans(self.path) if by_line else _list_spans(self.path)  # (records, 2): offset, length
        self._reader = FileReader()
        if by_line:
            self._check_first_line()

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(index)
        offset, length = self.spans[index].tolist()
        if length > LARGEST_RECORD:
            raise BadSample(self.path, index, f"a record of {length} bytes, more than {LARGEST_RECORD}")
        try:
            record = json.loads(self._reader.read(self.path, self.size, offset, length))
        except (ValueError, RecursionError) as error:
            raise BadSample(self.path, index, f"not JSON: {error}") from error
        if not isinstance(record, dict):
            raise BadSample(self.path, index, f"a JSON object was expected, not {type(record).__name__}")
        return record

    def images(self, index: int, record: dict) -> list[ImageFile]:
        return [ImageFile(path, partial(open_image, self.images_root, path)) for path in image_paths(record)]

    def file_of(self, index: int) -> str:
        return str(self.path)

    @property
    def files(self) -> list[Path]:
        return [self.path]

    def _check_first_line(self) -> None:
        if len(self):
            try:
                self[0]
            except BadSample as error:
                raise LitPruneError(f"{self.path}: no JSON lines: the first line is {error.reason}") from error


def _line_spans(path: Path) -> np.ndarray:
    spans, offset = array("q"), 0
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                spans.extend((offset, len(line)))
            offset += len(line)
    return np.frombuffer(spans, dtype=np.int64).reshape(-1, 2)


def _list_spans(path: Path) -> np.ndarray:
    spans = array("q")
    with path.open("rb") as file:
        try:
            for span in _ListScanner(file).spans():
                spans.extend(span)
        except UnicodeDecodeError as error:
            raise LitPruneError(f"{path}: not UTF-8 text: {error.reason}") from error
        except _ScanError as error:
            raise LitPruneError(f"{path}: {error}") from error
    return np.frombuffer(spans, dtype=np.int64).reshape(-1, 2)


class _ScanError(Exception):
    pass


class _ListScanner:
    """Walks a JSON list through a buffer of text; `at` is the place in the buffer, `byte` the same in the file."""

    def __init__(self, file):
        self.file, self.decode = file, codecs.getincrementaldecoder("utf-8")().decode
        self.json = json.JSONDecoder()
        self.text, self.at, self.byte, self.ended = "", 0, 0, False

    def spans(self) -> Iterator[tuple[int, int]]:
        """Offset and length in bytes of every item."""
        if self._next() == "\ufeff":
            self._move(self.at + 1)
        first = self._next()
        if first != "[":
            kind = _KINDS.get(first, "no list")
            hint = " (JSON lines need the suffix .jsonl)" if first == "{" else ""
            raise _ScanError(f"a JSON list of samples was expected, found {kind if first else 'an empty file'}{hint}")
        self._move(self.at + 1)
        count = 0
        while not (count == 0 and self._next() == "]"):
            yield self._item(count)
            count += 1
            mark = self._next()
            if mark == "]":
                break
            if mark != ",":
                raise _ScanError(f"not JSON: ',' or ']' expected after item {count - 1}, at byte {self.byte}")
            self._move(self.at + 1)
        self._move(self.at + 1)
        if self._next():
            raise _ScanError(f"not JSON: text after the list, at byte {self.byte}")

    def _item(self, number: int) -> tuple[int, int]:
        if self._next() not in ("{", ""):
            raise _ScanError(f"item {number} of the list is no JSON object, at byte {self.byte}")
        while True:
            try:
                _, end = self.json.raw_decode(self.text, self.at)
                break
            except RecursionError as error:
                raise _ScanError(f"item {number} is nested too deeply, at byte {self.byte}") from error
            except json.JSONDecodeError as error:
                if self.ended or len(self.text) - self.at > LARGEST_RECORD:
                    raise _ScanError(f"not JSON: {error.msg} in item {number}, at byte {self.byte}") from error
                self._fill()
            except ValueError as error:  # an integer of too many digits
                raise _ScanError(f"{error}: in item {number}, at byte {self.byte}") from error
        start = self.byte
        self._move(end)
        return start, self.byte - start

    def _next(self) -> str:
        """The next character that is no white space, without taking it; "" at the end of the file."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self._move(self.at + 1)
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self._fill()

    def _fill(self) -> None:
        rest = self.text[self.at :]
        chunk = self.file.read(max(CHUNK, len(rest)))  # doubles, so that a long record is not read again and again
        self.ended = not chunk
        self.text, self.at = rest + self.decode(chunk, final=self.ended), 0

    def _move(self, to: int) -> None:
        self.byte += len(self.text[self.at : to].encode())
        self.at = to

"""Base class of instruction data sources: records by index, their images, and names for messages."""

import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lit_prune.data.records import own_images, similar_keys
from lit_prune.data.references import ImageFile
from lit_prune.errors import LitPruneError

SAMPLED = 64  # records of a source that are inspected


def spread(size: int, count: int = SAMPLED) -> list[int]:
    """At most `count` indices below `size`, evenly spaced."""
    return np.unique(np.linspace(0, size - 1, count).astype(int)).tolist()


class Source(ABC):
    """Records with random access, and their images.

    Memory grows by a few bytes per record only. A source can be pickled and forked: every process opens its own files.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Number of records, bad ones included."""

    @abstractmethod
    def __getitem__(self, index: int) -> dict:
        """Read a record for `read_conversation`, without the images next to its turns.

        Raises:
            BadSample: the data is no record; with file and index.
            IndexError: no such index.
        """

    @abstractmethod
    def images(self, index: int, record: dict) -> list[ImageFile]:
        """Images of a record in the order of `image_paths`, not opened yet.

        Args:
            index: of the record.
            record: the result of `source[index]`.

        Raises:
            BadSample: an image is neither a path nor bytes. File and sample are not set.
        """

    @abstractmethod
    def file_of(self, index: int) -> str:
        """File or location of a record, for messages."""

    def similar_keys(self) -> list[str]:
        """Keys that look like images in records without an image, among 64 evenly spaced records."""
        found: dict[str, None] = {}
        for index in spread(len(self)):
            with suppress(Exception):  # a bad sample, whatever it is
                record = self[index]
                found |= {} if own_images(record) else dict.fromkeys(similar_keys(record))
        return list(found)

    @property
    @abstractmethod
    def files(self) -> Sequence[Path]:
        """Files of the records, in their order (without those of an image folder)."""


def sample_name(record: dict, index: int) -> str | int:
    """Name of a record in messages: its `id`, if that is a number or one line of text, otherwise its index."""
    name = record.get("id")
    if isinstance(name, str):
        return name if name and name.isprintable() else index
    return name if isinstance(name, int) and not isinstance(name, bool) else index


class FileReader:
    """Read spans of files, with a bounded number of open files per process. Can be pickled.

    Args:
        limit: most files open at a time; the least recently read one is closed.
    """

    def __init__(self, limit: int = 16):
        self.limit = limit
        self._open: OrderedDict[Path, BinaryIO] = OrderedDict()
        self._owner: int | None = None

    def read(self, path: Path, size: int, offset: int, length: int) -> bytes:
        """Read `length` bytes from `offset` on.

        Raises:
            LitPruneError: the file cannot be opened or read, or is not `size` bytes long any more.
        """
        try:
            file = self._file(path, size)
            file.seek(offset)
            return file.read(length)
        except OSError as error:
            raise LitPruneError(f"{path}: {error.strerror}") from error

    def close(self) -> None:
        """Close all files; reading reopens them."""
        while self._open:
            self._open.popitem()[1].close()

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": OrderedDict(), "_owner": None}

    def _file(self, path: Path, size: int) -> BinaryIO:
        if self._owner != os.getpid():  # a forked worker must not share its parent's file positions
            self.close()
            self._owner = os.getpid()
        if path not in self._open:
            self._open[path] = _opened(path, size)
            if len(self._open) > self.limit:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(path)
        return self._open[path]


def _opened(path: Path, size: int) -> BinaryIO:
    file = path.open("rb")
    if os.fstat(file.fileno()).st_size != size:
        file.close()
        raise LitPruneError(f"{path}: the file changed after it was opened")
    return file

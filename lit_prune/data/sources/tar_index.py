"""Index of the samples in a tar shard, read from its headers once and stored in a small file next to it.

Written by hand, since libraries for tar shards only read sequentially, while shuffled samples need random access.
"""

import tarfile
from array import array
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lit_prune.errors import LitPruneError
from lit_prune.files.images import SUFFIXES as IMAGE_SUFFIXES
from lit_prune.files.writing import written_whole

VERSION = 2
BLOCK = 512
SUFFIX = ".index.npy"


@dataclass(frozen=True)
class TarIndex:
    """Byte spans in a shard of `size` bytes.

    Sample i owns the rows `firsts[i]` to `firsts[i + 1]` of `spans` (offset, length): its record, then its images. A
    sample without a record has one of length 0.
    """

    size: int
    firsts: np.ndarray
    spans: np.ndarray

    def __len__(self) -> int:
        return len(self.firsts) - 1

    def of(self, sample: int) -> list[tuple[int, int]]:
        """Spans of a sample: its record's, then those of its images."""
        return [tuple(span) for span in self.spans[self.firsts[sample] : self.firsts[sample + 1]].tolist()]


def index_of(path: Path) -> TarIndex:
    """Load the index next to a shard, or rebuild it if it is missing, broken, older or of another size.

    A new index is stored next to the shard if the folder is writable.

    Raises:
        LitPruneError: the shard is no plain tar file, is truncated, has members other than regular files, or has two
            records with the same key.
    """
    beside = path.with_name(path.name + SUFFIX)
    index = _load(beside, path)
    if index is None:
        index = _build(path)
        numbers = np.concatenate([[VERSION, index.size, len(index)], index.firsts, index.spans.ravel()])
        with suppress(OSError), written_whole(beside) as name, name.open("wb") as file:  # the folder may be read-only
            np.save(file, numbers)
    return index


def _load(file: Path, shard: Path) -> TarIndex | None:
    size = shard.stat().st_size
    try:
        if file.stat().st_mtime_ns < shard.stat().st_mtime_ns:
            return None
        numbers = np.load(file, allow_pickle=False)
        version, known_size, samples = numbers[:3].tolist()
        firsts, spans = np.split(numbers[3:], [samples + 1])
        spans = spans.reshape(-1, 2)
    except Exception:  # no file, or a broken header, for which numpy raises anything
        return None
    whole = numbers.dtype == np.int64 and (version, known_size) == (VERSION, size) and len(firsts) == samples + 1
    if not whole or firsts[0] != 0 or firsts[-1] != len(spans) or (np.diff(firsts) < 1).any():
        return None
    return None if (spans < 0).any() or (spans.sum(1) > size).any() else TarIndex(size, firsts, spans)


def _build(path: Path) -> TarIndex:
    firsts, spans = array("q", [0]), array("q")
    key, record, images = None, None, []

    def close() -> None:
        if record or images:  # else members of other kinds only
            for _, span in [(0, record or (0, 0)), *sorted(images)]:
                spans.extend(span)
            firsts.append(len(spans) // 2)

    for member in _members(path):
        folder, _, name = member.name.rpartition("/")
        stem, _, extension = name.partition(".")
        if not stem:  # hidden files, such as macOS puts beside each of its own
            continue
        if (folder, stem) != key:
            close()
            key, record, images = (folder, stem), None, []
        span, number = (member.offset_data, member.size), extension.partition(".")[0]
        if extension.lower() == "json":
            if record:
                raise LitPruneError(f"{path}: two records of the key {stem}")
            record = span
        elif f".{extension.rpartition('.')[2]}".lower() in IMAGE_SUFFIXES:
            images.append((int(number) if number.isdecimal() else 0, span))
    close()
    return TarIndex(path.stat().st_size, _as_numpy(firsts), _as_numpy(spans).reshape(-1, 2))


def _as_numpy(numbers: array) -> np.ndarray:
    return np.frombuffer(numbers, dtype=np.int64)


def _members(path: Path) -> Iterator[tarfile.TarInfo]:
    """The regular files of a tar in their order. Nothing is unpacked; a name is only a name."""
    end = 0
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # tarfile would keep them all
                if not member.isdir():
                    if not member.isreg() or member.issparse():
                        raise LitPruneError(f"{path}: member {member.name} is no regular file; links are not followed")
                    yield member
                end = member.offset_data + (-(-member.size // BLOCK) * BLOCK if member.isreg() else 0)
    except tarfile.TarError as error:
        raise LitPruneError(f"{path}: not a whole, uncompressed tar file: {error}") from error
    with path.open("rb") as file:  # tarfile takes a broken header for the end
        file.seek(end)
        if file.read(BLOCK) != bytes(BLOCK):
            raise LitPruneError(f"{path}: cut short or broken at byte {end}")

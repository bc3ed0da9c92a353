"""Tar shards in the WebDataset layout: `KEY.json` with a record, `KEY.0.png`, `KEY.1.jpg`, ... with its images."""

import io
import json
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lit_prune.data.records import image_paths
from lit_prune.data.references import ImageFile, name_of
from lit_prune.data.sources.base import FileReader, Source
from lit_prune.data.sources.tar_index import index_of
from lit_prune.errors import BadSample, LitPruneError

MANIFEST = "shards.json"
LARGEST_MEMBER = 1 << 28  # bytes


class Shards(Source):
    """The samples of tar shards, read by their byte offsets without unpacking anything: 40 bytes a sample or so.

    Images are those of the shard in the order of their numbers; what a record calls them is a name only.

    Args:
        paths: the shards.

    Raises:
        LitPruneError: see `index_of`.
    """

    def __init__(self, paths: Sequence[Path]):
        self.paths = list(paths)
        self.indexes = [index_of(path) for path in self.paths]
        self.ends = np.array(list(accumulate(len(index) for index in self.indexes)))
        self._reader = FileReader()

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard, (span, *images) = self._place(index)
        try:
            record = json.loads(self._read(shard, span)) if span[1] else None
        except (ValueError, RecursionError) as error:
            raise BadSample(self.paths[shard], index, f"not JSON: {error}") from error
        except BadSample as error:
            raise BadSample(self.paths[shard], index, error.reason) from error
        if not isinstance(record, dict):
            found = f"not {type(record).__name__}" if span[1] else "there is none beside its images"
            raise BadSample(self.paths[shard], index, f"a JSON object was expected, {found}")
        if images and not _names_images(record):
            record["images"] = [f"number {number}" for number in range(len(images))]
        return record

    def images(self, index: int, record: dict) -> list[ImageFile]:
        shard, (_, *spans) = self._place(index)
        names = [name_of(value, number) for number, value in enumerate(image_paths(record))]
        if len(names) != len(spans):
            raise BadSample("", None, f"{len(names)} images are named but {len(spans)} lie in the shard")
        return [ImageFile(name, partial(self._open, shard, span)) for name, span in zip(names, spans, strict=True)]

    def file_of(self, index: int) -> str:
        return str(self.paths[self._place(index)[0]])

    @property
    def files(self) -> list[Path]:
        return self.paths

    def _place(self, index: int) -> tuple[int, list[tuple[int, int]]]:
        """Number of the shard and the spans of a sample."""
        shard = int(np.searchsorted(self.ends, index, side="right"))
        return shard, self.indexes[shard].of(index - (int(self.ends[shard - 1]) if shard else 0))

    def _open(self, shard: int, span: tuple[int, int]) -> BinaryIO:
        return io.BytesIO(self._read(shard, span))

    def _read(self, shard: int, span: tuple[int, int]) -> bytes:
        if span[1] > LARGEST_MEMBER:
            raise BadSample("", None, f"{span[1]} bytes in one member, more than {LARGEST_MEMBER}")
        return self._reader.read(self.paths[shard], self.indexes[shard].size, *span)


def _names_images(record: dict) -> bool:
    """True if the record names images, or is unreadable, which is reported later."""
    try:
        return bool(image_paths(record))
    except BadSample:
        return True


def check_finished(folder: Path) -> None:
    """Raise LitPruneError for a folder whose writing by `lit-prune shard` has not come to its end."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return
    try:
        state = json.loads(manifest.read_text(encoding="utf-8"))
        done, whole = state["done"], state["records"]
    except (ValueError, KeyError, TypeError) as error:
        raise LitPruneError(f"{manifest}: not written by lit-prune shard: {error}") from error
    if done < whole:
        raise LitPruneError(f"{folder}: {done} of {whole} records are written; finish it with the same lit-prune shard")

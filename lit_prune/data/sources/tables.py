"""Arrow tables by Hugging Face `datasets`: parquet and arrow files, `save_to_disk` folders, data sets of the hub."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from types import ModuleType
from typing import Any

from lit_prune.data.sources.base import ImageFile, Source
from lit_prune.data.sources.locations import HUB, Location
from lit_prune.data.sources.rows import COLUMNS, IMAGE_COLUMNS, TURN_COLUMNS, image_files, record_of
from lit_prune.errors import BadSample, LitPruneError, extra

BATCH = 1000  # rows that are read of a parquet file at a time; `datasets` writes row groups of so many


class Table(Source):
    """Rows with a column `conversations` or `messages`, and `image` or `images`; columns that no record has go unread.

    Images are bytes, paths, or structs of `bytes` and `path`, one or a list of them (the `Image` feature too). Rows are
    read as they are stored: no decoder of `datasets` runs. A path without bytes is one under the image root.

    Args:
        row: gives the row of an index as a `pyarrow.Table` of one row.
        count: number of rows.
        columns: their names.
        location: for messages.
        images_root: folder of the images that are paths; None refuses them.
        files: what holds the rows.

    Raises:
        LitPruneError: no column of conversations.
    """

    def __init__(
        self,
        row: Callable[[int], Any],
        count: int,
        columns: Sequence[str],
        location: str,
        images_root: Path | None,
        files: Sequence[Path] = (),
    ):
        if not set(TURN_COLUMNS) & set(columns):
            raise LitPruneError(f"{location}: no column {' or '.join(TURN_COLUMNS)}; it has {', '.join(columns)}")
        self.row, self.count, self.location, self.images_root = row, count, location, images_root
        self.text_columns = [name for name in columns if name in COLUMNS and name not in IMAGE_COLUMNS]
        self.image_columns = [name for name in columns if name in IMAGE_COLUMNS]
        self._files = list(files)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            row = self._row(index)
            values = {name: row[name][0].as_py() for name in self.text_columns}
            return record_of(values | {name: _without_bytes(row[name][0]) for name in self.image_columns})
        except BadSample as error:
            raise BadSample(self.location, index, error.reason) from error
        except (ValueError, OverflowError) as error:  # a time that Python has no word for
            raise BadSample(self.location, index, f"a value cannot be read: {error}") from error

    def images(self, index: int, record: dict) -> list[ImageFile]:
        row = self._row(index)
        return image_files({name: row[name][0].as_py() for name in self.image_columns}, self.images_root)

    def file_of(self, index: int) -> str:
        return self.location

    @property
    def files(self) -> list[Path]:
        return self._files

    def _row(self, index: int) -> Any:
        """The row, checked: offsets of a damaged file would make pyarrow read anywhere in memory."""
        try:
            row = self.row(index)
            row.validate(full=True)
        except ValueError as error:
            raise BadSample("", None, f"the row is damaged: {error}") from error
        return row


def open_table(location: Location, images_root: Path | None) -> Table:
    """The table at a location of parquet, arrow, `Dataset.save_to_disk` or the hub, mapped into memory.

    Arrow files are mapped where they lie. Parquet and data sets of the hub are written as arrow to the cache of
    `datasets` (HF_DATASETS_CACHE, else ~/.cache/huggingface/datasets) the first time.

    Raises:
        LitPruneError: files that cannot be read or have other columns than the first; a data set of the hub that is not
            there or cannot be reached.
    """
    datasets = library()
    with explained(location.name):
        if location.kind == "saved":
            data = datasets.load_from_disk(str(location.files[0]))
            _check_inside(location.files[0], data.cache_files)
        elif location.kind == "arrow":
            data = datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in location.files])
        else:
            data = datasets.load_dataset(**load_arguments(location))
        files = [Path(file["filename"]) for file in data.cache_files]
        row = data.with_format("arrow").__getitem__
    return Table(row, len(data), data.column_names, location.name, images_root or location.folder, files)


def load_arguments(location: Location) -> dict[str, Any]:
    """What `datasets.load_dataset` is told. Code of a data set is never run.

    Raises:
        LitPruneError: a name that is not `hub:OWNER/NAME[/CONFIGURATION][:SPLIT]`.
    """
    if location.kind != "hub":
        batches = {"batch_size": BATCH} if location.kind == "parquet" else {}  # by default that of the file, even if 0
        files = [escape(str(file)) for file in location.files]  # they are taken for patterns
        return {"path": location.kind, "data_files": files, "split": "train", **batches}
    found = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:/([\w.-]+))?(?::([\w.-]+))?", location.name.removeprefix(HUB))
    if not found:
        raise LitPruneError(f"{location.name}: a data set of the hub is written hub:OWNER/NAME[/CONFIGURATION][:SPLIT]")
    path, configuration, split = found.groups()
    return {"path": path, "name": configuration, "split": split or "train"}


def _check_inside(folder: Path, files: Sequence[dict[str, str]]) -> None:
    """Raise LitPruneError if `state.json` names files elsewhere."""
    for file in files:
        if not Path(os.path.abspath(file["filename"])).is_relative_to(os.path.abspath(folder)):
            raise LitPruneError(f"{folder}: its state.json names a file outside the folder: {file['filename']}")


def library() -> ModuleType:
    """Hugging Face `datasets`. Raises LitPruneError where it is not installed."""
    try:
        import datasets
    except ImportError as error:
        raise LitPruneError(f"parquet, arrow and the hub need `datasets`: {extra('datasets')}") from error
    return datasets


@contextmanager
def explained(location: str) -> Iterator[None]:
    """What `datasets` raises for a broken file or an unreachable hub, as one sentence with the location."""
    try:
        yield
    except ConnectionError as error:
        hint = "without a network, save it where there is one (Dataset.save_to_disk) and give that folder"
        raise LitPruneError(f"{location}: {error}; {hint}") from error
    except LitPruneError:
        raise
    except Exception as error:  # broken files raise anything
        cause = error.__cause__ or error
        raise LitPruneError(f"{location}: cannot be read: {type(cause).__name__}: {cause}") from error


def _without_bytes(scalar: Any) -> Any:
    """A pyarrow scalar of an image column as Python has it, but with empty bytes: reads no image."""
    import pyarrow

    if not scalar.is_valid:
        return None
    if isinstance(scalar, pyarrow.StructScalar):
        return {name: _without_bytes(scalar[name]) for name in scalar}
    if isinstance(scalar, pyarrow.ListScalar | pyarrow.LargeListScalar):
        return [_without_bytes(value) for value in scalar]
    types = pyarrow.types
    return b"" if types.is_binary(scalar.type) or types.is_large_binary(scalar.type) else scalar.as_py()

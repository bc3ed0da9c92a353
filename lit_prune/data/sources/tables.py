"""Arrow tables by Hugging Face `datasets`: parquet and arrow files, `save_to_disk` folders, data sets of the hub."""

import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from types import ModuleType
from typing import Any

from lit_prune.data.records import IMAGE_KEYS, UNREAD, similar_keys
from lit_prune.data.references import ImageFile
from lit_prune.data.sources.base import Source
from lit_prune.data.sources.locations import HUB, Location
from lit_prune.data.sources.rows import columns_read, image_files, record_of
from lit_prune.errors import BadSample, LitPruneError, extra

BATCH = 1000  # rows that are read of a parquet file at a time; `datasets` writes row groups of so many


class Table(Source):
    """Rows with a column of turns, and `image` or `images`; columns that no record has go unread.

    Images are bytes, paths, or structs of `bytes` and `path`, one or a list of them (the `Image` feature too). Rows are
    read as they are stored: no decoder of `datasets` runs. A path without bytes is one under the image root.

    Args:
        row: gives the row of an index as a `pyarrow.Table` of one row.
        count: number of rows.
        columns: their names.
        location: for messages.
        images_root: folder of the images that are paths; None refuses them.
        files: what holds the rows.
        classes: names of the classes of columns that hold their numbers.

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
        classes: Mapping[str, Sequence[str]] | None = None,
    ):
        self.text_columns = columns_read(columns)
        if not self.text_columns:
            raise LitPruneError(f"{location}: no column conversations or messages; it has {', '.join(columns)}")
        self.row, self.count, self.location, self.images_root = row, count, location, images_root
        self.image_columns = [name for name in columns if name in IMAGE_KEYS]
        self.columns = list(columns)
        self._files, self.classes = list(files), dict(classes or {})

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            row = self._row(index)
            return record_of({name: self._value(row, name) for name in (*self.text_columns, *self.image_columns)})
        except BadSample as error:
            raise BadSample(self.location, index, error.reason) from error
        except (ValueError, OverflowError, IndexError) as error:  # a time that Python has no word for, a class unknown
            raise BadSample(self.location, index, f"a value cannot be read: {error}") from error

    def images(self, index: int, record: dict) -> list[ImageFile]:
        row = self._row(index)
        return image_files({name: row[name][0].as_py() for name in self.image_columns}, record, self.images_root)

    def file_of(self, index: int) -> str:
        return self.location

    def similar_keys(self) -> list[str]:
        return [] if self.image_columns else similar_keys(dict.fromkeys(self.columns, "unread"))

    @property
    def files(self) -> list[Path]:
        return self._files

    def _value(self, row: Any, name: str) -> Any:
        """A column of a row as Python has it: classes by their names, images and the like without their bytes."""
        if name in self.image_columns or name in UNREAD:
            return _without_bytes(row[name][0])
        value = row[name][0].as_py()
        if name in self.classes and value is not None:
            return self.classes[name][value] if value >= 0 else None
        return value

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
    _refuse_empty(location)
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
        classes = class_names(data.features)
    return Table(row, len(data), data.column_names, location.name, images_root or location.folder, files, classes)


def class_names(features: Mapping[str, Any] | None) -> dict[str, list[str]]:
    """The names of the classes of every column of the `ClassLabel` feature."""
    label = library().ClassLabel
    return {name: feature.names for name, feature in (features or {}).items() if isinstance(feature, label)}


def _refuse_empty(location: Location) -> None:
    """Raise LitPruneError for a table without rows, which `datasets` takes for a broken one."""
    empty = False
    with suppress(Exception):  # broken files are explained later
        if location.kind == "parquet":
            from pyarrow.parquet import read_metadata

            empty = all(read_metadata(file).num_rows == 0 for file in location.files)
        else:
            empty = location.kind == "saved" and not _saved_files(location.files[0])
    if empty:
        raise LitPruneError(f"{location.name}: it has no data: 0 rows")


def _saved_files(folder: Path) -> list[Any]:
    """The data files of a folder that `Dataset.save_to_disk` wrote."""
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]


def load_arguments(location: Location) -> dict[str, Any]:
    """Arguments for `datasets.load_dataset`. Code of a data set is never executed.

    Raises:
        LitPruneError: the name is not `hub:OWNER/NAME[/CONFIGURATION][:SPLIT]`.
    """
    if location.kind != "hub":
        batches = {"batch_size": BATCH} if location.kind == "parquet" else {}  # default: the file's own, even 0
        files = [escape(str(file)) for file in location.files]  # file names are interpreted as patterns
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
    """Import Hugging Face `datasets`. Raises LitPruneError if it is not installed."""
    try:
        import datasets
    except ImportError as error:
        raise LitPruneError(f"parquet, arrow and the hub need `datasets`: {extra('datasets')}") from error
    return datasets


@contextmanager
def explained(location: str) -> Iterator[None]:
    """Convert errors of `datasets`, for broken files or an unreachable hub, to one sentence with the location."""
    logger = logging.getLogger("datasets")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # it logs the same error
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
    finally:
        logger.setLevel(level)


def _without_bytes(scalar: Any) -> Any:
    """Convert a pyarrow scalar of an image column to Python with empty bytes, so that no image is read."""
    import pyarrow

    if not scalar.is_valid:
        return None
    if isinstance(scalar, pyarrow.StructScalar):
        return {name: _without_bytes(scalar[name]) for name in scalar}
    if isinstance(scalar, pyarrow.ListScalar | pyarrow.LargeListScalar):
        return [_without_bytes(value) for value in scalar]
    types = pyarrow.types
    return b"" if types.is_binary(scalar.type) or types.is_large_binary(scalar.type) else scalar.as_py()

"""Rows of tables, whose images stand in a column of their own as bytes or paths, as records and image files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_prune.data.records import IMAGE_KEYS, PAIR_KEYS, PAIRS, SYSTEM_KEYS, TURN_KEYS, UNREAD, image_paths
from lit_prune.data.references import ImageFile, as_list, image_file, name_of
from lit_prune.errors import BadSample


def columns_read(columns: Sequence[str]) -> list[str]:
    """The columns that make up a record, besides those of images; none if no column holds turns or questions."""
    turns = [name for name in TURN_KEYS[:2] if name in columns] or [name for name in TURN_KEYS[2:] if name in columns]
    if not turns and not {asked for asked, _ in PAIRS} & set(columns):
        return []
    read = {"id", "skill", "boxes", *SYSTEM_KEYS, *UNREAD, *(turns or PAIR_KEYS)}
    return [name for name in columns if name in read]


def record_of(row: dict[str, Any]) -> dict:
    """The row as a record: its images by their names, turns as a list, empty columns left out.

    Raises:
        BadSample: images that are neither a path nor bytes. File and sample are left open.
    """
    record = {key: value for key, value in row.items() if value is not None and key not in IMAGE_KEYS}
    for column in TURN_KEYS:
        if column in record:
            record[column] = _as_turns(record[column])
    if names := [name_of(value, number) for number, value in enumerate(stored_images(row))]:
        record["images"] = names
    return record


def image_files(row: dict[str, Any], record: dict, root: Path | None) -> list[ImageFile]:
    """The images of a row: of their bytes, else of the file that their path names under the root.

    Args:
        row: its columns of images.
        record: what `record_of` made of the row.
        root: folder that paths start from; None refuses them.

    Raises:
        BadSample: as `record_of`.
    """
    own = stored_images(row)
    inside = image_paths(record)[len(own) :]  # the turns
    return [image_file(value, number, root) for number, value in enumerate([*own, *inside])]


def stored_images(row: dict[str, Any]) -> list[Any]:
    """The image values of a row, each a path, bytes, or a dict of both.

    Raises:
        BadSample: something else, or others in either column. File and sample are left open.
    """
    found = [as_list(row.get(column)) for column in IMAGE_KEYS if as_list(row.get(column))]
    for values in found:
        for number, value in enumerate(values):
            if not isinstance(value, str | bytes) and not (
                isinstance(value, dict) and value.keys() & {"bytes", "path"}
            ):
                hint = ": arrays of pixels are not read, files are" if isinstance(value, list) else ""
                raise BadSample("", None, f"image {number} is neither a path nor bytes{hint}")
    if len(found) > 1 and [*map(name_of, found[0], range(9999))] != [*map(name_of, found[1], range(9999))]:
        raise BadSample("", None, f"images in the columns {' and '.join(IMAGE_KEYS)} that differ")
    return found[0] if found else []


def _as_turns(value: Any) -> Any:
    """A list of objects, where an older `datasets` has stored an object of lists; also for the contents of turns."""
    if isinstance(value, dict) and value and all(isinstance(values, list) for values in value.values()):
        value = [dict(zip(value, values, strict=False)) for values in zip(*value.values(), strict=False)]
    if isinstance(value, list):
        turns = [turn for turn in value if isinstance(turn, dict)]
        for turn in turns:
            for key in ("content", "value"):
                if isinstance(turn.get(key), dict):
                    turn[key] = _as_turns(turn[key])
    return value

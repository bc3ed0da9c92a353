"""Rows of tables, whose images stand in a column of their own as bytes or paths, as records and image files."""

import io
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from lit_prune.data.sources.base import ImageFile
from lit_prune.errors import BadSample
from lit_prune.images import open_image

IMAGE_COLUMNS = ("image", "images")
TURN_COLUMNS = ("conversations", "messages")
COLUMNS = ("id", "skill", "boxes", *TURN_COLUMNS, *IMAGE_COLUMNS)  # all that a record has


def record_of(row: dict[str, Any]) -> dict:
    """The row as a record: its images by their names, turns as a list, empty columns left out.

    Raises:
        BadSample: images that are neither a path nor bytes. File and sample are left open.
    """
    record = {key: value for key, value in row.items() if value is not None and key not in IMAGE_COLUMNS}
    for column in TURN_COLUMNS:
        if isinstance(record.get(column), dict):  # a struct of lists, as older versions of `datasets` write it
            turns = record[column]
            record[column] = [dict(zip(turns, values, strict=False)) for values in zip(*turns.values(), strict=False)]
    if names := [_name(value, number) for number, value in enumerate(stored_images(row))]:
        record["images"] = names
    return record


def image_files(row: dict[str, Any], root: Path | None) -> list[ImageFile]:
    """The images of a row: of their bytes, else of the file that their path names under the root.

    Raises:
        BadSample: as `record_of`.
    """
    images = []
    for number, value in enumerate(stored_images(row)):
        name, data = _name(value, number), value.get("bytes") if isinstance(value, dict) else value
        opens = partial(io.BytesIO, data) if isinstance(data, bytes) else partial(_open_path, root, name)
        images.append(ImageFile(name, opens))
    return images


def stored_images(row: dict[str, Any]) -> list[Any]:
    """What the row holds in place of images: a path, bytes, or a dict of both, each."""
    value = next((row[column] for column in IMAGE_COLUMNS if row.get(column) is not None), None)
    if isinstance(value, list):
        return value
    return [] if value is None or value == {"bytes": None, "path": None} else [value]


def _name(value: Any, number: int) -> str:
    held = value if isinstance(value, dict) else {"path": value} if isinstance(value, str) else {"bytes": value}
    path, data = held.get("path"), held.get("bytes")
    if isinstance(path, str) and path:
        return path
    if not isinstance(data, bytes):
        raise BadSample("", None, f"image {number} is neither a path nor bytes")
    return f"number {number}"


def _open_path(root: Path | None, path: str) -> BinaryIO:
    if root is None:
        raise BadSample("", None, f"image {path} is only a path: the folder it lies in must be given as image root")
    return open_image(root, path)

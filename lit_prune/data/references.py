"""Resolve image references of records: paths, file URLs, data URLs, base64, bytes, and objects around these."""

import base64
import binascii
import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote

from lit_prune.errors import BadSample
from lit_prune.files.images import open_image, short

KEYS = ("bytes", "base64", "data", "image", "image_url", "path", "url", "source")  # of an object around a reference
EMBEDDED_KEYS = ("bytes", "base64", "data")
LARGEST_EMBEDDED = 1 << 26  # characters of an image inside a record
LEAST_BASE64 = 64  # characters; a shorter text is a path
LONGEST_PATH = 4096  # characters; no file system takes more
DEEPEST = 3  # nested objects around a reference, as in {"image_url": {"url": ...}}

# Base64 of the first bytes of JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF and HEIC, SVG, XML and PDF.
_BASE64_IMAGE = re.compile(r"/9j/|iVBORw0KGgo|UklGR|R0lGOD|Qk[0-3]|SUkqA|TU0AK|AAAA..Z0eXB|PHN2Z|PD94bW|JVBERi")
_BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]+=*\s*")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")


@dataclass(frozen=True)
class ImageFile:
    """Image file, not decoded: `name` for messages, `open` returns a binary file at its start.

    `open` raises BadSample for an image that is missing or may not be read.
    """

    name: str
    open: Callable[[], BinaryIO]


def is_absent(value: Any) -> bool:
    """True for a value that means no image: null, NaN, blank text."""
    return (
        value is None
        or (isinstance(value, float) and math.isnan(value))
        or (isinstance(value, str) and not value.strip())
    )


def as_list(value: Any) -> list[Any]:
    """Convert one or several references to a list, without absent ones; an object of nulls is absent."""
    if isinstance(value, list | tuple):
        return [item for item in value if not is_absent(item)]
    empty = is_absent(value) or (
        isinstance(value, dict) and all(key in KEYS and is_absent(value[key]) for key in value)
    )
    return [] if empty else [value]


def name_of(value: Any, number: int) -> str:
    """Name of an image in messages: its path or URL if it has one, otherwise its number.

    Raises:
        BadSample: it is no reference. File and sample are left open.
    """
    held, embedded = _unwrapped(value, number)
    path = value.get("path") if isinstance(value, dict) else None
    if isinstance(path, str) and path:
        return path
    return f"number {number}" if embedded else held


def is_embedded(value: Any, number: int = 0) -> bool:
    """True if a reference holds the image itself: bytes, a data URL, base64. Raises BadSample as `name_of` does."""
    return _unwrapped(value, number)[1]


def image_file(value: Any, number: int, root: Path | None) -> ImageFile:
    """Resolve an image reference of a record.

    Args:
        value: the reference.
        number: of the image in its record, for messages.
        root: folder that paths start from and may not leave; None refuses them.

    Raises:
        BadSample: it is no reference at all. What cannot be opened raises later.
    """
    held, embedded = _unwrapped(value, number)
    name = name_of(value, number)
    if isinstance(held, bytes):
        return ImageFile(name, partial(io.BytesIO, held))
    if embedded:
        return ImageFile(name, partial(_open_data_url if _is_data_url(held) else _open_base64, held, name))
    return ImageFile(name, partial(_open_path, held, root))


def _unwrapped(value: Any, number: int) -> tuple[str | bytes, bool]:
    """Unwrap a reference, and tell if it holds the image itself. Bytes take precedence over a path."""
    held, key = value, None
    for _ in range(DEEPEST):
        if isinstance(held, dict):
            key = next((key for key in KEYS if not is_absent(held.get(key))), None)
            held = held.get(key)
    if not isinstance(held, str | bytes) or is_absent(held):
        raise _bad(f"image {number} is neither a path nor bytes, but {_kind(value)}")
    named = isinstance(held, str) and key in EMBEDDED_KEYS
    return held, isinstance(held, bytes) or named or _is_data_url(held) or _is_base64(held)


def _open_path(reference: str, root: Path | None) -> BinaryIO:
    """Open the file of a path or a file URL. Raises BadSample for other URLs: nothing is downloaded."""
    scheme = _URL.match(reference)
    if scheme and scheme[1].lower() != "file":
        raise _bad(f"image {short(reference)} is a URL; nothing is downloaded: give its file")
    if reference.lower().startswith("file:"):
        reference = unquote(re.sub(r"(?i)^file:(?://(?:localhost(?=/))?)?", "", reference))
    if root is None:
        raise _bad(f"image {short(reference)} is only a path: the folder it lies in must be given as image root")
    return open_image(root, reference)


def _is_data_url(text: str) -> bool:
    return text[:5].lower() == "data:"


def _is_base64(text: str) -> bool:
    """True for long text that begins like an image file in base64, and is therefore no path."""
    if len(text) < LEAST_BASE64 or not _BASE64_IMAGE.match(text):
        return False
    return len(text) > LONGEST_PATH or _BASE64.fullmatch(text) is not None


def _open_data_url(url: str, name: str) -> BinaryIO:
    head, comma, data = url.partition(",")
    kind = head[len("data:") :].partition(";")[0]
    if not comma or not head.lower().endswith(";base64"):
        raise _bad(f"image {short(name)} is a data URL without base64")
    if kind and not kind.lower().startswith(("image/", "application/octet-stream")):
        raise _bad(f"image {short(name)} is a data URL of {short(kind)}, not of an image")
    return _open_base64(data.replace("%2B", "+").replace("%2F", "/").replace("%3D", "="), name)


def _open_base64(text: str, name: str) -> BinaryIO:
    if len(text) > LARGEST_EMBEDDED:
        raise _bad(f"image {short(name)} has {len(text)} characters of base64, more than {LARGEST_EMBEDDED}")
    plain = "".join(text.split()).replace("-", "+").replace("_", "/").rstrip("=")  # both alphabets
    try:
        return io.BytesIO(base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True))
    except (binascii.Error, ValueError) as error:
        raise _bad(f"image {short(name)} cannot be read: broken base64") from error


def _kind(value: Any) -> str:
    kinds = {bool: "true or false", int: "a number", float: "a number", dict: "an object", list: "a list"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def _bad(reason: str) -> BadSample:
    return BadSample("", None, reason)

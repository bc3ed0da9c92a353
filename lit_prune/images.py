"""Reading images that others made: inside their root only, of a sane size, and whole."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO

from PIL import Image, ImageOps

from lit_prune.errors import BadSample

MAX_PIXELS = 89_478_485  # Pillow's own limit
LONGEST = 200  # times the shorter side; the limit of Qwen2-VL's processor
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # none that runs another program


def read_image(root: str | Path, relative_path: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image at `root/relative_path` in RGB; see `open_image` and `decode_image` for arguments and errors."""
    with open_image(root, relative_path) as file:
        return decode_image(file, relative_path, max_pixels)


def open_image(root: str | Path, relative_path: str) -> BinaryIO:
    """The file at `root/relative_path`, for reading.

    Args:
        root: the folder that the path may not leave.
        relative_path: as written in a record, with forward slashes.

    Raises:
        BadSample: a path that is absolute or leaves the root (`..`, a link), or a file that is missing or may not be
            read. File and sample are left open.
    """
    try:
        return resolve_image(root, relative_path).open("rb")
    except OSError as error:
        raise _bad(f"image {relative_path} cannot be read: {error.strerror}") from error


def decode_image(file: BinaryIO, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image in RGB, upright if its EXIF says how, transparency left away, the first one if there are several.

    Args:
        file: a binary file at its begin.
        name: for messages.
        max_pixels: width times height an image may have at most, read from its header before it is decoded
            (never more than Pillow's own limit).

    Raises:
        BadSample: unreadable, cut short, too large or too long a strip, or greys of unknown range. File and sample are
            left open.
    """
    with _header(file, name, max_pixels) as image:
        decoded = _rgb(image, name)
        with suppress(Exception):  # what is broken in EXIF may raise anything; it says nothing then
            ImageOps.exif_transpose(decoded, in_place=True)
        return decoded


def upright(image: Image.Image, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An image that is open already, as `decode_image` gives it; name and errors as there."""
    try:
        _check_size(image, name, max_pixels)
        decoded = _rgb(image, name)
    except BadSample:
        raise
    except Exception as error:  # pixels are read late, and decoders raise anything on a broken file
        raise _bad(f"image {name} cannot be read: {error}") from error
    with suppress(Exception):  # as above
        ImageOps.exif_transpose(decoded, in_place=True)
    return decoded


def image_format(file: BinaryIO, name: str, max_pixels: int = MAX_PIXELS) -> str:
    """Pillow's name of the format, one of `FORMATS`, by the header alone; arguments and errors as `decode_image`."""
    with _header(file, name, max_pixels) as image:
        return "JPEG" if image.format == "MPO" else image.format  # a phone's: a JPEG with others behind it


@contextmanager
def _header(file: BinaryIO, name: str, max_pixels: int) -> Iterator[Image.Image]:
    """The image with its header read; what decoding raises inside is told as a bad sample too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of transparency, and of what is broken beside the pixels
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(file, formats=FORMATS) as image:
                _check_size(image, name, max_pixels)
                yield image
        except BadSample:
            raise
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise _bad(f"image {name} is a decompression bomb: {error}") from error
        except Exception as error:  # decoders raise anything on a broken file
            raise _bad(f"image {name} cannot be read: {error}") from error


def resolve_image(root: str | Path, relative_path: str) -> Path:
    """The real path of an image, which lies inside the root and is a file. Raises BadSample otherwise."""
    if not isinstance(relative_path, str) or not relative_path or "\0" in relative_path:
        raise _bad(f"{relative_path!r} is no image path")
    posix, windows = PurePosixPath(relative_path), PureWindowsPath(relative_path)
    if posix.is_absolute() or windows.drive or windows.root:
        raise _bad(f"image path {relative_path} is absolute; it must be relative to the image root")
    if ".." in posix.parts or ".." in windows.parts:
        raise _bad(f"image path {relative_path} leaves the image root by '..'")
    root = Path(root).resolve()
    try:
        path = (root / relative_path).resolve()
        found = path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # a name that is too long or no Unicode, a loop of links
        raise _bad(f"image {relative_path} cannot be read: {getattr(error, 'strerror', error)}") from error
    if not path.is_relative_to(root):
        raise _bad(f"image path {relative_path} leaves the image root by a link")
    if not found:
        raise _bad(f"image {relative_path} is missing in {root}")
    return path


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # 16 bits of grey: Pillow's conversion cuts at 255 where this keeps the upper 8 bits
        image = image.convert("I").point(lambda grey: grey / 256).convert("L")
    if image.mode in ("I", "F"):
        raise _bad(f"image {name} has greys of 32 bits, and nobody knows which of them is white")
    return image.convert("RGB")


def _check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if max(width, height) > LONGEST * min(width, height):  # made 336 pixels wide it would fill the memory
        raise _bad(f"image {name} has {width} x {height} pixels: one side is more than {LONGEST} times the other")
    if width * height > max_pixels:
        raise _bad(f"image {name} is a decompression bomb: {width} x {height} pixels, more than {max_pixels}")


def _bad(reason: str) -> BadSample:
    return BadSample("", None, reason)

"""Read untrusted images: only inside their root, of limited size, and complete."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO

from PIL import Image, ImageOps, UnidentifiedImageError, features

from lit_prune.errors import BadSample

MAX_PIXELS = 89_478_485  # Pillow's own limit
LONGEST = 200  # times the shorter side; the limit of Qwen2-VL's processor
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # none that runs another program
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif")  # of their files
OPTIONAL = {"AVIF": "avif"}  # formats that some builds of Pillow decode, with the feature to ask for
LONGEST_NAME = 100  # characters of a name in a message
HEAD = 512  # bytes that `kind_of` looks at

# Files that are found in place of images, by their first bytes.
_MAGIC = (
    (rb"\x00\x00\x00\x0cJXL |\xff\x0a", "JPEG XL"),
    (rb"\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51", "JPEG 2000"),
    (rb"....ftyp(?:avif|avis)", "AVIF"),
    (rb"....ftyp(?:hei[cxms]|hev[cxms]|mif1|msf1)", "HEIC"),
    (rb"....ftyp|....moov|\x1aE\xdf\xa3|RIFF....AVI |\x00\x00\x01\xba", "a video"),
    (rb"%PDF-", "PDF"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "PostScript"),
    (rb"8BPS", "a Photoshop file"),
    (rb"\x00\x00[\x01\x02]\x00", "an icon (ICO)"),
    (rb"\x93NUMPY", "a numpy array"),
    (rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd", "an archive"),
    (rb"version https://git-lfs", "a Git LFS pointer in place of the image (git lfs pull fetches it)"),
    (rb"\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)?(?:<!DOCTYPE svg[^>]*>\s*)?<svg\b", "SVG"),
    (rb"\s*(?:<!DOCTYPE html|<html|<head|<\?xml|<Error)", "a web page or XML in place of an image"),
    (rb"\s*[\[{]", "JSON or text in place of an image"),
)


def read_image(root: str | Path, relative_path: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read the image at `root/relative_path` in RGB; see `open_image` and `decode_image` for arguments and errors."""
    with open_image(root, relative_path) as file:
        return decode_image(file, relative_path, max_pixels)


def open_image(root: str | Path, relative_path: str) -> BinaryIO:
    """Open the file at `root/relative_path` for reading.

    Args:
        root: the folder that the path may not leave.
        relative_path: as written in a record, with forward slashes; or an absolute path of a file inside the root.

    Raises:
        BadSample: a path that leaves the root (absolute, `..`, a link), or a file that is missing or may not be read.
            File and sample are left open.
    """
    try:
        return resolve_image(root, relative_path).open("rb")
    except OSError as error:
        raise _bad(f"image {short(relative_path)} cannot be read: {error.strerror}") from error


def decode_image(file: BinaryIO, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image to RGB: rotated by EXIF, without transparency, the first of several frames.

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
    """Convert an opened image as `decode_image` does; name and errors as there."""
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


def padded_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Pad an RGB image to a square with one colour, as in LLaVA-1.5's training and evaluation."""
    width, height = image.size
    side = max(width, height)  # by hand: ImageOps.pad rounds the place of odd margins, LLaVA rounds it down
    square = Image.new(image.mode, (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def image_format(file: BinaryIO, name: str, max_pixels: int = MAX_PIXELS) -> str:
    """Read the format from the header, by Pillow's name, one of `formats()`; arguments and errors as `decode_image`."""
    with _header(file, name, max_pixels) as image:
        return "JPEG" if image.format == "MPO" else image.format  # from phones: a JPEG followed by others


@cache
def formats() -> tuple[str, ...]:
    """Supported formats, by Pillow's names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an older Pillow warns about features that it has never heard of
        return (*FORMATS, *(name for name, feature in OPTIONAL.items() if features.check(feature)))


def kind_of(head: bytes) -> str | None:
    """Name the format of a file that is no readable image, from its first bytes; None if unknown."""
    return next((kind for magic, kind in _MAGIC if re.match(magic, head, re.DOTALL | re.IGNORECASE)), None)


def short(name: object) -> str:
    """Shorten a name for a message to one line of at most 100 characters, without its middle."""
    text = str(name)
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= LONGEST_NAME else f"{text[: LONGEST_NAME // 2]}...{text[-LONGEST_NAME // 4 :]}"


@contextmanager
def _header(file: BinaryIO, name: str, max_pixels: int) -> Iterator[Image.Image]:
    """Open an image and read its header; errors inside the block become bad samples too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of transparency, and of what is broken beside the pixels
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(file, formats=formats()) as image:
                _check_size(image, name, max_pixels)
                yield image
        except BadSample:
            raise
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise _bad(f"image {short(name)} is a decompression bomb: {error}") from error
        except UnidentifiedImageError as error:
            raise _bad(f"image {short(name)} cannot be read: {_unidentified(file)}") from error
        except Exception as error:  # decoders raise anything on a broken file
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise _bad(f"image {short(name)} cannot be read: {reason}") from error


def _unidentified(file: BinaryIO) -> str:
    """Explain why Pillow cannot identify a file, from its first bytes."""
    try:
        file.seek(0)
        head = file.read(HEAD)
    except (OSError, ValueError):
        return "its first bytes cannot be read"
    if not head:
        return "the file is empty"
    kind, known = kind_of(head), ", ".join(formats())
    if kind is None or kind in formats():
        return f"a broken header, or none of {known}"
    return f"it is {kind}; {known} are read"


def resolve_image(root: str | Path, relative_path: str) -> Path:
    """Resolve the path of an image; raises BadSample unless it is a file inside the root."""
    if not isinstance(relative_path, str) or not relative_path or "\0" in relative_path:
        raise _bad(f"{short(repr(relative_path))} is no image path")
    name = short(relative_path)
    posix, windows = PurePosixPath(relative_path), PureWindowsPath(relative_path)
    if not posix.is_absolute() and (windows.drive or windows.root):
        raise _bad(f"image path {name} is absolute; it must be relative to the image root")
    if ".." in posix.parts or ".." in windows.parts:
        raise _bad(f"image path {name} leaves the image root by '..'")
    root = Path(root).resolve()
    try:
        path = (root / relative_path).resolve()
        found = path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # a name that is too long or no Unicode, a loop of links
        raise _bad(f"image {name} cannot be read: {getattr(error, 'strerror', error)}") from error
    if not path.is_relative_to(root):
        by = f"is absolute and lies outside the image root {root}" if posix.is_absolute() else None
        raise _bad(f"image path {name} {by or 'leaves the image root by a link'}")
    if not found and "\\" in relative_path:  # as Windows writes them
        return resolve_image(root, relative_path.replace("\\", "/"))
    if not found:
        raise _bad(f"image {name} is missing in {root}")
    return path


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # 16 bits of grey: Pillow's conversion cuts at 255 where this keeps the upper 8 bits
        image = image.convert("I").point(lambda grey: grey / 256).convert("L")
    if image.mode in ("I", "F"):
        raise _bad(f"image {short(name)} has greys of 32 bits, and nobody knows which of them is white")
    return image.convert("RGB")


def _check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if max(width, height) > LONGEST * min(width, height):  # made 336 pixels wide it would fill the memory
        raise _bad(
            f"image {short(name)} has {width} x {height} pixels: one side is more than {LONGEST} times the other"
        )
    if width * height > max_pixels:
        raise _bad(f"image {short(name)} is a decompression bomb: {width} x {height} pixels, more than {max_pixels}")


def _bad(reason: str) -> BadSample:
    return BadSample("", None, reason)

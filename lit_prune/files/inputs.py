"""Convert images and questions, one or many, to two lists of equal length."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lit_prune.errors import BadSample, LitPruneError
from lit_prune.files.images import read_image, upright

Picture = str | Path | Image.Image | np.ndarray
ACCEPTED = "give a path, a PIL image, or an array of uint8, height x width (x 3)"
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:")


def pair(images: Any, prompts: Any) -> tuple[list[Image.Image], list[str]]:
    """One image, in RGB, for each prompt.

    Args:
        images: what `as_image` takes, or an iterable of it. A single one serves all prompts.
        prompts: text, or an iterable of it. A single one serves all images.

    Raises:
        LitPruneError: what is no image or no text, or lists of unequal length.
    """
    single = is_image(images)
    questions = [prompts] if isinstance(prompts, str) else _listed(prompts, "prompts", "give text")
    pictures = [images] if single else _listed(images, "images", ACCEPTED)
    if isinstance(prompts, str) and not single:
        questions *= len(pictures)
    if not single and len(pictures) != len(questions):
        raise LitPruneError(
            f"{len(pictures)} images and {len(questions)} prompts: give one prompt for each image, or a single one"
        )
    for number, question in enumerate(questions, 1):
        if not isinstance(question, str):
            raise LitPruneError(f"prompt {number} is {_kind(question)}: give text")
    opened = [as_image(picture, str(number)) for number, picture in enumerate(pictures, 1)]
    return opened * len(questions) if single else opened, questions


def check_prompts(prompts: Iterable[str], image_token: str | None) -> None:
    """Raise `LitPruneError` for a prompt that is empty or contains the image token."""
    for prompt in prompts:
        if not prompt.strip() or (image_token and image_token in prompt):
            token = f" or hold {image_token}" if image_token else ""
            raise LitPruneError(f"prompt {prompt!r}: write the question alone, it must not be empty{token}")


def is_image(value: Any) -> bool:
    """True if a value is meant as one picture, readable or not, rather than several."""
    return isinstance(value, str | Path | Image.Image) or (isinstance(value, np.ndarray) and value.ndim < 4)


def as_image(value: Any, name: str = "1") -> Image.Image:
    """Convert any supported image input to an upright RGB image.

    Args:
        value: path of a file wherever it lies, a PIL image, or an array of uint8, height x width or height x width x
            channels (1 grey, 3 RGB, 4 RGB and transparency, which is left away).
        name: for messages, where it is no file.

    Raises:
        LitPruneError: it is no picture, or can't be read.
    """
    if isinstance(value, str | Path):
        return _read(value)
    if isinstance(value, np.ndarray):
        value = _from_array(value, name)
    if not isinstance(value, Image.Image):
        raise LitPruneError(f"image {name} is {_kind(value)}: {ACCEPTED}")
    return upright(value, name)


def _read(path: str | Path) -> Image.Image:
    """Read an image file given by the user, from any folder and through any links."""
    if not str(path):
        raise LitPruneError("the path of an image is empty")
    if URL.match(str(path)):
        raise LitPruneError(f"image {str(path)[:60]} is an address: give a file")
    try:
        real = Path(path).expanduser().resolve()
        folder = real.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name that no system takes
        reason = getattr(error, "strerror", None) or error
        raise LitPruneError(f"image {path!s:.200} cannot be read: {reason}") from error
    if folder:
        raise LitPruneError(f"image {path} is a folder: give files")
    try:
        return read_image(real.parent, real.name)
    except BadSample as error:
        raise LitPruneError(f"{path}: {error.reason}") from error


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    """Grey, RGB or RGBA of 8 bits."""
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 3, 4) or not array.size:
        size = " x ".join(map(str, array.shape)) or "no dimension"
        raise LitPruneError(f"image {name} is an array of {size}, {array.dtype}: {ACCEPTED}")
    return Image.fromarray(array[..., 0] if array.ndim == 3 and channels == 1 else array)


def _listed(values: Any, name: str, wanted: str) -> list[Any]:
    try:
        if not isinstance(values, str | bytes | Mapping):
            return list(values)
    except TypeError:  # no iterable, or an array without a dimension
        pass
    raise LitPruneError(f"{name} can't be {_kind(values)}: {wanted}, or a list of it")


def _kind(value: Any) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"

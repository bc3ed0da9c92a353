"""Images and questions as callers give them, one or many, as two lists of equal length."""

from collections.abc import Iterable, Mapping
from typing import Any

from PIL import Image

from lit_prune.errors import LitPruneError
from lit_prune.images import ACCEPTED, as_image, is_image


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
    """Raise `LitPruneError` for a prompt that is empty, or holds the token that stands for an image."""
    for prompt in prompts:
        if not prompt.strip() or (image_token and image_token in prompt):
            token = f" or hold {image_token}" if image_token else ""
            raise LitPruneError(f"prompt {prompt!r}: write the question alone, it must not be empty{token}")


def _listed(values: Any, name: str, wanted: str) -> list[Any]:
    try:
        if not isinstance(values, str | bytes | Mapping):
            return list(values)
    except TypeError:  # no iterable, or an array without a dimension
        pass
    raise LitPruneError(f"{name} can't be {_kind(values)}: {wanted}, or a list of it")


def _kind(value: Any) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"

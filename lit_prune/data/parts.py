"""Split the content of a turn into text and image parts, in order."""

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from lit_prune.data.references import is_absent
from lit_prune.errors import BadSample
from lit_prune.files.images import short

IMAGE_MARKER = "<image>"
OTHER_MARKERS = {"<video>": "videos are not read", "<audio>": "audio is not read"}
TAGGED_IMAGE = re.compile(r"<img>[^<>]+</img>")  # Qwen-VL's first format
TEXT_TYPES = ("text", "input_text", "output_text")
IMAGE_TYPES = ("image", "image_url", "input_image")
REFERENCE_KEYS = ("image", "image_url", "path", "url", "base64", "bytes", "source")

# {"type": "text", "text": ...} or {"type": "image"}, the latter with its own "reference" or "index" if it has one
Part = dict[str, Any]


def read_parts(content: Any, role: str) -> list[Part]:
    """The parts of a turn's content, text split at its `<image>` markers. White space goes at both ends of the text.

    Between text and an image inside it white space stays: templates that move images to the front must glue no words.

    Args:
        content: a text, or a list of texts and of objects with `type`; in an answer a number too.
        role: of the turn. Questions and system prompts may not hold markers of videos.

    Raises:
        BadSample: content of another kind. File and sample are left open.
    """
    items = content if isinstance(content, list) else [{"type": "text", "text": content}]
    parts = [part for item in items for part in _read(item, role) if part["type"] == "image" or part["text"].strip()]
    texts = [part for part in parts if part["type"] == "text"]
    if texts:
        texts[0]["text"] = texts[0]["text"].lstrip()
        texts[-1]["text"] = texts[-1]["text"].rstrip()
    return parts


def joined(parts: list[Part]) -> list[Part]:
    """Join text to one part, since templates mark an answer part by part; unchanged with images, rejected later."""
    if len(parts) < 2 or any(part["type"] == "image" for part in parts):
        return parts
    return [{"type": "text", "text": " ".join(part["text"].strip() for part in parts)}]


def images_in(parts: Sequence[Part]) -> list[Part]:
    """Image parts among the parts."""
    return [part for part in parts if part["type"] == "image"]


def kind_of_value(value: Any) -> str:
    """Describe the type of a JSON value, for messages."""
    kinds = {
        type(None): "null",
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
    }
    return kinds.get(type(value), "an object" if isinstance(value, dict) else f"a {type(value).__name__}")


def _read(item: Any, role: str) -> list[Part]:
    if isinstance(item, str):
        return _split(item, role)
    kind, references = None, {}
    if isinstance(item, dict):
        references = {key: item[key] for key in REFERENCE_KEYS if not is_absent(item.get(key))}
        kind = item.get("type") or ("image" if references else "text" if "text" in item else None)
    if kind in TEXT_TYPES and not references:
        return _split(_text(item.get("text"), role), role)
    if kind in IMAGE_TYPES and is_absent(item.get("text")):
        return [_image(references, item.get("index"))]
    if kind in (*TEXT_TYPES, *IMAGE_TYPES):
        raise _bad("a part of a message that is both text and image")
    raise _bad(f"a part of a message that is neither text nor image: {short(repr(kind))}")


def _image(references: dict[str, Any], index: Any) -> Part:
    """Create an image part with its reference, or the index of the record's image, if it has either."""
    if references:
        struct = references.keys() <= {"bytes", "path"}  # as Hugging Face `datasets` stores an image
        values = [references] if struct else list(references.values())
        if any(value != values[0] for value in values[1:]):
            raise _bad(f"an image of several references: {', '.join(references)}")
        return {"type": "image", "reference": values[0]}
    if isinstance(index, int | float) and not isinstance(index, bool) and math.isfinite(index) and index == int(index):
        return {"type": "image", "index": int(index)}
    return {"type": "image"}


def _text(value: Any, role: str) -> str:
    if role == "assistant" and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return json.dumps(value)
    if not isinstance(value, str):
        raise _bad("a turn whose content is no text")
    return value


def _split(text: str, role: str) -> list[Part]:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON may hold lone surrogates, which tokenizers reject
        raise _bad(f"a turn whose text is no Unicode: {error.reason}") from error
    if role != "assistant":
        for marker, reason in OTHER_MARKERS.items():
            if marker in text:
                raise _bad(f"a {marker} marker: {reason}")
        if TAGGED_IMAGE.search(text):
            raise _bad("an image between <img> and </img>: name it under images and write <image> in its place")
    parts: list[Part] = []
    for number, piece in enumerate(text.split(IMAGE_MARKER)):
        parts += [{"type": "image"}] if number else []
        parts.append({"type": "text", "text": piece})
    return parts


def _bad(reason: str) -> BadSample:
    return BadSample("", None, reason)

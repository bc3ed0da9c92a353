"""Check the bodies of chat completions, and read their images.

What the library would ignore in silence, or fail on halfway, is refused in one sentence here.
"""

from collections.abc import Callable, Iterable
from typing import Any

from PIL import Image

from lit_prune.commands._support.serving.images import ImageReader, ImageSources
from lit_prune.errors import LitPruneError, check_number

ROLES = ("system", "developer", "user", "assistant")
TEXTS, IMAGES = ("text", "input_text"), ("image_url", "input_image")
MESSAGES, STOPS, TEXT = 256, 8, 1_000_000  # messages, stop strings, characters of a request
CHECKED = {
    "model", "messages", "stream", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop",
    "frequency_penalty",
}  # fmt: skip
HARMLESS = {"user", "metadata", "store", "service_tier", "stream_options", "safety_identifier"}  # change no answer
# Fields that are refused unless they hold what the server does anyway.
DEFAULTS: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "chat_template_kwargs": ({},),
}


class ChatReader:
    """Turns bodies of chat completions into ones that the library can answer.

    Args:
        name: that clients know the model by.
        sources: where images may come from, with the limits of a request.
        markers: text that stands for an image or video in prompts, which a message may not hold.
    """

    def __init__(self, name: str, sources: ImageSources, markers: Iterable[str]) -> None:
        self.name, self.sources, self.markers = name, sources, tuple(markers)

    def __call__(self, body: dict[str, Any]) -> dict[str, Any]:
        """Check a body and read its images; raises `LitPruneError`."""
        given = {key: value for key, value in body.items() if value is not None and key not in HARMLESS}
        for key, value in given.items():
            if key not in CHECKED and value not in DEFAULTS.get(key, ()):
                raise LitPruneError(f"`{key!s:.40}` is not supported by this server; leave it out")
        if given.setdefault("model", self.name) != self.name:
            raise LitPruneError(f"`model`: this server has `{self.name}` alone")
        kept = {key: value for key, value in given.items() if key in CHECKED}
        kept |= self._numbers(given)
        kept["messages"] = self._messages(given.get("messages"))
        return kept

    def _numbers(self, given: dict[str, Any]) -> dict[str, Any]:
        """Settings of the answer: checked, with the longest answer filled in."""
        most = self.sources.limits.new_tokens
        check_number("`max_tokens`", given.get("max_tokens"), least=1, most=most, whole=True)
        check_number("`max_completion_tokens`", given.get("max_completion_tokens"), least=1, most=most, whole=True)
        check_number("`temperature`", given.get("temperature"), least=0, most=2)
        check_number("`top_p`", given.get("top_p"), above=0, most=1)
        check_number("`frequency_penalty`", given.get("frequency_penalty"), least=0, most=2)
        check_number("`seed`", given.get("seed"), least=0, most=2**63 - 1, whole=True)
        if not isinstance(given.get("stream", False), bool):
            raise LitPruneError("`stream` must be true or false")
        # Either name means the same; versions of the library differ in which they read.
        asked = given.get("max_completion_tokens", given.get("max_tokens", most))
        settings: dict[str, Any] = {"max_tokens": asked, "max_completion_tokens": asked}
        return settings | ({"stop": _stops(given["stop"])} if "stop" in given else {})

    def _messages(self, messages: Any) -> list[dict[str, Any]]:
        if not isinstance(messages, list) or not 1 <= len(messages) <= MESSAGES:
            raise LitPruneError(f"`messages` must be a list of 1 to {MESSAGES} messages")
        reader, read = self.sources.reader(), []
        for number, message in enumerate(messages):
            where = f"`messages[{number}]`"
            if not isinstance(message, dict) or message.get("role") not in ROLES:
                raise LitPruneError(f"{where} needs a `role` of {', '.join(ROLES)}")
            if unknown := message.keys() - {"role", "content", "name", "refusal"}:
                raise LitPruneError(f"{where}: `{min(map(str, unknown)):.40}` is not supported by this server")
            read.append({"role": message["role"], "content": self._content(message.get("content"), where, reader)})
        texts = [part["text"] for message in read for part in message["content"] if part["type"] == "text"]
        self._check_texts(texts)
        return read

    def _content(self, content: Any, where: str, reader: ImageReader) -> list[dict[str, Any]]:
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list) or not parts:
            raise LitPruneError(f"{where} needs `content`: text, or a list of text and image_url parts")
        return [_part(part, f"{where} part {number}", reader.read) for number, part in enumerate(parts)]

    def _check_texts(self, texts: list[str]) -> None:
        if sum(map(len, texts)) > TEXT:
            raise LitPruneError(f"the messages hold more than {TEXT:,} characters")
        for text in texts:
            if found := next((marker for marker in self.markers if marker in text), None):
                raise LitPruneError(f"a message may not hold {found}: send images as image_url parts")
            if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
                raise LitPruneError("a message holds half of a surrogate pair, which is no text")


def _part(part: Any, where: str, read: Callable[[str], Image.Image]) -> dict[str, Any]:
    """A text or image part; the image is read."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in TEXTS and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind in IMAGES:
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, dict) else url
        if not isinstance(url, str) or not url:
            raise LitPruneError(f"{where}: an image_url part is {{'type': 'image_url', 'image_url': {{'url': ...}}}}")
        return {"type": "image_url", "image_url": {"url": read(url)}}
    raise LitPruneError(f"{where} is neither text nor image_url, which is all that this server reads")


def _stops(stop: Any) -> list[str]:
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > STOPS or not all(isinstance(s, str) and s for s in stops):
        raise LitPruneError(f"`stop` must be text, or a list of at most {STOPS} texts")
    return stops

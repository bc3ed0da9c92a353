"""Read the images of a request from data URLs, files and the web, as far as the server's settings allow."""

import base64
import binascii
import time
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Literal
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from PIL import Image

from lit_prune.commands._support.serving.download import download
from lit_prune.commands._support.serving.limits import Limits
from lit_prune.errors import BadSample, LitPruneError
from lit_prune.files.images import MAX_PIXELS, decode_image, open_image

Urls = Literal["none", "public", "any"]


@dataclass(frozen=True)
class ImageSources:
    """Permitted sources of images; data URLs are always read.

    Args:
        urls: `public` reads http and https URLs of the public internet, `any` those of private networks too.
        folder: files below it may be read, by `file:` URLs or by paths relative to it.
        limits: of a request.
    """

    urls: Urls
    folder: Path | None
    limits: Limits

    def reader(self) -> "ImageReader":
        """Create a reader for one request."""
        return ImageReader(self)


class ImageReader:
    """Reads the images of one request, and counts them, their pixels and what was downloaded against its limits."""

    def __init__(self, sources: ImageSources) -> None:
        limits = sources.limits
        self.sources, self.count = sources, 0
        self.pixels, self.bytes = min(limits.pixels, MAX_PIXELS), limits.request_bytes
        self.deadline = time.monotonic() + limits.seconds

    def read(self, url: str) -> Image.Image:
        """Read one image in RGB; raises `LitPruneError` for one that can't be read or may not be."""
        self.count += 1
        if self.count > self.sources.limits.images:
            raise LitPruneError(f"more than {self.sources.limits.images} images")
        name = f"{self.count} of the request"
        try:
            with self._open(url) as file:
                image = decode_image(file, name, self.pixels)
        except BadSample as error:
            raise LitPruneError(error.reason) from error
        except LitPruneError as error:
            raise LitPruneError(f"image {name}: {error}") from error
        self.pixels -= image.width * image.height
        return image

    def _open(self, url: str) -> BinaryIO:
        if url[:5].lower() == "data:":
            return BytesIO(_from_data_url(url))
        if url[:8].lower().startswith(("http://", "https://")):
            return BytesIO(self._from_web(url))
        if self.sources.folder is None:
            raise LitPruneError("files are not read here: send a data: URL (--image-folder names one to read from)")
        return open_image(self.sources.folder, _path(url))

    def _from_web(self, url: str) -> bytes:
        if self.sources.urls == "none":
            raise LitPruneError("http URLs are not read here: send a data: URL (--image-urls public would allow them)")
        left = max(self.deadline - time.monotonic(), 0)
        content = download(url, self.bytes, left, private=self.sources.urls == "any")
        self.bytes -= len(content)
        return content


def _path(url: str) -> str:
    """Path of a `file:` URL without a host, or of a plain path; raises `LitPruneError` for any other URL."""
    if url[:5].lower() == "file:":
        try:
            parts = urlsplit(url)
        except ValueError as error:
            raise LitPruneError(f"it is no URL: {error}") from error
        if parts.netloc not in ("", "localhost"):
            raise LitPruneError("a file: URL may not name a host")
        return unquote(parts.path)
    if "://" in url:
        raise LitPruneError("images are read from data:, http:, https: and file: URLs")
    return url


def _from_data_url(url: str) -> bytes:
    head, comma, content = url.partition(",")
    if not comma:
        raise LitPruneError("a data: URL needs a comma before its content")
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(content)
    try:
        return base64.b64decode(unquote(content), validate=True)
    except (binascii.Error, ValueError) as error:
        raise LitPruneError(f"its base64 can't be decoded: {error}") from error

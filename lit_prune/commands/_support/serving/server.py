"""Assemble the server of a pruned model, and run it until a signal."""

import asyncio
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from torch import Tensor

from lit_prune.commands._support.serving.gate import ARRIVAL, Gate, error_response
from lit_prune.commands._support.serving.images import ImageSources
from lit_prune.commands._support.serving.limits import Refused
from lit_prune.commands._support.serving.metrics import Metrics
from lit_prune.commands._support.serving.requests import ChatReader
from lit_prune.errors import LitPruneError, in_words, one_line
from lit_prune.host import Record, Session
from lit_prune.host.parts import find
from lit_prune.loading import context_length
from lit_prune.loading.openai_app import CHAT, openai_app
from lit_prune.vlm import VLM

MARKERS = ("image_token", "video_token", "audio_token")  # of processors


class Server:
    """A model with its plug-in, its counters and its app.

    Args:
        vlm: model with a processor, and with the method attached or without one.
        name: that clients know the model by.
        sources: where images may come from, with the limits of a request.
    """

    def __init__(self, vlm: VLM, name: str, sources: ImageSources) -> None:
        self.vlm, self.limits, self.metrics = vlm, sources.limits, Metrics()
        self.context = context_length(vlm.processor, vlm.name)
        markers = [getattr(vlm.processor, marker, None) for marker in MARKERS]
        reader = ChatReader(name, sources, [marker for marker in markers if isinstance(marker, str)])
        app = openai_app(vlm.model, vlm.processor, name, reader, self._observe)
        _answer_errors(app)
        app.add_api_route("/metrics", lambda: Response(self.metrics.text(), media_type=CONTENT_TYPE_LATEST))
        self.app = Gate(app, CHAT, self.limits, self.metrics)

    def _observe(self, inputs: Mapping[str, Any]) -> "_Generation":
        length = inputs["input_ids"].shape[-1]
        if self.context is not None and length > self.context:
            raise LitPruneError(f"the prompt has {length} tokens with its images, and the model reads {self.context}")
        self.metrics.prompt.inc(length)
        return _Generation(self.vlm, self.metrics, inputs["input_ids"])

    def uvicorn(self) -> uvicorn.Server:
        """The HTTP server, not yet running: `await server.serve(sockets=[...])`."""
        config = uvicorn.Config(
            self.app,
            log_level="error",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=self.limits.stop_seconds,
        )
        return uvicorn.Server(config)

    def run(self, listening: socket.socket) -> None:
        """Serve until SIGTERM or SIGINT, then finish the requests that run; a second SIGINT ends at once."""
        # uvicorn raises the signal again when it has stopped: by then all is done.
        before = {number: signal.signal(number, _ignore) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            asyncio.run(self.uvicorn().serve(sockets=[listening]))
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def listen(host: str, port: int) -> socket.socket:
    """Open a socket that connections wait at; raises `LitPruneError` if the address can't be had."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        raise LitPruneError(f"can't serve at {host} port {port}: {error.strerror}") from error


class _Generation:
    """Counts what one `generate()` call keeps and generates."""

    def __init__(self, vlm: VLM, metrics: Metrics, ids: Tensor) -> None:
        self.vlm, self.metrics = vlm, metrics
        self.total = int(find(vlm.model).image_columns(ids).sum())
        self.arrival, self.tokens, self.record = ARRIVAL.get(), 0, Record()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Record the prefill; what was recorded is released at the end, since a connection keeps its last request."""
        host = self.vlm.host
        prunes = host is not None and host.handles
        try:
            with self.vlm.using(Session(record=self.record)) if prunes else nullcontext():
                yield
        finally:
            self.record = Record()

    def token(self) -> None:
        """Count a token; the first one gives the time to first token, and what the prefill kept."""
        self.tokens += 1
        self.metrics.generated.inc()
        if self.tokens == 1:
            self.metrics.first_token.observe(time.perf_counter() - self.arrival)
            visual, kept = self._visual(self.record)
            self.metrics.visual.inc(visual)
            self.metrics.kept.inc(kept)

    def _visual(self, record: Record) -> tuple[float, float]:
        """Visual tokens of the prompt, and how many of them an average layer saw."""
        if record.trace.total_visual is None:  # the plain model, or a prompt without an image
            return self.total, self.total
        return float(record.trace.total_visual.sum()), float(record.trace.average_visual().sum())


def _answer_errors(app: FastAPI) -> None:
    """Answer every error in OpenAI's form; unexpected ones are logged by the server, with a traceback."""

    @app.exception_handler(LitPruneError)
    async def refused(_: Request, error: LitPruneError) -> Response:
        return error_response(error.status if isinstance(error, Refused) else 400, one_line(str(error)))

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        return error_response(error.status_code, one_line(str(error.detail)), dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return error_response(400, f"the request is no JSON object: {error.errors()[0]['msg']}")

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return error_response(500, f"the server failed: {one_line(in_words(error))}")


def _ignore(*_: Any) -> None:
    """Take a signal and do nothing."""

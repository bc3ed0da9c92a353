"""The entrance of a server: limits requests in number, size and time, and counts them."""

import asyncio
import time
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lit_prune.commands._support.serving.limits import Limits, Refused
from lit_prune.commands._support.serving.metrics import Metrics

ARRIVAL: ContextVar[float] = ContextVar("arrival")  # of the current request, by time.perf_counter
DRAINED, DRAIN_SECONDS = 4, 5.0  # times the largest request, and time, that a refused one may go on sending
STREAM_ERROR = b'data: {"error"'  # an event of the library's, in place of text


def error_response(status: int, text: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error as OpenAI's clients expect it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": text, "type": kind, "code": status}}, status, headers)


class Gate:
    """ASGI app around another one. Only requests of POST to `path` are limited and counted.

    A body is read whole before it is passed on, so that one that is too large or too slow never reaches the app.
    """

    def __init__(self, app: ASGIApp, path: str, limits: Limits, metrics: Metrics) -> None:
        self.app, self.path, self.limits, self.metrics = app, path, limits, metrics
        self.running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] != self.path:
            await self.app(scope, receive, send)
            return
        arrival = time.perf_counter()
        ARRIVAL.set(arrival)
        watched = _Watched(send)
        self.running += 1
        self.metrics.in_progress.inc()
        try:
            await self._serve(scope, receive, watched)
        finally:
            self.running -= 1
            self.metrics.in_progress.dec()
            self.metrics.requests.labels(str(watched.status)).inc()
            self.metrics.errors.inc(watched.failed)
            self.metrics.duration.observe(time.perf_counter() - arrival)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if self.running > self.limits.requests:
                raise Refused(503, f"{self.limits.requests} requests are running or waiting: try again later")
            body = await self._body(scope, receive)
        except Refused as error:
            if error.status != 408:
                await self._drain(scope, receive)
            headers = {"Connection": "close"} | ({"Retry-After": "1"} if error.status == 503 else {})
            await error_response(error.status, str(error), headers)(scope, receive, send)
            return
        if body is not None:
            await self.app(scope, _replayed(body, receive), send)

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None if the client has gone."""
        most = self.limits.request_bytes
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > most:
            raise Refused(413, f"the request is larger than {self.limits.request_mb:g} MB")
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise Refused(413, f"the request is larger than {self.limits.request_mb:g} MB")
                    if not message.get("more_body"):
                        return bytes(body)
        except TimeoutError as error:
            raise Refused(408, f"the request did not arrive within {self.limits.seconds:g} seconds") from error

    async def _drain(self, scope: Scope, receive: Receive) -> None:
        """Read and drop what a client is still sending, within limits: most read an answer only after that."""
        if dict(scope["headers"]).get(b"expect", b"").lower() == b"100-continue":  # it waits to be asked for its body
            return
        left, more = DRAINED * self.limits.request_bytes, True
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                while more and left > 0:
                    message = await receive()
                    left -= len(message.get("body", b""))
                    more = message.get("more_body", False)


class _Watched:
    """A `send` that remembers how a response began, and whether it failed. 499: the client left before."""

    def __init__(self, send: Send) -> None:
        self.send, self.status, self.failed = send, 499, True

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.failed = self.status >= 400
        elif message.get("body", b"").startswith(STREAM_ERROR):
            self.failed = True
        await self.send(message)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body that was read before, then what comes."""
    waiting: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay

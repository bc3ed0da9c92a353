"""Download an image from an address that a client chose, without reaching into the server's own network.

Every address that a name resolves to is checked, the connection goes to the address that was checked, and each redirect
is checked as the first URL is. Proxies of the environment are not used: they would resolve names again.
"""

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from contextlib import suppress
from urllib.parse import SplitResult, urljoin, urlsplit

from lit_prune.errors import LitPruneError

REDIRECTS = 3
CHUNK = 65536
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # IPv6 addresses that stand for IPv4 ones
HEADERS = {"User-Agent": "lit_prune", "Accept": "image/*", "Accept-Encoding": "identity"}


def download(url: str, most_bytes: int, seconds: float, private: bool = False) -> bytes:
    """Download what `url` names by GET.

    Args:
        url: http or https, without user name.
        most_bytes: longest body.
        seconds: time for everything.
        private: whether addresses that are not public may be reached.

    Raises:
        LitPruneError: it can't be downloaded, or may not be.
    """
    deadline = time.monotonic() + seconds
    for _ in range(REDIRECTS + 1):
        parts = checked_url(url)
        addresses = resolved(parts, private)
        try:
            status, location, body = _get(_Connection(parts, addresses, deadline), parts, most_bytes)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise LitPruneError(f"{parts.hostname} can't be reached ({type(error).__name__})") from error
        if location is None and status == http.HTTPStatus.OK:
            return body
        if location is None:
            raise LitPruneError(f"{parts.hostname} answers with status {status}")
        url = urljoin(url, location)
    raise LitPruneError(f"more than {REDIRECTS} redirects")


def checked_url(url: str) -> SplitResult:
    """Split a URL; raises `LitPruneError` unless it is http or https with a host, and no user name."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError as error:
        raise LitPruneError(f"it is no URL: {error}") from error
    if not usable or parts.username is not None or not url.isprintable() or " " in url:
        raise LitPruneError("images are read from data:, http: and https: URLs without user name")
    return parts


def resolved(parts: SplitResult, private: bool) -> list[str]:
    """Resolve a URL's host; raises `LitPruneError` if an address is not public, unless `private` allows that."""
    try:
        found = socket.getaddrinfo(parts.hostname, _port(parts), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise LitPruneError(f"{parts.hostname} can't be resolved") from error
    addresses = [str(entry[4][0]) for entry in found]
    if not private and not all(map(is_public, addresses)):
        raise LitPruneError(
            f"{parts.hostname} is an address of a private network, which this server doesn't read from "
            f"(--image-urls any would let it)"
        )
    return list(dict.fromkeys(addresses))


def is_public(address: str) -> bool:
    """True for an address of the public internet, also where it is an IPv4 address written as an IPv6 one."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo or (None, None))[1]
        if ip in NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def _port(parts: SplitResult) -> int:
    return parts.port or (443 if parts.scheme == "https" else 80)


class _Connection(http.client.HTTPConnection):
    """A connection to one of the addresses that were checked before, cut off at a deadline."""

    def __init__(self, parts: SplitResult, addresses: list[str], deadline: float) -> None:
        super().__init__(parts.hostname, _port(parts))
        self.secure, self.addresses, self.deadline = parts.scheme == "https", addresses, deadline
        self.stream: socket.socket | None = None  # `sock` is taken away once a response is read
        self.timer = threading.Timer(max(deadline - time.monotonic(), 0), self._cut)
        self.timer.daemon = True
        if self.secure:
            self.default_port = http.client.HTTPS_PORT

    def connect(self) -> None:
        self.timer.start()
        for place, address in enumerate(self.addresses, 1):
            try:
                self.stream = socket.create_connection((address, self.port), timeout=self.left())
                break
            except OSError:
                if place == len(self.addresses):
                    raise
        if self.secure:
            context = ssl.create_default_context()
            self.stream = context.wrap_socket(self.stream, server_hostname=self.host, do_handshake_on_connect=False)
            self.stream.do_handshake()
        self.sock = self.stream

    def end(self) -> None:
        """Close for good; `close` is called by the library as soon as a last response has begun."""
        self.timer.cancel()
        self.close()
        if self.stream is not None:
            self.stream.close()

    def left(self) -> float:
        """Seconds until the deadline; raises `TimeoutError` if it has passed."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("no time left")
        return left

    def _cut(self) -> None:
        """End the reads of another thread: a timeout of the socket alone starts again with every byte."""
        if self.stream is not None:
            with suppress(OSError):
                self.stream.shutdown(socket.SHUT_RDWR)


def _get(connection: _Connection, parts: SplitResult, most_bytes: int) -> tuple[int, str | None, bytes]:
    """Status, target of a redirect and body of a GET request."""
    try:
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", target, headers=HEADERS)
        response = connection.getresponse()
        location = response.getheader("Location") if 300 <= response.status < 400 else None
        if location is not None or response.status != http.HTTPStatus.OK:
            return response.status, location, b""
        body = bytearray()
        while chunk := response.read1(CHUNK):
            body += chunk
            connection.left()
            if len(body) > most_bytes:
                raise LitPruneError(f"{parts.hostname} sends more than {most_bytes:,} bytes")
        connection.left()  # a body that was cut off may look complete
        return response.status, None, bytes(body)
    finally:
        connection.end()

"""Limits on what a request may ask for, and the errors of requests that exceed them."""

from dataclasses import dataclass, fields

from lit_prune.errors import LitPruneError, check_number

MEGA = 1_000_000


class Refused(LitPruneError):
    """A request that is refused with an HTTP status other than 400."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """Limits on requests; one that exceeds them is answered with an error.

    Args:
        requests: Requests in progress or waiting, e.g. --limits.requests 64; further ones get status 503.
        request_mb: Megabytes of a request with its data URLs, and of all images that are downloaded for it.
        images: Images of a request.
        megapixels: Megapixels of all images of a request, read from their headers before they are decoded.
        new_tokens: Longest answer in tokens; also the default of a request that doesn't say.
        seconds: Time for receiving a request, and for downloading its images.
        stop_seconds: Time that running requests have to finish after a signal to stop.
    """

    requests: int = 64
    request_mb: float = 20
    images: int = 16
    megapixels: float = 50
    new_tokens: int = 1024
    seconds: float = 30
    stop_seconds: int = 60

    def __post_init__(self) -> None:
        for field in fields(self):
            whole = field.type in (int, "int")
            bound = {"least": 1} if whole else {"above": 0}
            check_number(f"--limits.{field.name}", getattr(self, field.name), whole=whole, **bound)

    @property
    def request_bytes(self) -> int:
        """Bytes of a request."""
        return int(self.request_mb * MEGA)

    @property
    def pixels(self) -> int:
        """Pixels of all images of a request."""
        return int(self.megapixels * MEGA)

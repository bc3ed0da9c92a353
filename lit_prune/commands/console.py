"""What the commands print: tables and results on stdout, messages on stderr."""

import sys

from rich.console import Console

out = Console()
err = Console(stderr=True)


def say(message: str) -> None:
    """Print a message for people on stderr, so that stdout can be piped."""
    err.print(message, markup=False, highlight=False)


def fail(message: str, hint: str | None = None) -> None:
    """Print an error as one message on stderr."""
    print(f"error: {message.strip()}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)

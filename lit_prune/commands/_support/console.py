"""What the commands print: tables and results on stdout, messages on stderr."""

from rich.console import Console

out = Console()
err = Console(stderr=True)


def say(message: str) -> None:
    """Print a message for people on stderr, so that stdout can be piped; commands in it can be copied whole."""
    err.print(message, markup=False, highlight=False, soft_wrap=True)

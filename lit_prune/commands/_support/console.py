"""Output of the commands: tables and results on stdout, messages on stderr."""

from rich.console import Console

out = Console()
err = Console(stderr=True)


def say(message: str) -> None:
    """Print a message on stderr, so that stdout can be piped; not wrapped, so that commands can be copied."""
    err.print(message, markup=False, highlight=False, soft_wrap=True)

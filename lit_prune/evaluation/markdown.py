"""Text and tables in Markdown, whatever the text is."""

from collections.abc import Sequence


def literal(text: str) -> str:
    """Text on one line that ends no cell of a table and starts no HTML."""
    for special in ("\\", "|", "<"):
        text = text.replace(special, f"\\{special}")
    return " ".join(text.splitlines())


def row(cells: Sequence[str]) -> str:
    """A row of a table, of cells that are Markdown already."""
    return f"| {' | '.join(cells)} |"

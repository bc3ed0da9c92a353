"""Tables of a report, as text to show and numbers to sort by: for the page, for W&B, and in Markdown."""

import math
from dataclasses import dataclass

from lit_prune.evaluation import markdown
from lit_prune.evaluation.report.intervals import Interval

UNKNOWN = "–"


@dataclass(frozen=True)
class Figure:
    """Cell of a table: `text`, `more` in small print, `order` to sort by, `strong` for bold type.

    `ends`: ends of the figure's interval, in its unit.
    """

    text: str
    order: float | str | None = None
    more: str = ""
    strong: bool = False
    ends: tuple[float, float] | None = None


@dataclass(frozen=True)
class Column:
    """A column's title, and what it means in a sentence."""

    title: str
    meaning: str = ""


@dataclass(frozen=True)
class Table:
    """A sortable table; the first `names` columns are text."""

    title: str
    columns: list[Column]
    rows: list[list[Figure]]
    names: int = 2

    def flat(self) -> tuple[list[str], list[list[float | str | None]]]:
        """Titles and rows of plain values; an interval makes two more columns, "X, low" and "X, high"."""
        ranged = [any(row[i].ends for row in self.rows) for i in range(len(self.columns))]
        titles: list[str] = []
        for column, wide in zip(self.columns, ranged, strict=True):
            titles += [column.title, *([f"{column.title}, low", f"{column.title}, high"] if wide else [])]
        lines = []
        for row in self.rows:
            line: list[float | str | None] = []
            for cell, wide in zip(row, ranged, strict=True):
                line += [cell.order, *((cell.ends or (None, None)) if wide else ())]
            lines.append(line)
        return titles, lines

    def markdown(self) -> str:
        """The table in Markdown under its title; columns that say nothing are left out."""
        shown = [i for i in range(len(self.columns)) if any(row[i].text != UNKNOWN for row in self.rows)]
        titles = [markdown.literal(self.columns[i].title) for i in shown]
        rules = ["---" if i < self.names else "---:" for i in shown]
        lines = [[_in_markdown(each[i]) for i in shown] for each in self.rows]
        return "\n".join([f"### {markdown.literal(self.title)}", "", *map(markdown.row, (titles, rules, *lines))])


def _in_markdown(cell: Figure) -> str:
    text = markdown.literal(cell.text)
    return (f"**{text}**" if cell.strong else text) + (f" ({markdown.literal(cell.more)})" if cell.more else "")


def number(value: float | None, scale: float = 1.0, digits: int = 1) -> Figure:
    """A figure, a dash where it is unknown."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return Figure(UNKNOWN)
    return Figure(f"{scale * value:.{digits}f}", scale * value)


def ranged(found: Interval | None, sign: str = "") -> Figure:
    """A share in per cent with its interval; `sign` "+" for differences, in bold type where the interval has no 0."""
    if found is None or not math.isfinite(found.value):
        return Figure(UNKNOWN)
    value, low, high = (100 * each for each in (found.value, found.low, found.high))
    if not math.isfinite(low):
        return Figure(f"{value:{sign}.1f}", value)
    more = f"{low:{sign}.1f} to {high:{sign}.1f}"
    return Figure(f"{value:{sign}.1f}", value, more, bool(sign) and found.excludes_zero, (low, high))


def name(text: object) -> Figure:
    """A cell of words."""
    return Figure(str(text), str(text))

"""Styles of a comparison's methods, and the pages that they are drawn on."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from lit_prune.evaluation.labels import Line, Name, name_lines

DPI = 160
GREY = "#7a828b"
PANEL = (4.4, 4.0)  # inches, without labels
COLOURS = [  # twenty distinguishable colours, none of them grey
    *("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#bcbd22", "#5b8def"),
    *("#0b3c5d", "#7a0f12", "#0f4d19", "#4b1d73", "#a34f00", "#006d77", "#3e1f17", "#99226b", "#6b6b00", "#3fbf9f"),
]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h", "d", "8", "H"]
MARKERS += [(4, 1, 0), (6, 1, 0), (3, 1, 0), (8, 1, 0), (4, 1, 45), (3, 1, 60), (3, 0, 15), (4, 0, 20), (5, 0, 36)]
DASHES = ["-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5))]


@dataclass(frozen=True)
class Style:
    """Colour, marker and dashes of a method; no other has its colour or its marker."""

    colour: str
    marker: Any
    dashes: Any

    def marks(self, size: float) -> dict[str, Any]:
        """A marker of this size; stars are drawn larger, and without an edge, which would fill their gaps."""
        star = self.marker in ("*", "P", "X") or (isinstance(self.marker, tuple) and self.marker[1] == 1)
        edge = {"markeredgewidth": 0.0} if star else {"markeredgecolor": "white", "markeredgewidth": 0.4}
        return {"color": self.colour, "marker": self.marker, "markersize": size * (1.45 if star else 1.0), **edge}


def styles_of(methods: Sequence[str]) -> dict[str, Style]:
    """A style for each method, in order of appearance."""
    names = list(dict.fromkeys(methods))
    colours = COLOURS[: len(names)]
    if len(names) > len(COLOURS):
        colours = [to_hex(colormaps["turbo"](0.03 + 0.94 * i / (len(names) - 1))) for i in range(len(names))]
    # Beyond the markers that there are, polygons and stars of ever more corners.
    more = [(corners, i % 2, 0) for corners in range(9, 9 + len(names)) for i in (0, 1)]
    markers = [*MARKERS, *more]
    return {name: Style(colours[i], markers[i], DASHES[i % len(DASHES)]) for i, name in enumerate(names)}


def room(methods: Iterable[str]) -> float:
    """Inches for names beside a panel."""
    return 0.4 + 0.058 * max(map(len, methods))


class Page:
    """Panels of one size in inches, each with room for names to its right.

    Args:
        panels: how many. size: of each. columns: at most so many in a row.
        left, right: room for ticks and labels, and for names.
    """

    BOTTOM, TOP = 0.62, 0.34

    def __init__(
        self,
        panels: int,
        size: tuple[float, float] = PANEL,
        columns: int = 2,
        left: float = 0.62,
        right: float = 1.75,
    ) -> None:
        columns = min(columns, panels)
        lines, self.height = -(-panels // columns), size[1]
        cell = (left + size[0] + right, self.BOTTOM + size[1] + self.TOP)
        whole = (columns * cell[0], lines * cell[1])
        self.figure = Figure(figsize=whole, dpi=DPI, facecolor="white")
        FigureCanvasAgg(self.figure)
        self.axes = []
        for panel in range(panels):
            x, y = panel % columns * cell[0] + left, (lines - 1 - panel // columns) * cell[1] + self.BOTTOM
            where = (x / whole[0], y / whole[1], size[0] / whole[0], size[1] / whole[1])
            self.axes.append(self.figure.add_axes(where))

    def name(self, axes: Axes, names: Sequence[Name], drawn: Sequence[Line] = ()) -> None:
        """Write names beside the panel, each at the height of its point or as near as there is room."""
        name_lines(axes, names, self.height, drawn)

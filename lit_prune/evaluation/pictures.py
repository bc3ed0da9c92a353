"""Pictures of what a method keeps: the image with dropped patches darkened, one row a method, one column a stage.

Everything here is a pure function of arrays. `mark` alone is enough for an image log; `draw_page` sets the whole page.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import wrap

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lit_prune.evaluation.views import Box, Part, Pixels, View

Mask = Bool[np.ndarray, " tokens"]

DPI = 240
CELL, GAP, MARGIN = 1.6, 0.12, 0.16  # inches
LABEL, TITLE, LINE = 1.6, 0.2, 0.19
BAR = 0.24  # of a cell with scores, for their colour bar
INK, GREY, RIGHT, WRONG = "#1f2328", "#7a828b", "#1a7f37", "#c62f2f"
DARK, TINT = 0.45, 0.3  # brightness of a dropped patch, and how much of its colour is left


@dataclass(frozen=True)
class Row:
    """One method: its name, what stands under it, its answer (right: true, false, unknown), and its stages.

    `stages` are (title, kept tokens of the grid); `scores` those of the first stage, -inf where a token had none.
    """

    name: str
    detail: str = ""
    answer: str = ""
    right: bool | None = None
    stages: list[tuple[str, Mask]] = field(default_factory=list)
    scores: Float[np.ndarray, " tokens"] | None = None


def titled(stages: Mapping[int, Mask]) -> list[tuple[str, Mask]]:
    """The stages of a `Row`, from the kept tokens after each pruning layer."""
    counts = {layer: int(kept.sum()) for layer, kept in stages.items()}
    return [(f"layer {i} · {counts[i]} token{'' if counts[i] == 1 else 's'}", kept) for i, kept in stages.items()]


def mark(view: View, kept: Mask) -> Pixels:
    """The picture with dropped patches dark and almost grey; kept ones as they are."""
    marked = view.pixels.copy()
    for part in view.parts:
        x0, y0, x1, y1 = part.box
        image, (rows, columns) = view.pixels[y0:y1, x0:x1], part.tokens.shape
        down, across = np.arange(y1 - y0) * rows // (y1 - y0), np.arange(x1 - x0) * columns // (x1 - x0)
        stays = kept[part.tokens][down][:, across, None]
        grey = image.mean(-1, keepdims=True)
        marked[y0:y1, x0:x1] = np.where(stays, image, DARK * (TINT * image + (1 - TINT) * grey)).astype(np.uint8)
    return marked


def borders(part: Part, kept: Mask) -> Float[np.ndarray, "lines 2 2"]:
    """Lines (x, y) between kept and other patches of a part, in pixels of the picture."""
    x0, y0, x1, y1 = part.box
    rows, columns = part.tokens.shape
    grid = np.pad(kept[part.tokens], 1)
    row, column = np.nonzero(grid[1:, :] != grid[:-1, :])
    across = np.stack([np.stack([column - 1, row], 1), np.stack([column, row], 1)], 1)
    row, column = np.nonzero(grid[:, 1:] != grid[:, :-1])
    down = np.stack([np.stack([column, row - 1], 1), np.stack([column, row], 1)], 1)
    return np.concatenate([across, down]) * np.array([(x1 - x0) / columns, (y1 - y0) / rows]) + np.array([x0, y0])


def draw_page(
    view: View, rows: Sequence[Row], title: str = "", subtitle: str = "", boxes: Sequence[Box] = ()
) -> Figure:
    """One page: rows are methods; columns are the image with the asked boxes, scores if any row has them, the stages.

    Args:
        view: the image as the model sees it.
        rows: the methods.
        title: the question.
        subtitle: small, under the title.
        boxes: x0, y0, x1, y1 in pixels of the picture.
    """
    stages = max((len(row.stages) for row in rows), default=0)
    scored = [r for r, row in enumerate(rows) if row.scores is not None]
    heat = bool(scored)
    sheet = Sheet(len(rows), 1 + stages + heat, title, subtitle)
    for r, row in enumerate(rows):
        sheet.label(r, row)
        legend = "image  □ what is asked about" if boxes else "image"
        _picture(sheet.cell(r, 0), view.pixels, legend if r == 0 else "", boxes=boxes)
        if row.scores is not None:
            _heat(
                sheet.cell(r, 1, BAR),
                sheet.below(r, 1),
                view,
                row.scores,
                "scores of the first stage" if r == scored[0] else "",
            )
        for s, (name, kept) in enumerate(row.stages):
            lines = np.concatenate([borders(part, kept) for part in view.parts])
            _picture(sheet.cell(r, 1 + heat + s), mark(view, kept), name, lines)
    return sheet.figure


class Sheet:
    """A page of equal cells under a title, with room for text to the left of each row. Lengths are inches."""

    def __init__(self, rows: int, columns: int, title: str = "", subtitle: str = "") -> None:
        self.width = 2 * MARGIN + LABEL + columns * CELL + (columns - 1) * GAP
        heads = [(line, 10.5, INK) for line in wrap(title, int(self.width * 11))]
        heads += [(line, 7.5, GREY) for line in wrap(subtitle, int(self.width * 15))]
        self.head = len(heads) * LINE + bool(heads) * 0.06
        self.height = 2 * MARGIN + self.head + rows * (TITLE + CELL) + (rows - 1) * GAP
        self.figure = Figure(figsize=(self.width, self.height), dpi=DPI, facecolor="white")
        FigureCanvasAgg(self.figure)
        self._column(MARGIN, heads)

    def cell(self, row: int, column: int, margin: float = 0.0) -> Axes:
        """Empty axes of one cell, square, with so much left free below."""
        side = CELL - margin
        axes = self._axes(row, column, (CELL - side) / 2, margin, side, side)
        axes.set_axis_off()
        return axes

    def below(self, row: int, column: int) -> Axes:
        """Axes of a colour bar in what a cell leaves free."""
        return self._axes(row, column, BAR / 2, 0.13, CELL - BAR, 0.06)

    def _axes(self, row: int, column: int, x: float, y: float, width: float, height: float) -> Axes:
        """Axes at a place in a cell, counted from its lower left corner."""
        left, bottom = MARGIN + LABEL + column * (CELL + GAP) + x, self.height - self._top(row) - CELL + y
        return self.figure.add_axes((left / self.width, bottom / self.height, width / self.width, height / self.height))

    def label(self, row: int, text: Row) -> None:
        """Name, detail and answer to the left of a row."""
        colour = {True: RIGHT, False: WRONG, None: INK}[text.right]
        tick = {True: " ✓", False: " ✗", None: ""}[text.right]
        lines = [(line, 9, INK) for line in wrap(text.name, 20)]
        lines += [(line, 7, GREY) for line in wrap(text.detail, 30)]
        lines += [(line, 8.5, colour) for line in wrap(text.answer + tick, 22, max_lines=5, placeholder=" …")]
        self._column(self._top(row) + 0.02, lines)

    def _top(self, row: int) -> float:
        return MARGIN + self.head + row * (TITLE + CELL + GAP) + TITLE

    def _column(self, top: float, lines: list[tuple[str, float, str]]) -> None:
        """Lines of (text, size, colour) under each other, from `top` down."""
        for i, (text, size, colour) in enumerate(lines):
            y = 1 - (top + i * LINE) / self.height
            self.figure.text(MARGIN / self.width, y, text, size=size, color=colour, va="top", parse_math=False)


def _picture(
    axes: Axes,
    image: Pixels,
    title: str,
    lines: Float[np.ndarray, "lines 2 2"] | None = None,
    boxes: Sequence[Box] = (),
) -> None:
    height, width = image.shape[:2]
    longest = max(height, width)
    interpolation = "nearest" if longest * 1.5 < CELL * DPI else "antialiased"
    axes.imshow(image, extent=(0, width, height, 0), interpolation=interpolation)
    axes.set_title(title, size=7, color=GREY, pad=3)
    if lines is not None:
        axes.add_collection(LineCollection(lines, colors="white", linewidths=0.6, capstyle="projecting"))
    for x0, y0, x1, y1 in boxes:
        for colour, points, outside in (("black", 2.4, 1.2), ("white", 1.0, 0.9)):
            pad = outside / 72 / CELL * longest
            frame = Rectangle((x0 - pad, y0 - pad), x1 - x0 + 2 * pad, y1 - y0 + 2 * pad)
            frame.set(fill=False, edgecolor=colour, linewidth=points, clip_on=False)
            axes.add_patch(frame)
    axes.set(xlim=(0, width), ylim=(height, 0))


def _heat(axes: Axes, bar: Axes, view: View, scores: Float[np.ndarray, " tokens"], title: str) -> None:
    """Scores as colours, without the few highest and lowest that would leave no colours for the rest; and their bar."""
    known = scores[np.isfinite(scores)]
    low, high = np.quantile(known, (0.02, 0.98)) if len(known) else (0.0, 1.0)
    shown, (height, width) = None, view.pixels.shape[:2]
    for part in view.parts:
        x0, y0, x1, y1 = part.box
        grid = np.where(np.isfinite(scores), scores, np.nan)[part.tokens]
        extent = (x0, x1, y1, y0)
        shown = axes.imshow(grid, cmap="magma", vmin=low, vmax=high, interpolation="nearest", extent=extent)
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_title(title, size=7, color=GREY, pad=3)
    bar.figure.colorbar(shown, cax=bar, orientation="horizontal", ticks=[]).outline.set_linewidth(0.4)
    bar.set_xticks([])
    for place, value, side in ((0, low, "left"), (1, high, "right")):
        bar.text(place, -0.4, f"{value:.3g}", size=6, color=GREY, ha=side, va="top", transform=bar.transAxes)

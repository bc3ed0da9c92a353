"""Names beside a plot's lines, in place of a legend, none on top of another."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox, Transform

SIZE = 7.0  # points
FAR = 0.8  # share of a panel's width; points left of it have their names inside
REACHES = (5, 8, 14, 22, 32, 46, 64)  # points between a name and what it names

Line = Sequence[tuple[float, float]]


class Name(NamedTuple):
    """A name of something at (x, y), in the colour that it is drawn in."""

    x: float
    y: float
    text: str
    colour: str


def apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places as near to the `wanted` ones as can be, in their order, at least `gap` apart, from `low` to `high`.

    Where there is no room for such gaps they are smaller, and all the same.
    """
    count = len(wanted)
    gap = min(gap, (high - low) / max(1, count - 1))
    order = sorted(range(count), key=lambda index: wanted[index])
    # Less `gap` for every one below, places need only not fall: neighbours that would are pooled at their mean.
    pools: list[tuple[float, int]] = []
    for rank, index in enumerate(order):
        mean, members = wanted[index] - gap * rank, 1
        while pools and pools[-1][0] > mean:
            other, more = pools.pop()
            mean, members = (mean * members + other * more) / (members + more), members + more
        pools.append((mean, members))
    flat = [min(max(mean, low), high - gap * (count - 1)) for mean, members in pools for _ in range(members)]
    places = dict(zip(order, (place + gap * rank for rank, place in enumerate(flat)), strict=True))
    return [places[index] for index in range(count)]


def name_lines(axes: Axes, names: Sequence[Name], height: float, drawn: Sequence[Line] = ()) -> None:
    """Write names to the right of a panel `height` inches high, each joined to its point by a thin line.

    Points that lie far from there get theirs inside, off what is `drawn`. The axes' scales and limits must be what they
    will be.
    """
    to_axes = _fixed(axes)
    points = {name: to_axes.transform((name.x, name.y)) for name in names}
    inside = [name for name in names if points[name][0] < FAR]
    outside = [name for name in names if points[name][0] >= FAR]
    gap = SIZE * 1.18 / 72 / height
    places = apart([float(points[name][1]) for name in outside], gap, 0.0, 1.0)
    for name, place in zip(outside, places, strict=True):
        x, y = points[name]
        options = {"color": name.colour, "clip_on": False, "transform": axes.transAxes}
        axes.plot([x, 1.015, 1.045], [y, place, place], linewidth=0.5, alpha=0.5, **options)
        axes.text(1.055, place, name.text, size=SIZE, va="center", color=name.colour, transform=axes.transAxes)
    name_points(axes, inside, drawn)


def name_points(axes: Axes, names: Sequence[Name], drawn: Sequence[Line]) -> None:
    """Write names near their points inside a panel, each on no other name, and on as few points and lines as can be.

    `drawn` are the lines with their points. A name that has to go far is joined to its point by a thin line.
    """
    _fixed(axes)
    renderer, pixels = axes.figure.canvas.get_renderer(), axes.figure.dpi / 72
    frame, lines = axes.get_window_extent(), [axes.transData.transform(list(line)) for line in drawn]
    shares = np.linspace(0, 1, 25)[1:-1, None]
    points = np.concatenate(lines) if lines else np.empty((0, 2))
    between = np.concatenate([np.empty((0, 2)), *(a + (b - a) * shares for line in lines for a, b in pairwise(line))])
    taken: list[Bbox] = []
    for name in names:
        ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.3, "alpha": 0.6}
        text = axes.text(0, 0, name.text, size=SIZE, color=name.colour, transform=None, bbox=ground)
        box, point = text.get_window_extent(renderer), axes.transData.transform((name.x, name.y))
        best, where = None, None
        for reach in REACHES:
            for angle in range(0, 360, 30):
                corner = _corner(point, angle, reach * pixels, box.width, box.height)
                here = Bbox.from_bounds(*corner, box.width, box.height)
                on = _inside(here, points) + _inside(here, between) / 6
                hit = sum(here.overlaps(other) for other in taken) + (not _within(here, frame))
                cost = 1000 * hit + 30 * on + reach
                if best is None or cost < best:
                    best, where, distance = cost, here, reach
        taken.append(where)
        text.set_position((where.x0, where.y0 - (box.y0 if box.y0 < 0 else 0)))
        if distance > REACHES[1]:
            end = (min(max(point[0], where.x0), where.x1), min(max(point[1], where.y0), where.y1))
            line = axes.transData.inverted().transform([point, end])
            axes.plot(*line.T, color=name.colour, linewidth=0.5, alpha=0.6, scalex=False, scaley=False)


def _fixed(axes: Axes) -> Transform:
    """From data to shares of the panel, whose limits stay from now on."""
    axes.set_xlim(axes.get_xlim())
    axes.set_ylim(axes.get_ylim())
    return axes.transData + axes.transAxes.inverted()


def _corner(point: Sequence[float], angle: float, reach: float, width: float, height: float) -> tuple[float, float]:
    """Lower left corner of a box that lies in a direction from a point, `reach` away from it."""
    across, up = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    middle = (point[0] + across * (reach + width / 2), point[1] + up * (reach + height / 2))
    return middle[0] - width / 2, middle[1] - height / 2


def _inside(box: Bbox, points: np.ndarray) -> int:
    """Number of points that lie in a box."""
    return int(((points >= box.min) & (points <= box.max)).all(1).sum())


def _within(box: Bbox, frame: Bbox) -> bool:
    return frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1

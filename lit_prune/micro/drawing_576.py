"""Drawing for the world of 576 visual tokens: textured ground, shapes with details on them, and clutter.

Numpy alone; every function takes the generator that its random choices come from.
"""

from functools import cache

import numpy as np

from lit_prune.micro.drawing import COLOURS, glyph, shape_mask

Pixels = np.ndarray  # float[height, width, 3], 0 to 255
GROUNDS = {  # muted, so that the eight vivid colours of the objects stand out on each of them
    "grey": (118, 118, 118),
    "brown": (112, 78, 52),
    "pink": (188, 138, 146),
    "olive": (104, 112, 62),
    "navy": (40, 48, 92),
    "teal": (48, 104, 104),
}
TEXTURES = ("smooth", "striped", "checked", "dotted", "wavy", "speckled", "bricked")
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring", "star", "hexagon")
# Side of the centred square inside a shape on which a detail is drawn, as a share of the shape's size.
INNER = {"square": 0.92, "circle": 0.68, "hexagon": 0.68, "diamond": 0.5}


@cache
def shape_576(shape: str, size: int) -> np.ndarray:
    """The shape as a mask of size x size pixels."""
    if shape not in ("star", "hexagon"):
        return shape_mask(shape, size)
    y, x = (np.mgrid[:size, :size] + 0.5) / size * 2 - 1
    angle, radius = np.arctan2(x, -y), np.hypot(x, y)
    if shape == "hexagon":
        return np.maximum(np.abs(x) * 0.5 + np.abs(y) * np.sqrt(0.75), np.abs(x)) <= 0.88
    spike = np.abs((angle / (2 * np.pi) * 5 + 0.5) % 1 - 0.5) * 2  # 0 at the five tips, 1 between them
    return radius <= 1.05 - 0.65 * spike**0.8


# Ground


def texture(kind: str, extent: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """float[height, width]: what a texture adds to the brightness of its ground; scale, angle and contrast vary."""
    height, width = extent
    y, x = np.mgrid[:height, :width].astype(np.float32)
    period, strength = rng.uniform(7, 13), rng.uniform(14, 26)
    y, x = y + rng.uniform(0, 50), x + rng.uniform(0, 50)
    if kind == "smooth":
        return np.zeros(extent, np.float32)
    if kind == "striped":
        angle = rng.uniform(0, np.pi)
        return strength * np.sign(np.sin(2 * np.pi * (np.cos(angle) * x + np.sin(angle) * y) / period))
    if kind == "checked":
        return strength * (((x // (period * 0.7)) + (y // (period * 0.7))) % 2 * 2 - 1)
    if kind == "dotted":
        near = np.hypot(x % period - period / 2, y % period - period / 2) < 0.3 * period
        return strength * np.where(near, 1.8, -0.4)
    if kind == "wavy":
        bend = 0.35 * period * np.sin(2 * np.pi * x / (2.2 * period))
        return strength * np.sign(np.sin(2 * np.pi * (y + bend) / period))
    if kind == "speckled":
        grains = rng.random((height // 2 + 1, width // 2 + 1)).repeat(2, 0).repeat(2, 1)[:height, :width]
        return 1.6 * strength * ((grains > 0.86).astype(np.float32) - (grains < 0.14))
    row = y // (0.8 * period)
    joint = (y % (0.8 * period) < 1.5) | ((x + row % 2 * 0.9 * period) % (1.8 * period) < 1.5)
    return strength * np.where(joint, -1.7, 0.4)


def paint_ground(pixels: Pixels, box: tuple, kind: str, colour: str, rng: np.random.Generator) -> None:
    """Fill a region of the ground, in place: colour, texture, and light that changes slowly over the region."""
    x0, y0, x1, y1 = box
    y, x = np.mgrid[: y1 - y0, : x1 - x0].astype(np.float32) / 100
    light = rng.uniform(-14, 14) * x + rng.uniform(-14, 14) * y + rng.uniform(-10, 10)
    tint = np.array(GROUNDS[colour], np.float32) + rng.uniform(-8, 8, 3).astype(np.float32)
    pixels[y0:y1, x0:x1] = tint + (light + texture(kind, (y1 - y0, x1 - x0), rng))[..., None]


def paint_clutter(pixels: Pixels, count: int, rng: np.random.Generator) -> None:
    """Things that are no objects, in place: strokes, bent lines, outlines and pebbles, in vivid or in other colours.

    Lines are 2 pixels wide and pebbles smaller than 10, where the smallest object has 16: none can pass for an object.
    """
    size = pixels.shape[0]
    for _ in range(count):
        vivid = rng.random() < 0.6
        colour = np.array(list(COLOURS.values())[rng.integers(len(COLOURS))]) if vivid else rng.uniform(20, 235, 3)
        kind, (x, y) = rng.integers(4), rng.uniform(4, size - 4, 2)
        if kind == 3:
            side = int(rng.integers(4, 10))
            top, left = (int(min(v, size - side)) for v in (y, x))
            name = SHAPES[rng.integers(len(SHAPES))] if side > 6 else "circle"
            pixels[top : top + side, left : left + side][shape_576(name, side)] = colour
            continue
        steps = np.linspace(0, 1, 60)
        if kind == 2:  # an outline
            turn, radius = rng.uniform(0, 2 * np.pi), rng.uniform(5, 12)
            sides = rng.integers(3, 7)
            corners = turn + 2 * np.pi * np.arange(sides + 1) / sides
            at = steps * sides
            low = np.minimum(at.astype(int), sides - 1)
            px, py = np.cos(corners) * radius, np.sin(corners) * radius
            along = at - low
            line = x + px[low] * (1 - along) + px[low + 1] * along, y + py[low] * (1 - along) + py[low + 1] * along
        else:
            angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(10, 34)
            bend = 0.0 if kind == 0 else rng.uniform(-2.5, 2.5)
            turn = angle + bend * steps
            line = x + np.cumsum(np.cos(turn)) * length / 60, y + np.cumsum(np.sin(turn)) * length / 60
        columns, rows = (np.round(v).astype(int) for v in line)
        columns, rows = np.concatenate([columns, columns + 1, columns]), np.concatenate([rows, rows, rows + 1])
        inside = (columns >= 0) & (columns < size) & (rows >= 0) & (rows < size)
        pixels[rows[inside], columns[inside]] = colour


# Objects and the details on them. Each detail function returns the boxes of its parts, as `parts` promises.

Box = tuple[int, int, int, int]


def tint_of(colour: str, rng: np.random.Generator) -> np.ndarray:
    """The colour as seen under a slightly different light."""
    return np.array(COLOURS[colour]) * rng.uniform(0.88, 1.0) + rng.uniform(-8, 8, 3)


def ink_on(tint: np.ndarray) -> np.ndarray:
    """Black on light colours, white on dark ones."""
    return np.full(3, 250.0 if tint.mean() < 130 else 10.0)


def paint_object(
    pixels: Pixels, box: Box, colour: str, shape: str, pattern: str, marks: list[np.ndarray], rng: np.random.Generator
) -> None:
    """Paint an object into its box, in place.

    Args:
        pixels: the image.
        box: of the object.
        colour: one of `COLOURS`. shape: one of `SHAPES`.
        pattern: "stripes" (with `marks` a mask of the dark ones), "checks", or anything else for a plain surface.
        marks: masks over the whole image that are painted in ink, or in a darker tint for stripes and checks.
        rng: for the shade.
    """
    x0, y0, x1, y1 = box
    mask = shape_576(shape, x1 - x0)
    area, tint = pixels[y0:y1, x0:x1], tint_of(colour, rng)
    area[mask] = tint
    second = 0.45 * tint if pattern in ("stripes", "checks") else ink_on(tint)
    for mark in marks:
        area[mask & mark] = second


def figure_scale(side: int, digits: int) -> int:
    """Pixels per dot of the font with which so many figures fit into a square of this side; 0 if none does."""
    return min((side - 2) // (6 * digits - 1), (side - 2) // 7, 3)


def dot_diameter(side: int) -> int:
    """Of the dots in a square of this side, 3 x 3 places."""
    return max(4, side // 3 - 3)


def figures_mask(digits: tuple[int, ...], size: int, scale: int) -> tuple[np.ndarray, list[Box]]:
    """Figures side by side in the middle of size x size pixels, and each one's box in it."""
    mask = np.zeros((size, size), bool)
    width = (6 * len(digits) - 1) * scale
    top, left = (size - 7 * scale) // 2, (size - width) // 2
    boxes = []
    for figure in digits:
        mask[top : top + 7 * scale, left : left + 5 * scale] = glyph(figure).repeat(scale, 0).repeat(scale, 1)
        boxes.append((left, top, left + 5 * scale, top + 7 * scale))
        left += 6 * scale
    return mask, boxes


def dots_mask(corners: tuple[tuple[int, int], ...], size: int, diameter: int) -> tuple[np.ndarray, list[Box]]:
    """Dots with these upper left corners in size x size pixels, and each one's box."""
    mask, dot = np.zeros((size, size), bool), shape_576("circle", diameter)
    boxes = []
    for x, y in corners:
        mask[y : y + diameter, x : x + diameter] |= dot
        boxes.append((x, y, x + diameter, y + diameter))
    return mask, boxes


def arrow_mask(direction: str, size: int, side: int) -> tuple[np.ndarray, list[Box]]:
    """An arrow of side x side pixels in the middle of size x size pixels, and its box."""
    y, x = (np.mgrid[:side, :side] + 0.5) / side * 2 - 1
    arrow = ((np.abs(x) <= 0.22) & (y > -0.4)) | ((y <= 0) & (np.abs(x) <= y + 1))  # points up
    arrow = np.rot90(arrow, ("up", "left", "down", "right").index(direction))
    start = (size - side) // 2
    mask = np.zeros((size, size), bool)
    mask[start : start + side, start : start + side] = arrow
    return mask, [(start, start, start + side, start + side)]


def stripes_mask(direction: str, size: int) -> tuple[np.ndarray, list[Box]]:
    """Dark stripes that run "across" or "upright" over size x size pixels, and the box of it all."""
    lines = np.arange(size) * max(3, round(size / 8)) // size % 2 == 1
    mask = np.broadcast_to(lines[:, None] if direction == "across" else lines[None, :], (size, size))
    return mask, [(0, 0, size, size)]


def checks_mask(size: int) -> tuple[np.ndarray, list[Box]]:
    """Dark squares of a checkerboard over size x size pixels, and the box of it all."""
    lines = np.arange(size) * max(4, round(size / 7)) // size % 2
    return (lines[:, None] + lines[None, :]) % 2 == 1, [(0, 0, size, size)]

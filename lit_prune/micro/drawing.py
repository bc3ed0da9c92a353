"""Drawing of the generated world: colours, shapes, digits and textured backgrounds, in numpy alone."""

from functools import cache

import numpy as np

COLOURS = {
    "red": (215, 35, 40),
    "green": (40, 165, 55),
    "blue": (45, 70, 220),
    "yellow": (240, 220, 50),
    "purple": (145, 50, 185),
    "orange": (245, 135, 30),
    "cyan": (60, 210, 220),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring", "tile")

# A 5 x 7 font, one row of bits a line.
_FONT = """
01110 00100 01110 11110 00010 11111 00110 11111 01110 01110
10001 01100 10001 00001 00110 10000 01000 00001 10001 10001
10011 00100 00001 00001 01010 11110 10000 00010 10001 10001
10101 00100 00010 01110 10010 00001 11110 00100 01110 01111
11001 00100 00100 00001 11111 00001 10001 01000 10001 00001
10001 00100 01000 00001 00010 10001 10001 01000 10001 00010
01110 01110 11111 11110 00010 01110 01110 01000 01110 01100
"""


@cache
def glyph(digit: int) -> np.ndarray:
    """The digit as a mask of 7 x 5 pixels."""
    return np.array([[bit == "1" for bit in line.split()[digit]] for line in _FONT.strip().splitlines()])


@cache
def shape_mask(shape: str, size: int) -> np.ndarray:
    """The shape as a mask of size x size pixels."""
    y, x = (np.mgrid[:size, :size] + 0.5) / size * 2 - 1
    radius = np.hypot(x, y)
    masks = {
        "circle": radius <= 1,
        "square": np.ones((size, size), bool),
        "tile": np.ones((size, size), bool),
        "triangle": np.abs(x) <= (y + 1) / 2,
        "diamond": np.abs(x) + np.abs(y) <= 1.05,
        "cross": np.minimum(np.abs(x), np.abs(y)) <= 0.36,
        "ring": (radius <= 1) & (radius >= 0.55),
    }
    return masks[shape]


def background(size: int, rng: np.random.Generator) -> np.ndarray:
    """A dull texture, float[size, size, 3]: a base colour, a slope and two waves."""
    y, x = np.mgrid[:size, :size] / size
    base = rng.uniform(60, 135) + rng.uniform(-12, 12, 3)
    texture = rng.uniform(-25, 25) * x + rng.uniform(-25, 25) * y
    for _ in range(2):
        fx, fy = rng.uniform(-12, 12, 2)
        texture += rng.uniform(3, 10) * np.sin(2 * np.pi * (fx * x + fy * y) + rng.uniform(0, 2 * np.pi))
    return base + texture[..., None] + rng.normal(0, 5, (size, size, 1))


def draw(pixels: np.ndarray, box: tuple, colour: str, shape: str, digit: int | None, rng: np.random.Generator) -> None:
    """Paint a shape into its box, in place; a tile carries its digit in black (in white on dark colours)."""
    x0, y0, x1, y1 = box
    size = x1 - x0
    area = pixels[y0:y1, x0:x1]
    tint = np.array(COLOURS[colour]) * rng.uniform(0.88, 1.0) + rng.uniform(-8, 8, 3)
    area[shape_mask(shape, size)] = tint
    if digit is not None:
        scale = size // 8
        mask = glyph(digit).repeat(scale, 0).repeat(scale, 1)
        top, left = (size - mask.shape[0]) // 2, (size - mask.shape[1]) // 2
        ink = 250 if tint.mean() < 130 else 10
        area[top : top + mask.shape[0], left : left + mask.shape[1]][mask] = ink

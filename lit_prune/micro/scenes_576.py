"""Scenes of the world of 576 visual tokens: objects of many sizes on textured ground, among clutter and look-alikes.

A scene depends on its seed and level alone. Its layout, its look and each skill's questions come from generators of
their own, seeded by the scene's seed, so nothing depends on the order of calls or on other scenes.

Geometry: images are 192 x 192 pixels and a patch of the vision tower is 8 x 8, so 24 x 24 = 576 visual tokens. An
object is a square box of 16 to 56 pixels (4 to 49 patches' area) at any pixel; objects don't touch. The ground is one
region, two halves, or four quarters, each with a texture and a colour.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from lit_prune.micro import drawing_576 as drawing
from lit_prune.micro.drawing import COLOURS
from lit_prune.micro.drawing_576 import GROUNDS, INNER, SHAPES, TEXTURES, Box

IMAGE_SIZE = 192
PATCH_SIZE = 8
GRID = IMAGE_SIZE // PATCH_SIZE
SIZES = (16, 20, 24, 28, 32, 36, 40, 48, 56)
GAP = 5  # pixels between objects, at least
CORNERS = ("top left", "top right", "bottom left", "bottom right")
LEVELS = ((1, 2), (2, 5), (5, 10))  # fewest and most objects; the first two are for pretraining's start alone
FULL_LEVEL = len(LEVELS) - 1
PATTERNS = ("nothing", "stripes", "checks", "dots", "figures", "arrow")
SMALLEST = {"stripes": 20, "checks": 24}  # pixels from which a pattern can be seen
INNER_SMALLEST = {"dots": 21, "figures": 13, "arrow": 11}  # the same for the square inside that carries the detail
MOST_DOTS = 4

# Disjoint ranges of seeds, above those of the 144-token world: those end at 10,000,000.
PRETRAIN_SEED = 10_000_000
TRAIN_SEED = 20_000_000
VALIDATION_SEED = 25_000_000
TEST_SEED = 26_000_000
SAMPLE_SEED = 28_000_000
RESERVED_SEED = 29_000_000  # outside checks: nothing in this project uses these
GATE_SEED = (
    PRETRAIN_SEED + 9_000_000
)  # held out from pretraining, for tuning world and recipe: no method is chosen here


@dataclass(frozen=True)
class Thing:
    """One object: look, upper left corner and size in pixels, and what its pattern shows.

    `digits` are those of a number, `dots` the corners of its dots relative to the object, `direction` where an
    arrow points or how stripes run; empty where the pattern has none.
    """

    colour: str
    shape: str
    pattern: str
    x: int
    y: int
    size: int
    digits: tuple[int, ...] = ()
    dots: tuple[tuple[int, int], ...] = ()
    direction: str = ""

    @property
    def look(self) -> tuple[str, str]:
        return self.colour, self.shape

    @property
    def box(self) -> Box:
        """Pixels x0, y0, x1, y1; x1 and y1 are the first ones outside."""
        return self.x, self.y, self.x + self.size, self.y + self.size

    @property
    def centre(self) -> tuple[float, float]:
        return self.x + self.size / 2, self.y + self.size / 2

    @property
    def detail(self) -> tuple[np.ndarray | None, list[Box]]:
        """The mask bool[size, size] of the pattern, and the boxes of its parts relative to the object."""
        side = int(INNER.get(self.shape, 0) * self.size)
        if self.pattern == "figures":
            return drawing.figures_mask(self.digits, self.size, drawing.figure_scale(side, len(self.digits)))
        if self.pattern == "dots":
            return drawing.dots_mask(self.dots, self.size, drawing.dot_diameter(side))
        if self.pattern == "arrow":
            return drawing.arrow_mask(self.direction, self.size, side)
        if self.pattern == "stripes":
            return drawing.stripes_mask(self.direction, self.size)
        if self.pattern == "checks":
            return drawing.checks_mask(self.size)
        return None, []

    @property
    def part_boxes(self) -> tuple[Box, ...]:
        """Boxes of the figures, dots, or the arrow in the image; the object's own for other patterns."""
        _, parts = self.detail
        return tuple((a + self.x, b + self.y, c + self.x, d + self.y) for a, b, c, d in parts) or (self.box,)


@dataclass(frozen=True)
class Region:
    """A part of the ground: its box, texture and colour, and where it lies ("top left", "left", "" for everything)."""

    box: Box
    texture: str
    colour: str
    place: str

    @property
    def look(self) -> tuple[str, str]:
        return self.texture, self.colour

    def holds(self, box: Box) -> bool:
        x0, y0, x1, y1 = self.box
        return x0 <= box[0] and y0 <= box[1] and box[2] <= x1 and box[3] <= y1


class Scene:
    """5 to 10 objects (fewer on lower levels), the ground's regions, and clutter."""

    def __init__(self, seed: int, level: int = FULL_LEVEL):
        self.seed, self.level = seed, level
        rng = np.random.default_rng([seed, 0, level])
        self.regions = _ground(rng)
        self.things = _place(_looks(rng, *LEVELS[level]), rng)
        self.clutter = int(rng.integers(*((0, 4), (4, 12), (16, 36))[level]))

    @cached_property
    def pixels(self) -> np.ndarray:
        """uint8[192, 192, 3]."""
        rng = np.random.default_rng([self.seed, 1, self.level])
        pixels = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
        for region in self.regions:
            drawing.paint_ground(pixels, region.box, region.texture, region.colour, rng)
        drawing.paint_clutter(pixels, self.clutter, rng)
        for thing in self.things:
            mask, _ = thing.detail
            marks = [] if mask is None else [mask]
            drawing.paint_object(pixels, thing.box, thing.colour, thing.shape, thing.pattern, marks, rng)
        pixels += rng.normal(0, 5, pixels.shape[:2])[..., None]
        return pixels.clip(0, 255).astype(np.uint8)

    def image(self) -> Image.Image:
        """The scene as an RGB image of 192 x 192 pixels."""
        return Image.fromarray(self.pixels)

    def matching(self, colour: str | None = None, shape: str | None = None, pattern: str | None = None) -> list[Thing]:
        """The objects of this colour, shape and pattern; None stands for any."""
        return [
            t
            for t in self.things
            if colour in (None, t.colour) and shape in (None, t.shape) and pattern in (None, t.pattern)
        ]

    def region_at(self, corner: str) -> Region:
        """The region that holds a corner of the image."""
        x = 0 if "left" in corner else IMAGE_SIZE - 1
        y = 0 if "top" in corner else IMAGE_SIZE - 1
        return next(r for r in self.regions if r.holds((x, y, x + 1, y + 1)))


def make_scene(seed: int, level: int = FULL_LEVEL) -> Scene:
    """The scene of a seed."""
    return Scene(seed, level)


def _ground(rng: np.random.Generator) -> list[Region]:
    """One region, two halves or four quarters; regions of one scene differ, but may share texture or colour."""
    form = pick(rng, ("whole", "columns", "rows", "quarters", "quarters"))
    x, y, end = int(rng.integers(80, 113)), int(rng.integers(80, 113)), IMAGE_SIZE
    boxes = {
        "whole": {"": (0, 0, end, end)},
        "columns": {"left": (0, 0, x, end), "right": (x, 0, end, end)},
        "rows": {"top": (0, 0, end, y), "bottom": (0, y, end, end)},
        "quarters": dict(zip(CORNERS, ((0, 0, x, y), (x, 0, end, y), (0, y, x, end), (x, y, end, end)), strict=True)),
    }[form]
    looks: list[tuple[str, str]] = []
    same = form == "quarters" and rng.random() < 0.6  # opposite or neighbouring quarters may look alike
    while len(looks) < len(boxes):
        look = pick(rng, TEXTURES), pick(rng, GROUNDS)
        if same and len(looks) == 2:
            look = looks[int(rng.integers(2))]
        elif look in looks:
            continue
        looks.append(look)
    if same:
        looks = [looks[i] for i in rng.permutation(len(looks))]
    return [Region(box, *look, place) for (place, box), look in zip(boxes.items(), looks, strict=True)]


# Objects

Look = tuple[str, str, str]


def _looks(rng: np.random.Generator, least: int, most: int) -> list[Look]:
    """Colours, shapes and patterns: a crowd of up to four that share one, look-alikes, and others."""
    count = int(rng.integers(least, most + 1))
    looks: list[Look] = []
    crowd, kind = int(rng.integers(0, 5)), int(rng.integers(3))
    shared = _look(rng)
    rare = [(pick(rng, COLOURS), pick(rng, INNER), pattern) for pattern in ("figures", "dots")]
    while len(looks) < count:
        look = _look(rng)
        if rare and count > len(rare):  # few shapes have room for these, and two skills need them
            look = rare.pop()
        elif len(looks) < min(crowd + 2, count):
            look = _with(look, kind, shared[kind])
        elif looks and rng.random() < 0.45:  # a look-alike: one property differs
            other, differs = pick(rng, looks), int(rng.integers(3))
            look = _with(other, differs, look[differs])
        look = _possible(look, rng)
        if look not in looks:
            looks.append(look)
    return [looks[i] for i in rng.permutation(count)]


def _look(rng: np.random.Generator) -> Look:
    pattern = pick(rng, PATTERNS)
    shape = pick(rng, SHAPES if rng.random() < 0.65 else tuple(INNER))
    return pick(rng, COLOURS), shape, pattern


def _with(look: Look, index: int, value: str) -> Look:
    return (*look[:index], value, *look[index + 1 :])


def _possible(look: Look, rng: np.random.Generator) -> Look:
    """A look that can be drawn: dots, figures and arrows need a shape with room for them."""
    colour, shape, pattern = look
    if pattern in INNER_SMALLEST and shape not in INNER:
        pattern = pick(rng, ("nothing", "stripes", "checks"))
    return colour, shape, pattern


def _place(looks: list[Look], rng: np.random.Generator) -> list[Thing]:
    """Sizes, then places without overlap, the largest first; smaller where there is no room."""
    wanted = sorted((_size(look, rng) for look in looks), reverse=True)
    order = sorted(range(len(looks)), key=lambda i: -_least_size(looks[i]))
    things: list[Thing] = []
    boxes: list[Box] = []
    for index, size in zip(order, wanted, strict=True):
        size = max(size, _least_size(looks[index]))
        while (place := _room(boxes, size, rng)) is None:
            size -= 4
            if size < _least_size(looks[index]):
                return _place(looks, rng)
        x, y = place
        boxes.append((x, y, x + size, y + size))
        things.append(_detailed(looks[index], x, y, size, rng))
    return [things[i] for i in rng.permutation(len(things))]


def _least_size(look: Look) -> int:
    """The smallest of `SIZES` at which the pattern fits the shape."""
    _, shape, pattern = look
    if pattern in INNER_SMALLEST:
        return next(s for s in SIZES if int(INNER[shape] * s) >= INNER_SMALLEST[pattern])
    return SMALLEST.get(pattern, SIZES[0])


def _size(look: Look, rng: np.random.Generator) -> int:
    return int(pick(rng, [s for s in SIZES if s >= _least_size(look)]))


def _room(boxes: list[Box], size: int, rng: np.random.Generator) -> tuple[int, int] | None:
    """A free place for a box of this size, after 40 tries None."""
    for x, y in rng.integers(2, IMAGE_SIZE - size - 1, (40, 2)).tolist():
        if all(
            x >= x1 + GAP or x + size + GAP <= x0 or y >= y1 + GAP or y + size + GAP <= y0 for x0, y0, x1, y1 in boxes
        ):
            return x, y
    return None


def _detailed(look: Look, x: int, y: int, size: int, rng: np.random.Generator) -> Thing:
    """The object with a number, dots or a direction, as its pattern asks for."""
    colour, shape, pattern = look
    side = int(INNER.get(shape, 0) * size)
    details: dict = {}
    if pattern == "figures":
        details["digits"] = tuple(int(v) for v in rng.integers(0, 10, 2))
    elif pattern == "dots":
        cells = rng.permutation(9)[: int(rng.integers(1, MOST_DOTS + 1))]
        cell, diameter, start = side / 3, drawing.dot_diameter(side), (size - side) / 2
        slack = max(cell - diameter - 1, 0.0)
        details["dots"] = tuple(
            tuple(int(start + c * cell + rng.uniform(0, slack)) for c in (index % 3, index // 3)) for index in cells
        )
    elif pattern == "arrow":
        details["direction"] = pick(rng, ("up", "down", "left", "right"))
    elif pattern == "stripes":
        details["direction"] = pick(rng, ("across", "upright"))
    return Thing(colour, shape, pattern, x, y, size, **details)


def pick(rng: np.random.Generator, items):
    """One of the items, all equally likely."""
    items = list(items)
    return items[int(rng.integers(len(items)))]

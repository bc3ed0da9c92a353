"""The generated world: seeded scenes of coloured shapes and digits, and questions about them.

A scene depends on its seed alone: looks and places, texture and questions each come from a generator of their own that
is seeded by the scene's seed, so nothing depends on the order of calls or on other scenes.

Geometry: images are 96 x 96 pixels and a patch of the vision tower is 8 x 8, so 12 x 12 = 144 visual tokens. Objects
stand on a loose 5 x 5 grid with uneven spacing. Every object fills a block of 2 x 2 patches: large ones wholly, small
ones (12 pixels) shifted in steps of 4 pixels inside it. An object's *anchor* is the upper left patch of its block.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from lit_prune.micro.drawing import COLOURS, SHAPES, background, draw

IMAGE_SIZE = 96
PATCH_SIZE = 8
GRID = IMAGE_SIZE // PATCH_SIZE
BLOCK = 2  # patches per side of an object's block
CELLS = 5  # the loose grid is CELLS x CELLS
LARGE, SMALL = 16, 12
SKILLS = ("existence", "colour", "shape", "counting", "relation", "digit", "position")

# Disjoint ranges of seeds. Seeds from RESERVED_SEED up belong to outside checks: nothing in this project uses them.
PRETRAIN_SEED = 0
TRAIN_SEED = 1_000_000
VALIDATION_SEED = 5_000_000
TEST_SEED = 6_000_000
SAMPLE_SEED = 8_000_000  # pictures to try things on: `lit-prune sample`
RESERVED_SEED = 9_000_000

Box = tuple[int, int, int, int]
Look = tuple[str, str]


@dataclass(frozen=True)
class Thing:
    """One object: its look, the patch row and column of its anchor, and its place inside the block in pixels."""

    colour: str
    shape: str
    digit: int | None
    row: int
    column: int
    size: int
    offset: tuple[int, int]

    @property
    def look(self) -> Look:
        return self.colour, self.shape

    @property
    def box(self) -> Box:
        """Pixels x0, y0, x1, y1; x1 and y1 are the first ones outside."""
        x, y = self.column * PATCH_SIZE + self.offset[0], self.row * PATCH_SIZE + self.offset[1]
        return x, y, x + self.size, y + self.size


@dataclass(frozen=True)
class Question:
    """A question, its answer, and the boxes of the objects it asks about (none if the thing is absent)."""

    text: str
    answer: str
    skill: str
    boxes: tuple[Box, ...]


class Scene:
    """4 to 9 objects on a textured background: one look occurs twice, all others once, one of them a tile."""

    def __init__(self, seed: int):
        self.seed = seed
        rng = np.random.default_rng([seed, 0])
        while True:  # until every skill can be asked about: two draws on average
            self.things = _place(_looks(rng), rng)
            if self.unique_shapes and self.unique_colours and self.related_pairs and self.unique_tiles:
                break

    def image(self) -> Image.Image:
        """The scene as an RGB image of 96 x 96 pixels."""
        rng = np.random.default_rng([self.seed, 1])
        pixels = background(IMAGE_SIZE, rng)
        for thing in self.things:
            draw(pixels, thing.box, thing.colour, thing.shape, thing.digit, rng)
        pixels += rng.normal(0, 6, pixels.shape)
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    def questions(self, per_skill: int | dict[str, int] = 1) -> list[Question]:
        """`per_skill` questions of every skill, different ones where the scene allows it."""
        questions = []
        for index, skill in enumerate(SKILLS):
            rng = np.random.default_rng([self.seed, 2, index])
            wanted = per_skill if isinstance(per_skill, int) else per_skill.get(skill, 0)
            ask = _ASK[skill]
            found: dict[str, Question] = {}
            for turn in range(3 * wanted):  # a few draws more, so that repetitions can be left out
                if len(found) == wanted:
                    break
                question = ask(self, rng, turn)
                found.setdefault(question.text, question)
            questions += found.values()
        return questions

    def matching(self, colour: str | None = None, shape: str | None = None) -> list[Thing]:
        """The objects of this colour and shape; None stands for any."""
        return [t for t in self.things if colour in (None, t.colour) and shape in (None, t.shape)]

    @property
    def unique_looks(self) -> list[Thing]:
        return [t for t in self.things if len(self.matching(*t.look)) == 1]

    @property
    def unique_colours(self) -> list[Thing]:
        return [t for t in self.things if len(self.matching(colour=t.colour)) == 1]

    @property
    def unique_shapes(self) -> list[Thing]:
        return [t for t in self.things if len(self.matching(shape=t.shape)) == 1]

    @property
    def unique_tiles(self) -> list[Thing]:
        return [t for t in self.unique_looks if t.shape == "tile"]

    @property
    def related_pairs(self) -> list[tuple[Thing, Thing]]:
        """Ordered pairs that differ in row and in column, so that both words of the answer are sure."""
        looks = self.unique_looks
        return [(a, b) for a in looks for b in looks if a.row != b.row and a.column != b.column]


def make_scene(seed: int) -> Scene:
    """The scene of a seed."""
    return Scene(seed)


def choose_questions(scene: Scene, count: int) -> list[Question]:
    """`count` questions of a scene, skill after skill in turn, beginning at `seed % 7`."""
    rounds = -(-count // len(SKILLS)) + 1
    by_skill = {skill: [] for skill in SKILLS}
    for question in scene.questions(per_skill=rounds):
        by_skill[question.skill].append(question)
    turns = [SKILLS[(scene.seed + i) % len(SKILLS)] for i in range(rounds * len(SKILLS))]
    queue = [by_skill[skill].pop(0) for skill in turns if by_skill[skill]]
    return queue[:count]


def as_sample(name: str, image: str, question: Question) -> dict:
    """A question as a record of LLaVA instruction data, with the further keys `skill` and `boxes`."""
    return {
        "id": name,
        "image": image,
        "conversations": [
            {"from": "human", "value": f"<image>\n{question.text}"},
            {"from": "gpt", "value": question.answer},
        ],
        "skill": question.skill,
        "boxes": [list(box) for box in question.boxes],
    }


# Scenes


def _looks(rng: np.random.Generator) -> list[Look]:
    """4 to 9 looks: a pair, one tile, and others that often share a colour or a shape with an earlier one."""
    count = int(rng.integers(4, 10))
    first = (_pick(rng, COLOURS), _pick(rng, SHAPES))
    looks = [first, first]
    while len(looks) < count:
        colour = _pick(rng, looks)[0] if rng.random() < 0.3 else _pick(rng, COLOURS)
        shape = _pick(rng, looks)[1] if rng.random() < 0.3 else _pick(rng, SHAPES)
        if len(looks) == 2:
            shape = "tile"
        if (colour, shape) not in looks:
            looks.append((colour, shape))
    return looks


def _place(looks: list[Look], rng: np.random.Generator) -> list[Thing]:
    rows, columns = _lines(rng), _lines(rng)
    cells = rng.permutation(CELLS * CELLS)[: len(looks)]
    things = []
    for (colour, shape), cell in zip(looks, cells, strict=True):
        size = int(rng.choice((LARGE, SMALL)))
        offset = tuple(4 * int(rng.integers(0, (LARGE - size) // 4 + 1)) for _ in range(2))
        digit = int(rng.integers(10)) if shape == "tile" else None
        things.append(Thing(colour, shape, digit, rows[cell // CELLS], columns[cell % CELLS], size, offset))
    return things


def _lines(rng: np.random.Generator) -> list[int]:
    """First patches of five rows or columns: the spare patches fall anywhere between them."""
    spare = np.sort(rng.integers(0, GRID - CELLS * BLOCK + 1, CELLS))
    return [int(BLOCK * i + s) for i, s in enumerate(spare)]


def _pick(rng: np.random.Generator, items):
    items = list(items)
    return items[int(rng.integers(len(items)))]


# Questions: one function a skill. `turn` alternates the kinds of answers, so that all kinds are equally frequent.


def _boxes(things: list[Thing]) -> tuple[Box, ...]:
    return tuple(t.box for t in things)


def _existence(scene: Scene, rng: np.random.Generator, turn: int) -> Question:
    present = (turn + rng.integers(2)) % 2 == 0
    colour, shape = _pick(rng, scene.things).look if present else _absent_look(scene, rng)
    things = scene.matching(colour, shape)
    return Question(f"Is there {_article(colour, shape)}?", "yes" if things else "no", "existence", _boxes(things))


def _absent_look(scene: Scene, rng: np.random.Generator) -> Look:
    """A near miss: colour and shape are both in the scene, but not on one object; or only one of them is."""
    while True:
        kind = rng.random()
        colour = _pick(rng, scene.things).colour if kind < 0.75 else _pick(rng, COLOURS)
        shape = _pick(rng, scene.things).shape if not 0.5 <= kind < 0.75 else _pick(rng, SHAPES)
        if not scene.matching(colour, shape):
            return colour, shape


def _colour(scene: Scene, rng: np.random.Generator, turn: int) -> Question:
    thing = _pick(rng, scene.unique_shapes)
    return Question(f"What colour is the {thing.shape}?", thing.colour, "colour", _boxes([thing]))


def _shape(scene: Scene, rng: np.random.Generator, turn: int) -> Question:
    things = [t for t in scene.unique_colours if t.shape != "tile" or rng.random() < 0.3]  # every scene has a tile
    thing = _pick(rng, things or scene.unique_colours)
    return Question(f"What shape is the {thing.colour} object?", thing.shape, "shape", _boxes([thing]))


def _counting(scene: Scene, rng: np.random.Generator, turn: int) -> Question:
    """0, 1 or 2 of a look, a colour or a shape; the count is drawn first, so all three are equally frequent."""
    target = (turn + int(rng.integers(3))) % 3
    options = []
    while not options:  # a pair's look always counts 2, so this ends
        form = int(rng.integers(3))
        if form == 0:  # absent looks are near misses, as with existence
            options = [_absent_look(scene, rng)] if target == 0 else [t.look for t in scene.things]
        else:
            options = [(colour, None) for colour in COLOURS] if form == 1 else [(None, shape) for shape in SHAPES]
        options = [look for look in options if len(scene.matching(*look)) == target]
    colour, shape = _pick(rng, options)
    phrase = colour if shape is None else _article(colour, shape)
    things = scene.matching(colour, shape)
    return Question(f"How many objects are {phrase}?", str(len(things)), "counting", _boxes(things))


def _article(colour: str | None, shape: str) -> str:
    phrase = shape if colour is None else f"{colour} {shape}"
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def _relation(scene: Scene, rng: np.random.Generator, turn: int) -> Question:
    a, b = _pick(rng, scene.related_pairs)
    text = f"Where is the {a.colour} {a.shape} relative to the {b.colour} {b.shape}?"
    answer = f"{'left' if a.column < b.column else 'right'} {'above' if a.row < b.row else 'below'}"
    return Question(text, answer, "relation", _boxes([a, b]))


def _digit(scene: Scene, rng: np.random.Generator, turn: int) -> Question:
    tile = _pick(rng, scene.unique_tiles)
    return Question(f"Which digit is on the {tile.colour} tile?", str(tile.digit), "digit", _boxes([tile]))


def _position(scene: Scene, rng: np.random.Generator, turn: int) -> Question:
    """One of nine regions; an object belongs to the region that holds its block's first patch: 0-3, 4-6 or 7-10."""
    thing = _pick(rng, scene.unique_looks)
    row, column = (sum(place >= edge for edge in (4, 7)) for place in (thing.row, thing.column))
    answer = f"{('top', 'middle', 'bottom')[row]} {('left', 'centre', 'right')[column]}"
    return Question(f"Where is the {thing.colour} {thing.shape}?", answer, "position", _boxes([thing]))


_ASK = dict(zip(SKILLS, (_existence, _colour, _shape, _counting, _relation, _digit, _position), strict=True))

_TEXT = """is there a an yes no what colour the shape object objects how many are where relative to which digit on
left right above below top middle bottom centre ? . , user: assistant: image"""
WORDS = sorted({*COLOURS, *SHAPES, *"0123456789", *_TEXT.split()})
"""Every word of questions, answers and the prompt, in lower case: the tokenizer's vocabulary."""

"""Questions about scenes of the 576-token world: eighteen skills, each question with its answer and its boxes.

A skill is a function of a scene that draws one question, or None where the scene has nothing to ask about. The kind of
answer is drawn before the objects, so that answers are balanced and a blind guess is about as good as chance. One skill
of the eighteen, `words`, is answerable without the image: its share, 1 / 18, is declared in the model's card.

Boxes are those of the parts asked about: single figures and dots, whole objects, regions of the ground. They serve
oracles and gates only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lit_prune.micro.drawing import COLOURS
from lit_prune.micro.drawing_576 import GROUNDS, SHAPES, TEXTURES, Box
from lit_prune.micro.scenes_576 import CORNERS, IMAGE_SIZE, PATTERNS, Region, Scene, Thing, pick

CORNER = 80  # every corner of this size lies in one region, however the ground is divided
MOST = 4  # counted objects
NEAR = 12  # centres nearer than this to a line are on neither side of it
LARGER = 1.35  # ratio of sizes that can be told apart
FRAME = 10  # pixels around an object that show the ground behind it
WITH = {
    "nothing": "plain {}",
    "stripes": "{} with stripes",
    "checks": "{} with checks",
    "dots": "{} with dots",
    "figures": "{} with figures",
    "arrow": "{} with an arrow",
}
PLURAL = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}
SIDES = {"triangle": "3", "square": "4", "diamond": "4", "hexagon": "6"}


@dataclass(frozen=True)
class Question:
    """A question, its answer, its skill, and the boxes of what it asks about (none if that is absent)."""

    text: str
    answer: str
    skill: str
    boxes: tuple[Box, ...]


def questions(scene: Scene, per_skill: int | dict[str, int] = 1) -> list[Question]:
    """`per_skill` questions of every skill, different ones; fewer where the scene doesn't allow so many."""
    asked = []
    for index, skill in enumerate(SKILLS):
        rng = np.random.default_rng([scene.seed, 2, scene.level, index])
        wanted = per_skill if isinstance(per_skill, int) else per_skill.get(skill, 0)
        found: dict[str, Question] = {}
        for _ in range(4 * wanted):  # a few draws more, so that repetitions can be left out
            if len(found) == wanted:
                break
            drawn = _ASK[skill](scene, rng)
            if drawn is not None:
                text, answer, boxes = drawn
                found.setdefault(text, Question(text, answer, skill, tuple(boxes)))
        asked += found.values()
    return asked


def choose_questions(scene: Scene, count: int) -> list[Question]:
    """`count` questions of a scene, skill after skill in turn, beginning at `seed % 18`."""
    rounds = -(-count // len(SKILLS)) + 1
    by_skill: dict[str, list[Question]] = {skill: [] for skill in SKILLS}
    for question in questions(scene, rounds):
        by_skill[question.skill].append(question)
    turns = [SKILLS[(scene.seed + i) % len(SKILLS)] for i in range(rounds * len(SKILLS))]
    return [by_skill[skill].pop(0) for skill in turns if by_skill[skill]][:count]


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


# Phrases that name one object

Drawn = tuple[str, str, Sequence[Box]] | None


def _article(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def described(colour: str | None, shape: str | None, pattern: str | None) -> str:
    """A phrase such as "red circle with dots", "plain star", "red object"."""
    phrase = " ".join(filter(None, (colour, shape or "object")))
    return phrase if pattern is None else WITH[pattern].format(phrase)


def _phrases(scene: Scene, thing: Thing, pattern: bool = True) -> list[str]:
    """The phrases that name this object and no other: colour and shape, or with its pattern too if these are shared."""
    if len(scene.matching(*thing.look)) == 1:
        return [described(*thing.look, None)]
    if pattern and len(scene.matching(*thing.look, thing.pattern)) == 1:
        return [described(*thing.look, thing.pattern)]
    return []


def _nameable(scene: Scene, pattern: bool = True) -> list[Thing]:
    return [t for t in scene.things if _phrases(scene, t, pattern)]


def _the(scene: Scene, thing: Thing, pattern: bool = True) -> str:
    return f"the {_phrases(scene, thing, pattern)[0]}"


def _boxes(things: Sequence[Thing]) -> list[Box]:
    return [t.box for t in things]


def _balanced(options: dict[str, list], rng: np.random.Generator):
    """An option of an answer that is drawn first: (answer, option), or None if there are none."""
    answers = [answer for answer, found in options.items() if found]
    if not answers:
        return None
    answer = pick(rng, answers)
    return answer, pick(rng, options[answer])


# One skill each: (text, answer, boxes), or None


def _existence(scene: Scene, rng: np.random.Generator) -> Drawn:
    """Present, or a near miss: one property of an object that is there is replaced."""
    present, with_pattern = rng.random() < 0.5, rng.random() < 0.5
    thing = pick(rng, scene.things)
    look = [thing.colour, thing.shape, thing.pattern if with_pattern else None]
    if not present:
        values = (COLOURS, SHAPES, PATTERNS)
        for _ in range(20):
            index = int(rng.integers(3 if with_pattern else 2))
            other = pick(rng, values[index])
            changed = [*look[:index], other, *look[index + 1 :]]
            if not scene.matching(*changed):
                look = changed
                break
    things = scene.matching(*look)
    return f"Is there {_article(described(*look))}?", "yes" if things else "no", _boxes(things)


def _unlike(scene: Scene, attribute: str) -> dict[str, list[tuple[str, Thing]]]:
    """Objects that a phrase names without this attribute, by its value."""
    options: dict[str, list[tuple[str, Thing]]] = {}
    largest = sorted(scene.things, key=lambda t: t.size)
    for thing in scene.things:
        named = []
        if attribute == "colour" and len(scene.matching(shape=thing.shape)) == 1:
            named.append(thing.shape)
        if attribute == "shape" and len(scene.matching(colour=thing.colour)) == 1:
            named.append(f"{thing.colour} object")
        if len(scene.matching(pattern=thing.pattern)) == 1:
            named.append(WITH[thing.pattern].format("object"))
        if len(largest) > 1 and thing.size >= LARGER * largest[-2].size:
            named.append("largest object")
        if len(largest) > 1 and LARGER * thing.size <= largest[1].size:
            named.append("smallest object")
        options.setdefault(getattr(thing, attribute), []).extend((name, thing) for name in named)
    return options


def _colour(scene: Scene, rng: np.random.Generator) -> Drawn:
    drawn = _balanced(_unlike(scene, "colour"), rng)
    return drawn and (f"What colour is the {drawn[1][0]}?", drawn[0], _boxes([drawn[1][1]]))


def _shape(scene: Scene, rng: np.random.Generator) -> Drawn:
    drawn = _balanced(_unlike(scene, "shape"), rng)
    return drawn and (f"What shape is the {drawn[1][0]}?", drawn[0], _boxes([drawn[1][1]]))


def _counting(scene: Scene, rng: np.random.Generator) -> Drawn:
    options: dict[str, list] = {str(n): [] for n in range(MOST + 1)}
    for index, values in enumerate((COLOURS, SHAPES, PATTERNS[1:])):
        for value in values:
            things = scene.matching(**{("colour", "shape", "pattern")[index]: value})
            if len(things) <= MOST:
                options[str(len(things))].append((index, value, things))
    answer, (index, value, things) = _balanced(options, rng)
    text = (
        f"How many objects are {value}?",
        f"How many {PLURAL.get(value)} are there?",
        f"How many objects have {_article(value) if value == 'arrow' else value}?",
    )[index]
    return text, answer, _boxes(things)


def _relation(scene: Scene, rng: np.random.Generator) -> Drawn:
    options: dict[str, list] = {}
    things = _nameable(scene)
    for a in things:
        for b in things:
            across, down = (p - q for p, q in zip(a.centre, b.centre, strict=True))
            if min(abs(across), abs(down)) >= NEAR:
                answer = f"{'left' if across < 0 else 'right'} {'above' if down < 0 else 'below'}"
                options.setdefault(answer, []).append((a, b))
    if (drawn := _balanced(options, rng)) is None:
        return None
    answer, (a, b) = drawn
    return f"Where is {_the(scene, a)} relative to {_the(scene, b)}?", answer, _boxes([a, b])


def place_of(thing: Thing) -> str | None:
    """One of nine places of an object's centre, None if it is near a line between two."""
    names, (x, y) = [], thing.centre
    for value, words in ((y, ("top", "middle", "bottom")), (x, ("left", "centre", "right"))):
        if min(abs(value - IMAGE_SIZE * i / 3) for i in (1, 2)) < NEAR / 2:
            return None
        names.append(words[int(3 * value // IMAGE_SIZE)])
    return " ".join(names)


def _position(scene: Scene, rng: np.random.Generator) -> Drawn:
    options: dict[str, list] = {}
    for thing in _nameable(scene):
        if place := place_of(thing):
            options.setdefault(place, []).append(thing)
    drawn = _balanced(options, rng)
    return drawn and (f"Where is {_the(scene, drawn[1])}?", drawn[0], _boxes([drawn[1]]))


def _size(scene: Scene, rng: np.random.Generator) -> Drawn:
    """Which of two is larger, or smaller; the first named is right half of the time."""
    things = _nameable(scene, pattern=False)
    pairs = [(a, b) for a in things for b in things if a.size >= LARGER * b.size]
    if not pairs:
        return None
    large, small = pick(rng, pairs)
    first, second = (large, small) if rng.random() < 0.5 else (small, large)
    word, right = ("larger", large) if rng.random() < 0.5 else ("smaller", small)
    text = f"Which is {word}, {_the(scene, first, False)} or {_the(scene, second, False)}?"
    return text, described(*right.look, None), _boxes([first, second])


def _pattern(scene: Scene, rng: np.random.Generator) -> Drawn:
    options: dict[str, list] = {}
    for thing in _nameable(scene, pattern=False):
        options.setdefault(thing.pattern, []).append(thing)
    drawn = _balanced(options, rng)
    return drawn and (f"What is on {_the(scene, drawn[1], False)}?", drawn[0], _boxes([drawn[1]]))


def _same(scene: Scene, rng: np.random.Generator) -> Drawn:
    """Whether the ground is the same behind two objects."""
    options: dict[str, list] = {"yes": [], "no": []}
    placed = [(t, region) for t in _nameable(scene) if (region := region_behind(scene, t))]
    for i, (a, one) in enumerate(placed):
        for b, other in placed[i + 1 :]:
            options["yes" if one.look == other.look else "no"].append((a, b))
    answer = "yes" if rng.random() < 0.5 else "no"
    if not options[answer]:
        return None
    a, b = pick(rng, options[answer])
    text = f"Do {_the(scene, a)} and {_the(scene, b)} stand on the same ground?"
    return text, answer, [a.box, b.box, *frame(a), *frame(b)]


def _figures(scene: Scene, rng: np.random.Generator) -> Drawn:
    things = [t for t in _nameable(scene) if t.pattern == "figures"]
    if not things:
        return None
    thing = pick(rng, things)
    return f"Which figures are on {_the(scene, thing)}?", " ".join(map(str, thing.figures)), thing.part_boxes


def _dots(scene: Scene, rng: np.random.Generator) -> Drawn:
    options: dict[str, list] = {}
    for thing in _nameable(scene):
        if thing.pattern == "dots":
            options.setdefault(str(len(thing.dots)), []).append(thing)
    drawn = _balanced(options, rng)
    return drawn and (f"How many dots are on {_the(scene, drawn[1])}?", drawn[0], drawn[1].part_boxes)


def _direction(scene: Scene, rng: np.random.Generator) -> Drawn:
    options: dict[str, list] = {}
    kind = "arrow" if rng.random() < 2 / 3 else "stripes"  # four answers and two
    for thing in _nameable(scene):
        if thing.pattern == kind:
            options.setdefault(thing.direction, []).append(thing)
    if (drawn := _balanced(options, rng)) is None:
        return None
    answer, thing = drawn
    start = "Where does the arrow on {} point?" if thing.pattern == "arrow" else "Which way do the stripes on {} run?"
    return start.format(_the(scene, thing)), answer, thing.part_boxes


def corner_box(corner: str) -> Box:
    """The corner of the image that is asked about."""
    x = 0 if "left" in corner else IMAGE_SIZE - CORNER
    y = 0 if "top" in corner else IMAGE_SIZE - CORNER
    return x, y, x + CORNER, y + CORNER


def _texture(scene: Scene, rng: np.random.Generator) -> Drawn:
    corner = pick(rng, CORNERS)
    return f"Which texture is at the {corner}?", scene.region_at(corner).texture, [corner_box(corner)]


def _ground(scene: Scene, rng: np.random.Generator) -> Drawn:
    corner = pick(rng, CORNERS)
    return f"What colour is the ground at the {corner}?", scene.region_at(corner).colour, [corner_box(corner)]


def _region(scene: Scene, rng: np.random.Generator) -> Drawn:
    """Where a texture, or a colour of the ground, is: its half or quarter, or nowhere."""
    options: dict[str, list] = {"nowhere": []}
    for index, values in enumerate((TEXTURES, GROUNDS)):
        for value in values:
            found = [r for r in scene.regions if (r.texture, r.colour)[index] == value]
            if not found:
                options["nowhere"].append((value, []))
            elif len(found) == 1 and found[0].place:
                options.setdefault(found[0].place, []).append((value, found))
    if rng.random() < 0.8 and len(options) > 1:
        del options["nowhere"]
    if (drawn := _balanced(options, rng)) is None:
        return None
    answer, (value, found) = drawn
    return f"Where is the {value} ground?", answer, [r.box for r in found]


def frame(thing: Thing) -> list[Box]:
    """The strips of ground above, below, left and right of an object, cut to the image."""
    x0, y0, x1, y1 = thing.box
    strips = (x0, y0 - FRAME, x1, y0), (x0, y1, x1, y1 + FRAME), (x0 - FRAME, y0, x0, y1), (x1, y0, x1 + FRAME, y1)
    cut = [tuple(min(max(v, 0), IMAGE_SIZE) for v in strip) for strip in strips]
    return [s for s in cut if s[0] < s[2] and s[1] < s[3]]


def region_behind(scene: Scene, thing: Thing) -> Region | None:
    """The region that an object lies in with its surroundings; None if it lies across a line."""
    x0, y0, x1, y1 = thing.box
    around = max(x0 - 4, 0), max(y0 - 4, 0), min(x1 + 4, IMAGE_SIZE), min(y1 + 4, IMAGE_SIZE)
    return next((r for r in scene.regions if r.holds(around)), None)


def _behind(scene: Scene, rng: np.random.Generator) -> Drawn:
    options: dict[str, list] = {}
    for thing in _nameable(scene):
        if region := region_behind(scene, thing):
            options.setdefault(region.texture, []).append(thing)
    if (drawn := _balanced(options, rng)) is None:
        return None
    answer, thing = drawn
    return f"Which texture is behind {_the(scene, thing)}?", answer, [thing.box, *frame(thing)]


def _layout(scene: Scene, rng: np.random.Generator) -> Drawn:
    """How many regions the ground has, or whether two corners look alike."""
    if rng.random() < 0.25:
        count = str(len(scene.regions))
        return "How many parts does the ground have?", count, [r.box for r in scene.regions]
    options: dict[str, list] = {"yes": [], "no": []}
    for i, a in enumerate(CORNERS):
        for b in CORNERS[i + 1 :]:
            one, other = scene.region_at(a), scene.region_at(b)
            options["yes" if one.look == other.look else "no"].append((a, b))
    wanted = "yes" if rng.random() < 0.5 else "no"
    if not options[wanted]:
        return None
    a, b = pick(rng, options[wanted])
    return f"Is the ground at the {a} like that at the {b}?", wanted, [corner_box(a), corner_box(b)]


def _words(scene: Scene, rng: np.random.Generator) -> Drawn:
    """Answerable without the image."""
    form = int(rng.integers(4))
    if form == 0:
        shape = pick(rng, SIDES)
        return f"How many corners does {_article(shape)} have?", SIDES[shape], []
    if form == 1:
        number = int(rng.integers(9))
        return f"Which number comes after {number}?", str(number + 1), []
    if form == 2:
        a, b = (int(v) for v in rng.permutation(10)[:2])
        return f"Is {a} larger than {b}?", "yes" if a > b else "no", []
    colour, shape = pick(rng, COLOURS), pick(rng, SHAPES)
    asked = colour if rng.random() < 0.5 else pick(rng, [c for c in COLOURS if c != colour])
    return f"Is {_article(f'{colour} {shape}')} {asked}?", "yes" if asked == colour else "no", []


_ASK: dict[str, Callable[[Scene, np.random.Generator], Drawn]] = {
    "existence": _existence,
    "colour": _colour,
    "shape": _shape,
    "counting": _counting,
    "relation": _relation,
    "position": _position,
    "size": _size,
    "pattern": _pattern,
    "same": _same,
    "figures": _figures,
    "dots": _dots,
    "direction": _direction,
    "texture": _texture,
    "ground": _ground,
    "region": _region,
    "behind": _behind,
    "layout": _layout,
    "words": _words,
}
SKILLS = tuple(_ASK)
WORDS_ALONE = ("words",)  # skills that need no image
GROUND_SKILLS = ("texture", "ground", "region", "behind", "layout")

_TEXT = """is there a an yes no what colour the object objects how many are where relative to which on left right above
below top middle bottom centre larger smaller or largest smallest with plain do and have same stand on figures
does arrow point way stripes run dots up down across upright texture at ground behind parts like that corners
number comes after than shape nowhere has it size image ? . , user: assistant:"""
WORDS = sorted({*COLOURS, *SHAPES, *PLURAL.values(), *PATTERNS, *TEXTURES, *GROUNDS, *"0123456789", *_TEXT.split()})
"""Every word of questions, answers and the prompt, in lower case: the tokenizer's vocabulary."""

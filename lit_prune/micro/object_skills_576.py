"""Questions about the objects of a scene of the 576-token world: one function a skill.

The kind of answer is drawn before the objects, so that answers are balanced.
"""

import numpy as np

from lit_prune.micro.drawing import COLOURS
from lit_prune.micro.drawing_576 import SHAPES, Box
from lit_prune.micro.phrases_576 import WITH, Drawn, article, balanced, boxes_of, described, nameable, the
from lit_prune.micro.scenes_576 import IMAGE_SIZE, PATTERNS, Scene, Thing, pick

MOST = 3  # counted objects
NEAR = 12  # centres nearer than this to a line are on neither side of it
LARGER = 1.35  # ratio of sizes that can be told apart
PLURAL = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}


def ask_existence(scene: Scene, rng: np.random.Generator) -> Drawn:
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
    return f"Is there {article(described(*look))}?", "yes" if things else "no", boxes_of(things)


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


def ask_colour(scene: Scene, rng: np.random.Generator) -> Drawn:
    drawn = balanced(_unlike(scene, "colour"), rng)
    return drawn and (f"What colour is the {drawn[1][0]}?", drawn[0], boxes_of([drawn[1][1]]))


def ask_shape(scene: Scene, rng: np.random.Generator) -> Drawn:
    drawn = balanced(_unlike(scene, "shape"), rng)
    return drawn and (f"What shape is the {drawn[1][0]}?", drawn[0], boxes_of([drawn[1][1]]))


def ask_counting(scene: Scene, rng: np.random.Generator) -> Drawn:
    options: dict[str, list] = {str(n): [] for n in range(MOST + 1)}
    for index, values in enumerate((COLOURS, SHAPES, PATTERNS[1:])):
        for value in values:
            things = scene.matching(**{("colour", "shape", "pattern")[index]: value})
            if len(things) <= MOST:
                options[str(len(things))].append((index, value, things))
    answer, (index, value, things) = balanced(options, rng)
    text = (
        f"How many objects are {value}?",
        f"How many {PLURAL.get(value)} are there?",
        f"How many objects have {article(value) if value == 'arrow' else value}?",
    )[index]
    return text, answer, boxes_of(things)


def ask_relation(scene: Scene, rng: np.random.Generator) -> Drawn:
    options: dict[str, list] = {}
    things = nameable(scene)
    for a in things:
        for b in things:
            across, down = (p - q for p, q in zip(a.centre, b.centre, strict=True))
            if min(abs(across), abs(down)) >= NEAR:
                answer = f"{'left' if across < 0 else 'right'} {'above' if down < 0 else 'below'}"
                options.setdefault(answer, []).append((a, b))
    if (drawn := balanced(options, rng)) is None:
        return None
    answer, (a, b) = drawn
    return f"Where is {the(scene, a)} relative to {the(scene, b)}?", answer, boxes_of([a, b])


def place_of(thing: Thing) -> str | None:
    """One of nine places of an object's centre, None if it is near a line between two."""
    names, (x, y) = [], thing.centre
    for value, words in ((y, ("top", "middle", "bottom")), (x, ("left", "centre", "right"))):
        if min(abs(value - IMAGE_SIZE * i / 3) for i in (1, 2)) < NEAR / 2:
            return None
        names.append(words[int(3 * value // IMAGE_SIZE)])
    return " ".join(names)


def ask_position(scene: Scene, rng: np.random.Generator) -> Drawn:
    options: dict[str, list] = {}
    for thing in nameable(scene):
        if place := place_of(thing):
            options.setdefault(place, []).append(thing)
    drawn = balanced(options, rng)
    return drawn and (f"Where is {the(scene, drawn[1])}?", drawn[0], boxes_of([drawn[1]]))


def ask_size(scene: Scene, rng: np.random.Generator) -> Drawn:
    """The larger, or smaller, of two; the first named is right half of the time."""
    things = nameable(scene, pattern=False)
    pairs = [(a, b) for a in things for b in things if a.size >= LARGER * b.size]
    if not pairs:
        return None
    large, small = pick(rng, pairs)
    first, second = (large, small) if rng.random() < 0.5 else (small, large)
    word, right = ("larger", large) if rng.random() < 0.5 else ("smaller", small)
    text = f"Which is {word}, {the(scene, first, False)} or {the(scene, second, False)}?"
    return text, described(*right.look, None), boxes_of([first, second])


def ask_pattern(scene: Scene, rng: np.random.Generator) -> Drawn:
    options: dict[str, list] = {}
    for thing in nameable(scene, pattern=False):
        options.setdefault(thing.pattern, []).append(thing)
    drawn = balanced(options, rng)
    return drawn and (f"What is on {the(scene, drawn[1], False)}?", drawn[0], boxes_of([drawn[1]]))


def parts_and_whole(thing: Thing) -> list[Box]:
    """Boxes of an object's figures or dots, and its own: parts are counted and read on an object that is seen."""
    return [*thing.part_boxes, thing.box]


def ask_figures(scene: Scene, rng: np.random.Generator) -> Drawn:
    things = [t for t in nameable(scene) if t.pattern == "figures"]
    if not things:
        return None
    thing = pick(rng, things)
    return f"Which figures are on {the(scene, thing)}?", " ".join(map(str, thing.digits)), parts_and_whole(thing)


def ask_dots(scene: Scene, rng: np.random.Generator) -> Drawn:
    options: dict[str, list] = {}
    for thing in nameable(scene):
        if thing.pattern == "dots":
            options.setdefault(str(len(thing.dots)), []).append(thing)
    drawn = balanced(options, rng)
    return drawn and (f"How many dots are on {the(scene, drawn[1])}?", drawn[0], parts_and_whole(drawn[1]))


def ask_direction(scene: Scene, rng: np.random.Generator) -> Drawn:
    options: dict[str, list] = {}
    kind = "arrow" if rng.random() < 2 / 3 else "stripes"  # four answers and two
    for thing in nameable(scene):
        if thing.pattern == kind:
            options.setdefault(thing.direction, []).append(thing)
    if (drawn := balanced(options, rng)) is None:
        return None
    answer, thing = drawn
    start = "Where does the arrow on {} point?" if thing.pattern == "arrow" else "Which way do the stripes on {} run?"
    return start.format(the(scene, thing)), answer, thing.part_boxes

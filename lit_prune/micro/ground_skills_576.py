"""Questions about the ground of a scene of the 576-token world: its textures, colours and layout."""

import numpy as np

from lit_prune.micro.drawing_576 import GROUNDS, TEXTURES, Box
from lit_prune.micro.phrases_576 import Drawn, balanced, nameable, the
from lit_prune.micro.scenes_576 import CORNERS, IMAGE_SIZE, Region, Scene, Thing, pick

CORNER = 80  # every corner of this size lies in one region, however the ground is divided
PRESENCE = 0.2  # share of questions about presence among those about a texture's or colour's place
FRAME = 10  # pixels around an object that show the ground behind it


def corner_box(corner: str) -> Box:
    """The corner of the image that is asked about."""
    x = 0 if "left" in corner else IMAGE_SIZE - CORNER
    y = 0 if "top" in corner else IMAGE_SIZE - CORNER
    return x, y, x + CORNER, y + CORNER


def ask_texture(scene: Scene, rng: np.random.Generator) -> Drawn:
    corner = pick(rng, CORNERS)
    return f"Which texture is at the {corner}?", scene.region_at(corner).texture, [corner_box(corner)]


def ask_ground(scene: Scene, rng: np.random.Generator) -> Drawn:
    corner = pick(rng, CORNERS)
    return f"What colour is the ground at the {corner}?", scene.region_at(corner).colour, [corner_box(corner)]


def ask_region(scene: Scene, rng: np.random.Generator) -> Drawn:
    """Presence of a texture, or of a colour of the ground, or its place: a half, a quarter, or nowhere."""
    found = {value: [r for r in scene.regions if value in r.look] for value in (*TEXTURES, *GROUNDS)}
    if rng.random() < PRESENCE:
        present = rng.random() < 0.5
        value = pick(rng, [value for value, regions in found.items() if bool(regions) == present])
        return f"Is there {value} ground?", "yes" if present else "no", [r.box for r in found[value]]
    options: dict[str, list[str]] = {}
    for value, regions in found.items():
        if len(regions) < 2:
            options.setdefault(regions[0].place if regions else "nowhere", []).append(value)
    options.pop("", None)  # the whole ground: nowhere in particular
    if rng.random() < 0.8 and len(options) > 1:
        del options["nowhere"]
    answer, value = balanced(options, rng)
    return f"Where is the {value} ground?", answer, [r.box for r in found[value]]


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


def ask_behind(scene: Scene, rng: np.random.Generator) -> Drawn:
    options: dict[str, list] = {}
    for thing in nameable(scene):
        if region := region_behind(scene, thing):
            options.setdefault(region.texture, []).append(thing)
    if (drawn := balanced(options, rng)) is None:
        return None
    answer, thing = drawn
    return f"Which texture is behind {the(scene, thing)}?", answer, [thing.box, *frame(thing)]


def ask_layout(scene: Scene, rng: np.random.Generator) -> Drawn:
    """Number of the ground's regions, or likeness of two corners."""
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


def ask_same(scene: Scene, rng: np.random.Generator) -> Drawn:
    """Sameness of the ground behind two objects."""
    options: dict[str, list] = {"yes": [], "no": []}
    placed = [(t, region) for t in nameable(scene) if (region := region_behind(scene, t))]
    for i, (a, one) in enumerate(placed):
        for b, other in placed[i + 1 :]:
            options["yes" if one.look == other.look else "no"].append((a, b))
    answer = "yes" if rng.random() < 0.5 else "no"
    if not options[answer]:
        return None
    a, b = pick(rng, options[answer])
    text = f"Do {the(scene, a)} and {the(scene, b)} stand on the same ground?"
    return text, answer, [a.box, b.box, *frame(a), *frame(b)]

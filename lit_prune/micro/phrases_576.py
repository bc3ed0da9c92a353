"""Phrases that name an object of a scene of the 576-token world, and draws of balanced answers."""

from collections.abc import Sequence

import numpy as np

from lit_prune.micro.drawing_576 import Box
from lit_prune.micro.scenes_576 import Scene, Thing, pick

WITH = {
    "nothing": "plain {}",
    "stripes": "{} with stripes",
    "checks": "{} with checks",
    "dots": "{} with dots",
    "figures": "{} with figures",
    "arrow": "{} with an arrow",
}
Drawn = tuple[str, str, Sequence[Box]] | None  # question, answer, boxes; None where there is nothing to ask about


def article(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def described(colour: str | None, shape: str | None, pattern: str | None) -> str:
    """A phrase such as "red circle with dots", "plain star", "red object"."""
    phrase = " ".join(filter(None, (colour, shape or "object")))
    return phrase if pattern is None else WITH[pattern].format(phrase)


def phrases_for(scene: Scene, thing: Thing, pattern: bool = True) -> list[str]:
    """The phrases that name this object and no other: colour and shape, or with its pattern too if these are shared."""
    if len(scene.matching(*thing.look)) == 1:
        return [described(*thing.look, None)]
    if pattern and len(scene.matching(*thing.look, thing.pattern)) == 1:
        return [described(*thing.look, thing.pattern)]
    return []


def nameable(scene: Scene, pattern: bool = True) -> list[Thing]:
    return [t for t in scene.things if phrases_for(scene, t, pattern)]


def the(scene: Scene, thing: Thing, pattern: bool = True) -> str:
    return f"the {phrases_for(scene, thing, pattern)[0]}"


def boxes_of(things: Sequence[Thing]) -> list[Box]:
    return [t.box for t in things]


def balanced(options: dict[str, list], rng: np.random.Generator):
    """An option of an answer that is drawn first: (answer, option), or None if there are none."""
    answers = [answer for answer, found in options.items() if found]
    if not answers:
        return None
    answer = pick(rng, answers)
    return answer, pick(rng, options[answer])

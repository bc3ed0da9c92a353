"""Questions about scenes of the 576-token world: eighteen skills, each question with its answer and its boxes.

A skill is a function of a scene that draws one question, or None where the scene has nothing to ask about. A blind
guess is about as good as chance. One skill of the eighteen, `words`, is answerable without the image: its share, 1 of
18, is declared in the model's card.

Boxes are those of the parts asked about: single figures and dots, whole objects, regions of the ground. They serve
oracles and gates only.
"""

from collections.abc import Callable

import numpy as np

from lit_prune.micro import ground_skills_576 as ground
from lit_prune.micro import object_skills_576 as objects
from lit_prune.micro.drawing import COLOURS
from lit_prune.micro.drawing_576 import GROUNDS, SHAPES, TEXTURES
from lit_prune.micro.object_skills_576 import PLURAL
from lit_prune.micro.phrases_576 import Drawn, article
from lit_prune.micro.scenes_576 import PATTERNS, Scene, pick
from lit_prune.micro.world import Question, as_sample

__all__ = ["SKILLS", "WORDS", "WORDS_ALONE", "Question", "as_sample", "choose_questions", "questions"]

SIDES = {"triangle": "3", "square": "4", "diamond": "4", "hexagon": "6"}


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


def ask_words(scene: Scene, rng: np.random.Generator) -> Drawn:
    """Answerable without the image."""
    form = int(rng.integers(4))
    if form == 0:
        shape = pick(rng, SIDES)
        return f"How many corners does {article(shape)} have?", SIDES[shape], []
    if form == 1:
        number = int(rng.integers(9))
        return f"Which number comes after {number}?", str(number + 1), []
    if form == 2:
        a, b = (int(v) for v in rng.permutation(10)[:2])
        return f"Is {a} larger than {b}?", "yes" if a > b else "no", []
    colour, shape = pick(rng, COLOURS), pick(rng, SHAPES)
    asked = colour if rng.random() < 0.5 else pick(rng, [c for c in COLOURS if c != colour])
    return f"Is {article(f'{colour} {shape}')} {asked}?", "yes" if asked == colour else "no", []


_ASK: dict[str, Callable[[Scene, np.random.Generator], Drawn]] = {
    "existence": objects.ask_existence,
    "colour": objects.ask_colour,
    "shape": objects.ask_shape,
    "counting": objects.ask_counting,
    "relation": objects.ask_relation,
    "position": objects.ask_position,
    "size": objects.ask_size,
    "pattern": objects.ask_pattern,
    "same": ground.ask_same,
    "figures": objects.ask_figures,
    "dots": objects.ask_dots,
    "direction": objects.ask_direction,
    "texture": ground.ask_texture,
    "ground": ground.ask_ground,
    "region": ground.ask_region,
    "behind": ground.ask_behind,
    "layout": ground.ask_layout,
    "words": ask_words,
}
SKILLS = tuple(_ASK)
WORDS_ALONE = ("words",)  # skills that need no image

_TEXT = """is there a an yes no what colour the object objects how many are where relative to which on left right above
below top middle bottom centre larger smaller or largest smallest with plain do and have same stand on figures
does arrow point way stripes run dots up down across upright texture at ground behind parts like that corners
number comes after than shape nowhere has it size image ? . , user: assistant:"""
WORDS = sorted({*COLOURS, *SHAPES, *PLURAL.values(), *PATTERNS, *TEXTURES, *GROUNDS, *"0123456789", *_TEXT.split()})
"""Every word of questions, answers and the prompt, in lower case: the tokenizer's vocabulary."""

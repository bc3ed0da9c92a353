"""The world of 576 visual tokens: seeds, places, balance, boxes, and answers derived again from what a scene shows."""

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Callable

import numpy as np
import pytest

from lit_prune.micro import drawing_576 as drawing
from lit_prune.micro import scenes_576 as scenes
from lit_prune.micro import world
from lit_prune.micro.drawing import COLOURS
from lit_prune.micro.drawing_576 import GROUNDS, SHAPES, TEXTURES
from lit_prune.micro.questions_576 import SKILLS, WORDS, WORDS_ALONE, Question, as_sample, choose_questions, questions
from lit_prune.micro.scenes_576 import CORNERS, FULL_LEVEL, GRID, IMAGE_SIZE, LEVELS, PATCH_SIZE, PATTERNS, SIZES, Scene

SEEDS = range(scenes.VALIDATION_SEED + 700_000, scenes.VALIDATION_SEED + 700_080)


@pytest.fixture(scope="module")
def some() -> list[Scene]:
    return [scenes.make_scene(seed) for seed in SEEDS]


@pytest.fixture(scope="module")
def asked(some: list[Scene]) -> list[tuple[Scene, Question]]:
    return [(scene, question) for scene in some for question in questions(scene, 2)]


# Seeds


def test_a_scene_depends_on_seed_and_level_alone(some: list[Scene]) -> None:
    again = scenes.make_scene(SEEDS[5])
    before = questions(again, 2)  # before the image: the order of calls does not matter
    assert again.things == some[5].things
    assert again.regions == some[5].regions
    assert np.array_equal(again.image(), some[5].image())
    assert before == questions(some[5], 2)
    assert not np.array_equal(some[4].pixels, some[5].pixels)
    assert scenes.make_scene(SEEDS[5], 0).things != again.things


def test_ranges_of_seeds_are_disjoint_from_each_other_and_from_the_small_world() -> None:
    starts = [
        scenes.PRETRAIN_SEED,
        scenes.GATE_SEED,
        scenes.TRAIN_SEED,
        scenes.VALIDATION_SEED,
        scenes.TEST_SEED,
        scenes.SAMPLE_SEED,
        scenes.RESERVED_SEED,
    ]
    assert starts == sorted(starts)
    assert min(b - a for a, b in itertools.pairwise(starts)) >= 1_000_000
    assert scenes.PRETRAIN_SEED > world.RESERVED_SEED


# Scenes


@pytest.mark.parametrize("level", range(len(LEVELS)))
def test_objects_lie_in_the_image_and_apart(level: int) -> None:
    for seed in SEEDS[:25]:
        scene = scenes.make_scene(seed, level)
        least, most = LEVELS[level]
        assert least <= len(scene.things) <= most
        used = np.zeros((IMAGE_SIZE, IMAGE_SIZE), int)
        for thing in scene.things:
            x0, y0, x1, y1 = thing.box
            assert 0 <= x0 < x1 <= IMAGE_SIZE
            assert 0 <= y0 < y1 <= IMAGE_SIZE
            assert x1 - x0 == y1 - y0 >= SIZES[0]
            used[y0:y1, x0:x1] += 1
        assert used.max() == 1


def test_regions_tile_the_image(some: list[Scene]) -> None:
    for scene in some:
        used = np.zeros((IMAGE_SIZE, IMAGE_SIZE), int)
        for region in scene.regions:
            x0, y0, x1, y1 = region.box
            used[y0:y1, x0:x1] += 1
        assert (used == 1).all()
        assert len(scene.regions) in (1, 2, 4)
    assert {len(scene.regions) for scene in some} == {1, 2, 4}


def test_objects_have_many_sizes(some: list[Scene]) -> None:
    sizes = Counter(thing.size for scene in some for thing in scene.things)
    assert set(sizes) >= set(SIZES)
    assert max(sizes.values()) < 0.35 * sizes.total()


def test_look_alikes_are_frequent(some: list[Scene]) -> None:
    """Most objects share two of colour, shape and pattern with another one of their scene."""

    def twin(a: scenes.Thing, b: scenes.Thing) -> bool:
        return a is not b and (a.colour == b.colour) + (a.shape == b.shape) + (a.pattern == b.pattern) == 2

    with_twin = [any(twin(a, b) for b in scene.things) for scene in some for a in scene.things]
    assert np.mean(with_twin) > 0.45


def test_everything_painted_of_an_object_is_in_its_box_and_details_in_theirs(some: list[Scene]) -> None:
    for scene in some[:20]:
        for thing in scene.things:
            pixels = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3))
            mask, _ = thing.detail
            marks = [] if mask is None else [mask]
            shape = drawing.shape_576(thing.shape, thing.size)
            drawing.paint_object(
                pixels, thing.box, thing.colour, thing.shape, thing.pattern, marks, np.random.default_rng(0)
            )
            x0, y0, x1, y1 = thing.box
            assert not np.delete(np.delete(pixels, np.s_[y0:y1], 0), np.s_[x0:x1], 1).any()
            assert pixels[y0:y1, x0:x1][shape].any(-1).all()
            if thing.pattern in ("figures", "dots", "arrow"):
                assert (mask & shape == mask).all(), f"the {thing.pattern} leave the {thing.shape}"
                inside = np.zeros((IMAGE_SIZE, IMAGE_SIZE), bool)
                for a, b, c, d in thing.part_boxes:
                    inside[b:d, a:c] = True
                assert not mask[~inside[y0:y1, x0:x1]].any()
                assert len(thing.part_boxes) == (len(thing.digits) or len(thing.dots) or 1)


def test_dots_can_be_counted(some: list[Scene]) -> None:
    """As many separate spots as the object says."""
    for scene in some:
        for thing in scene.things:
            if thing.pattern != "dots":
                continue
            mask, boxes = thing.detail
            assert 1 <= len(thing.dots) <= scenes.MOST_DOTS
            spots = np.zeros(mask.shape, int)
            for x0, y0, x1, y1 in boxes:
                spots[max(y0 - 1, 0) : y1, max(x0 - 1, 0) : x1] += 1  # a pixel of room on two sides
            assert spots.max() == 1


def test_colours_can_be_seen(some: list[Scene]) -> None:
    """The median colour of a plain object is nearest to the colour that the scene says."""
    names = list(COLOURS)
    table = np.array([COLOURS[name] for name in names], float)
    for scene in some[:25]:
        for thing in scene.things:
            if thing.pattern == "nothing":
                x0, y0, x1, y1 = thing.box
                inside = scene.pixels[y0:y1, x0:x1][drawing.shape_576(thing.shape, thing.size)]
                assert names[np.linalg.norm(table - np.median(inside, 0), axis=1).argmin()] == thing.colour


def test_textures_differ() -> None:
    """Each texture but the smooth one changes the brightness, and no two draw the same picture."""
    drawn = {kind: drawing.texture(kind, (64, 64), np.random.default_rng(3)) for kind in TEXTURES}
    assert all(image.shape == (64, 64) for image in drawn.values())
    assert [kind for kind, image in drawn.items() if image.std() < 5] == ["smooth"]
    assert len({image.tobytes() for image in drawn.values()}) == len(TEXTURES)


def test_clutter_cannot_pass_for_an_object() -> None:
    """No disc as wide as the smallest object fits into what clutter paints at once."""
    for seed in range(40):
        pixels = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), -1.0)
        drawing.paint_clutter(pixels, 1, np.random.default_rng(seed))
        painted = (pixels[..., 0] >= 0).astype(float)
        assert painted.any()
        sums = np.pad(painted.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
        side = 11  # the largest square inside a circle of 16
        assert (sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]).max() < side**2


# Questions: the answer again, from the text and what the scene shows alone

OBJECT = re.compile(
    rf"(?P<plain>plain )?(?:(?P<colour>{'|'.join(COLOURS)})\b ?)?(?:(?P<shape>{'|'.join(SHAPES)}|object)\b)"
    rf"(?: with (?:an )?(?P<pattern>{'|'.join(PATTERNS)}))?"
)


def named(scene: Scene, phrase: str) -> list[scenes.Thing]:
    """The objects that a phrase such as "plain red circle" or "object with dots" is true of."""
    found = OBJECT.fullmatch(phrase)
    assert found, phrase
    pattern = "nothing" if found["plain"] else found["pattern"]
    shape = None if found["shape"] == "object" else found["shape"]
    return [
        t
        for t in scene.things
        if found["colour"] in (None, t.colour) and shape in (None, t.shape) and pattern in (None, t.pattern)
    ]


def one(scene: Scene, phrase: str) -> scenes.Thing:
    (thing,) = named(scene, phrase)
    return thing


def one_or_extreme(scene: Scene, phrase: str) -> scenes.Thing:
    """The same, or the largest or smallest object, by a margin that can be seen."""
    if phrase not in ("largest object", "smallest object"):
        return one(scene, phrase)
    by_size = sorted(scene.things, key=lambda t: t.size, reverse=phrase.startswith("largest"))
    ratio = by_size[0].size / by_size[1].size
    assert max(ratio, 1 / ratio) > 1.3
    return by_size[0]


def corner_look(scene: Scene, corner: str) -> tuple[str, str]:
    """Texture and colour of the pixel in a corner of the image."""
    x, y = (IMAGE_SIZE - 1 if side in corner else 0 for side in ("right", "bottom"))
    (region,) = (r for r in scene.regions if r.box[0] <= x < r.box[2] and r.box[1] <= y < r.box[3])
    return region.texture, region.colour


def ground_of(scene: Scene, thing: scenes.Thing) -> tuple[str, str]:
    """Texture and colour of the one region in which an object's corners lie."""
    x0, y0, x1, y1 = thing.box
    regions = {
        (r.texture, r.colour, r.box)
        for r in scene.regions
        for x, y in ((x0, y0), (x1 - 1, y0), (x0, y1 - 1), (x1 - 1, y1 - 1))
        if r.box[0] <= x < r.box[2] and r.box[1] <= y < r.box[3]
    }
    ((texture, colour, _),) = regions
    return texture, colour


def yes(truth: bool) -> str:
    return "yes" if truth else "no"


def count_answer(scene: Scene, kind: str) -> str:
    word = (
        kind.removeprefix("objects are ").removeprefix("objects have ").removeprefix("an ").removesuffix(" are there")
    )
    word = {"crosses": "cross"}.get(word, word)
    singular = word if word in (*COLOURS, *PATTERNS, *SHAPES) else word.removesuffix("s")
    return str(sum(singular in (t.colour, t.shape, t.pattern) for t in scene.things))


def where_answer(scene: Scene, phrase: str) -> str:
    x, y = one(scene, phrase).centre
    return f"{('top', 'middle', 'bottom')[int(y // 64)]} {('left', 'centre', 'right')[int(x // 64)]}"


def relation_answer(scene: Scene, a: str, b: str) -> str:
    (ax, ay), (bx, by) = one(scene, a).centre, one(scene, b).centre
    return f"{'left' if ax < bx else 'right'} {'above' if ay < by else 'below'}"


def size_answer(scene: Scene, word: str, a: str, b: str) -> str:
    return (max if word == "larger" else min)((a, b), key=lambda phrase: one(scene, phrase).size)


def region_answer(scene: Scene, look: str) -> str:
    found = [r for r in scene.regions if look in (r.texture, r.colour)]
    assert len(found) < 2
    if not found:
        return "nowhere"
    x0, y0, x1, y1 = found[0].box
    across = "" if x1 - x0 == IMAGE_SIZE else "left" if x0 == 0 else "right"
    down = "" if y1 - y0 == IMAGE_SIZE else "top" if y0 == 0 else "bottom"
    return f"{down} {across}".strip()


def corners_answer(shape: str) -> str:
    return {"triangle": "3", "square": "4", "diamond": "4", "hexagon": "6"}[shape]


RULES: list[tuple[str, str, Callable[..., str]]] = [
    ("existence", r"Is there an? (.+)\?", lambda s, a: yes(bool(named(s, a)))),
    ("colour", r"What colour is the (.+)\?", lambda s, a: one_or_extreme(s, a).colour),
    ("shape", r"What shape is the (.+)\?", lambda s, a: one_or_extreme(s, a).shape),
    ("counting", r"How many (.+)\?", count_answer),
    ("relation", r"Where is the (.+) relative to the (.+)\?", relation_answer),
    ("position", r"Where is the (.+)\?", where_answer),
    ("size", r"Which is (larger|smaller), the (.+) or the (.+)\?", size_answer),
    ("pattern", r"What is on the (.+)\?", lambda s, a: one(s, a).pattern),
    (
        "same",
        r"Do the (.+) and the (.+) stand on the same ground\?",
        lambda s, a, b: yes(ground_of(s, one(s, a)) == ground_of(s, one(s, b))),
    ),
    ("figures", r"Which figures are on the (.+)\?", lambda s, a: " ".join(map(str, one(s, a).digits))),
    ("dots", r"How many dots are on the (.+)\?", lambda s, a: str(len(one(s, a).dots))),
    ("direction", r"Where does the arrow on the (.+) point\?", lambda s, a: one(s, a).direction),
    ("direction", r"Which way do the stripes on the (.+) run\?", lambda s, a: one(s, a).direction),
    ("texture", r"Which texture is at the (.+)\?", lambda s, a: corner_look(s, a)[0]),
    ("ground", r"What colour is the ground at the (.+)\?", lambda s, a: corner_look(s, a)[1]),
    ("region", r"Where is the (.+) ground\?", region_answer),
    ("region", r"Is there (\w+) ground\?", lambda s, a: yes(any(a in region.look for region in s.regions))),
    ("behind", r"Which texture is behind the (.+)\?", lambda s, a: ground_of(s, one(s, a))[0]),
    ("layout", r"How many parts does the ground have\?", lambda s: str(len(s.regions))),
    (
        "layout",
        r"Is the ground at the (.+) like that at the (.+)\?",
        lambda s, a, b: yes(corner_look(s, a) == corner_look(s, b)),
    ),
    ("words", r"How many corners does an? (.+) have\?", lambda s, a: corners_answer(a)),
    ("words", r"Which number comes after (\d)\?", lambda s, a: str(int(a) + 1)),
    ("words", r"Is (\d) larger than (\d)\?", lambda s, a, b: yes(int(a) > int(b))),
    ("words", r"Is an? (\w+) \w+ (\w+)\?", lambda s, a, b: yes(a == b)),
]


@pytest.mark.parametrize("skill", SKILLS)
def test_answers_follow_from_the_scene(skill: str, asked: list[tuple[Scene, Question]]) -> None:
    mine = [(scene, question) for scene, question in asked if question.skill == skill]
    assert len(mine) > 80
    forms = Counter()
    for scene, question in mine:
        rule, match = next(
            (rule, match) for rule in RULES if rule[0] == skill and (match := re.fullmatch(rule[1], question.text))
        )
        forms[rule[1]] += 1
        assert rule[2](scene, *match.groups()) == question.answer, question
    assert set(forms) == {pattern for name, pattern, _ in RULES if name == skill}


# Boxes


def test_boxes_lie_in_the_image(asked: list[tuple[Scene, Question]]) -> None:
    for _, question in asked:
        for x0, y0, x1, y1 in question.boxes:
            assert 0 <= x0 < x1 <= IMAGE_SIZE
            assert 0 <= y0 < y1 <= IMAGE_SIZE


def phrases_in(text: str) -> list[str]:
    return [match.group(0).strip() for match in OBJECT.finditer(text)]


def test_boxes_cover_what_is_asked(asked: list[tuple[Scene, Question]]) -> None:
    """Objects named in a question, their parts where these are asked for, the ground where it is."""
    for scene, question in asked:
        boxes = set(question.boxes)
        absent = question.skill in ("existence", "counting", "region") and question.answer in ("no", "0", "nowhere")
        if question.skill in WORDS_ALONE or absent:
            assert not boxes
        elif question.skill in ("figures", "dots"):
            thing = one(scene, phrases_in(question.text)[0])
            assert boxes == {*thing.part_boxes, thing.box}
            assert len(boxes) == len(thing.digits or thing.dots) + 1
            assert all(thing.x <= b[0] and b[2] <= thing.x + thing.size and thing.y <= b[1] for b in boxes)
        elif question.skill in ("existence", "relation", "position", "size", "pattern"):
            things = [thing for phrase in phrases_in(question.text) for thing in named(scene, phrase)]
            assert boxes == {thing.box for thing in things}
        elif question.skill == "counting":
            assert len(boxes) == int(question.answer)
            assert boxes <= {thing.box for thing in scene.things}
        elif question.skill in ("behind", "same"):
            things = [one(scene, phrase) for phrase in phrases_in(question.text)]
            assert boxes > {thing.box for thing in things}
            for x0, y0, x1, y1 in boxes - {thing.box for thing in things}:  # strips of ground beside these objects
                assert any(
                    t.x - 10 <= x0 and t.y - 10 <= y0 and x1 <= t.x + t.size + 10 and y1 <= t.y + t.size + 10
                    and not (t.x < x1 and x0 < t.x + t.size and t.y < y1 and y0 < t.y + t.size)
                    for t in things
                )  # fmt: skip
        elif question.skill in ("texture", "ground"):
            (box,) = boxes
            corner = next(c for c in CORNERS if c in question.text)
            assert ((box[0] == 0), (box[1] == 0)) == ("left" in corner, "top" in corner)
            assert sum(r.holds(box) for r in scene.regions) == 1
        elif question.skill == "region":
            assert {r.box for r in scene.regions if any(w in question.text for w in r.look)} == boxes
            assert len(boxes) == 1 or question.answer == "yes"
        else:
            assert boxes


# Balance


def test_answers_are_balanced_and_a_blind_guess_is_poor() -> None:
    answers, by_text = defaultdict(Counter), defaultdict(Counter)
    for seed in range(SEEDS[0], SEEDS[0] + 300):
        for question in choose_questions(scenes.make_scene(seed), len(SKILLS)):
            answers[question.skill][question.answer] += 1
            by_text[question.skill, re.sub(r"\b(the|an?) .*", "", question.text)][question.answer] += 1
    assert set(answers) == set(SKILLS)
    counts = {skill: count.total() for skill, count in answers.items()}
    assert min(counts.values()) > 0.55 * max(counts.values()), counts
    limit = {"existence": 0.56, "same": 0.6, "layout": 0.42, "counting": 0.32, "relation": 0.32, "direction": 0.4}
    limit |= {"region": 0.32, "dots": 0.3}
    limit |= {"pattern": 0.33, "words": 0.35, "figures": 0.06, "position": 0.2, "size": 0.1}
    share = {skill: count.most_common(1)[0][1] / count.total() for skill, count in answers.items()}
    assert {skill: value for skill, value in share.items() if value > limit.get(skill, 0.25)} == {}
    # The best that the form of a question tells, over all skills that need the image.
    guessed = sum(count.most_common(1)[0][1] for (skill, _), count in by_text.items() if skill not in WORDS_ALONE)
    assert guessed / sum(n for skill, n in counts.items() if skill not in WORDS_ALONE) < 0.3
    kinds = {"texture": TEXTURES, "ground": GROUNDS, "colour": COLOURS, "shape": SHAPES, "pattern": PATTERNS}
    assert all(set(answers[skill]) == set(values) for skill, values in kinds.items())
    assert set(answers["dots"]) == set("1234")
    assert set(answers["counting"]) == set("0123")


def test_the_first_of_two_named_is_right_half_of_the_time(asked: list[tuple[Scene, Question]]) -> None:
    sizes = [question for _, question in asked if question.skill == "size"]
    first = [question.answer == re.search(r"the (.+) or the", question.text).group(1) for question in sizes]
    assert 0.4 < np.mean(first) < 0.6


def test_words_do_not_tell_what_exists() -> None:
    answers = defaultdict(list)
    for seed in range(SEEDS[0], SEEDS[0] + 250):
        for question in questions(scenes.make_scene(seed), {"existence": 3}):
            for word in question.text.strip("?").split()[3:]:
                answers[word].append(question.answer == "yes")
    shares = {word: np.mean(found) for word, found in answers.items() if len(found) > 60}
    assert all(0.3 < share < 0.7 for share in shares.values()), shares


def test_a_declared_share_needs_no_image() -> None:
    assert len(WORDS_ALONE) / len(SKILLS) < 0.1


# Text and files


def test_every_word_is_in_the_vocabulary(asked: list[tuple[Scene, Question]]) -> None:
    for _, question in asked:
        text = re.sub(r"([?,])", r" \1", f"{question.text} {question.answer}").lower()
        assert set(text.split()) <= set(WORDS)


def test_choose_questions_takes_skills_in_turn(some: list[Scene]) -> None:
    for scene in some[:10]:
        chosen = choose_questions(scene, 5)
        assert len({question.skill for question in chosen}) == 5
        assert len({(question.skill, question.text) for question in choose_questions(scene, 30)}) == 30


def test_samples_are_instruction_data(some: list[Scene]) -> None:
    question = choose_questions(some[0], 1)[0]
    sample = as_sample("a", "b.png", question)
    assert set(sample) == {"id", "image", "conversations", "skill", "boxes"}
    assert sample["conversations"][0] == {"from": "human", "value": f"<image>\n{question.text}"}


def test_geometry() -> None:
    assert GRID * PATCH_SIZE == IMAGE_SIZE
    assert GRID * GRID == 576
    assert LEVELS[FULL_LEVEL] == max(LEVELS)

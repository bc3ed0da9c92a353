"""The generated world: seeds, boxes, answers, balance and the files it writes."""

import itertools
import json
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from jobs.micro_llava.batches import block, patch_labels
from lit_prune.micro import instructions, world
from lit_prune.micro.drawing import COLOURS, SHAPES, glyph, shape_mask
from lit_prune.micro.worlds import WORLDS

SEEDS = range(world.TEST_SEED + 800_000, world.TEST_SEED + 800_150)


@pytest.fixture(scope="module")
def scenes() -> list[world.Scene]:
    return [world.make_scene(seed) for seed in SEEDS]


def test_scene_depends_on_its_seed_only(scenes):
    seed = SEEDS[7]
    again = world.make_scene(seed)
    questions = again.questions(2)  # before the image: the order of calls does not matter
    assert again.things == scenes[7].things
    assert np.array_equal(again.image(), scenes[7].image())
    assert questions == scenes[7].questions(2)
    assert not np.array_equal(scenes[6].image(), scenes[7].image())


def test_seed_ranges_are_disjoint_and_below_the_reserved_ones():
    starts = (world.PRETRAIN_SEED, world.TRAIN_SEED, world.VALIDATION_SEED, world.TEST_SEED, world.RESERVED_SEED)
    assert list(starts) == sorted(set(starts))
    assert min(b - a for a, b in itertools.pairwise(starts)) >= 1_000_000
    assert world.RESERVED_SEED == 9_000_000


def test_boxes_hold_the_objects_pixels(scenes):
    """Without noise and texture, everything that is painted lies in the boxes, and fills a good part of them."""
    for scene in scenes[:20]:
        pixels = np.zeros((world.IMAGE_SIZE, world.IMAGE_SIZE, 3))
        for thing in scene.things:
            world.draw(pixels, thing.box, thing.colour, thing.shape, thing.digit, np.random.default_rng(0))
        painted = pixels.any(-1)
        for thing in scene.things:
            x0, y0, x1, y1 = thing.box
            assert painted[y0:y1, x0:x1].mean() > 0.3
            painted[y0:y1, x0:x1] = False
        assert not painted.any()


def test_objects_fill_blocks_of_two_by_two_patches(scenes):
    for scene in scenes:
        used = Counter(patch for thing in scene.things for patch in block(thing))
        assert max(used.values()) == 1
        for thing in scene.things:
            x0, y0, x1, y1 = thing.box
            assert (x0 // 8, y0 // 8, (x1 - 1) // 8, (y1 - 1) // 8) == (
                thing.column,
                thing.row,
                thing.column + 1,
                thing.row + 1,
            )
            assert 0 <= x0 < x1 <= 96
            assert 0 <= y0 < y1 <= 96


def test_scenes_look_as_described(scenes):
    for scene in scenes:
        looks = Counter(thing.look for thing in scene.things)
        assert 4 <= len(scene.things) <= 9
        assert sorted(looks.values())[-2:] == [1, 2]
        assert scene.image().size == (96, 96)
        assert all((thing.digit is not None) == (thing.shape == "tile") for thing in scene.things)


def test_colours_can_be_seen(scenes):
    """The mean colour inside a full shape is nearest to the colour that the scene says."""
    names = list(COLOURS)
    table = np.array([COLOURS[name] for name in names], float)
    for scene in scenes[:30]:
        pixels = np.asarray(scene.image(), float)
        for thing in scene.things:
            if thing.shape not in ("square", "circle", "diamond"):
                continue
            x0, y0, x1, y1 = thing.box
            mean = pixels[y0:y1, x0:x1][shape_mask(thing.shape, thing.size)].mean(0)
            assert names[np.linalg.norm(table - mean, axis=1).argmin()] == thing.colour


def recompute(scene: world.Scene, question: world.Question) -> tuple[str, list[world.Thing]]:
    """The answer and the objects asked about, from the text and the list of objects alone."""
    words = question.text.lower().replace("?", "").split()
    phrases, i = [], 0
    while i < len(words):
        if words[i] in COLOURS and i + 1 < len(words) and words[i + 1] in SHAPES:
            phrases.append((words[i], words[i + 1]))
            i += 1
        elif words[i] in COLOURS:
            phrases.append((words[i], None))
        elif words[i] in SHAPES:
            phrases.append((None, words[i]))
        i += 1
    found = [[t for t in scene.things if (c or t.colour) == t.colour and (s or t.shape) == t.shape] for c, s in phrases]
    first = found[0]
    if words[:2] == ["is", "there"]:
        return ("yes" if first else "no"), first
    if words[:2] == ["how", "many"]:
        return str(len(first)), first
    assert all(len(things) == 1 for things in found)
    thing = first[0]
    if "relative" in words:
        (ax, ay, *_), (bx, by, *_) = thing.box, found[1][0].box
        return f"{'left' if ax < bx else 'right'} {'above' if ay < by else 'below'}", [thing, found[1][0]]
    if words[0] == "where":
        x, y = (sum(edge // 8 >= e for e in (4, 7)) for edge in thing.box[:2])
        return f"{['top', 'middle', 'bottom'][y]} {['left', 'centre', 'right'][x]}", [thing]
    return {"what": thing.colour if words[1] == "colour" else thing.shape, "which": str(thing.digit)}[words[0]], [thing]


def test_answers_are_right(scenes):
    for scene in scenes:
        for question in scene.questions(3):
            answer, things = recompute(scene, question)
            assert question.answer == answer, question
            assert sorted(question.boxes) == sorted(thing.box for thing in things), question


def test_answers_are_balanced():
    answers = defaultdict(Counter)
    for seed in range(SEEDS[0], SEEDS[0] + 700):
        for question in world.choose_questions(world.make_scene(seed), 7):
            answers[question.skill][question.answer] += 1
    share = {skill: count.most_common(1)[0][1] / count.total() for skill, count in answers.items()}
    limits = {"existence": 0.55, "colour": 0.2, "shape": 0.3, "counting": 0.4, "relation": 0.32, "digit": 0.17}
    assert all(share[skill] < limit for skill, limit in (limits | {"position": 0.22}).items()), share
    assert [len(answers[skill]) for skill in world.SKILLS] == [2, 8, 7, 3, 4, 10, 9]


def test_words_of_a_question_do_not_tell_its_answer():
    """Yes and no, and the three counts, are about as frequent behind each shape and each colour."""
    answers = defaultdict(list)
    for seed in range(SEEDS[0], SEEDS[0] + 1500):
        for question in world.make_scene(seed).questions({"existence": 1}):
            for word in question.text.strip("?").split()[-2:]:
                answers[word].append(question.answer == "yes")
    shares = {word: sum(found) / len(found) for word, found in answers.items()}
    assert all(0.35 < share < 0.65 for share in shares.values()), shares


def test_every_word_is_in_the_vocabulary(scenes):
    for scene in scenes:
        for question in scene.questions(2):
            words = (question.text.replace("?", " ?") + " " + question.answer).lower().split()
            assert set(words) <= set(world.WORDS)


def test_write_world(tmp_path):
    path = instructions.write_world(
        WORLDS["micro"], tmp_path, range(SEEDS[0], SEEDS[0] + 14), questions_per_image=3, progress=False
    )
    samples = json.loads(path.read_text())
    assert len(samples) == 42
    assert set(Counter(sample["skill"] for sample in samples).values()) == {6}
    assert len({sample["id"] for sample in samples}) == 42
    for sample in samples:
        assert set(sample) == {"id", "image", "conversations", "skill", "boxes"}
        human, model = sample["conversations"]
        assert human["from"] == "human"
        assert human["value"].startswith("<image>\n")
        assert model["from"] == "gpt"
    with Image.open(tmp_path / samples[0]["image"]) as image:
        assert np.array_equal(image, world.make_scene(SEEDS[0]).image())


def test_written_samples_do_not_depend_on_the_range(tmp_path):
    one = json.loads(
        instructions.write_world(WORLDS["micro"], tmp_path / "a", [SEEDS[3]], 5, progress=False).read_text()
    )
    many = json.loads(
        instructions.write_world(WORLDS["micro"], tmp_path / "b", list(SEEDS[:5]), 5, progress=False).read_text()
    )
    assert one == [sample for sample in many if sample["image"] == one[0]["image"]]


def test_patch_labels(scenes):
    labels = patch_labels(scenes[0])
    assert (labels["colour"] > 0).sum() == 4 * len(scenes[0].things)
    assert labels["anchor"].sum() == len(scenes[0].things)
    assert ((labels["digit"] > 0) <= (labels["shape"] == 1 + SHAPES.index("tile"))).all()


def test_glyphs_differ():
    assert len({glyph(digit).tobytes() for digit in range(10)}) == 10

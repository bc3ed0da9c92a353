"""Batches of pretraining: scenes as tensors, with about twenty questions an image that share one prefix.

A sequence is `<s> USER: <576 visual tokens>`, followed by all questions of the image one after the other. A question
sees the prefix and itself only, and its position ids restart after the prefix, so its logits are those of the question
asked alone while the visual tokens are computed once. Nothing of the boxes reaches the decoder.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from torch import Tensor

from jobs.pretraining import NONE, pack
from lit_prune.micro.drawing import COLOURS
from lit_prune.micro.drawing_576 import GROUNDS, SHAPES, TEXTURES, shape_576
from lit_prune.micro.model import BOS, EOS, IMAGE
from lit_prune.micro.model_576 import VISUAL_TOKENS, build_tokenizer
from lit_prune.micro.questions_576 import SKILLS, Question, questions
from lit_prune.micro.scenes_576 import GRID, IMAGE_SIZE, PATCH_SIZE, PATTERNS, Scene, Thing, make_scene

PREFIX = 2 + VISUAL_TOKENS  # <s>, USER:, the image
FIRST_PATCH = 2
COVERED = 0.35  # share of a patch from which an object's look is its label
BLOCKS = 4  # the pixels of a patch that are read out: brightness in 4 x 4 blocks, colour in 2 x 2
# Most questions of each skill and image. Skills that are learned late are asked more often: text costs little beside
# an image's 576 visual tokens.
MIX = dict.fromkeys(SKILLS, 1) | {"region": 8, "counting": 5, "dots": 2, "figures": 3, "same": 2, "size": 2}
NAMES = (*COLOURS, *SHAPES, *TEXTURES, *GROUNDS)  # words whose presence in a scene is an image-level label

INDEX = {name: i for names in (COLOURS, SHAPES, PATTERNS, TEXTURES, GROUNDS) for i, name in enumerate(names)}
DIRECTIONS = ("up", "down", "left", "right", "across", "upright")  # of arrows and of stripes
PATCH_CLASSES = {
    "colour": len(COLOURS) + 1,
    "shape": len(SHAPES) + 1,
    "pattern": len(PATTERNS) + 1,
    "figure": 11,
    "figure_odd": 11,
    "dot": 3,
    "direction": len(DIRECTIONS) + 1,
    "row": GRID,
    "column": GRID,
    "own_row": GRID,
    "own_column": GRID,
    "texture": len(TEXTURES),
    "ground": len(GROUNDS),
}
OBJECT_LABELS = ("colour", "shape", "pattern", "figure", "figure_odd", "dot", "direction")  # 0 where there is none
PIXELS = BLOCKS * BLOCKS + 3 * 4


@cache
def tokenizer():
    return build_tokenizer()


@dataclass
class Batch:
    """All tensors of a step; `patches` holds the label maps by name."""

    pixels: Tensor  # float[batch, 3, 192, 192]
    patches: dict[str, Tensor]  # int[batch, 576]; "pixels" float[batch, 576, 28]; "names" float[batch, names]
    input_ids: Tensor | None = None  # int[batch, length]
    positions: Tensor | None = None  # int[batch, length]
    mask: Tensor | None = None  # bool[batch, 1, text, length]: where the rows after the prefix may look
    labels: Tensor | None = None  # int[batch, length], the next token at positions that predict an answer
    segments: Tensor | None = None  # int[batch, length], 0 prefix, 1.. questions, -1 padding
    questions: list[list[Question]] = field(default_factory=list)


def pixel_values(scene: Scene) -> np.ndarray:
    """float32[3, 192, 192], exactly what the image processor makes of the scene's image."""
    return ((scene.pixels.astype(np.float32) / 255 - 0.5) / 0.5).transpose(2, 0, 1)


def vision_batch(seeds: Sequence[int], levels: Sequence[int] | None = None) -> Batch:
    """Images and patch labels alone, for the tower's stage."""
    return _images(_scenes(seeds, levels))


def question_batch(
    seeds: Sequence[int], levels: Sequence[int] | None = None, mix: dict[str, int] | int | None = None
) -> Batch:
    """Images with their questions; `mix` as in `questions_576.questions`, by default `MIX`."""
    scenes = _scenes(seeds, levels)
    batch = _images(scenes)
    batch.questions = [questions(scene, MIX if mix is None else mix) for scene in scenes]
    texts = [[encode(question) for question in asked] for asked in batch.questions]
    prefix = [BOS, tokenizer().convert_tokens_to_ids("user:"), *[IMAGE] * VISUAL_TOKENS]
    batch.input_ids, batch.positions, batch.segments, batch.labels = pack(prefix, texts)
    batch.mask = text_rows_mask(batch.segments)
    return batch


def _scenes(seeds: Sequence[int], levels: Sequence[int] | None) -> list[Scene]:
    if levels is None:
        return [make_scene(seed) for seed in seeds]
    return [make_scene(seed, level) for seed, level in zip(seeds, levels, strict=True)]


# What patches show


def _images(scenes: list[Scene]) -> Batch:
    labels = [patch_labels(scene) for scene in scenes]
    patches = {name: torch.from_numpy(np.stack([one[name] for one in labels])) for name in labels[0]}
    pixels = torch.from_numpy(np.stack([pixel_values(scene) for scene in scenes]))
    return Batch(pixels, patches | {"pixels": patch_pixels(pixels)})


def patch_labels(scene: Scene) -> dict[str, np.ndarray]:
    """Labels of each patch, int[576] by name, and "names": the words that name something in the scene.

    Details are labelled where they are: a figure on the patches that it covers, dots on the patches of their centres.
    Patches that an object covers have no texture or ground.
    """
    labels = {name: np.zeros((GRID, GRID), np.int64) for name in OBJECT_LABELS}
    labels |= {name: np.full((GRID, GRID), NONE, np.int64) for name in ("row", "column")}
    labels |= _ground_labels(scene)
    labels["own_row"], labels["own_column"] = np.mgrid[:GRID, :GRID]
    present = np.zeros(len(NAMES), np.float32)
    for thing in scene.things:
        cover = object_cover(thing)
        on = cover >= min(COVERED, 0.8 * cover.max())
        labels["colour"][on] = 1 + INDEX[thing.colour]
        labels["shape"][on] = 1 + INDEX[thing.shape]
        labels["pattern"][on] = 1 + INDEX[thing.pattern]
        labels["column"][on], labels["row"][on] = (int(v // PATCH_SIZE) for v in thing.centre)
        if thing.direction:
            labels["direction"][on] = 1 + DIRECTIONS.index(thing.direction)
        _label_parts(labels, thing)
        for name in ("texture", "ground"):
            labels[name][cover > 0.1] = NONE
        present[[NAMES.index(thing.colour), NAMES.index(thing.shape)]] = 1
    for region in scene.regions:
        present[[NAMES.index(region.texture), NAMES.index(region.colour)]] = 1
    np.minimum(labels["dot"], 2, out=labels["dot"])
    return {name: values.reshape(-1) for name, values in labels.items()} | {"names": present}


def _label_parts(labels: dict[str, np.ndarray], thing: Thing) -> None:
    """Figures on the patches of which they cover a good part, every second one in a map of its own; dots by centre."""
    for index, (x0, y0, x1, y1) in enumerate(thing.part_boxes):
        middle = int((y0 + y1) / 2 // PATCH_SIZE), int((x0 + x1) / 2 // PATCH_SIZE)
        if thing.digits:
            rows, columns = (slice(round(a / PATCH_SIZE), round(b / PATCH_SIZE)) for a, b in ((y0, y1), (x0, x1)))
            figure = labels[("figure", "figure_odd")[index % 2]]
            figure[rows, columns] = figure[middle] = 1 + thing.digits[index]
        elif thing.dots:
            labels["dot"][middle] += 1


def _ground_labels(scene: Scene) -> dict[str, np.ndarray]:
    """Texture and colour of the region that holds each patch's middle."""
    labels = {name: np.zeros((GRID, GRID), np.int64) for name in ("texture", "ground")}
    for region in scene.regions:
        x0, y0, x1, y1 = (round(v / PATCH_SIZE) for v in region.box)
        labels["texture"][y0:y1, x0:x1] = INDEX[region.texture]
        labels["ground"][y0:y1, x0:x1] = INDEX[region.colour]
    return labels


def object_cover(thing: Thing) -> np.ndarray:
    """float[24, 24]: the share of each patch that an object's shape covers."""
    mask = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.float32)
    x0, y0, x1, y1 = thing.box
    mask[y0:y1, x0:x1] = shape_576(thing.shape, thing.size)
    return mask.reshape(GRID, PATCH_SIZE, GRID, PATCH_SIZE).mean((1, 3))


def patch_pixels(pixels: Tensor) -> Tensor:
    """float[batch, 576, 28]: each patch's brightness in 4 x 4 blocks and colours in 2 x 2."""
    count = pixels.shape[0]

    def blocks(values: Tensor, side: int) -> Tensor:
        small = torch.nn.functional.avg_pool2d(values, PATCH_SIZE // side)
        tiles = small.unfold(2, side, side).unfold(3, side, side)  # batch, channels, rows, columns, side, side
        return tiles.permute(0, 2, 3, 1, 4, 5).reshape(count, VISUAL_TOKENS, -1)

    return torch.cat([blocks(pixels.mean(1, keepdim=True), BLOCKS), blocks(pixels, 2)], -1)


# Text


def words(text: str) -> list[str]:
    """The words of a question as the tokenizer splits it."""
    return text.lower().replace("?", " ?").replace(",", " ,").split()


def encode(question: Question) -> tuple[list[int], list[int]]:
    """Token ids of "question ASSISTANT:" and of "answer</s>"."""
    ids = tokenizer().convert_tokens_to_ids
    return ids([*words(question.text), "assistant:"]), [*ids(question.answer.split()), EOS]


def text_rows_mask(segments: Tensor) -> Tensor:
    """bool[batch, 1, text, length]: a question sees the prefix and, causally, itself."""
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()[PREFIX:]
    same = segments[:, PREFIX:, None] == segments[:, None, :]
    return ((same | (segments == 0)[:, None, :]) & causal)[:, None]

"""Batches of pretraining: generated scenes as tensors, with about 16 questions an image that share one prefix.

A sequence is `<s> USER: <144 visual tokens>` followed by all questions of the image one after the other. A 4-D mask
lets each question see the prefix and itself only, and its position ids restart behind the prefix, so its logits are
those of the question asked alone while the 144 visual tokens are computed once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from jobs import pretraining
from jobs.pretraining import NONE, pack
from lit_prune.micro.drawing import COLOURS, SHAPES
from lit_prune.micro.model import BOS, EOS, IMAGE, VISUAL_TOKENS, build_tokenizer
from lit_prune.micro.world import GRID, Question, Scene, Thing, make_scene

PREFIX = 2 + VISUAL_TOKENS  # <s>, USER:, the image
FIRST_PATCH = 2
# Questions of each skill and image: counting and relation learn last.
MIX = {"existence": 2, "colour": 2, "shape": 1, "counting": 4, "relation": 4, "digit": 1, "position": 2}

_COLOUR = {name: i for i, name in enumerate(COLOURS)}
_SHAPE = {name: i for i, name in enumerate(SHAPES)}
_TOKENIZER = build_tokenizer()
_USER = _TOKENIZER.convert_tokens_to_ids("user:")


@dataclass
class Rows:
    """Attention targets of some text positions: a distribution over the prefix for each."""

    batch: list[int] = field(default_factory=list)
    position: list[int] = field(default_factory=list)
    target: list[np.ndarray] = field(default_factory=list)

    def add(self, batch: int, position: int, target: np.ndarray) -> None:
        self.batch.append(batch)
        self.position.append(position)
        self.target.append(target)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        target = torch.from_numpy(np.stack(self.target)) if self.target else torch.zeros(0, PREFIX)
        return torch.tensor(self.batch, dtype=torch.long), torch.tensor(self.position, dtype=torch.long), target


@dataclass
class Batch:
    """All tensors of a step; `rows` holds the attention targets by name, `patches` the label maps by name."""

    pixels: Tensor  # float[batch, 3, 96, 96]
    patches: dict[str, Tensor]  # int[batch, 144]; "present": float[batch, 15] for the class token
    input_ids: Tensor | None = None  # int[batch, length]
    positions: Tensor | None = None  # int[batch, length]
    mask: Tensor | None = None  # bool[batch, 1, length, length], True where a row may look
    labels: Tensor | None = None  # int[batch, length], the next token at positions that predict an answer
    segments: Tensor | None = None  # int[batch, length], 0 prefix, 1.. questions, -1 padding
    rows: dict[str, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    questions: list[list[Question]] = field(default_factory=list)


def pixel_values(scene: Scene) -> np.ndarray:
    """float32[3, 96, 96], exactly what the image processor makes of the scene's image."""
    image = np.asarray(scene.image(), np.float32)
    return ((image / 255 - 0.5) / 0.5).transpose(2, 0, 1)


def anchor(thing: Thing) -> int:
    """Index of the upper left patch of an object's block."""
    return thing.row * GRID + thing.column


def block(thing: Thing) -> list[int]:
    """Indices of the four patches of an object's block."""
    return [anchor(thing) + i for i in (0, 1, GRID, GRID + 1)]


def patch_labels(scene: Scene) -> dict[str, np.ndarray]:
    """Labels of each patch: colour, shape, digit, whether it is an anchor, and its object's row and column."""
    labels = {name: np.zeros(VISUAL_TOKENS, np.int64) for name in ("colour", "shape", "digit", "anchor")}
    labels |= {name: np.full(VISUAL_TOKENS, NONE, np.int64) for name in ("row", "column")}
    present = np.zeros(len(COLOURS) + len(SHAPES), np.float32)
    for thing in scene.things:
        patches = block(thing)
        labels["colour"][patches] = 1 + _COLOUR[thing.colour]
        labels["shape"][patches] = 1 + _SHAPE[thing.shape]
        labels["digit"][patches] = 0 if thing.digit is None else 1 + thing.digit
        labels["anchor"][anchor(thing)] = 1
        labels["row"][patches] = thing.row
        labels["column"][patches] = thing.column
        present[[_COLOUR[thing.colour], len(COLOURS) + _SHAPE[thing.shape]]] = 1
    return labels | {"present": present}


def vision_batch(seeds: list[int]) -> Batch:
    """Images and patch labels alone, for the first stage."""
    return _images([make_scene(seed) for seed in seeds])


def _images(scenes: list[Scene]) -> Batch:
    labels = [patch_labels(scene) for scene in scenes]
    patches = {name: torch.from_numpy(np.stack([one[name] for one in labels])) for name in labels[0]}
    return Batch(torch.from_numpy(np.stack([pixel_values(scene) for scene in scenes])), patches)


def question_batch(seeds: list[int], mix: dict[str, int] | int | None = None) -> Batch:
    """Images with their questions; `mix` as in `Scene.questions`, by default `MIX`."""
    scenes = [make_scene(seed) for seed in seeds]
    batch = _images(scenes)
    batch.questions = [scene.questions(MIX if mix is None else mix) for scene in scenes]
    texts = [[encode(question) for question in questions] for questions in batch.questions]
    prefix = [BOS, _USER, *[IMAGE] * VISUAL_TOKENS]
    batch.input_ids, batch.positions, batch.segments, batch.labels = pack(prefix, texts)
    batch.mask = shared_prefix_mask(batch.segments)
    rows = {name: Rows() for name in ("words", "phrases", "count", "answer")}
    for b, (scene, questions) in enumerate(zip(scenes, batch.questions, strict=True)):
        start = PREFIX
        for question, (prompt, answer) in zip(questions, texts[b], strict=True):
            _ground(rows, b, start, scene, question, prompt, len(answer))
            start += len(prompt) + len(answer) - 1
    batch.rows = {name: found.tensors() for name, found in rows.items()}
    return batch


def encode(question: Question) -> tuple[list[int], list[int]]:
    """Token ids of "question ASSISTANT:" and of "answer</s>"."""
    ids = _TOKENIZER.convert_tokens_to_ids
    return ids([*words(question.text), "assistant:"]), [*ids(question.answer.split()), EOS]


def words(text: str) -> list[str]:
    """The words of a question as the tokenizer splits it."""
    return text.lower().replace("?", " ?").split()


def shared_prefix_mask(segments: Tensor) -> Tensor:
    """bool[batch, 1, length, length]: causal, and a question sees the prefix and itself."""
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same = segments[:, :, None] == segments[:, None, :]
    return ((same | (segments == 0)[:, None, :]) & causal)[:, None]


def _ground(
    rows: dict[str, Rows], b: int, start: int, scene: Scene, question: Question, prompt: list[int], answer: int
) -> None:
    """Attention targets of one question whose first token stands at `start`.

    words: a colour or shape looks at the patches that it names. phrases: the last word of "red circle" looks at the red
    circles, or at <s> if there are none. count: the same word looks at <s> and the anchors of its objects with equal
    shares, so the share of <s> is 1 / (1 + count). answer: the positions that predict the answer look at the objects
    asked about.
    """
    text = words(question.text)
    for i, word in enumerate(text):
        if word not in _COLOUR and word not in _SHAPE:
            continue
        named = scene.matching(colour=word) if word in _COLOUR else scene.matching(shape=word)
        rows["words"].add(b, start + i, _look_at([p for t in named for p in block(t)]))
        if word in _COLOUR and text[i + 1] in _SHAPE:
            continue  # the phrase ends with the next word
        if word in _SHAPE and text[i - 1] in _COLOUR:
            named = [t for t in named if t.colour == text[i - 1]]
        rows["phrases"].add(b, start + i, _look_at([p for t in named for p in block(t)]))
        rows["count"].add(b, start + i, _look_at([anchor(t) for t in named], sink=True))
    asked = [t for t in scene.things if t.box in question.boxes]
    for i in range(len(prompt) - 1, len(prompt) - 1 + max(answer - 1, 1)):
        rows["answer"].add(b, start + i, _look_at([p for t in asked for p in block(t)]))


def _look_at(patches: list[int], sink: bool = False) -> np.ndarray:
    """float32[PREFIX]: equal shares on the patches; <s> takes a share too if `sink`, or all of it without patches."""
    target = np.zeros(PREFIX, np.float32)
    target[[FIRST_PATCH + p for p in patches]] = 1
    target[0] = sink or not patches
    return target / target.sum()


def prefetch(make: Callable[[list[int]], Batch], first: int, size: int, steps: range) -> Iterator[Batch]:
    """Batches of `size` fresh seeds for each step, made by a thread; an exception in the thread is raised here."""
    return pretraining.prefetch(lambda step: make([first + step * size + i for i in range(size)]), steps, ahead=4)

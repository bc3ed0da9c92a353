"""Prompts with images of noise for a tiny model, by the conventions of its class as far as its signature shows them."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.host.zoo.pixels import Inputs, parameters, pixels_of

IMAGES = (1, 2, 1)  # images of each prompt: their visual tokens differ in number, whatever the class
QUESTION = (5, 7, 6)  # words behind the last image
PAD = 0
# Visual tokens of an image, where the encoder's features don't show them.
LENGTHS: dict[str, Callable[[Any], int]] = {
    "blip-2": lambda config: config.num_query_tokens,
    "instructblip": lambda config: config.num_query_tokens,
    "instructblipvideo": lambda config: 4 * config.num_query_tokens,
}


@dataclass(frozen=True)
class Prompts:
    """Samples of one class: their ids, and what gives the pixels of some of them."""

    ids: list[Tensor]
    images: list[range]  # which of all images each sample has
    pixels: Callable[[Sequence[int], Sequence[int]], Inputs]
    image_token: int
    extra: Callable[..., Inputs]

    def batch(self, rows: Sequence[int] = (0, 1, 2), side: str = "left", answers: int = 0) -> Inputs:
        """Model inputs of some samples, padded on one side; the last `answers` tokens of each are labelled."""
        ids = [self.ids[row] for row in rows]
        length = max(len(sample) for sample in ids)
        found = {name: torch.full((len(ids), length), PAD) for name in ("input_ids", "attention_mask")}
        labels = torch.full((len(ids), length), -100)
        for row, sample in enumerate(ids):
            start = length - len(sample) if side == "left" else 0
            found["input_ids"][row, start : start + len(sample)] = sample
            found["attention_mask"][row, start : start + len(sample)] = 1
            labels[row, start + len(sample) - answers : start + len(sample)] = sample[len(sample) - answers :]
        found |= self.pixels(
            [image for row in rows for image in self.images[row]], [len(self.images[row]) for row in rows]
        )
        found |= self.extra(found["input_ids"], found["attention_mask"])
        return {**found, "labels": labels} if answers else found

    def text(self, inputs: Inputs) -> Tensor:
        """Real positions that are no image's."""
        return inputs["attention_mask"].bool() & (inputs["input_ids"] != self.image_token)


def prompts(kind: str, model: nn.Module) -> Prompts:
    """Three samples with one, two and one images."""
    config, pixels, total = model.config, pixels_of(kind, model), sum(IMAGES)
    lengths = [visual_tokens(kind, model, pixels([image], [1])) for image in range(total)]
    token = image_token(config)
    start, end = (marker(config, which) for which in ("start", "end"))
    draw, samples, owned, first = torch.Generator().manual_seed(0), [], [], 0
    for images, words in zip(IMAGES, QUESTION, strict=True):
        parts = [torch.randint(3, 90, (2,), generator=draw)]
        for image in range(first, first + images):
            parts += [*start, torch.full((lengths[image],), token), *end, torch.randint(3, 90, (1,), generator=draw)]
        samples.append(torch.cat([*parts, torch.randint(3, 90, (words,), generator=draw)]))
        owned.append(range(first, first + images))
        first += images

    def extra(ids: Tensor, mask: Tensor, start: int | None = None) -> Inputs:
        return types_of(kind, model, token, ids, start)

    return Prompts(samples, owned, pixels, token, extra)


def types_of(kind: str, model: nn.Module, token: int, ids: Tensor, start: int | None = None) -> Inputs:
    """Token types, for classes that take them: text, or an image's token; `start`: where an answer begins."""
    taken, types = parameters(model), (ids == token).long()
    found = {name: types for name in ("mm_token_type_ids", "token_type_ids") if name in taken}
    if "moe_mm_token_type_ids" in taken:  # an image's first and last token are its own there
        ends = [int(end) for which in ("start", "end") for end in marker(model.config, which)]
        found["moe_mm_token_type_ids"] = torch.isin(ids, torch.tensor([token, *ends])).long()
    if kind == "paligemma":  # there they say what is the answer's
        found["token_type_ids"] = (torch.arange(ids.shape[1]) >= (start or ids.shape[1])).long().expand_as(ids)
    return found


def image_token(config: Any) -> int:
    """Id of the placeholder of an image's token."""
    for name in ("image_token_id", "image_token_index", "image_patch_id"):
        if isinstance(found := getattr(config, name, None), int):
            return found
    vocabulary = getattr(config, "vocabulary_map", None) or {}
    return vocabulary.get("<image>", 250)


def marker(config: Any, which: str) -> list[Tensor]:
    """The token in front of an image (`start`) or behind it (`end`), if a class has one."""
    names = (
        f"vision_{which}_token_id",
        f"image_{which}_token_id",
        "boi_token_id" if which == "start" else "eoi_token_id",
    )
    found = next((getattr(config, name) for name in names if isinstance(getattr(config, name, None), int)), None)
    return [] if found is None else [torch.tensor([found])]


@torch.no_grad()
def visual_tokens(kind: str, model: nn.Module, arguments: Inputs) -> int:
    """Visual tokens of one image, given as model inputs: the features that the model's own encoder gives."""
    if kind in LENGTHS:
        return LENGTHS[kind](model.config)
    owner = model if hasattr(model, "get_image_features") else model.model
    known = inspect.signature(owner.get_image_features).parameters
    renamed = {"pixel_values_images": "pixel_values"}
    arguments = {name if name in known else renamed.get(name, name): value for name, value in arguments.items()}
    if "kwargs" not in known and "args" not in known:
        arguments = {name: value for name, value in arguments.items() if name in known}
    features = owner.get_image_features(**arguments)
    found = getattr(features, "pooler_output", None)
    if found is None:
        found = getattr(features, "last_hidden_state", features)
    if found is None:  # features of several layers; each has a row per token
        found = features.deepstack_features[0][1]
    rows = found if isinstance(found, tuple | list) else [found]
    return sum(part.shape[:-1].numel() for part in rows)

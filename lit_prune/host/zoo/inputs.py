"""Prompts with images of noise for a tiny model, by the conventions of its class as far as its signature shows them."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.host.zoo.shrink import PATCH, SIDE

IMAGES = (1, 2, 1)  # images of each prompt: their visual tokens differ in number, whatever the class
QUESTION = (5, 7, 6)  # words behind the last image
PAD = 0
GRIDS = ((4, 4), (4, 8), (8, 4), (8, 8))  # patches along the sides of images that keep their own size

Inputs = dict[str, Tensor]


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
    config, taken = model.config, _parameters(model)
    pixels = _pixels(kind, model)
    total = sum(IMAGES)
    lengths = [_visual(kind, model, pixels, image) for image in range(total)]
    token = image_token(config)
    start, end = (_marker(config, which) for which in ("start", "end"))
    draw, samples, owned, first = torch.Generator().manual_seed(0), [], [], 0
    for images, words in zip(IMAGES, QUESTION, strict=True):
        parts = [torch.randint(3, 90, (2,), generator=draw)]
        for image in range(first, first + images):
            parts += [*start, torch.full((lengths[image],), token), *end, torch.randint(3, 90, (1,), generator=draw)]
        samples.append(torch.cat([*parts, torch.randint(3, 90, (words,), generator=draw)]))
        owned.append(range(first, first + images))
        first += images

    def extra(ids: Tensor, mask: Tensor, start: int | None = None) -> Inputs:
        types = (ids == token).long()
        found = {name: types for name in ("mm_token_type_ids", "token_type_ids") if name in taken}
        if kind == "paligemma":  # there they say what is the answer's
            found["token_type_ids"] = (torch.arange(ids.shape[1]) >= (start or ids.shape[1])).long().expand_as(ids)
        return found

    return Prompts(samples, owned, pixels, token, extra)


def image_token(config: Any) -> int:
    """Id of the placeholder of an image's token."""
    for name in ("image_token_id", "image_token_index", "image_patch_id"):
        if isinstance(found := getattr(config, name, None), int):
            return found
    vocabulary = getattr(config, "vocabulary_map", None) or {}
    return vocabulary.get("<image>", 250)


def _marker(config: Any, which: str) -> list[Tensor]:
    names = (
        f"vision_{which}_token_id",
        f"image_{which}_token_id",
        "boi_token_id" if which == "start" else "eoi_token_id",
    )
    found = next((getattr(config, name) for name in names if isinstance(getattr(config, name, None), int)), None)
    return [] if found is None else [torch.tensor([found])]


def _parameters(model: nn.Module) -> set[str]:
    return set(inspect.signature(type(model).forward).parameters)


@torch.no_grad()
def _visual(kind: str, model: nn.Module, pixels: Callable, image: int) -> int:
    """Visual tokens of one image: the features that the model's own encoder gives."""
    if kind in LENGTHS:
        return LENGTHS[kind](model.config)
    arguments = pixels([image], [1])
    owner = model if hasattr(model, "get_image_features") else model.model
    known = inspect.signature(owner.get_image_features).parameters
    renamed = {"pixel_values_images": "pixel_values"}
    arguments = {renamed.get(name, name): value for name, value in arguments.items()}
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


# -- pixels ---------------------------------------------------------------------------------------------------------


def _draw(image: int, *sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(image + 1))


def _pixels(kind: str, model: nn.Module) -> Callable[[Sequence[int], Sequence[int]], Inputs]:
    """What a processor would make of some of all images, given how many each sample has."""
    config, taken = model.config, _parameters(model)
    if kind in PIXELS:
        return lambda images, counts: PIXELS[kind](config, images, counts)
    if "image_grid_thw" in taken:
        return lambda images, counts: _grids(config, images)
    if "pixel_attention_mask" in taken:
        return lambda images, counts: _per_sample(config, images, counts)
    if hasattr(config, "image_grid_pinpoints"):
        return lambda images, counts: _crops(config, images)
    sized = getattr(_vision(config), "model_type", "") == "pixtral"
    return lambda images, counts: _plain(config, images, sized)


def _vision(config: Any) -> Any:
    return getattr(config, "vision_config", None) or config


def _side(config: Any) -> int:
    side = getattr(_vision(config), "image_size", SIDE)
    return side[0] if isinstance(side, list | tuple) else side


def _plain(config: Any, images: Sequence[int], sized: bool) -> Inputs:
    side = _side(config)
    found = {"pixel_values": torch.stack([_draw(image, 3, side, side) for image in images])}
    return {**found, "image_sizes": torch.tensor([[side, side]] * len(images))} if sized else found


def _first(part: Any, names: Sequence[str], default: int = 1) -> int:
    for name in names:
        if (value := getattr(part, name, None)) is not None:
            return value[0] if isinstance(value, list | tuple) else value
    return default


def _grids(config: Any, images: Sequence[int]) -> Inputs:
    """Patches of all images in one row, and each image's grid (time, height, width) in patches."""
    vision = _vision(config)
    patch = _first(vision, ["patch_size"]) ** 2 * _first(vision, ["num_channels", "in_channels"], 3)
    patch *= _first(vision, ["temporal_patch_size", "patch_temporal"])
    sizes = [GRIDS[image] for image in images]
    pixels = [_draw(image, height * width, patch) for image, (height, width) in zip(images, sizes, strict=True)]
    return {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.tensor([[1, *size] for size in sizes])}


def _per_sample(config: Any, images: Sequence[int], counts: Sequence[int]) -> Inputs:
    """Images of each sample in a row of their own, blank ones behind them."""
    side, rows, done = _side(config), [], 0
    for count in counts:
        mine = [_draw(image, 3, side, side) for image in images[done : done + count]]
        rows.append(torch.stack(mine + [torch.zeros(3, side, side)] * (max(counts) - count)))
        done += count
    return {"pixel_values": torch.stack(rows)}


def _crops(config: Any, images: Sequence[int]) -> Inputs:
    """The whole image and the crops of one canvas."""
    side = _side(config)
    sizes = [(side, 2 * side) if image % 2 else (2 * side, side) for image in images]
    pixels = torch.stack([_draw(image, 3, 3, side, side) for image in images])
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


# -- classes with conventions of their own --------------------------------------------------------------------------


def _patches(config: Any, images: Sequence[int], size: int, name: str) -> Inputs:
    """Patches of all images in one row of `size` values each, and the grid of each, without a time."""
    sizes = torch.tensor([GRIDS[image] for image in images])
    pixels = [_draw(image, int(grid.prod()), size) for image, grid in zip(images, sizes, strict=True)]
    return {"pixel_values": torch.cat(pixels), name: sizes}


def _padded(config: Any, images: Sequence[int], size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Patches of each image in a row of its own, which of them are real, and the grids."""
    sizes = torch.tensor([GRIDS[image] for image in images])
    pixels = torch.zeros(len(images), int(sizes.prod(1).max()), size)
    for row, (image, grid) in enumerate(zip(images, sizes, strict=True)):
        pixels[row, : grid.prod()] = _draw(image, int(grid.prod()), size)
    return pixels, torch.arange(pixels.shape[1]) < sizes.prod(1, keepdim=True), sizes


def _square(config: Any) -> int:
    return 3 * _first(_vision(config), ["patch_size"]) ** 2


def _images_in(images: Sequence[int], name: str = "pixel_values", side: int = SIDE) -> Inputs:
    return {name: torch.stack([_draw(image, 3, side, side) for image in images])}


def _squares(config: Any, images: Sequence[int]) -> Inputs:
    """Grids whose patches are small images."""
    found, patch = _grids(config, images), _first(_vision(config), ["patch_size"])
    pixels = found["pixel_values"].unflatten(1, (3, patch, patch))
    return {**found, "pixel_values": pixels}


def _blocks(config: Any, images: Sequence[int]) -> Inputs:
    """Blocks of patches that are merged, each a small image, channels last."""
    found, side = _grids(config, images), 2 * _first(_vision(config), ["patch_size"])
    pixels = found["pixel_values"].reshape(-1, side, side, 3)
    return {"pixel_values": pixels, "image_grid_thw": found["image_grid_thw"] // torch.tensor([1, 2, 2])}


def _lfm2(config: Any, images: Sequence[int], counts: Sequence[int]) -> Inputs:
    pixels, real, sizes = _padded(config, images, _square(config))
    return {"pixel_values": pixels, "pixel_attention_mask": real.long(), "spatial_shapes": sizes}


def _gemma4(config: Any, images: Sequence[int], counts: Sequence[int]) -> Inputs:
    vision = _vision(config)
    side = _first(vision, ["model_patch_size", "patch_size"])
    pixels, real, sizes = _padded(config, images, 3 * side**2)
    place = torch.arange(pixels.shape[1])[None]
    places = torch.stack([place % sizes[:, 1:], place // sizes[:, 1:]], -1)
    return {"pixel_values": pixels, "image_position_ids": places.masked_fill(~real[..., None], -1)}


def _minicpm(config: Any, images: Sequence[int], counts: Sequence[int]) -> Inputs:
    patch, sizes = _first(_vision(config), ["patch_size"]), [GRIDS[image] for image in images]
    strips = [
        _draw(image, 3, patch, height * width * patch) for image, (height, width) in zip(images, sizes, strict=True)
    ]
    return {"pixel_values": torch.cat(strips, 2)[None], "target_sizes": torch.tensor(sizes, dtype=torch.int32)}


def _molmo2(config: Any, images: Sequence[int], counts: Sequence[int]) -> Inputs:
    """One crop an image, of which each visual token pools four patches."""
    side = SIDE // PATCH
    pixels = torch.stack([_draw(image, side * side, 3 * PATCH**2) for image in images])
    grid = torch.arange(side * side).view(side, side).unfold(0, 2, 2).unfold(1, 2, 2).reshape(-1, 4)
    pooling = torch.cat([grid + number * side * side for number in range(len(images))])
    grids = torch.tensor([[0, 0, side // 2, side // 2]] * len(images))
    return {"pixel_values": pixels, "image_token_pooling": pooling, "image_grids": grids}


def _perception(config: Any, images: Sequence[int], counts: Sequence[int]) -> Inputs:
    return {"pixel_values": torch.stack([_draw(image, 1, 3, SIDE, SIDE) for image in images])}


def _questioner(config: Any, images: Sequence[int], counts: Sequence[int]) -> Inputs:
    ids = torch.full((len(images), 3), 5)
    return {**_images_in(images), "qformer_input_ids": ids, "qformer_attention_mask": torch.ones_like(ids)}


PIXELS: dict[str, Callable[[Any, Sequence[int], Sequence[int]], Inputs]] = {
    "deepseek_vl_hybrid": lambda config, images, _: {
        **_images_in(images),
        **_images_in(images, "high_res_pixel_values", _first(config.high_res_vision_config, ["image_size"])),
    },
    "deepseek_ocr2": lambda config, images, _: _images_in(images, side=64),
    "unlimited_ocr": lambda config, images, _: _images_in(images, side=64),
    "emu3": lambda config, images, _: _plain(config, images, True),
    "apertus1p5": lambda config, images, _: _plain(config, images, True),
    "fuyu": lambda config, images, _: {"pixel_values": torch.stack([_draw(image, 16, 3 * 8 * 8) for image in images])},
    "gemma4": _gemma4,
    "gemma4_unified": _gemma4,
    "granite_docling": lambda config, images, counts: {
        **_per_sample(config, images, counts),
        "pixel_attention_mask": torch.arange(max(counts)) < torch.tensor(counts)[:, None],
    },
    "inkling_mm_model": lambda config, images, _: {
        "pixel_values": torch.cat([_draw(image, 4 * (1 + image % 2), 2, 8, 8, 3) for image in images])
    },
    **dict.fromkeys(("inkling2", "inkling2_loop"), lambda config, images, _: _blocks(config, images)),
    "instructblip": _questioner,
    "instructblipvideo": lambda config, images, counts: {
        **_questioner(config, images, counts),
        "pixel_values": torch.stack([_draw(image, 4, 3, SIDE, SIDE) for image in images]),
    },
    "kimi_k25": lambda config, images, _: _squares(config, images),
    "lfm2_vl": _lfm2,
    **dict.fromkeys(("minicpm_ocr", "minicpmv4_6", "minicpmv4_7"), _minicpm),
    "molmo2": _molmo2,
    "nemotron_h_omni": lambda config, images, _: _patches(config, images, _square(config), "image_grid_hw"),
    "paddleocr_vl": lambda config, images, _: _squares(config, images),
    "perception_lm": _perception,
    "video_llama_3": lambda config, images, _: {
        **_grids(config, images),
        "image_merge_sizes": torch.full((len(images),), 2),
    },
    "video_llava": lambda config, images, _: _images_in(images, "pixel_values_images"),
}
LENGTHS: dict[str, Callable[[Any], int]] = {
    "blip-2": lambda config: config.num_query_tokens,
    "instructblip": lambda config: config.num_query_tokens,
    "instructblipvideo": lambda config: 4 * config.num_query_tokens,
}

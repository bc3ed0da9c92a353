"""Images of noise as the processor of each class would hand them to its model."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.host.zoo.shrink import PATCH, SIDE

GRIDS = ((4, 4), (4, 8), (8, 4), (8, 8))  # patches along the sides of images that keep their own size

PADDED = 64  # patches of a row where images of several sizes are padded, as processors do: not less than a grid has

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Picture:
    """An image of noise: its seed, and the grid of patches where images keep their own size."""

    seed: int
    grid: tuple[int, int]


Pictures = Sequence[Picture]


def pictures(numbers: Sequence[int]) -> list[Picture]:
    """Images by their numbers, of the sizes in `GRIDS`."""
    return [Picture(number + 1, GRIDS[number]) for number in numbers]


def parameters(model: nn.Module) -> set[str]:
    """Names of the parameters of a model's forward."""
    return set(inspect.signature(type(model).forward).parameters)


def _draw(image: Picture, *sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(image.seed))


def pixels_of(kind: str, model: nn.Module) -> Callable[[Sequence[int], Sequence[int]], Inputs]:
    """A processor's output for some of all images, by their numbers, given how many each sample has."""
    draw = drawn(kind, model)
    return lambda numbers, counts: draw(pictures(numbers), counts)


def drawn(kind: str, model: nn.Module) -> Callable[[Pictures, Sequence[int]], Inputs]:
    """The same for images of any size, for a model of any size of a class."""
    config, taken = model.config, parameters(model)
    if kind in PIXELS:
        return lambda images, counts: PIXELS[kind](config, images, counts)
    if "image_grid_thw" in taken:
        return lambda images, counts: _grids(config, images)
    if "pixel_attention_mask" in taken:
        return lambda images, counts: _per_sample(config, images, counts)
    if hasattr(config, "image_grid_pinpoints"):
        return lambda images, counts: _crops(config, images)
    if getattr(_vision(config), "model_type", "") == "pixtral":
        return lambda images, counts: _sized(config, images)
    return lambda images, counts: _plain(config, images, False)


def _vision(config: Any) -> Any:
    return getattr(config, "vision_config", None) or config


def _side(config: Any) -> int:
    side = getattr(_vision(config), "image_size", SIDE)
    return side[0] if isinstance(side, list | tuple) else side


def _plain(config: Any, images: Pictures, sized: bool) -> Inputs:
    side = _side(config)
    found = {"pixel_values": torch.stack([_draw(image, 3, side, side) for image in images])}
    return {**found, "image_sizes": torch.tensor([[side, side]] * len(images))} if sized else found


def _sized(config: Any, images: Pictures) -> Inputs:
    """Images of their own sizes, up to the tower's, padded to the largest."""
    patch, most = _first(_vision(config), ["patch_size"]), _side(config)
    sizes = [tuple(min(side * patch, most) for side in image.grid) for image in images]
    pixels = torch.zeros(len(images), 3, *map(max, zip(*sizes, strict=True)))
    for row, (image, (height, width)) in enumerate(zip(images, sizes, strict=True)):
        pixels[row, :, :height, :width] = _draw(image, 3, height, width)
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


def _first(part: Any, names: Sequence[str], default: int = 1) -> int:
    for name in names:
        if (value := getattr(part, name, None)) is not None:
            return value[0] if isinstance(value, list | tuple) else value
    return default


def _grids(config: Any, images: Pictures) -> Inputs:
    """Patches of all images in one row, and each image's grid (time, height, width) in patches."""
    vision = _vision(config)
    patch = _first(vision, ["patch_size"]) ** 2 * _first(vision, ["num_channels", "in_channels"], 3)
    patch *= _first(vision, ["temporal_patch_size", "patch_temporal"])
    sizes = [image.grid for image in images]
    pixels = [_draw(image, height * width, patch) for image, (height, width) in zip(images, sizes, strict=True)]
    return {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.tensor([[1, *size] for size in sizes])}


def _per_sample(config: Any, images: Pictures, counts: Sequence[int]) -> Inputs:
    """Images of each sample in a row of their own, blank ones behind them."""
    side, rows, done = _side(config), [], 0
    for count in counts:
        mine = [_draw(image, 3, side, side) for image in images[done : done + count]]
        rows.append(torch.stack(mine + [torch.zeros(3, side, side)] * (max(counts) - count)))
        done += count
    return {"pixel_values": torch.stack(rows)}


def _crops(config: Any, images: Pictures) -> Inputs:
    """The whole image and the crops of one canvas."""
    side = _side(config)
    sizes = [(2 * side, side) if image.seed % 2 else (side, 2 * side) for image in images]
    pixels = torch.stack([_draw(image, 3, 3, side, side) for image in images])
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


# -- classes with conventions of their own --------------------------------------------------------------------------


def _patches(config: Any, images: Pictures, size: int, name: str) -> Inputs:
    """Patches of all images in one row of `size` values each, and the grid of each, without a time."""
    sizes = torch.tensor([image.grid for image in images])
    pixels = [_draw(image, int(grid.prod()), size) for image, grid in zip(images, sizes, strict=True)]
    return {"pixel_values": torch.cat(pixels), name: sizes}


def _padded(config: Any, images: Pictures, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Patches of each image in a row of its own, which of them are real, and the grids."""
    sizes = torch.tensor([image.grid for image in images])
    pixels = torch.zeros(len(images), max(PADDED, int(sizes.prod(1).max())), size)
    for row, (image, grid) in enumerate(zip(images, sizes, strict=True)):
        pixels[row, : grid.prod()] = _draw(image, int(grid.prod()), size)
    return pixels, torch.arange(pixels.shape[1]) < sizes.prod(1, keepdim=True), sizes


def _square(config: Any) -> int:
    return 3 * _first(_vision(config), ["patch_size"]) ** 2


def _images_in(images: Pictures, name: str = "pixel_values", side: int = SIDE) -> Inputs:
    return {name: torch.stack([_draw(image, 3, side, side) for image in images])}


def _squares(config: Any, images: Pictures) -> Inputs:
    """Grids whose patches are small images."""
    found, patch = _grids(config, images), _first(_vision(config), ["patch_size"])
    pixels = found["pixel_values"].unflatten(1, (3, patch, patch))
    return {**found, "pixel_values": pixels}


def _blocks(config: Any, images: Pictures) -> Inputs:
    """Blocks of patches that are merged, each a small image, channels last."""
    found, side = _grids(config, images), 2 * _first(_vision(config), ["patch_size"])
    pixels = found["pixel_values"].reshape(-1, side, side, 3)
    return {"pixel_values": pixels, "image_grid_thw": found["image_grid_thw"] // torch.tensor([1, 2, 2])}


def _lfm2(config: Any, images: Pictures, counts: Sequence[int]) -> Inputs:
    pixels, real, sizes = _padded(config, images, _square(config))
    return {"pixel_values": pixels, "pixel_attention_mask": real.long(), "spatial_shapes": sizes}


def _gemma4(config: Any, images: Pictures, counts: Sequence[int]) -> Inputs:
    vision = _vision(config)
    side = _first(vision, ["model_patch_size", "patch_size"])
    pixels, real, sizes = _padded(config, images, 3 * side**2)
    place = torch.arange(pixels.shape[1])[None]
    places = torch.stack([place % sizes[:, 1:], place // sizes[:, 1:]], -1)
    return {"pixel_values": pixels, "image_position_ids": places.masked_fill(~real[..., None], -1)}


def _minicpm(config: Any, images: Pictures, counts: Sequence[int]) -> Inputs:
    patch, sizes = _first(_vision(config), ["patch_size"]), [image.grid for image in images]
    strips = [
        _draw(image, 3, patch, height * width * patch) for image, (height, width) in zip(images, sizes, strict=True)
    ]
    return {"pixel_values": torch.cat(strips, 2)[None], "target_sizes": torch.tensor(sizes, dtype=torch.int32)}


def _molmo2(config: Any, images: Pictures, counts: Sequence[int]) -> Inputs:
    """One crop an image, of which each visual token pools four patches."""
    side = SIDE // PATCH
    pixels = torch.stack([_draw(image, side * side, 3 * PATCH**2) for image in images])
    grid = torch.arange(side * side).view(side, side).unfold(0, 2, 2).unfold(1, 2, 2).reshape(-1, 4)
    pooling = torch.cat([grid + number * side * side for number in range(len(images))])
    grids = torch.tensor([[0, 0, side // 2, side // 2]] * len(images))
    return {"pixel_values": pixels, "image_token_pooling": pooling, "image_grids": grids}


def _perception(config: Any, images: Pictures, counts: Sequence[int]) -> Inputs:
    return {"pixel_values": torch.stack([_draw(image, 1, 3, SIDE, SIDE) for image in images])}


def _questioner(config: Any, images: Pictures, counts: Sequence[int]) -> Inputs:
    ids = torch.full((len(images), 3), 5)
    return {**_images_in(images), "qformer_input_ids": ids, "qformer_attention_mask": torch.ones_like(ids)}


PIXELS: dict[str, Callable[[Any, Pictures, Sequence[int]], Inputs]] = {
    "deepseek_vl_hybrid": lambda config, images, _: {
        **_images_in(images),
        **_images_in(images, "high_res_pixel_values", _first(config.high_res_vision_config, ["image_size"])),
    },
    "deepseek_ocr2": lambda config, images, _: _images_in(images, side=64),
    "unlimited_ocr": lambda config, images, _: _images_in(images, side=64),
    "emu3": lambda config, images, _: _plain(config, images, True),
    "apertus1p5": lambda config, images, _: _plain(config, images, True),
    "fuyu": lambda config, images, _: {
        "pixel_values": torch.stack([_draw(image, 16, 3 * config.patch_size**2) for image in images])
    },
    "gemma4": _gemma4,
    "gemma4_unified": _gemma4,
    "granite_docling": lambda config, images, counts: {
        **_per_sample(config, images, counts),
        "pixel_attention_mask": torch.arange(max(counts)) < torch.tensor(counts)[:, None],
    },
    "inkling_mm_model": lambda config, images, _: {
        "pixel_values": torch.cat([_draw(image, 8 // (1 + image.seed % 2), 2, 8, 8, 3) for image in images])
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

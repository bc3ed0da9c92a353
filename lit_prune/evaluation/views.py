"""An image as a model sees it, and which part of it each visual token stands for.

Models differ: one square, an image of its own shape, tiles in the model's order, the whole image and a finer grid. What
stands where is read from the inputs of the tower and from the number of visual tokens; a model whose tokens stand for
no part of the image (queries of a resampler) has no view.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from lit_prune.errors import LitPruneError
from lit_prune.host.parts import find
from lit_prune.vlm import VLM

Pixels = UInt8[np.ndarray, "height width 3"]
Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels

# Rows and columns of patches where the patches of all images stand in one row; some have a number of frames before.
GRIDS = ("image_grid_thw", "image_grid_hw", "spatial_shapes", "target_sizes")
RESAMPLER = re.compile("resampler|perceiver|qformer", re.IGNORECASE)  # a module of such a name has queries for tokens
SPACE = 0.04  # between tiles, of a tile's longer side
LONGEST = 1024  # pixels of a side that a drawn image needs at most


@dataclass(frozen=True)
class Part:
    """A rectangle of the picture, in pixels, and the visual tokens that stand for it, row by row."""

    box: tuple[int, int, int, int]
    tokens: Int[np.ndarray, "rows columns"]


@dataclass(frozen=True)
class View:
    """The picture: the image as the model sees it, or its tiles side by side. `whole`: the image file, not cropped."""

    pixels: Pixels
    parts: tuple[Part, ...]
    whole: bool = False


def view(vlm: VLM, inputs: Mapping[str, Tensor], image: Image.Image) -> View:
    """The view of a prompt with one image.

    Args:
        vlm: the model. inputs: of the prompt, a batch of one. image: as it was given to the processor.

    Raises `LitPruneError` where it isn't known which part of the image a token stands for.
    """
    tokens = int((inputs["input_ids"] == find(vlm.model).tokens["image"]).sum())
    found = _by_grids(inputs, image, tokens)
    tiles = tiles_of(inputs, getattr(vlm.processor, "image_processor", None))
    if found is None and tiles and not any(RESAMPLER.search(name) for name, _ in vlm.model.named_modules()):
        patch = patch_of(vlm.model.config)
        found = by_tiles(tiles, tokens, patch)
        if found is None and patch is not None and "image_sizes" in inputs and len(tiles) > 1:
            ended = any(name.endswith("image_newline") for name, _ in vlm.model.named_parameters())
            found = _by_finer_grid(tiles[0], image, tokens, patch, ended)
    if found is None:
        raise LitPruneError(
            f"it isn't known which part of the image each of {tokens} visual tokens of {vlm.name} stands for, so that "
            f"none can be drawn"
        )
    return found


def by_tiles(tiles: Sequence[Pixels], tokens: int, patch: int | None = None) -> View | None:
    """A view of tiles that have the same number of tokens each, a token for a patch or a square block of patches.

    Args:
        tiles: in the model's order. tokens: visual tokens in all.
        patch: side of the tower's patches in pixels; None: unknown, and tiles and their grids are squares.
    """
    each, rest = divmod(tokens, len(tiles))
    height, width = tiles[0].shape[:2]
    if patch is None:
        grid = (isqrt(each),) * 2 if height == width and isqrt(each) ** 2 == each else None
    else:
        grid = _blocks(height // patch, width // patch, each)
    if rest or not each or grid is None:
        return None
    return _sheet([(tile, _count(*grid, each * number)) for number, tile in enumerate(tiles)])


def _blocks(rows: int, columns: int, tokens: int) -> tuple[int, int] | None:
    """Rows and columns of the square blocks of patches that so many tokens stand for; None if they are none."""
    merge = isqrt(rows * columns // tokens) if tokens else 0
    if not merge or merge * merge * tokens != rows * columns or rows % merge or columns % merge:
        return None
    return rows // merge, columns // merge


def _count(rows: int, columns: int, first: int = 0) -> Int[np.ndarray, "rows columns"]:
    return first + np.arange(rows * columns).reshape(rows, columns)


# -- images whose patches stand in one row --------------------------------------------------------------------------


def _by_grids(inputs: Mapping[str, Tensor], image: Image.Image, tokens: int) -> View | None:
    if len(sizes := inputs.get("image_grids", ())) == 1:  # Molmo 2: the whole image, and a finer grid
        (rows, columns), finer = sizes[0].view(2, 2).tolist()
        grids = [_count(rows, columns), _count(*finer, rows * columns)]
        return _whole(image, [grid for grid in grids if grid.size]) if sum(g.size for g in grids) == tokens else None
    sizes = next((inputs[name][:, -2:].tolist() for name in GRIDS if name in inputs), [])
    if "image_position_ids" in inputs:  # column and row of each patch
        sizes = (inputs["image_position_ids"].amax(1) + 1).flip(1).tolist()
    grid = _blocks(*sizes[0], tokens) if len(sizes) == 1 else None
    return grid and _whole(image, [_count(*grid)])


def _whole(image: Image.Image, grids: list[Int[np.ndarray, "rows columns"]]) -> View:
    """The image file once for each grid over it."""
    copy = image.convert("RGB")
    copy.thumbnail((LONGEST, LONGEST))
    found = _sheet([(np.asarray(copy), grid) for grid in grids])
    return View(found.pixels, found.parts, len(grids) == 1)


# -- tiles ----------------------------------------------------------------------------------------------------------


def tiles_of(inputs: Mapping[str, Tensor], processor: Any) -> list[Pixels]:
    """The tiles of a prompt, normalisation undone; none where pixels are no images."""
    pixels = inputs.get("pixel_values", inputs.get("pixel_values_images"))
    if pixels is None or pixels.ndim < 4 or pixels.shape[-3] != 3:
        return []
    mean, std = (getattr(processor, name, None) for name in ("image_mean", "image_std"))
    tiles = list(pixels.flatten(0, -4))
    if pixels.ndim == 4 and len(inputs.get("image_sizes", ())) == len(tiles):  # smaller ones are padded
        sizes = torch.as_tensor(inputs["image_sizes"]).tolist()
        tiles = [tile[:, :height, :width] for tile, (height, width) in zip(tiles, sizes, strict=True)]
    return [as_seen(tile, mean or (0.0,) * 3, std or (1.0,) * 3) for tile in tiles]


def as_seen(pixel_values: Float[Tensor, "3 height width"], mean: Sequence[float], std: Sequence[float]) -> Pixels:
    """The image as the model sees it: resized and cropped by its processor, normalisation undone."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
    image = pixel_values.detach().float().cpu() * std + mean
    return (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def patch_of(config: Any) -> int | None:
    """Side of the tower's patches in pixels, None if the configuration doesn't say."""
    sides = getattr(getattr(config, "vision_config", None) or config, "patch_size", None)
    return sides[0] if isinstance(sides, list | tuple) else sides


def _by_finer_grid(tile: Pixels, image: Image.Image, tokens: int, patch: int, ended: bool) -> View | None:
    """The whole image as the first tile, and a grid over the others without the padding, as in LLaVA-NeXT.

    The finer grid has the shape nearest to the image's. `ended`: each of its rows ends with a token of its own.
    """
    height, width = (side // patch for side in tile.shape[:2])
    if (rest := tokens - height * width) <= 0:
        return None
    shapes = [(rows, rest // rows - ended) for rows in range(1, rest + 1) if not rest % rows and rest // rows > ended]
    wanted = image.width / image.height
    rows, columns = min(shapes, key=lambda shape: abs(np.log(shape[1] / shape[0] / wanted)), default=(1, 0))
    if not 0.7 < columns / rows / wanted < 1.4:  # by rounding; else the tokens are something else
        return None
    finer = height * width + np.arange(rest).reshape(rows, -1)[:, :columns]
    copy = image.convert("RGB")
    copy.thumbnail((LONGEST, LONGEST))
    return _sheet([(tile, _count(height, width)), (np.asarray(copy), finer)])


# -- pages ----------------------------------------------------------------------------------------------------------


def _sheet(tiles: list[tuple[Pixels, Int[np.ndarray, "rows columns"]]]) -> View:
    """Tiles in rows, about as many as in a row, on white."""
    if len(tiles) == 1:
        (pixels, tokens), *_ = tiles
        return View(pixels, (Part((0, 0, pixels.shape[1], pixels.shape[0]), tokens),))
    across = isqrt(len(tiles) - 1) + 1
    high, wide = (max(tile.shape[axis] for tile, _ in tiles) for axis in (0, 1))
    space = max(1, round(SPACE * max(high, wide)))
    down = -(-len(tiles) // across)
    page = np.full((down * (high + space) - space, across * (wide + space) - space, 3), 255, np.uint8)
    parts = []
    for number, (tile, tokens) in enumerate(tiles):
        y, x = (number // across) * (high + space), (number % across) * (wide + space)
        page[y : y + tile.shape[0], x : x + tile.shape[1]] = tile
        parts.append(Part((x, y, x + tile.shape[1], y + tile.shape[0]), tokens))
    return View(page, tuple(parts))

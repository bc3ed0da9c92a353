"""An image as a model sees it, and which part of it each visual token stands for.

Models differ: one square, an image of its own shape, tiles in the model's order, the whole image and a finer grid. What
stands where is read from the inputs of the tower and from the number of visual tokens; a model whose tokens stand for
no part of the image (queries of a resampler) has no view.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, isqrt, sqrt
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor, nn

from lit_prune.errors import LitPruneError
from lit_prune.host.parts import INPUTS, find
from lit_prune.ops.pixels import denormalised
from lit_prune.vlm import VLM

Pixels = UInt8[np.ndarray, "height width 3"]
Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels

# Rows and columns of patches where the patches of all images stand in one row; some have a number of frames before.
GRIDS = ("image_grid_thw", "image_grid_hw", "spatial_shapes", "target_sizes")
# A module of such a name has queries for tokens; LLaVA-NeXT-Video's `vision_resampler` pools videos alone.
RESAMPLER = re.compile("(?<!vision_)resampler|perceiver|qformer", re.IGNORECASE)
SPACE = 0.04  # between tiles, of a tile's longer side
LONGEST = 1024  # pixels of a side that a drawn image needs at most
LEAST = 4  # pixels of a side of a drawn token


@dataclass(frozen=True)
class Part:
    """A rectangle of the picture, in pixels, and the visual tokens that stand for it, row by row."""

    box: tuple[int, int, int, int]
    tokens: Int[np.ndarray, "rows columns"]


@dataclass(frozen=True)
class View:
    """The picture: the image as the model sees it, or its tiles side by side.

    `whole`: width and height in pixels of the image file in the upper left corner, if nothing of it is cropped.
    """

    pixels: Pixels
    parts: tuple[Part, ...]
    whole: tuple[int, int] | None = None


def view(vlm: VLM, inputs: Mapping[str, Tensor], image: Image.Image) -> View:
    """The view of a prompt with one image.

    Args:
        vlm: the model. inputs: of the prompt, a batch of one. image: as it was given to the processor.

    Raises `LitPruneError` where it isn't known which part of the image a token stands for.
    """
    tokens = visual_tokens(vlm, inputs)
    processor = getattr(vlm.processor, "image_processor", None)
    found = _by_grids(inputs, image, tokens, processor)
    tiles = tiles_of(inputs, processor)
    if found is None and tiles and not has_queries(vlm.model):
        patch = patch_of(vlm.model.config)
        if patch is not None and "image_sizes" in inputs and len(tiles) > 1:
            size = torch.as_tensor(inputs["image_sizes"])[0].tolist()
            finer = _finer_grid(tiles, size, tokens, patch, vlm.model)
            found = None if finer is None else _twice(tiles[0], image, patch, finer)
        else:
            found = by_tiles(tiles, tokens, patch)
    if found is None:
        raise LitPruneError(
            f"it isn't known which part of the image each of {tokens} visual tokens of {vlm.name} stands for, so that "
            f"none can be drawn"
        )
    return found


def visual_tokens(vlm: VLM, inputs: Mapping[str, Tensor]) -> int:
    """Visual tokens of a prompt, ends of rows included."""
    return int(find(vlm.model).image_columns(inputs["input_ids"]).sum())


def has_queries(model: nn.Module) -> bool:
    """True if a resampler's queries are the visual tokens."""
    return any(RESAMPLER.search(name) for name, _ in model.named_modules())


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
    if patch is not None:  # the tower reads no pixels beyond the last whole patch
        tiles = [tile[: height // patch * patch, : width // patch * patch] for tile in tiles]
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


def _by_grids(inputs: Mapping[str, Tensor], image: Image.Image, tokens: int, processor: Any) -> View | None:
    if len(sizes := inputs.get("image_grids", ())) == 1:  # Molmo 2: the whole image, and a finer grid
        (rows, columns), finer = sizes[0].view(2, 2).tolist()
        grids = [_count(rows, columns), _count(*finer, rows * columns)]
        return _whole(image, [grid for grid in grids if grid.size]) if sum(g.size for g in grids) == tokens else None
    sizes = next((inputs[name][:, -2:].tolist() for name in GRIDS if name in inputs), [])
    if "image_position_ids" in inputs:  # column and row of each patch
        sizes = (inputs["image_position_ids"].amax(1) + 1).flip(1).tolist()
    if len(sizes) > 1 and {"spatial_shapes", "target_sizes"} & set(inputs):
        return _by_packed_tiles(inputs["pixel_values"], sizes, tokens, processor)
    grid = _blocks(*sizes[0], tokens) if len(sizes) == 1 else None
    if grid is None:
        return None
    padded = _padding(processor, image, grid) if processor is not None and "image_grid_thw" in inputs else (1.0, 1.0)
    return None if padded is None else _whole(image, [_count(*grid)], padded)


def _by_packed_tiles(pixels: Tensor, sizes: Sequence[Sequence[int]], tokens: int, processor: Any) -> View | None:
    """A view of tiles of several shapes, each a row of patches (LFM2-VL), or all of them one strip (MiniCPM-V)."""
    counts = [rows * columns for rows, columns in sizes]
    each = sum(counts) // max(1, tokens)  # patches that a token stands for, in all tiles as many
    grids = [each and _blocks(rows, columns, rows * columns // each) for rows, columns in sizes]
    if not all(grids) or sum(rows * columns for rows, columns in grids) != tokens:
        return None
    if pixels.ndim == 4:
        patches = pixels[0].unflatten(-1, (-1, pixels.shape[-2])).permute(2, 0, 1, 3)
    else:
        side = isqrt(pixels.shape[-1] // 3)
        rows = torch.cat([row[:count] for row, count in zip(pixels, counts, strict=True)])
        patches = rows.unflatten(-1, (side, side, 3)).permute(0, 3, 1, 2)
    shaped, first = [], 0
    for (rows, columns), grid, part in zip(sizes, grids, patches.split(counts), strict=True):
        tile = part.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
        shaped.append((_drawn(tile, processor), _count(*grid, first)))
        first += shaped[-1][1].size
    return _sheet(shaped)


def _padding(processor: Any, image: Image.Image, grid: tuple[int, int]) -> tuple[float, float] | None:
    """Width and height of the padded image that a grid is over, relative to the image.

    Some processors (Kimi K2.5, GLM-5) keep the shape of an image and fill up its right and lower end with black. How
    much is counted in what they make of a white image. None if that isn't what they do.
    """
    white = processor(images=Image.new("RGB", image.size, "white"), return_tensors="pt")["pixel_values"] > 0
    if white.all():
        return 1.0, 1.0
    (rows, columns), wanted = grid, image.width / image.height
    side = sqrt(int(white.sum()) / white.numel() * rows * columns * wanted)  # columns that the image takes
    if not side:
        return None
    wider, higher = columns / side, rows / (side / wanted)
    return (wider, higher) if min(wider, higher) > 0.98 else None  # by rounding


def _whole(
    image: Image.Image, grids: list[Int[np.ndarray, "rows columns"]], padded: tuple[float, float] = (1.0, 1.0)
) -> View:
    """The image file once for each grid over it, on black where the grid is `padded` times as wide and high."""
    copy = _copy(image, grids)
    wider, higher = (max(1.0, times) for times in padded)
    page = np.zeros((round(copy.height * higher), round(copy.width * wider), 3), np.uint8)
    page[: copy.height, : copy.width] = np.asarray(copy)
    found = _sheet([(page, grid) for grid in grids])
    return View(found.pixels, found.parts, copy.size if len(grids) == 1 else None)


def _copy(image: Image.Image, grids: list[Int[np.ndarray, "rows columns"]]) -> Image.Image:
    """The image file, small enough to draw and with pixels for every token."""
    copy = image.convert("RGB")
    copy.thumbnail((LONGEST, LONGEST))
    rows, columns = (max(grid.shape[axis] for grid in grids) for axis in (0, 1))
    times = max(1, ceil(LEAST * rows / copy.height), ceil(LEAST * columns / copy.width))
    return copy.resize((times * copy.width, times * copy.height), Image.Resampling.NEAREST)


# -- tiles ----------------------------------------------------------------------------------------------------------


def tiles_of(inputs: Mapping[str, Tensor], processor: Any) -> list[Pixels]:
    """The tiles of a prompt, normalisation undone; none where pixels are no images."""
    pixels = next((inputs[name] for name in INPUTS["image"] if name in inputs), None)
    if pixels is None or pixels.ndim < 4 or pixels.shape[-3] != 3:
        return []
    tiles = list(pixels.flatten(0, -4))
    if pixels.ndim == 4 and len(inputs.get("image_sizes", ())) == len(tiles):  # smaller ones are padded
        sizes = torch.as_tensor(inputs["image_sizes"]).tolist()
        tiles = [tile[:, :height, :width] for tile, (height, width) in zip(tiles, sizes, strict=True)]
    return [_drawn(tile, processor) for tile in tiles]


def _drawn(tile: Tensor, processor: Any) -> Pixels:
    return (denormalised(tile, processor) * 255).round().byte().permute(1, 2, 0).numpy()


def patch_of(config: Any) -> int | None:
    """Side of the tower's patches in pixels, None if the configuration doesn't say."""
    sides = getattr(getattr(config, "vision_config", None) or config, "patch_size", None)
    return sides[0] if isinstance(sides, list | tuple) else sides


def _finer_grid(
    tiles: Sequence[Pixels], size: Sequence[int], tokens: int, patch: int, model: nn.Module
) -> Int[np.ndarray, "rows columns"] | None:
    """Tokens of a grid over all tiles but the first, without the padding, as in LLaVA-NeXT.

    Of the shapes in which the tiles can stand side by side, it is the one that has so many tokens.

    Args:
        tiles: the whole image and its tiles. size: height and width of the image. tokens: of all tiles.
        patch: side of the tower's patches in pixels. model: says if rows end with a token of their own.
    """
    height, width = (side // patch for side in tiles[0].shape[:2])
    number, first = len(tiles) - 1, height * width
    ended = any(name.endswith("image_newline") for name, _ in model.named_parameters())
    most = re.search(r"\d+$", str(getattr(model.config, "vision_aspect_ratio", "")))  # LLaVA-OneVision: then smaller
    shapes = set()
    for down in (down for down in range(1, number + 1) if number % down == 0):
        rows, columns = _unpadded(down * height, number // down * width, size)
        over = sqrt(rows * columns / (int(most[0]) * height**2)) if most else 1.0
        shapes.add((int(rows // over), int(columns // over)) if over > 1.1 else (rows, columns))
    fitting = [(rows, columns) for rows, columns in shapes if rows * (columns + ended) == tokens - first]
    if len(fitting) != 1 or min(fitting[0]) < 1:
        return None
    return _count(fitting[0][0], fitting[0][1] + ended, first)[:, : fitting[0][1]]


def _unpadded(rows: int, columns: int, size: Sequence[int]) -> tuple[int, int]:
    """A grid of tiles without the rows or columns that only pad an image of this height and width."""
    height, width = size
    if width / height > columns / rows:
        return rows - (rows - int(round(height * (columns / width), 7))) // 2 * 2, columns
    return rows, columns - (columns - int(round(width * (rows / height), 7))) // 2 * 2


def _twice(tile: Pixels, image: Image.Image, patch: int, finer: Int[np.ndarray, "rows columns"]) -> View:
    """The whole image as a tile of patches, and the image file under a finer grid."""
    rows, columns = (side // patch for side in tile.shape[:2])
    seen = tile[: rows * patch, : columns * patch]
    return _sheet([(seen, _count(rows, columns)), (np.asarray(_copy(image, [finer])), finer)])


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

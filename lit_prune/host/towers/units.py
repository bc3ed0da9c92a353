"""Units of a tower: a unit is the block of patches that the model merges into one visual token.

Units are counted tile by tile. A tile is an image, one of its crops, or a frame of a video, as a grid of patches of its
own; towers get tiles as a batch of one size, padded, or packed one after the other.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lit_prune.errors import LitPruneError

Grid = tuple[int, int, int]  # frames, and patches along both sides


@dataclass(frozen=True)
class Units:
    """`rows`: the patches of each unit, as rows of all samples' sequences one after the other.

    `real` is False for filler, in tiles with fewer units than others. `ordinal`: places on grids of `side` x `side`.
    `images`: the image that each tile belongs to; `others`: rows of a tile's sequence that are no patches.
    """

    rows: Int[Tensor, "tiles units members"]
    real: Bool[Tensor, "tiles units"]
    ordinal: Int[Tensor, "tiles units"]
    side: int
    images: Int[Tensor, " tiles"]
    others: int

    @property
    def members(self) -> int:
        """Patches of a unit."""
        return self.rows.shape[2]


def _filled(inputs: Iterable[Any], extent: Sequence[int], counts: Sequence[int]) -> bool:
    """True if a mask of padded rows (samples, rows) among a tower's inputs has so many patches in each."""
    masks = (value for value in inputs if isinstance(value, Tensor) and tuple(value.shape) == tuple(extent))
    return any(mask.bool().sum(1).tolist() == list(counts) for mask in masks)


def grids_of(inputs: Iterable[Any], extent: Sequence[int], patch: int) -> tuple[list[Grid], list[int]]:
    """The grid of each image, and the row of all samples' sequences (samples, rows) at which its patches start.

    Read off a tower's `inputs`: pixels of one size, or the only integers that tell of sizes, in patches or in pixels.

    Raises:
        LitPruneError: none of them accounts for the rows.
    """
    samples, rows = extent
    for value in inputs:
        if (
            not isinstance(value, Tensor)
            or value.is_floating_point()
            or value.ndim != 2
            or value.shape[1] not in (2, 3)
        ):
            continue
        sizes = [(1, *size)[-3:] for size in value.tolist()]
        for scale in (1, patch):
            grids = [(frames, height // scale, width // scale) for frames, height, width in sizes]
            counts = [frames * height * width for frames, height, width in grids]
            if samples == 1 and sum(counts) == rows:
                return grids, [sum(counts[:place]) for place in range(len(counts))]
            if samples == len(grids) and ((samples > 1 and max(counts) <= rows) or _filled(inputs, extent, counts)):
                return grids, [place * rows for place in range(samples)]
    for value in inputs:
        if isinstance(value, Tensor) and value.ndim == 4 and value.is_floating_point():
            height, width = (side // patch for side in value.shape[2:])
            if value.shape[0] == samples and 0 <= rows - height * width < 8:
                return [(1, height, width)] * samples, [(place + 1) * rows - height * width for place in range(samples)]
    raise LitPruneError("stages inside this vision tower: its inputs don't say how images are cut into patches")


def units_of(
    grids: Sequence[Grid], starts: Sequence[int], extent: Sequence[int], merge: int, blocks: bool, device: torch.device
) -> Units:
    """The units of all tiles; patches stand in rows of the grid, or `blocks` by block. Incomplete blocks are left."""
    tiles = [
        (image, start + frame * height * width, height, width)
        for image, ((frames, height, width), start) in enumerate(zip(grids, starts, strict=True))
        for frame in range(frames)
    ]
    shapes = {(height, width): members(height, width, merge, blocks) for _, _, height, width in tiles}
    side = max(max(size) // merge for size in shapes)
    most = max(len(rows) for rows in shapes.values())
    padded = {size: torch.cat([rows, rows[:1].expand(most - len(rows), -1)]) for size, rows in shapes.items()}
    rows = torch.stack([padded[height, width] + start for _, start, height, width in tiles])
    counts = torch.tensor([len(shapes[height, width]) for _, _, height, width in tiles])
    place = torch.arange(most)
    across = torch.tensor([width // merge for *_, width in tiles])[:, None]
    samples = len(tiles) if extent[0] == len(tiles) else 1
    return Units(
        rows=rows.to(device),
        real=(place < counts[:, None]).to(device),
        ordinal=(place // across * side + place % across).clamp(max=side * side - 1).to(device),
        side=side,
        images=torch.tensor([image for image, *_ in tiles]),
        others=extent[1] - most * merge**2 if samples > 1 or extent[0] == 1 == len(tiles) else 0,
    )


def members(height: int, width: int, merge: int, blocks: bool) -> Int[Tensor, "units members"]:
    """The patches of each unit of one grid."""
    down, across = height // merge, width // merge
    if blocks:
        return torch.arange(down * across * merge**2).view(down * across, merge**2)
    grid = torch.arange(height * width).view(height, width)[: down * merge, : across * merge]
    return grid.view(down, merge, across, merge).permute(0, 2, 1, 3).reshape(down * across, merge**2)


def fits(units: Units, tile: int, grid: Grid, merge: int, rope: Tensor) -> bool:
    """True if rotary embeddings (rows, channels) turn with the row or with the column of patches in this order."""
    down, across = grid[1] // merge, grid[2] // merge
    order = units.rows[tile, : down * across].view(down, across, merge, merge).permute(0, 2, 1, 3)
    found = rope[order.reshape(down * merge, across * merge)].float()
    by_row = (found - found[:, :1]).abs().amax((0, 1)) < 1e-4
    by_column = (found - found[:1]).abs().amax((0, 1)) < 1e-4
    return bool((by_row | by_column).all())


def permuted(units: Units, order: Int[Tensor, " all"], merge: int) -> Units:
    """The units of tiles packed by block, whose blocks were put into another order."""
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order))).to(units.rows.device)
    block, member = units.rows // merge**2, units.rows % merge**2
    return replace(units, rows=place[block] * merge**2 + member)

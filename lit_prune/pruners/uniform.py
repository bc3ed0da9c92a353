"""Control: evenly spaced tokens."""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from lit_prune.ops import selection
from lit_prune.pruners.base import Context, Pruner


class Uniform(Pruner):
    """Regular grid over the image with as many cells as tokens are kept.

    Ours: papers differ in how they spread a budget that is no square. If a cell of the grid is missing (dropped by an
    earlier stage), the nearest present one replaces it. An image whose tokens form no square grid (crops, unpadded or
    wide images, newline tokens) keeps evenly spaced ones in raster order.
    """

    title = "uniform"

    def __init__(
        self, layers: Sequence[int] = (0,), stage_ratios: Sequence[float] | None = None, depth: int | None = None
    ) -> None:
        super().__init__(layers, stage_ratios, depth)

    def score(self, context: Context) -> Float[Tensor, "batch visual"]:
        """Closeness to the nearest cell of the grid for this count, image by image."""
        counts, sizes = context.count[:, None], context.total[:, None]
        if context.images is not None:
            sizes = context.images.sizes
            counts = selection.share(context.count, sizes)
        tables = [
            torch.cat([_closeness(*image) for image in zip(*sample, strict=True)])
            for sample in zip(counts.tolist(), sizes.tolist(), strict=True)
        ]
        table = torch.nn.utils.rnn.pad_sequence(tables, batch_first=True).to(context.ordinal.device)
        return table.gather(1, context.ordinal)


@lru_cache(maxsize=1024)
def _closeness(count: int, total: int) -> Tensor:
    """Minus the squared distance of each of `total` cells to the nearest of `count` evenly spaced ones.

    A square grid is divided into about sqrt(count) bands of rows that share the count; each band's tokens are evenly
    spaced on its middle row. Otherwise the cells form a line.
    """
    side = math.isqrt(total)
    if not min(count, total):
        return torch.zeros(total)
    if side * side != total:
        cells, wanted = torch.arange(total)[:, None], [(int((i + 0.5) * total / count),) for i in range(count)]
    else:
        cells, wanted = torch.stack([torch.arange(total) // side, torch.arange(total) % side], 1), []
        bands = max(1, round(math.sqrt(count)))
        for band in range(bands):
            here = (band + 1) * count // bands - band * count // bands
            middle = int((band + 0.5) * side / bands)
            wanted += [(middle, int((i + 0.5) * side / here)) for i in range(here)]
    distance = (cells[:, None] - torch.tensor(wanted)).square().sum(-1)
    return -distance.amin(1).to(torch.float32)

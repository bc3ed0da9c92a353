"""Evenly spread tokens: the second control."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lit_prune.pruners.base import Context, Pruner


class Uniform(Pruner):
    """A regular grid over the image: tokens ranked by how early a coarse-to-fine grid visits their cell.

    The square grid of the image's tokens (side = sqrt of their number) is split recursively; the first k visited cells
    spread evenly for every k. Ours: papers differ in how they spread a budget that is no square.
    """

    def __init__(
        self, layers: Sequence[int] = (0,), shape: Sequence[float] | None = None, depth: int | None = None
    ) -> None:
        super().__init__(layers, shape, depth)

    def score(self, context: Context) -> Float[Tensor, "batch visual"]:
        """Minus the visiting order: a two-dimensional low-discrepancy sequence assigned to the nearest free cells."""
        side = context.total.to(torch.float64).sqrt().clamp(min=1).ceil()[:, None]
        row = (context.ordinal // side.long()).to(torch.float64)
        column = (context.ordinal % side.long()).to(torch.float64)
        return self._spread(context.count, side, row, column).to(torch.float32)

    @staticmethod
    def _spread(count: Tensor, side: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """Closeness of each cell to the centre of the nearest of about `count` equal tiles, higher first."""
        rows = count.to(torch.float64).sqrt().round().clamp(min=1)[:, None]
        tiles = (count[:, None] / rows).ceil()
        height, width = side / rows, side / tiles
        down = ((row + 0.5) / height).frac() - 0.5
        across = ((column + 0.5) / width).frac() - 0.5
        return -(down.square() + across.square()) - 1e-6 * (row * side + column) / side**2

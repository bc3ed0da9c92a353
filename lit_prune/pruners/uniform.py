"""Evenly spread tokens: the second control."""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from lit_prune.pruners.base import Context, Pruner


class Uniform(Pruner):
    """A regular grid over the image, of as many cells as tokens are kept.

    Ours: papers differ in how they spread a budget that is no square. Where a cell of the grid isn't there (an earlier
    stage dropped it), the nearest one that is takes its place.
    """

    def __init__(
        self, layers: Sequence[int] = (0,), shape: Sequence[float] | None = None, depth: int | None = None
    ) -> None:
        super().__init__(layers, shape, depth)

    def score(self, context: Context) -> Float[Tensor, "batch visual"]:
        """Closeness to the nearest cell of the grid for this count."""
        tables = [
            _closeness(count, total)
            for count, total in zip(context.count.tolist(), context.total.tolist(), strict=True)
        ]
        table = torch.nn.utils.rnn.pad_sequence(tables, batch_first=True).to(context.ordinal.device)
        return table.gather(1, context.ordinal)


@lru_cache(maxsize=1024)
def _closeness(count: int, total: int) -> Tensor:
    """Minus the squared distance of each of `total` cells to the nearest of `count` evenly spread ones.

    About sqrt(count) bands of rows share the count; each band's tokens lie evenly on its middle row.
    """
    side = max(1, math.ceil(math.sqrt(total)))
    bands = max(1, round(math.sqrt(count)))
    wanted = []
    for band in range(bands):
        here = (band + 1) * count // bands - band * count // bands
        middle = int((band + 0.5) * side / bands)
        wanted += [(middle, int((i + 0.5) * side / here)) for i in range(here)]
    if not wanted:
        return torch.zeros(max(1, total))
    cells = torch.stack([torch.arange(side * side) // side, torch.arange(side * side) % side], 1)
    distance = (cells[:, None] - torch.tensor(wanted)).square().sum(-1)
    return -distance.amin(1)[: max(1, total)].to(torch.float32)

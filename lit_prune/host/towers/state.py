"""One forward of a vision tower with stages: what is left of its rows, and how they go and come back."""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lit_prune.ops import selection
from lit_prune.pruners.base import Kept


@dataclass
class TowerPass:
    """A forward of the tower. Tiles and units are as in `Units`; `rows` are of the sequences as they are now.

    `columns`: where each row that is left stood in the `extent` (samples, rows) of all, None as long as all are there;
    `there`: which of them are real, the others filler of samples with fewer.
    """

    inputs: list[Any] = field(default_factory=list)  # what the tower was called with
    late: bool = False  # whether features are read off recorded states, not off what the tower returns
    scaled: bool = False  # whether the image was scaled down
    extent: tuple[int, int] = (0, 0)
    rows: Int[Tensor, "tiles units members"] | None = None
    real: Bool[Tensor, "tiles units"] | None = None
    ordinal: Int[Tensor, "tiles units"] | None = None
    side: int = 0
    others: int = 0  # rows of a tile that are no patches, such as the class token
    prefix: int = 0  # of them, those before the patches
    total: Int[Tensor, " tiles"] | None = None  # units of each tile at first
    images: Int[Tensor, " tiles"] | None = None  # the image that each tile belongs to
    tile_of: Tensor | None = None  # tile of every row, for the price of windows
    columns: Int[Tensor, "samples left"] | None = None
    there: Bool[Tensor, "samples left"] | None = None
    filled: bool = False  # whether some rows are filler
    sizes: Float[Tensor, "tiles units"] | None = None  # what each one stands for, where a stage said so
    memory: dict[str, Tensor] = field(default_factory=dict)
    before: Tensor | None = None  # input of the layer before the next stage
    seen: dict[str, Tensor] = field(default_factory=dict)  # what the projections of that layer gave
    counts: dict[int, Tensor] = field(default_factory=dict)  # units of each tile that a stage keeps
    past: list[tuple[Tensor, Tensor] | None] = field(default_factory=list)  # columns at each layer's output
    entered: Int[Tensor, " tiles"] | None = None  # patches of each tile
    lengths: list[Tensor] = field(default_factory=list)
    pairs: list[Tensor | None] = field(default_factory=list)
    scored: int = 0  # tokens projected once more for the stages so far
    rated: Tensor | int = 0  # tokens whose attention they read
    stages: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # units that each stage found and kept
    final: Tensor | None = None  # features behind the last stage, all rows
    merged: list[Tensor] = field(default_factory=list)  # units of each tile that a merger took from between two layers
    tapped: bool = False  # the last layer's output has all rows
    left: bool = False  # features have left the layers

    @property
    def members(self) -> int:
        """Patches of a unit."""
        return self.rows.shape[2]

    def everything(self) -> tuple[Tensor, Tensor]:
        """Columns of all rows."""
        columns = torch.arange(self.extent[1], device=self.rows.device).expand(self.extent[0], -1)
        return columns, torch.ones_like(columns, dtype=torch.bool)

    def present(self) -> Int[Tensor, " tiles"]:
        """Rows of each tile that are left."""
        return self.real.sum(1) * self.members + self.others

    def patches(self, extent: tuple[int, int]) -> Bool[Tensor, "samples rows"]:
        """Rows that are patches of some unit."""
        found = torch.zeros(extent[0] * extent[1], dtype=torch.bool, device=self.rows.device)
        found[self.rows[self.real].flatten()] = True
        return found.view(extent)

    def units(self, values: Tensor) -> Tensor:
        """Rows of values (rows, ...) of each unit: (tiles, units, members, ...)."""
        return values[self.rows]

    def merge(self, hidden: Tensor, units: Tensor, kept: Kept) -> Tensor:
        """States with those of kept units in place of their own."""
        changed = torch.where(kept.mask[..., None], kept.states.to(units.dtype), units)
        flat = hidden.reshape(-1, hidden.shape[-1])
        own = self.rows[self.real]
        values = changed[self.real].view(*own.shape, -1)
        return flat.index_copy(0, own.flatten(), values.flatten(0, 1)).view(hidden.shape)

    def pack(self, hidden: Tensor, kept: Kept) -> Tensor:
        """The rows (samples, rows, width) that stay, in order, filler behind them."""
        samples, length, _ = hidden.shape
        gone = self.rows[self.real & ~kept.mask]
        stays = torch.ones(samples * length, dtype=torch.bool, device=hidden.device)
        stays[gone.flatten()] = False
        stays = stays.view(samples, length)
        if self.there is not None:
            stays = stays & self.there
        columns, self.there = selection.compact(stays)
        hidden = selection.gather_rows(hidden, columns)
        now = torch.arange(samples * columns.shape[1], device=hidden.device).view(columns.shape)
        moved = torch.zeros(samples, length, dtype=torch.long, device=hidden.device).scatter(1, columns, now)
        chosen, self.real = selection.compact(kept.mask)
        index = chosen[..., None].expand(-1, -1, self.members)
        self.rows = moved.flatten()[self.rows.gather(1, index)]
        self.ordinal = self.ordinal.gather(1, chosen)
        sizes = self.sizes if kept.sizes is None else kept.sizes
        self.sizes = None if sizes is None else sizes.gather(1, chosen)
        self.columns = columns if self.columns is None else self.columns.gather(1, columns)
        self.filled = samples > 1 and not bool(self.there.all())
        return hidden

    @property
    def marked(self) -> bool:
        """True once rows of zeros stand for what left."""
        return self.columns is not None and (self.left or self.tapped)

    def whole(self, hidden: Tensor) -> Tensor:
        """`back`, of states with or without a dimension of samples."""
        return self.back(hidden[None])[0] if hidden.ndim == 2 else self.back(hidden)

    def again(self, hidden: Tensor) -> Tensor:
        """The way back from `whole`."""
        if hidden.ndim == 2:
            return hidden[self.columns[0]]
        return selection.gather_rows(hidden, self.columns)

    def back(self, hidden: Tensor, columns: Tensor | None = None, there: Tensor | None = None) -> Tensor:
        """All rows of features (samples, left, width), zeros for those that left; at other `columns`, of earlier ones.

        What earlier rows have beyond those that are left now is dropped.
        """
        final = torch.zeros(self.extent, dtype=torch.bool, device=hidden.device)
        final.scatter_(1, self.columns, self.there)
        columns, there = (self.columns, self.there) if columns is None else (columns, there)
        stays = there & final.gather(1, columns)
        return selection.put_rows(hidden * stays[..., None].to(hidden.dtype), columns, self.extent[1])

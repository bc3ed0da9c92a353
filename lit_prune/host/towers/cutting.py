"""Arguments of a tower's layers, cut down to the rows that are left."""

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lit_prune.host.towers.state import TowerPass


def cut(
    value: Any, columns: Int[Tensor, "samples left"], there: Bool[Tensor, "samples left"], extent: tuple[int, int]
) -> Any:
    """A layer's argument at the columns that are left of `extent` (samples, rows); as it is if it has none of them.

    Bounds of packed images become those of what is left of them; images and windows without any vanish.
    """
    samples, rows = extent
    if isinstance(value, tuple | list):
        return type(value)(cut(part, columns, there, extent) for part in value)
    if not isinstance(value, Tensor):
        return value
    if is_bounds(value, samples * rows):
        return cut_bounds(value, columns, samples * rows)
    if value.ndim == 4 and value.shape[2:] == (rows, rows):
        value = value.expand(samples, -1, -1, -1)
        value = value.gather(2, columns[:, None, :, None].expand(-1, value.shape[1], -1, rows))
        return value.gather(3, columns[:, None, None].expand(-1, value.shape[1], columns.shape[1], -1))
    if value.ndim >= 2 and value.shape[:2] in ((samples, rows), (1, rows)):
        value = value.expand(samples, *value.shape[1:])
        index = columns.view(*columns.shape, *[1] * (value.ndim - 2)).expand(-1, -1, *value.shape[2:])
        return value.gather(1, index)
    if value.ndim >= 1 and value.shape[0] == rows:
        return value[columns[0]] if samples == 1 else value[columns]
    return value


def is_bounds(value: Any, rows: int) -> bool:
    """True for cumulative lengths of what attends to itself alone."""
    if not isinstance(value, Tensor) or value.is_floating_point() or value.ndim != 1 or len(value) < 2:
        return False
    return int(value[0]) == 0 and int(value[-1]) == rows


def cut_bounds(value: Tensor, columns: Int[Tensor, "1 left"], rows: int) -> Tensor:
    """Cumulative lengths of what is left."""
    present = torch.zeros(rows + 1, dtype=torch.long, device=value.device)
    present[columns[0] + 1] = 1
    return torch.unique_consecutive(present.cumsum(0)[value.long()]).to(value.dtype)


def pairs(values: tuple, state: TowerPass) -> Int[Tensor, " tiles"] | None:
    """(query, key) pairs of a layer's attention in each tile, by what the layer is handed; None: the tile's square."""
    if state.extent[0] > 1 or (len(state.rows) == 1 and state.others):
        return None
    rows = state.extent[1] if state.columns is None else state.columns.shape[1]
    own = state.tile_of if state.columns is None else state.tile_of[state.columns[0]]
    for value in values:
        if is_bounds(value, rows):
            lengths = value.diff().long()
            return torch.zeros(len(state.rows), dtype=torch.long, device=value.device).index_add(
                0, own[value[:-1].long()], lengths.square()
            )
        if isinstance(value, Tensor) and value.ndim == 4 and value.shape[2:] == (rows, rows):
            return state.present() * rows
    return None

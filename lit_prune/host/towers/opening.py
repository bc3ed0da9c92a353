"""The beginning of a pass: which rows of the tower's sequences are which patch, and which patches make a unit."""

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lit_prune.errors import LitPruneError
from lit_prune.host.towers.state import TowerPass
from lit_prune.host.towers.units import Grid, Units, fits, grids_of, permuted, units_of

# In which a tower may have its patches: by block, by row, blocks by window, patches by window.
ORDERS = ("blocks", "rows", "block windows", "windows")


def begin(state: TowerPass, tower: Any, hidden: Tensor, rope: Any, orders: dict[str, str], side: int) -> None:
    """Note where patches and units are in the states at the first layer's input.

    Raises:
        LitPruneError: they can't be told from the tower's inputs.
    """
    if hidden.ndim not in (2, 3):
        raise LitPruneError(
            f"stages inside the vision tower: the layers of {type(tower.module).__name__} are given states of "
            f"{hidden.ndim} dimensions, not rows of patches; use a method of the decoder"
        )
    extent = (1, hidden.shape[0]) if hidden.ndim == 2 else tuple(hidden.shape[:2])
    merge, device = tower.size.merge, hidden.device
    if state.scaled:
        units, state.columns, state.there, state.extent = _scaled(extent, tower, side, device)
    else:
        grids, starts = grids_of(state.inputs, extent, tower.patch)
        state.extent = extent
        units = _ordered(grids, starts, extent, tower, rope, orders, device)
        state.prefix = starts[0]
    state.rows, state.real, state.ordinal, state.side = units.rows, units.real, units.ordinal, units.side
    state.others, state.images, state.total = units.others, units.images, units.real.sum(1)
    state.entered = state.total * merge**2
    state.tile_of = torch.zeros(extent[0] * extent[1], dtype=torch.long, device=device)
    tiles = torch.arange(len(units.rows), device=device)[:, None, None].expand_as(units.rows)
    state.tile_of[units.rows[units.real].flatten()] = tiles[units.real].flatten()


def stage_counts(
    state: TowerPass, layers: Iterable[int], plan: Callable[[int, int], Mapping[int, int]]
) -> dict[int, Tensor]:
    """Units that each tile keeps, by the layer of the stage.

    Args:
        state: at its beginning. layers: with a stage before them.
        plan: {layer: units kept} of a tile of so many units in an image of so many frames, asked once for each pair.
    """
    plan = cache(plan)
    frames = state.images.bincount()[state.images].tolist()
    plans = [plan(*tile) for tile in zip(state.total.tolist(), frames, strict=True)]
    return {layer: torch.tensor([found[layer] for found in plans], device=state.rows.device) for layer in layers}


def _ordered(
    grids: list[Grid], starts: list[int], extent: tuple[int, int], tower: Any, rope: Any, orders: dict, device: Any
) -> Units:
    """Units in the order that the rotary embeddings show; without any, by row, or by block where tiles are packed."""
    merge, packed = tower.size.merge, extent[0] == 1 and tower.packed
    turned = rope[0] if isinstance(rope, tuple | list) and isinstance(rope[0], Tensor) else None
    turned = turned[0] if turned is not None and turned.ndim == 3 else turned

    def made(order: str) -> Units:
        units = units_of(grids, starts, extent, merge, order.startswith("block"), device)
        if not order.endswith("windows"):
            return units
        size = merge if order.startswith("block") else 1
        return permuted(units, tower.windows(grids, size), size)

    if "order" not in orders:
        names = [order for order in ORDERS if not order.endswith("windows") or tower.windows is not None]
        shown = next((tile for tile, grid in enumerate(grids) if grid[0] == 1 and min(grid[1:]) > merge), None)
        if merge == 1 and tower.windows is None:
            orders["order"] = "rows"
        elif turned is None or extent[0] * extent[1] != len(turned):
            return made("blocks" if packed and not tower.convolves else "rows")
        elif shown is None:
            return made(names[0])
        else:
            found = next((order for order in names if fits(made(order), shown, grids[shown], merge, turned)), None)
            if found is None:
                raise LitPruneError(
                    f"stages inside the vision tower: {type(tower.module).__name__} has its patches in an order that "
                    f"isn't known; use a method of the decoder"
                )
            orders["order"] = found
    return made(orders["order"])


def _scaled(
    extent: tuple[int, int], tower: Any, side: int, device: torch.device
) -> tuple[Units, Tensor, Tensor, tuple[int, int]]:
    """Units of images scaled down, at the nearest places of the full grid."""
    samples, rows = extent
    merge, full = tower.size.merge, tower.size.side
    prefix = rows - (side * merge) ** 2
    whole = prefix + (full * merge) ** 2
    small = units_of([(1, side * merge, side * merge)] * samples, [prefix + i * rows for i in range(samples)], extent,
                     merge, False, device)  # fmt: skip
    wide = units_of([(1, full * merge, full * merge)], [prefix], (1, whole), merge, False, device)
    steps = ((torch.arange(side, device=device) + 0.5) * full / side).long()
    place = (steps[:, None] * full + steps).flatten()
    columns = torch.arange(rows, device=device)
    columns[small.rows[0].flatten()] = wide.rows[0][place].flatten()
    columns = columns.expand(samples, -1)
    units = Units(small.rows, small.real, place.expand(samples, -1), full, small.images, small.others)
    return units, columns, torch.ones_like(columns, dtype=torch.bool), (samples, whole)


def smaller(args: tuple, kwargs: dict, size: int) -> tuple[tuple, dict]:
    """The tower's arguments with images scaled down and position embeddings that follow."""
    kwargs = dict(kwargs)
    pixels = kwargs.pop("pixel_values", None)
    pixels, args = (args[0], args[1:]) if pixels is None else (pixels, args)
    pixels = torch.nn.functional.interpolate(pixels, (size, size), mode="bicubic", antialias=True)
    return (pixels, *args), {**kwargs, "interpolate_pos_encoding": True}

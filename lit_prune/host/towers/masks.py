"""Masks of a tower's layers, once patches have left."""

from typing import Any

import torch
from torch import Tensor

from lit_prune.errors import LitPruneError
from lit_prune.host.compat import bidirectional_mask
from lit_prune.host.towers.state import TowerPass


def tower_mask(config: Any, method: str, hidden: Tensor, state: TowerPass, given: Tensor | None) -> Tensor | None:
    """A mask that hides filler, and adds log(size) where patches stand for several; None: not needed.

    Args:
        config: the tower's.
        method: its name, for the error.
        hidden: states of the rows that are left (samples, rows, width).
        state: the pass.
        given: what the tower masks itself, at these rows.

    Raises:
        LitPruneError: attention that takes no bias.
    """
    if state.sizes is not None:
        if config._attn_implementation not in ("sdpa", "eager"):
            raise LitPruneError(
                f"{method} adds log(size) to attention inside the vision tower, which {config._attn_implementation} "
                f"attention can't: load with attn_implementation='sdpa'"
            )
        bias, lowest = _log_sizes(hidden, state), torch.finfo(hidden.dtype).min
        if given is None:
            return bias
        return bias.masked_fill(~given, lowest) if given.dtype == torch.bool else bias + given
    if given is not None:
        lowest = False if given.dtype == torch.bool else torch.finfo(given.dtype).min
        return given.masked_fill(~state.there[:, None, None], lowest)
    return bidirectional_mask(config, hidden, state.there)


def _log_sizes(hidden: Tensor, state: TowerPass) -> Tensor:
    """log(size) of every key, the lowest number of filler: (samples, 1, rows, rows)."""
    bias = torch.zeros(hidden.shape[:2], device=hidden.device).flatten()
    own, logs = state.rows[state.real], state.sizes.log()[state.real]
    bias = bias.index_copy(0, own.flatten(), logs[:, None].expand(own.shape).flatten()).view(hidden.shape[:2])
    bias = bias.to(hidden).masked_fill(~state.there, torch.finfo(hidden.dtype).min)
    return bias[:, None, None].expand(-1, 1, hidden.shape[1], -1)

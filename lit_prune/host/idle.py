"""Layers whose work a forward can leave out: those below a point that another forward has reached, and late ones.

A hook can't skip a layer, but it can hand it one column and stretch what comes out to the length that everything
around expects. So every module still runs in its order on every rank, which sharded weights need, and no forward, layer
list or class is touched. A layer over one column costs about what it costs in decoding.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_prune.host.slicing import Slices


@dataclass
class Prefix:
    """States at the input of decoder layer `layer`: the first forward leaves them, the next ones start from them.

    Only for forwards over the same batch that don't differ below that layer.
    """

    layer: int
    states: Tensor | None = None


def one_column(args: tuple, kwargs: dict, length: int) -> tuple[tuple, dict]:
    """A layer's arguments with the first column alone, of the `length` that they were made for."""
    hidden, *rest = args
    first = torch.zeros(hidden.shape[0], 1, dtype=torch.long, device=hidden.device)
    slices = Slices(first, length)
    mask, kwargs = kwargs.get("attention_mask"), slices.named(kwargs, ())
    return (hidden[:, :1], *slices.of(tuple(rest))), {**kwargs, "attention_mask": _open(mask)}


def _open(mask: Any) -> Tensor | None:
    """A mask that hides nothing, where the layer is handed one of four dimensions: some choose their keys by it."""
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        return None
    corner = mask[:, :, :1, :1]
    return torch.ones_like(corner) if mask.dtype == torch.bool else torch.zeros_like(corner)


def stretched(output: Tensor, length: int) -> Tensor:
    """An idle layer's output at the length of the sequence, without memory; its values mean nothing."""
    return output[:, :1].expand(-1, length, *[-1] * (output.ndim - 2))

"""Lower bound on prefill time: the plain model on sequences cut to given lengths, for measuring what methods add."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.host import parts
from lit_prune.host.slicing import Slices


def _last(mask: Any, length: int) -> Tensor | None:
    """The last rows and columns of a mask: a window's, one that chooses keys reads (4 dimensions), or a state's (2)."""
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        return None
    return mask[(..., *[slice(-length, None)] * (mask.ndim // 2))]


@contextmanager
def cut_to(model: nn.Module, lengths: Sequence[int], full: int) -> Iterator[None]:
    """Prefill `full` columns with `lengths[i]` at the input of decoder layer i, by a slice that keeps the last ones.

    Nothing is scored, gathered, repaired or put back, so what a method takes longer than this is what it adds. For
    batches without padding and without a cache to continue; the outputs are those of a shorter sequence.
    """

    def cut(length: int):
        def hook(module: nn.Module, args: tuple, kwargs: dict):
            hidden, *rest = args
            last = torch.arange(full - length, full, device=hidden.device).expand(hidden.shape[0], -1)
            slices = Slices(last, full)
            mask, kwargs = kwargs.get("attention_mask"), {name: slices.of(value) for name, value in kwargs.items()}
            kwargs["attention_mask"] = _last(mask, length)
            return (hidden[:, -length:], *slices.of(tuple(rest))), kwargs

        return hook

    layers = parts.find(model).layers
    handles = [
        layer.register_forward_pre_hook(cut(length), with_kwargs=True)
        for layer, length in zip(layers, lengths, strict=True)
        if length < full
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

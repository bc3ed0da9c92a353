"""Tail of a tower: the modules after its layers, which map rows of features to rows, each of them alone.

Patches that left come back after the last layer as rows of zeros, so that everything there finds the shape that it
expects: norms, pixel shuffles, mergers, projectors. Each module with weights runs on the other rows only and leaves a
row of zeros where it found one. So the marks reach the decoder, wherever the model carries its features.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lit_prune.ops import selection

PACKED = "lit_prune_packed"  # attribute of features on their way through a module


def row_wise(module: nn.Module) -> bool:
    """True for a module with weights of its own that maps rows to rows: a matrix, a norm, a patch-wise convolution."""
    if next(module.children(), None) is not None or next(module.parameters(), None) is None:
        return False
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == module.stride and module.padding == (0, 0)
    return isinstance(module, nn.Linear) or "Norm" in type(module).__name__


def leaves(module: nn.Module, apart: set[nn.Module]) -> Iterator[nn.Module]:
    """The row-wise modules inside a module, but for those in `apart`."""
    if module in apart:
        return
    if row_wise(module):
        yield module
    for child in module.children():
        yield from leaves(child, apart)


def enter(module: nn.Module, args: tuple):
    """Leave rows of zeros out; rows of a convolution are its samples."""
    features = args[0]
    flat = features.flatten(1) if isinstance(module, nn.Conv2d) else features.reshape(-1, features.shape[-1])
    there = (flat != 0).any(-1)
    if bool(there.all()):
        return None
    rows = there.nonzero()[:, 0]
    if isinstance(module, nn.Conv2d):
        packed = features[rows]
    else:
        packed = flat[rows] if features.ndim < 3 else flat[rows][None]
    # The hook behind the module gets this very tensor again: what it needs rides along.
    setattr(packed, PACKED, (rows, features.shape, features))
    return (packed, *args[1:])


def leave(module: nn.Module, args: tuple, output: Tensor):
    """Rows of zeros back at their places; of a convolution over a grid also where it found nothing but zeros."""
    if isinstance(module, nn.Conv2d):
        output = _windows(module, args[0], output)
    if not hasattr(args[0], PACKED):
        return output
    rows, shape, _ = getattr(args[0], PACKED)
    if isinstance(module, nn.Conv2d):
        return output.new_zeros(shape[0], *output.shape[1:]).index_copy(0, rows, output)
    flat = output.reshape(-1, output.shape[-1])
    count = torch.Size(shape[:-1]).numel()
    return selection.put_rows(flat[None], rows[None], count)[0].view(*shape[:-1], flat.shape[-1])


def _windows(module: nn.Conv2d, features: Tensor, output: Tensor) -> Tensor:
    there = (features != 0).any(1, keepdim=True).to(output.dtype)
    if bool(there.all()):
        return output
    return output * nn.functional.max_pool2d(there, module.kernel_size, module.stride)


def absent(embeds: Tensor, newline: Tensor | None) -> Tensor:
    """Mask of embeddings of patches that the tower dropped, and, in their samples, of line breaks of rows."""
    embeds = embeds.flatten(2)  # of a decoder with several streams
    gone = (embeds == 0).all(-1)
    if newline is None:
        return gone
    return gone | ((embeds == newline.to(embeds)).all(-1) & gone.any(1, keepdim=True))

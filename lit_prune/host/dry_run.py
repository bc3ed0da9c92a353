"""A vision tower's FLOPs for one image without weights: on the meta device, whatever the tower's structure."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from lit_prune.host.counting import Counter
from lit_prune.host.noise import one_image
from lit_prune.host.zoo.inputs import visual_tokens

META = torch.device("meta")
COPY = torch.ops.aten._to_copy.default
INDEXED = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)


class DryRun(TorchDispatchMode):
    """Inside, floating-point tensors on the meta device stay there, and whole numbers and truths are computed.

    Towers read sizes of images, positions and masks from tensors of whole numbers, and decide by them what to compute.
    Where such a tensor depends on floating-point values, which nobody knows, it is zero: no pixel is zero then.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(one.is_meta for one in given):
            args = (args[0], _numbers(args[1]), *args[2:]) if func in INDEXED else args
            args, kwargs = tree_map_only(Tensor, lambda one: one.to(META), (args, kwargs))
            if func is COPY:
                kwargs["device"] = META
        elif kwargs.get("device") == META and not func(*args, **kwargs).is_floating_point():
            kwargs["device"] = torch.device("cpu")  # made out of nothing, or of whole numbers
        return tree_map_only(Tensor, _known, func(*args, **kwargs))


def _numbers(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Indices in which masks are the numbers of what they select: how many that are, the meta device doesn't know."""
    found: list[Tensor | None] = []
    for index in indices:
        found += index.nonzero(as_tuple=True) if index is not None and index.dtype == torch.bool else [index]
    return found


def _known(result: Tensor) -> Tensor:
    if not result.is_meta or result.is_floating_point():
        return result
    return torch.zeros(result.shape, dtype=result.dtype)


def tower_flops(model: nn.Module, image: tuple[int, int]) -> tuple[int, int]:
    """FLOPs of tower and projector for an image of so many pixels, and its visual tokens.

    `model` is on the meta device. Raises whatever a tower raises that can't be run so.
    """
    inputs, counter = one_image(model, image), Counter()
    try:
        with torch.no_grad(), DryRun():
            visual = visual_tokens(model.config.model_type, model, inputs)
    finally:
        flops = counter.end()
    return flops, visual

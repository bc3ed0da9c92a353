"""Reasons why nothing can be pruned inside a vision tower, found by structure before anything runs."""

from collections.abc import Callable, Iterator

from torch import nn

from lit_prune.host.compat import parameters
from lit_prune.host.towers.reading import attention_of


def unsuited(
    model: nn.Module,
    decoder: nn.Module,
    module: nn.Module,
    layers: nn.ModuleList,
    another: Callable[[nn.Module, nn.Module], bool],
) -> str | None:
    """Why patches can't leave a tower, in words that follow the model's name; None: they can.

    Args:
        model: the whole model. decoder: its decoder. module: its vision tower. layers: the tower's.
        another: says which models inside the model have nothing to do with the tower.
    """
    pixels = [name for name in parameters(type(model).forward) if name.endswith("pixel_values")]
    if len(pixels) > 1:
        return "makes its visual tokens of images in two resolutions"
    if (reason := _unknown_rows(module, layers)) is not None:
        return reason
    inputs = {part for part in model.modules() if another(part, module) and part.main_input_name != "input_ids"}
    behind = False  # modules stand in the order in which they run
    for part in _outside(model, {decoder, *inputs}, layers):
        behind = behind or part is layers
        if part is not layers and behind and (reason := _mixes(part)) is not None:
            return reason
    return None


def _unknown_rows(module: nn.Module, layers: nn.ModuleList) -> str | None:
    """Reason why the inputs of a tower don't determine the rows of its states; None if they do."""
    taken = parameters(type(module).forward)
    if places := [name for name in taken if name.endswith("position_ids")]:
        return f"hands its vision tower the place of each patch ({places[0]}) and no image's size"
    if sizes := [name for name in taken if "merge_size" in name]:
        return f"merges patches by a size that comes with each image ({sizes[0]})"
    apart = (
        name.lower() for part in _outside(module, set(), layers) for name, _ in part.named_parameters(recurse=False)
    )
    grids = [name for name in taken if "grid" in name]
    if grids and any("cls" in name or "register" in name for name in apart):
        return "packs images with class tokens between them"
    return None


def _mixes(part: nn.Module) -> str | None:
    """Reason why a module after the tower's layers needs all patches: it mixes them, or gives dropped ones a value."""
    name = type(part).__name__
    if attention_of(part) is not None:
        return f"mixes patches behind the tower's layers, in {name}"
    if isinstance(part, nn.Conv2d) and any(k > s for k, s in zip(part.kernel_size, part.stride, strict=True)):
        return "mixes patches behind the tower's layers, in a convolution whose windows overlap"
    if isinstance(part, nn.Embedding) and type(part).forward is not nn.Embedding.forward:
        return f"makes visual words of patches behind the tower's layers, in {name}, also of those that left"
    if "PositionEmbedding" in name:
        return f"adds positions behind the tower's layers, in {name}, also to patches that left"
    return None


def _outside(module: nn.Module, apart: set[nn.Module], layers: nn.ModuleList) -> Iterator[nn.Module]:
    """Modules inside a module in the order in which it has them, without what is in `apart` and in the layers."""
    if module in apart:
        return
    yield module
    if module is layers:
        return
    for child in module.children():
        yield from _outside(child, apart, layers)

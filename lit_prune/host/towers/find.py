"""Discovery of a model's vision tower and of how its layers work, by structure."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from lit_prune.cost.sizes import first_side
from lit_prune.cost.towers import TowerSize, tower_size
from lit_prune.errors import LitPruneError
from lit_prune.host.checks import check_tower
from lit_prune.host.compat import parameters, window_order
from lit_prune.host.towers.reading import attention_of, clip_like
from lit_prune.host.towers.suited import unsuited
from lit_prune.host.towers.tail import leaves

POOLERS = ("apply_pooling", "vision_resampler")  # what pools the features of videos, and not those of images


@dataclass(frozen=True)
class Tower:
    """The parts of a model that pruning inside its vision tower touches.

    `taps`: layers behind which mergers take features too; `tail`: what follows the last, row by row; `packed`: images
    stand one after the other, apart by bounds; `windows`: gives the order of blocks in which the tower puts them for
    attention inside windows; `masked`: layers take a mask for their keys; `picks`: features are a layer's recorded
    states; `newline`: put behind each row of crops. `videos`: why videos can't be pruned in it, if so.
    """

    size: TowerSize
    module: nn.Module
    layers: nn.ModuleList
    decoder: nn.Module
    taps: tuple[int, ...]
    tail: tuple[nn.Module, ...]
    patch: int
    packed: bool
    masked: bool
    clip_like: bool
    convolves: bool
    picks: bool
    windows: Callable[[Sequence, int], Tensor] | None
    newline: Tensor | None
    videos: str | None


def tower(model: nn.Module, decoder: nn.Module) -> Tower:
    """The vision tower of a model.

    Raises:
        LitPruneError: it has none whose layers are attention over patches, or several.
    """
    module, layers = vision_tower(model, decoder)
    vision, taken = model.config.vision_config, parameters(type(layers[0]).forward)
    size = tower_size(model.config)
    packed = "cu_seqlens" in taken or "cu_seqlens" in parameters(type(attention_of(layers[0])[0]).forward)
    if len(layers) != size.layers:
        raise _refused(
            model, f"has {len(layers)} layers in its vision tower, where its configuration says {size.layers}"
        )
    check_tower()
    base = getattr(model, "model", model)
    if (reason := unsuited(model, decoder, module, layers, _another)) is not None:
        raise _refused(model, reason)
    apart = {decoder, layers, model.get_output_embeddings()}
    apart |= {part for part in model.modules() if _another(part, module)}
    tail = tuple(leaves(model, apart))
    window = getattr(vision, "window_size", None)
    return Tower(
        size=size,
        module=module,
        layers=layers,
        decoder=decoder,
        taps=tuple(getattr(vision, "deepstack_visual_indexes", None) or ()),
        tail=tail,
        patch=first_side(vision.patch_size),
        packed=packed,
        masked="attention_mask" in taken and not packed,
        clip_like=not packed and all(map(clip_like, layers)),
        convolves=any(isinstance(part, nn.Conv2d) and part.stride == (size.merge,) * 2 for part in tail),
        picks=hasattr(model.config, "vision_feature_layer") and size.merge == 1,
        windows=None if window is None else partial(window_order, window=window, patch=first_side(vision.patch_size)),
        newline=getattr(base, "image_newline", None),
        videos=_videos(model, decoder, base),
    )


def _videos(model: nn.Module, decoder: nn.Module, base: nn.Module) -> str | None:
    """Reason why a tower that images can be pruned in doesn't do for videos."""
    if len(dict(_towers(model, decoder))) > 1:
        return "go through a tower of their own"
    if any(hasattr(base, name) for name in POOLERS):
        return "are pooled behind the tower, which would mix dropped patches into the kept ones"
    return None


def vision_tower(model: nn.Module, decoder: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """The module that encodes images, and its layers."""
    found = dict(_towers(model, decoder))
    if len(found) > 1:
        found = {name: pair for name, pair in found.items() if "image" in name}
        if len(found) != 1:
            raise _refused(model, "has several vision towers")
    if not found:
        raise _refused(model, "has no vision tower whose layers are attention over rows of patches")
    module, stacks = next(iter(found.values()))
    if len(stacks) > 1:
        raise _refused(model, "has several stacks of layers in its vision tower")
    return module, stacks[0]


def _towers(model: nn.Module, decoder: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, list[nn.ModuleList]]]]:
    """Outermost modules whose configuration is of the vision configuration's class, with their stacks of layers."""
    vision, inside = getattr(model.config, "vision_config", None), set(decoder.modules())
    for name, module in model.named_modules():
        own = getattr(module, "config", None)
        if module in inside or vision is None or own is None or own is model.config or not _same(own, vision):
            continue
        if not _is_model(module):
            continue
        stacks = [part for part in module.modules() if isinstance(part, nn.ModuleList) and _layers(part)]
        inside |= set(module.modules())
        if stacks:
            yield name, (module, stacks)


def _same(own: object, vision: object) -> bool:
    return own is vision or type(own) is type(vision)


def _layers(stack: nn.ModuleList) -> bool:
    """True for layers of one kind that attend over rows of patches."""
    kinds = {type(layer) for layer in stack}
    if len(kinds) != 1 or any(hasattr(next(iter(kinds)), name) for name in ("window_partition",)):
        return False
    return all(attention_of(layer) is not None for layer in stack)


def _another(part: nn.Module, module: nn.Module) -> bool:
    """True for a model inside the model that has nothing to do with the tower: of sounds, of other images."""
    return _is_model(part) and not _holds(part, module) and not _holds(module, part)


def _holds(whole: nn.Module, part: nn.Module) -> bool:
    return any(part is inner for inner in whole.modules())


def _refused(model: nn.Module, reason: str) -> LitPruneError:
    return LitPruneError(
        f"{type(model).__name__} {reason}, so nothing can be pruned inside the tower; use a method of the decoder"
    )


def _is_model(part: object) -> bool:
    """True for a model of transformers, alone or as a part of another."""
    from transformers import PreTrainedModel  # brings models' code, which pricing does without

    return isinstance(part, PreTrainedModel)

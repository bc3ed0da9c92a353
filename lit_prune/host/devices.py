"""Decoders whose layers are on several devices (`device_map`): everything that layers share follows the states.

accelerate moves a layer's arguments inside its `forward`, so the hooks of a layer run before and after that, and move
what they need themselves. A plug-in stays on one device: what its parts are given comes to them, and results go back.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.errors import LitPruneError

Devices = tuple[torch.device, ...]


def device_of(module: nn.Module) -> torch.device:
    """Device that a module computes on, by accelerate's hook if it brings the weights in from the CPU or the disk."""
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
        if (weight := next(part.parameters(recurse=False), None)) is not None:
            return weight.device
    raise LitPruneError(f"{type(module).__name__} has no weights that would say on which device it is")


def devices_of(model: nn.Module, layers: Iterable[nn.Module]) -> Devices | None:
    """The device of each layer; None if all are on the one that the model's embeddings come from."""
    found, others = tuple(device_of(layer) for layer in layers), set()
    with suppress(NotImplementedError, AttributeError):  # a class that doesn't say where its embeddings are
        others.add(device_of(model.get_input_embeddings()))
    return found if others.union(found) != {found[0]} else None


def check_devices(devices: Devices, pairs: Mapping[int, int]) -> None:
    """Raise `LitPruneError` if a stage reads the attention of a layer on another device: {stage: that layer}."""
    for stage, read in pairs.items():
        if devices[stage] != devices[read]:
            raise LitPruneError(
                f"pruning before layer {stage} reads the attention of layer {read}, which is on {devices[read]} and "
                f"not on {devices[stage]}: load with a device_map that keeps the two together"
            )


def check_tower(layers: Iterable[nn.Module]) -> None:
    """Raise `LitPruneError` if a vision tower whose patches are pruned is on several devices."""
    if len(found := {str(device_of(layer)) for layer in layers}) > 1:
        raise LitPruneError(
            f"the vision tower is spread over {', '.join(sorted(found))}, and a method that prunes inside it needs its "
            f"layers on one device: load with a device_map that keeps model.vision_tower together"
        )


def moved(value: Any, device: torch.device) -> Any:
    """A copy with all tensors on a device: of tensors, containers, dataclasses, and what has a method `to`."""
    if hasattr(value, "to"):
        return value.to(device)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(moved(part, device) for part in value))
    if type(value) in (tuple, list):
        return type(value)(moved(part, device) for part in value)
    if isinstance(value, dict):
        return {key: moved(part, device) for key, part in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{each.name: moved(getattr(value, each.name), device) for each in fields(value)})
    return value


def move(holder: Any, device: torch.device) -> None:
    """Put all tensors that a dataclass object holds on a device; others keep referring to the object itself."""
    for each in fields(holder):
        setattr(holder, each.name, moved(getattr(holder, each.name), device))


def reachable(part: nn.Module, *methods: str) -> nn.Module:
    """A view of a plug-in's part whose `methods` take tensors from any device, and give results on that device."""
    view = copy.copy(part)  # shares weights and modules; a method runs on the part itself
    for name in methods:
        setattr(view, name, partial(_call, getattr(part, name), part))
    return view


def _call(method: Callable, part: nn.Module, *args: Any) -> Any:
    weight, given = next(part.parameters(), None), _device(args)
    if weight is None or given is None:
        return method(*args)
    return moved(method(*moved(args, weight.device)), given)


def _device(value: Any) -> torch.device | None:
    """Device of the first tensor."""
    if isinstance(value, Tensor):
        return value.device
    if is_dataclass(value):
        value = [getattr(value, each.name) for each in fields(value)]
    parts = value if isinstance(value, tuple | list) else ()
    return next((found for part in parts if (found := _device(part)) is not None), None)


class Transfers:
    """Copies, on one device, of the values that a decoder hands to all its layers; each is copied once.

    Args:
        device: of the layers.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.known: dict[int, tuple[Any, Any]] = {}  # by identity, with the value itself, so that it lives as long

    def of(self, value: Any) -> Any:
        """The value there; the same object for the same one."""
        if not isinstance(value, Tensor | tuple | list | dict):
            return value
        if id(value) not in self.known:
            self.known[id(value)] = (value, moved(value, self.device))
        return self.known[id(value)][1]

"""Devices that are all this machine's CPU, but may no more be mixed than two GPUs may: for tests of `device_map`."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

FIRST, SECOND = torch.device("cpu", 0), torch.device("cpu", 1)
CPU = torch.device("cpu")
MOVES = {Tensor.to, Tensor.cpu}
PLACE = "_place"  # attribute of a tensor


def place_of(value: Tensor) -> torch.device:
    return vars(value).get(PLACE, FIRST)


def indexed(device: torch.device | str) -> torch.device:
    device = torch.device(device)
    return FIRST if device.index is None else device


def put(value: Any, device: torch.device) -> Any:
    """Label all tensors in a result."""
    if isinstance(value, Tensor):
        setattr(value, PLACE, device)
    elif isinstance(value, tuple | list):
        for part in value:
            put(part, device)
    return value


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors(part)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))


class Devices(TorchFunctionMode):
    """While it is on, a tensor is on the first device unless it was made on another, or moved; ops don't mix them."""

    def __init__(self) -> None:
        super().__init__()
        self.moves = 0

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if function == Tensor.device.__get__:
            return place_of(args[0])
        if function in MOVES:
            return self._to(function, args, kwargs)
        if function == torch._has_compatible_shallow_copy_type:  # of `Module.to`, which sets data then
            return True
        if function == Tensor.data.__set__:
            function(*args)
            return put(args[0], place_of(args[1]))
        places = {place_of(each) for each in tensors([args, kwargs]) if each.ndim}
        if len(places) > 1:
            raise RuntimeError(f"{function} mixes {places}")
        place = places.pop() if places else next((place_of(each) for each in tensors([args, kwargs])), FIRST)
        if isinstance(device := kwargs.get("device"), torch.device | str):
            place, kwargs["device"] = indexed(device), CPU
        found = function(*args, **kwargs)
        return found if function in (nn.Parameter, setattr) else put(found, place)

    def _to(self, function: Any, args: tuple, kwargs: dict) -> Tensor:
        value, place, rest = args[0], place_of(args[0]), []
        for each in (*args[1:], *kwargs.values()):
            if isinstance(each, torch.device | str):
                place = indexed(each)
            elif isinstance(each, Tensor):
                place = place_of(each)
                rest.append(each.dtype)
            elif isinstance(each, torch.dtype):
                rest.append(each)
        found = value.to(*rest) if rest else value
        if place == place_of(value):
            return put(found, place)
        self.moves += 1
        return put(found.view_as(found), place)


def spread(model: nn.Module, places: dict[str, torch.device]) -> None:
    """Put a model's modules on devices, and accelerate's hooks on them, as `dispatch_model` does for a `device_map`."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    for name, device in places.items():
        module = model.get_submodule(name)
        hook = AlignDevicesHook(execution_device=device, io_same_device=name == "", skip_keys="past_key_values")
        add_hook_to_module(module, hook)
        for part in (*module.parameters(), *module.buffers()):
            setattr(part, PLACE, device)

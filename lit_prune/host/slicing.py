"""Whatever a layer is handed with a row per original token, at the columns that are left.

Rotary embeddings, position ids, types of tokens, inputs of each layer: a decoder gives them to every layer at the
length of the prompt. A tensor's shape says where its tokens are, so that no name is needed.
"""

from collections.abc import Container, Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lit_prune.ops import selection


class Slices:
    """Cuts what one forward hands its layers; a value that comes again, layer after layer, is cut once.

    Args:
        columns: original columns that are left.
        length: original columns.
    """

    def __init__(self, columns: Int[Tensor, "batch columns"], length: int) -> None:
        self.columns, self.length = columns, length
        self.known: dict[int, tuple[Any, Any]] = {}  # by identity, with the value itself, so that it lives as long

    def to(self, device: torch.device) -> "Slices":
        """For what is handed on another device."""
        return Slices(self.columns.to(device), self.length)

    def named(self, arguments: dict[str, Any], untouched: Container[str]) -> dict[str, Any]:
        """Keyword arguments at the columns that are left, without those `untouched`."""
        known = self.known  # looked up here, for speed: all but the first layer find everything in it
        return {
            name: value if name in untouched else known[id(value)][1] if id(value) in known else self.of(value)
            for name, value in arguments.items()
        }

    def of(self, value: Any) -> Any:
        """The same at the columns that are left; what has no row per token is left alone."""
        if id(value) in self.known:
            return self.known[id(value)][1]
        if isinstance(value, Tensor):
            cut = self._cut(value)
        elif type(value) is tuple:
            cut = tuple([self.of(part) for part in value])
        elif type(value) is list:  # it, and a mapping, may change from layer to layer
            return [self.of(part) for part in value]
        elif value is not None and isinstance(value, Mapping):
            return {key: self.of(part) for key, part in value.items()}
        else:
            cut = value
        self.known[id(value)] = (value, cut)
        return cut

    def _cut(self, value: Tensor) -> Tensor:
        batch, shape = self.columns.shape[0], value.shape
        if value.ndim >= 2 and shape[1] == self.length and shape[0] in (1, batch):
            return self.take(value.expand(batch, *shape[1:]))
        positions = not value.is_floating_point() and not value.is_complex()  # of several parts each
        if positions and value.ndim == 3 and shape[2] == self.length and shape[1] in (1, batch):
            parts = value.expand(shape[0], batch, *shape[2:])
            return torch.stack([self.take(part) for part in parts])
        if value.ndim == 1 and shape[0] == self.length and batch == 1:
            return value[self.columns[0]]
        return value

    def take(self, value: Tensor) -> Tensor:
        """Values (batch, columns, ...) at the columns that are left."""
        return _gather(value, self.columns)


def _gather(value: Tensor, columns: Tensor) -> Tensor:
    if value.ndim == 2:
        return value.gather(1, columns)
    if value.ndim == 3:
        return selection.gather_rows(value, columns)
    return selection.gather_rows(value.flatten(2), columns).unflatten(2, value.shape[2:])

"""Layers that are compiled one by one, and stay so in copies of their model."""

from typing import Any

import torch
from torch import nn


class CompiledForward:
    """A layer's `forward`, compiled; a copy, or what is unpickled, compiles the copied layer's own.

    `torch.compile` alone makes a closure: a copied layer would go on running the original's weights, and can't be
    pickled.

    Args:
        layer: whose forward, as it is now.
        options: of `torch.compile`.
    """

    def __init__(self, layer: nn.Module, options: dict[str, Any]) -> None:
        self.layer, self.options = layer, options
        before = vars(layer).get("forward")  # put there by accelerate, for one; None: the class's
        self.replaced = before.replaced if isinstance(before, CompiledForward) else before
        self._compile()

    def _compile(self) -> None:
        forward = self.replaced or type(self.layer).forward.__get__(self.layer)
        self.run = torch.compile(forward, isolate_recompiles=True, **self.options)

    def __call__(self, *args, **kwargs):
        return self.run(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {"layer": self.layer, "options": self.options, "replaced": self.replaced}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._compile()

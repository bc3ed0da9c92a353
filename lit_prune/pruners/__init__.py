"""Pruning methods, one file each; `base.py` is the contract.

A config names a method by its class path, `lit_prune.pruners.<file>.<Class>`; there is no list of methods to extend.
"""

from lit_prune.pruners.base import (
    AttentionRows,
    Context,
    Dims,
    Full,
    Kept,
    Pruner,
    PruningMethod,
    VisionContext,
    VisionPruner,
)

__all__ = [
    "AttentionRows",
    "Context",
    "Dims",
    "Full",
    "Kept",
    "Pruner",
    "PruningMethod",
    "VisionContext",
    "VisionPruner",
]

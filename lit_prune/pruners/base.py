"""The contract of a pruning method, to import from: of the decoder, of the vision tower, and what both are given."""

from lit_prune.pruners.contexts import AttentionRows, Context, Dims, Kept, VisionContext
from lit_prune.pruners.full import UNPRUNED, Full
from lit_prune.pruners.method import Pruner, PruningMethod, Stage, init_args, spec
from lit_prune.pruners.tower import VisionPruner

__all__ = [
    "UNPRUNED",
    "AttentionRows",
    "Context",
    "Dims",
    "Full",
    "Kept",
    "Pruner",
    "PruningMethod",
    "Stage",
    "VisionContext",
    "VisionPruner",
    "init_args",
    "spec",
]

"""Public contract of pruning methods, in the decoder and in the vision tower, and the contexts they get."""

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

"""Sweeps without a server. One file serves `wandb sweep` with `wandb agent`, and `lit-prune sweep`."""

from lit_prune.training.sweeps.file import Sweep, read_sweep
from lit_prune.training.sweeps.study import open_study, outcome, search

__all__ = ["Sweep", "open_study", "outcome", "read_sweep", "search"]

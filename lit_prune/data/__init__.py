"""Instruction data: from JSON and image files to batches."""

from lit_prune.data.instruct import InstructData
from lit_prune.data.micro import MicroData

__all__ = ["InstructData", "MicroData"]

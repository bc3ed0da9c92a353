"""Instruction data: from files, tables and tar shards to batches."""

from lit_prune.data.instruct import InstructData
from lit_prune.data.micro import MicroData
from lit_prune.data.streamed import StreamedData

__all__ = ["InstructData", "MicroData", "StreamedData"]

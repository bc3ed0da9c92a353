"""Instruction data: from files, tables and tar shards to batches."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_prune.data.benchmark_data import BenchmarkData
    from lit_prune.data.instruct import InstructData
    from lit_prune.data.micro import MicroData
    from lit_prune.data.streamed import StreamedData

__all__ = ["BenchmarkData", "InstructData", "MicroData", "StreamedData"]


def __getattr__(name: str) -> Any:
    """Import the data modules, and Lightning, when they are asked for: images and shards do without."""
    modules = {"InstructData": "instruct", "MicroData": "micro", "StreamedData": "streamed"}
    modules["BenchmarkData"] = "benchmark_data"
    if name not in modules:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{modules[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

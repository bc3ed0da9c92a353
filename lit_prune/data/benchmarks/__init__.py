"""Public benchmarks in their official files, as downloaded: questions with references, and LLaVA-1.5's prompts.

One module a benchmark, with one `Benchmark`, named as `lit-prune score` names it.
"""

from importlib import import_module
from pathlib import Path

from lit_prune.data.benchmarks.base import Benchmark, Labels
from lit_prune.errors import LitPruneError

__all__ = ["Benchmark", "Labels", "benchmark", "names"]

BASE = "base"


def names() -> list[str]:
    """Names of all benchmarks."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in (BASE, "__init__"))


def benchmark(name: str) -> Benchmark:
    """Look a benchmark up by its name.

    Raises:
        LitPruneError: there is no benchmark of this name; with those that are there.
    """
    if name not in names():
        raise LitPruneError(f"no benchmark {name!r}; there are {', '.join(names())}")
    return import_module(f"{__name__}.{name}").BENCHMARK

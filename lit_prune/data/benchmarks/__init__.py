"""Public benchmarks in their official files, as downloaded: questions with references, and LLaVA-1.5's prompts.

One module a benchmark, with one `Benchmark`, named as `lit-prune score` names it.
"""

import inspect
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from lit_prune.data.benchmarks.base import Benchmark, Labels
from lit_prune.errors import LitPruneError

__all__ = ["Benchmark", "Labels", "benchmark", "names"]

BASE = "base"


def names() -> list[str]:
    """Names of all benchmarks."""
    return sorted(module.name for module in iter_modules(__path__) if module.name != BASE)


def benchmark(name: str, **options: Any) -> Benchmark:
    """Look a benchmark up by its name; `options` are those of its reader, such as `ocr` of textvqa.

    Raises:
        LitPruneError: there is no benchmark of this name, with those that are there; or its reader has no such option.
    """
    if name not in names():
        raise LitPruneError(f"no benchmark {name!r}; there are {', '.join(names())}")
    found = import_module(f"{__name__}.{name}").BENCHMARK
    known = inspect.signature(type(found)).parameters
    if wrong := [option for option in options if option not in known]:
        takes = f"it takes {', '.join(known)}" if known else "it takes none"
        raise LitPruneError(f"benchmark {name} has no option {wrong[0]!r}; {takes}")
    return type(found)(**options) if options else found

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from instruct_samples import make_processor
from source_samples import write_shapes
from tiny_benchmarks import WRITERS
from transformers import LlavaProcessor

from lit_prune.data import BenchmarkData
from lit_prune.pruners.divprune import DivPrune
from lit_prune.training.module import PruneModule


@pytest.fixture(scope="session")
def processor() -> LlavaProcessor:
    return make_processor()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`data.jsonl` with samples of all shapes, and its images."""
    write_shapes(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tables converted in tests go to a folder of their own, not to the user's cache."""
    cache = str(tmp_path_factory.mktemp("datasets"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "HF_DATASETS_CACHE", cache)  # read when `datasets` is imported
        if "datasets" in sys.modules:
            patch.setattr(sys.modules["datasets"].config, "HF_DATASETS_CACHE", cache)
        yield


@pytest.fixture(scope="session")
def official(tmp_path_factory) -> Path:
    """A folder of tiny copies of all benchmarks, by name."""
    root = tmp_path_factory.mktemp("official")
    for name, write in WRITERS.items():
        write(root / name)
    return root


@pytest.fixture(scope="module")
def pruned_micro() -> PruneModule:
    """The shipped micro-LLaVA, pruned without training."""
    return PruneModule("micro", DivPrune(), keep=48, max_new_tokens=4)


@pytest.fixture
def benchmarks(official) -> Callable[..., BenchmarkData]:
    """Makes data modules over the tiny copies."""

    def make(*args: Any, **options: Any) -> BenchmarkData:
        return BenchmarkData("micro", *args, **{"root": str(official), "eval_batch_size": 5, **options})

    return make

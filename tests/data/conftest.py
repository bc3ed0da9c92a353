import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from instruct_samples import make_processor
from source_samples import write_shapes
from transformers import LlavaProcessor


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

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

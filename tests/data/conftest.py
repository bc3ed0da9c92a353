import pytest
from instruct_samples import make_processor
from transformers import LlavaProcessor


@pytest.fixture(scope="session")
def processor() -> LlavaProcessor:
    return make_processor()

"""Models that several test modules share, and pruners that go when the test does."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
from torch import nn

from lit_prune.micro.model import build
from lit_prune.vlm import VLM


@pytest.fixture(scope="session")
def tiny_model() -> nn.Module:
    """The tiny random LLaVA; read-only."""
    return tiny.build_model()


@pytest.fixture(scope="session")
def tiny_eager() -> nn.Module:
    """The same weights with eager attention."""
    return tiny.build_model("eager")


@pytest.fixture
def pruned(tiny_model: nn.Module) -> Iterator[Callable[..., VLM]]:
    """Attaches a pruner, to the tiny model unless told otherwise, until the next one or the end of the test."""
    attached: list[VLM] = []

    def make(*args, model: nn.Module = tiny_model, **options) -> VLM:
        for vlm in attached:
            vlm.detach()
        attached.append(tiny.attach(model, *args, **options))
        return attached[-1]

    yield make
    for vlm in attached:
        vlm.detach()


@pytest.fixture(scope="session")
def micro_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained micro-LLaVA on disk, for `lit_prune.load`."""
    folder = tmp_path_factory.mktemp("base") / "micro"
    model, processor = build(seed=0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder

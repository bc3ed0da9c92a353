"""Models that several test modules share, and pruners that go when the test does."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import shapes  # noqa: F401  (before what it checks)
import tiny
import torch
from torch import nn
from transformers import CONFIG_MAPPING

from lit_prune.data import MicroData
from lit_prune.micro.model import build
from lit_prune.pruners.rcp import RCP
from lit_prune.repair import RepairAdapter
from lit_prune.training.module import PruneModule
from lit_prune.vlm import VLM

OUTSIDE = ("SLURM_", "MASTER_", "WANDB_", "LIT_PRUNE_")
OUTSIDE += ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "COLUMNS", "FORCE_COLOR", "NO_COLOR")


def pytest_configure() -> None:
    """The caller's environment changes no test: the job of a cluster, an account, a terminal's width and colours."""
    for name in [name for name in os.environ if name.startswith(OUTSIDE)]:
        del os.environ[name]
    os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}


# Files that start processes, train, or go through all methods come first, so that a parallel run ends with short ones.
LONGEST = (
    *("strategies", "add_method", "equality", "families", "resume", "trainer_options", "docs", "submissions"),
    *("jobs", "copies", "compare", "micro_recipe", "training", "family_runs", "batch_shapes", "replay"),
    *("signals", "shipped", "logging", "report", "pruners", "cost", "many_images", "any_record"),
    *("any_source", "any_option", "loading", "cli"),
)


# Model types that not every supported version of transformers has, with the parameters that stand for them in tests.
NEW_TYPES = {
    "molmo2": ("molmo2", "molmo2-8b", "allenai/Molmo2-8B"),
    "mistral_large4": ("mistral_large4",),
    "unlimited_ocr": ("unlimited_ocr",),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    absent = {name: kind for kind, names in NEW_TYPES.items() if kind not in CONFIG_MAPPING for name in names}
    for item in items:
        shown = getattr(item, "callspec", None)
        if shown is not None and shown.id in absent:
            item.add_marker(pytest.mark.skip(f"this version of transformers has no {absent[shown.id]}"))
    place = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """What a test, or a command that it runs, leaves in the environment goes with it, and so does a number of threads.

    Sums of two threads differ in their last bits from those of one, as in a process that a later test starts.
    """
    threads = torch.get_num_threads()
    with patch.dict(os.environ):
        yield
    torch.set_num_threads(threads)


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


@pytest.fixture(scope="session")
def world(micro_folder, tmp_path_factory):
    """Makes data modules over one small generated world: 12 questions to train on, 3 batches an epoch."""
    root = tmp_path_factory.mktemp("world")
    sizes = {"train_samples": 12, "val_samples": 6, "test_samples": 6, "questions_per_image": 3}

    def make(**options) -> MicroData:
        return MicroData(str(micro_folder), str(root), **sizes, **{"batch_size": 4, "eval_batch_size": 6, **options})

    return make


@pytest.fixture(scope="session")
def student(micro_folder):
    """Makes modules: RCP with repair, small, noisy and with dropout."""

    def make(select: str = "topk", queries: int = 4, **options) -> PruneModule:
        sizes = {"layers": [1, 5, 10], "stage_ratios": [15.0, 8.0, 2.0], "inner": 16, "dropout": 0.2}
        sizes["attention_score"] = "relative"
        rcp = RCP(select=select, queries=queries, bias=0.0, **sizes)
        repair = RepairAdapter([11, 14], [1, 2], bottleneck=8, condition=6, code=4)
        given = {"keep": 16, "lr": 3e-3, "weight_decay": 0.0, "max_new_tokens": 2, **options}
        return PruneModule(str(micro_folder), rcp, repair, **given)

    return make


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked gpu are skipped where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")

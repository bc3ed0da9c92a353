"""Data loaders whose workers ignore a job's signals, and with readable errors for dead workers."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from lit_prune.data.conversation import TOKEN_KEYS
from lit_prune.errors import LitPruneError


@contextmanager
def dead_workers_explained() -> Iterator[None]:
    """Convert torch's error about a dead worker, which may occur at any point of training, to one message.

    Raises:
        LitPruneError: a worker process of a data loader died.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise LitPruneError(
            f"a process that reads data died: {error} Most often memory ran out: lower data.num_workers or "
            "data.prefetch_factor, or ask for more memory; with data.num_workers=0 the cause shows itself"
        ) from error


class Loader(DataLoader):
    """torch's, with `dead_workers_explained` while it is waited for; `waited`: for how many seconds so far."""

    waited = 0.0

    def __iter__(self) -> Iterator[Any]:
        batches, since = super().__iter__(), time.perf_counter()
        with dead_workers_explained():
            for batch in batches:
                self.waited += time.perf_counter() - since
                yield batch
                since = time.perf_counter()


def make_loader(
    dataset: Dataset, collate: Callable, workers: int, prefetch: int | None, seed: int, **order: Any
) -> Loader:
    """Create a loader of index batches.

    Args:
        dataset: gives an index batch.
        collate: makes a batch of it.
        workers: processes that read.
        prefetch: batches that each reads ahead; None for torch's own number.
        seed: of what torch draws for its workers.
        order: arguments of the loader that say what a batch is made of.
    """
    if workers:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # otherwise tokenizers warn about every fork
    return Loader(
        dataset,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_outlive_first_signal,
        prefetch_factor=prefetch if workers else None,
        generator=torch.Generator().manual_seed(seed),  # don't draw from the global generator
        **{"persistent_workers": workers > 0, **order},
    )


def _outlive_first_signal(_: int) -> None:
    """Ignore a job's signals in workers, since the main process handles them; a second one ends the worker."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda number, _: signal.signal(number, signal.SIG_DFL))


def move_batch(batch: dict[str, Any], move: Callable[[Any], Any]) -> dict[str, Any]:
    """The batch with `move` applied to its tensors; the prompts' images are the inputs' own, moved once."""
    if "prompts" not in batch:
        return move(batch)
    tokens = {key: value for key, value in batch["prompts"].items() if key in TOKEN_KEYS}
    moved = move({**batch, "prompts": tokens})
    moved["prompts"] |= {key: moved["inputs"][key] for key in batch["prompts"] if key not in TOKEN_KEYS}
    return moved

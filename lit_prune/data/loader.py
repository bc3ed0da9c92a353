"""A data loader whose dead workers are reported in words."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader

from lit_prune.errors import LitPruneError


@contextmanager
def dead_workers_explained() -> Iterator[None]:
    """Turns torch's error about a worker that died, which may come at any moment of training, into one message.

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
    """torch's, with `dead_workers_explained` while it is waited for."""

    def __iter__(self) -> Iterator[Any]:
        with dead_workers_explained():
            yield from super().__iter__()

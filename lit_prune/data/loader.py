"""A data loader whose dead workers are reported in words."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from lit_prune.errors import LitPruneError


class Loader(DataLoader):
    """torch's, but a worker process that dies ends in one message.

    Raises:
        LitPruneError: while iterating, a worker that died.
    """

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from super().__iter__()
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise LitPruneError(
                f"a process that reads data died: {error}. Most often memory ran out: lower data.num_workers or "
                "data.prefetch_factor, or ask for more memory; with data.num_workers=0 the cause shows itself"
            ) from error

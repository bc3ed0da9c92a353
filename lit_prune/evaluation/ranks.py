"""The processes that share an evaluation, each with whole batches of it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from lit_prune.errors import LitPruneError

PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # variables that torchrun sets
PATIENCE = timedelta(days=1)  # that one process waits for the others' last batch


@dataclass(frozen=True)
class Ranks:
    """This process among those that share an evaluation: its number, how many there are, its number on this machine."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @classmethod
    @contextmanager
    def joined(cls) -> Iterator["Ranks"]:
        """The place that torchrun's variables name, in a process group inside the block; else a process alone."""
        if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", 1)) == 1:
            yield cls()
            return
        import torch
        import torch.distributed as dist

        rank, world, local = (int(os.environ.get(name, 0)) for name in PLACE[:3])
        if torch.cuda.is_available():
            if local >= torch.cuda.device_count():
                raise LitPruneError(f"process {rank} has no GPU: this machine has {torch.cuda.device_count()}")
            torch.cuda.set_device(local)
        mine = not dist.is_initialized()
        if mine:
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, timeout=PATIENCE)
        try:
            yield cls(rank, world, local)
        finally:
            if mine:
                dist.destroy_process_group()

    @property
    def writes(self) -> bool:
        """True for the one process that writes files."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes in their order; all must call it.

        Raises:
            LitPruneError: another process has ended.
        """
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.world
        try:
            dist.all_gather_object(found, value)
        except RuntimeError as error:
            raise LitPruneError("another process of this run has ended; its own message says why") from error
        return found

    def wait(self) -> None:
        """Until all processes are here."""
        self.gather(None)

"""Samplers of index batches: one for training that resumes exactly, one for evaluation that repeats nothing."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from lit_prune.errors import LitPruneError


class TrainBatches(Sampler[list[int]]):
    """Batches of a seeded permutation per epoch, split over ranks, which can begin anywhere in an epoch.

    The order depends on `seed`, the epoch and `size` only. A global batch is the next `batch_size * world` indices, of
    which rank r takes every `world`-th from the r-th; the last incomplete global batch is dropped.

    `epoch` and `consumed` (samples over all ranks) say where the next iterator begins; iterating moves neither, because
    batches that were only fetched ahead are not consumed. `batches` is how many batches of this epoch lie before
    `consumed`, so that `len` stays the length of the whole epoch, as Lightning counts it. `shift` is added to the epoch
    that Lightning sets: it counts an epoch that `max_steps` broke off as a whole one, the data goes on where it was.

    Raises:
        LitPruneError: fewer samples than one global batch.
    """

    def __init__(self, size: int, batch_size: int, seed: int = 0, rank: int = 0, world: int = 1):
        self.size, self.batch_size, self.seed, self.rank, self.world = size, batch_size, seed, rank, world
        self.global_batch = batch_size * world
        if size < self.global_batch:
            raise LitPruneError(f"{size} training samples do not fill one batch of {batch_size} on {world} processes")
        self.epoch = self.consumed = self.batches = self.shift = 0
        self.resumed = False

    @property
    def sampler(self) -> "TrainBatches":
        """Where Lightning looks for `set_epoch`."""
        return self

    def __len__(self) -> int:
        return self.batches + (self.size - self.consumed) // self.global_batch

    def __iter__(self) -> Iterator[list[int]]:
        return self._batches(self.epoch, self.consumed)  # fixed now: workers draw from it later

    def set_epoch(self, epoch: int) -> None:
        """Begin the epoch that Lightning calls `epoch`; the one that is under way already is left as it is."""
        epoch += self.shift
        if epoch != self.epoch:
            self.epoch, self.consumed, self.batches, self.resumed = epoch, 0, 0, False

    def state_dict(self, epoch: int, batches: int, shift: int | None = None) -> dict[str, int]:
        """The state after `batches` batches of `epoch` (as counted here, shift included) were trained on."""
        begun = (self.consumed, self.batches) if epoch == self.epoch else (0, 0)
        return {
            "seed": self.seed,
            "size": self.size,
            "epoch": epoch,
            "consumed": begun[0] + (batches - begun[1]) * self.global_batch,
            "batches": batches,
            "shift": self.shift if shift is None else shift,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a state, also one of another number of ranks or another batch size.

        Raises:
            LitPruneError: the state belongs to another seed or another number of samples.
        """
        for key in ("seed", "size"):
            if state[key] != getattr(self, key):
                raise LitPruneError(
                    f"cannot resume: the checkpoint's training data has {key} {state[key]}, "
                    f"the data given now {getattr(self, key)}"
                )
        self.epoch, self.consumed = state["epoch"], state["consumed"]
        self.batches, self.shift = state["batches"], state["shift"]
        self.resumed = True

    def _batches(self, epoch: int, consumed: int) -> Iterator[list[int]]:
        order = np.random.default_rng([self.seed, epoch]).permutation(self.size)
        for start in range(consumed, self.size - self.global_batch + 1, self.global_batch):
            yield order[start + self.rank : start + self.global_batch : self.world].tolist()


class RankShare(Sampler[int]):
    """The indices of one rank in order: every `world`-th. Ranks may differ by one; nothing is repeated."""

    def __init__(self, size: int, rank: int = 0, world: int = 1):
        self.size, self.rank, self.world = size, rank, world

    def __len__(self) -> int:
        return len(range(self.rank, self.size, self.world))

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, self.size, self.world))


class EvalBatches(Sampler[list[int]]):
    """Batches of a RankShare, equally many on every rank: one without samples left yields an empty last batch.

    No `BatchSampler`: for prediction Lightning makes those anew, around a sampler of its own.
    """

    def __init__(self, share: RankShare, batch_size: int):
        self.share, self.batch_size = share, batch_size

    def __len__(self) -> int:
        longest = -(-self.share.size // self.share.world)
        return -(-longest // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        indices = list(self.share)
        for batch in range(len(self)):
            yield indices[batch * self.batch_size : (batch + 1) * self.batch_size]

"""Batch samplers: for training, with exact resume, and for evaluation, without repeated samples."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch.utils.data import Sampler

from lit_prune.data.order import Order
from lit_prune.data.resume import refuse_other_data
from lit_prune.errors import LitPruneError


class TrainBatches(Sampler[list[int]]):
    """Batches of an epoch's order, split over ranks; an iterator can start anywhere in an epoch.

    A global batch is the next `batch_size * world` indices of `order`, of which rank r takes every `world`-th starting
    at the r-th; the last incomplete global batch is dropped. With `multiple`, complete ones are dropped too until an
    epoch's number of batches is a multiple of it: DeepSpeed steps after that many batches, regardless of epochs.

    `epoch` and `consumed` (samples over all ranks) are the start of the next iterator; iterating changes neither, since
    prefetched batches are not consumed. `batches` is the number of batches of this epoch before `consumed`, so that
    `len` stays the length of the whole epoch, as Lightning counts it. `shift` is added to Lightning's epoch: Lightning
    counts an epoch that `max_steps` interrupted as complete, while the data resumes inside it. `fingerprints` are those
    of the sources, see `fingerprint`. With `repeats` every epoch has the order of the first, for overfitting.

    Raises:
        LitPruneError: fewer samples than one global batch.
    """

    def __init__(
        self,
        order: Order,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        multiple: int = 1,
        fingerprints: Sequence[str] = (),
        repeats: bool = False,
    ):
        self.order, self.batch_size, self.rank, self.world, self.multiple = order, batch_size, rank, world, multiple
        self.fingerprints, self.repeats = list(fingerprints), repeats
        self.global_batch = batch_size * world
        if len(order) < self.global_batch * multiple:
            accumulated = f", accumulated {multiple} times," if multiple > 1 else ""
            raise LitPruneError(
                f"{len(order)} training samples do not fill one batch of {batch_size}{accumulated} on {world} processes"
            )
        self.epoch = self.consumed = self.batches = self.shift = 0
        self.resumed = False

    @property
    def sampler(self) -> "TrainBatches":
        """Object on which Lightning calls `set_epoch`."""
        return self

    def __len__(self) -> int:
        batches = self.batches + (len(self.order) - self.consumed) // self.global_batch
        return batches - batches % self.multiple

    def __iter__(self) -> Iterator[list[int]]:
        left = max(0, len(self) - self.batches)
        end = self.consumed + left * self.global_batch
        # The range is fixed now, since workers draw from it later.
        return self._batches(self.epoch, range(self.consumed, end, self.global_batch))

    def resize(self, batch_size: int) -> int:
        """Change the batch size from the next iterator on, at most to all samples; returns the new size.

        For Lightning's batch-size finder, which tries several before training begins.
        """
        if batch_size != self.batch_size:
            self.batch_size = max(1, min(batch_size, len(self.order) // (self.world * self.multiple)))
            self.global_batch = self.batch_size * self.world
            self.order = replace(self.order, group=self.global_batch)
        return self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Start Lightning's `epoch`; does nothing for the current one."""
        epoch += self.shift
        if epoch != self.epoch:
            self.epoch, self.consumed, self.batches, self.resumed = epoch, 0, 0, False

    def state_dict(self, epoch: int, batches: int, shift: int | None = None) -> dict[str, Any]:
        """State after training on `batches` batches of `epoch` (including the shift)."""
        begun = (self.consumed, self.batches) if epoch == self.epoch else (0, 0)
        return {
            **self._data(),
            "group": self.order.group,
            "epoch": epoch,
            "global_batch": self.global_batch,
            "consumed": begun[0] + (batches - begun[1]) * self.global_batch,
            "batches": batches,
            "shift": self.shift if shift is None else shift,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state, also of another number of ranks or another batch size.

        Samples grouped by length keep the checkpoint's group size, so that the current epoch doesn't change.

        Raises:
            LitPruneError: the state belongs to other data: another seed, other sources, records or weights.
        """
        refuse_other_data(state, self._data(), "training data")
        self.order = replace(self.order, group=state["group"])
        self.epoch, self.consumed = state["epoch"], state["consumed"]
        self.batches, self.shift = state["batches"], state["shift"]
        self.resumed = True

    def _data(self) -> dict[str, Any]:
        """Everything the order of samples depends on, except the epoch."""
        order = self.order
        return {
            "seed": order.seed,
            "sizes": list(order.sizes),
            "weights": None if order.weights is None else list(order.weights),
            "group_by_length": order.lengths is not None,
            "fingerprints": self.fingerprints,
        }

    def _batches(self, epoch: int, starts: range) -> Iterator[list[int]]:
        order = self.order.epoch(0 if self.repeats else epoch)
        for start in starts:
            yield order[start + self.rank : start + self.global_batch : self.world].tolist()


class RankShare(Sampler[int]):
    """Indices of one rank in order, every `world`-th. Ranks may differ by one; nothing is repeated.

    Args:
        size: number of samples, or the indices to read.
        rank: of this process.
        world: number of ranks.
    """

    def __init__(self, size: int | Sequence[int], rank: int = 0, world: int = 1):
        self.indices = range(size) if isinstance(size, int) else size
        self.size, self.rank, self.world = len(self.indices), rank, world

    def __len__(self) -> int:
        return len(range(self.rank, self.size, self.world))

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices[self.rank :: self.world])


class EvalBatches(Sampler[list[int]]):
    """Batches of a RankShare, equally many on every rank: a rank without samples left yields an empty last batch.

    Not a `BatchSampler`: in prediction Lightning recreates those around a sampler of its own. `turns` are the numbers
    of the batches to yield, by default all.
    """

    def __init__(self, share: RankShare, batch_size: int):
        self.share, self.batch_size, self.turns = share, batch_size, slice(None)

    def __len__(self) -> int:
        return len(self._numbers())

    def _numbers(self) -> range:
        longest = -(-self.share.size // self.share.world)
        return range(-(-longest // self.batch_size))[self.turns]

    def __iter__(self) -> Iterator[list[int]]:
        indices = list(self.share)
        for batch in self._numbers():
            yield indices[batch * self.batch_size : (batch + 1) * self.batch_size]

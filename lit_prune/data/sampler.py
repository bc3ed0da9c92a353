"""Samplers of index batches: one for training that resumes exactly, one for evaluation that repeats nothing."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch.utils.data import Sampler

from lit_prune.data.order import Order
from lit_prune.data.resume import refuse_other_data
from lit_prune.errors import LitPruneError


class TrainBatches(Sampler[list[int]]):
    """Batches of an order per epoch, split over ranks, which can begin anywhere in an epoch.

    A global batch is the next `batch_size * world` indices of `order`, of which rank r takes every `world`-th from the
    r-th; the last incomplete global batch is dropped. With `multiple`, so are whole ones, until an epoch's number of
    batches is a multiple of it: DeepSpeed steps after every so many batches, wherever an epoch ends.

    `epoch` and `consumed` (samples over all ranks) say where the next iterator begins; iterating moves neither, because
    batches that were only fetched ahead are not consumed. `batches` is how many batches of this epoch lie before
    `consumed`, so that `len` stays the length of the whole epoch, as Lightning counts it. `shift` is added to the epoch
    that Lightning sets: it counts an epoch that `max_steps` broke off as a whole one, the data goes on where it was.
    `fingerprints` are those of the sources, see `fingerprint`. With `repeats` every epoch has the order of the first,
    to overfit on a few batches.

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
        """Where Lightning looks for `set_epoch`."""
        return self

    def __len__(self) -> int:
        batches = self.batches + (len(self.order) - self.consumed) // self.global_batch
        return batches - batches % self.multiple

    def __iter__(self) -> Iterator[list[int]]:
        left = max(0, len(self) - self.batches)
        end = self.consumed + left * self.global_batch
        return self._batches(self.epoch, range(self.consumed, end, self.global_batch))  # fixed: workers draw later

    def resize(self, batch_size: int) -> int:
        """Make batches of another size from the next iterator on, at most one of all samples; returns that size.

        For a finder of batch sizes, which tries several before training begins.
        """
        if batch_size != self.batch_size:
            self.batch_size = max(1, min(batch_size, len(self.order) // (self.world * self.multiple)))
            self.global_batch = self.batch_size * self.world
            self.order = replace(self.order, group=self.global_batch)
        return self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Begin the epoch that Lightning calls `epoch`; the one that is under way already is left as it is."""
        epoch += self.shift
        if epoch != self.epoch:
            self.epoch, self.consumed, self.batches, self.resumed = epoch, 0, 0, False

    def state_dict(self, epoch: int, batches: int, shift: int | None = None) -> dict[str, Any]:
        """The state after `batches` batches of `epoch` (as counted here, shift included) were trained on."""
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
        """Continue from a state, also one of another number of ranks or another batch size.

        Samples grouped by length keep the checkpoint's group, so that the epoch under way stays what it was.

        Raises:
            LitPruneError: the state belongs to other data: another seed, other sources, records or weights.
        """
        refuse_other_data(state, self._data(), "training data")
        self.order = replace(self.order, group=state["group"])
        self.epoch, self.consumed = state["epoch"], state["consumed"]
        self.batches, self.shift = state["batches"], state["shift"]
        self.resumed = True

    def _data(self) -> dict[str, Any]:
        """What the order of samples depends on, beside the epoch."""
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
    """The indices of one rank in order: every `world`-th. Ranks may differ by one; nothing is repeated.

    Args:
        size: number of samples, or the indices of those that are to be read.
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

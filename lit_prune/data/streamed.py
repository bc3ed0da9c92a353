"""LightningDataModule whose training data are read as they come, for what is too large to keep or to index."""

import warnings
from typing import Any

from torch.utils.data import DataLoader

from lit_prune.data.instruct import InstructData
from lit_prune.data.progress import batches_since_step, resumes
from lit_prune.data.settings import check_numbers
from lit_prune.data.stream import Stream, streamed_location
from lit_prune.errors import LitPruneError


class StreamedData(InstructData):
    """Training data read file after file by `Stream`; validation, test and prediction as in `InstructData`.

    What is weaker than there: samples are shuffled within blocks of `block` rows and by files, not over all data; their
    order depends on the number of ranks and workers; an epoch is a number of steps. A run that is resumed with the same
    number of both goes on with the very next sample. With another number it begins the next pass over the data.

    Args:
        base: see `InstructData`.
        train: parquet or arrow files, or `hub:OWNER/NAME[/CONFIGURATION][:SPLIT]`; at least as many files as there are
            ranks times workers.
        steps: training batches of an epoch, on each process.
        block: rows that are shuffled together and held in memory by each worker, with their images' bytes.
        options: see there; `group_by_length` is for data that can be indexed.

    Raises:
        LitPruneError: see `Stream`.
    """

    def __init__(self, base: str, train: str | None = None, steps: int = 1000, block: int = 256, **options: Any):
        check_numbers(1, steps=steps, block=block)
        super().__init__(base, train, group_by_length=False, **options)
        if len(self.sources) > 1:
            raise LitPruneError(f"data.train: one location can be streamed, {len(self.sources)} are given")
        self.steps, self.block = steps, block
        self._stream: Stream | None = None

    def train_dataloader(self) -> DataLoader:
        """Workers are begun anew every epoch, so that they begin where training is."""
        warnings.filterwarnings("ignore", message="Your `IterableDataset` has `__len__` defined")  # it is the epoch's
        return self._loader("train", batch_size=None, persistent_workers=False)

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Notes where the stream is, and what `InstructData` does."""
        place = batch.pop("place", None)
        batch = super().on_before_batch_transfer(batch, dataloader_idx)
        if place:
            self._stream.take(place)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where training is in its data: behind the last optimizer step's batches."""
        if self._stream is None or self.trainer is None:
            return {}
        current = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return self._stream.state_dict(current.ready - current.processed + batches_since_step(self.trainer))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._stream is not None and resumes(self.trainer, state_dict):
            self._stream.load_state_dict(state_dict)

    def _check(self, split: str) -> None:
        if split == "train":
            streamed_location(self.sources[0].data)
        else:
            super()._check(split)

    def _setup_train(self) -> None:
        if self.trainer is not None and self.trainer.overfit_batches:
            raise LitPruneError(
                "overfit_batches needs the same batches in every epoch, which a stream does not give: use InstructData"
            )
        source = self.sources[0]
        rank, world = self._rank_and_world()
        self._stream = self.datasets["train"] = Stream(
            source.data,
            source.images,
            self._encoder("train"),
            source.name,
            self.batch_size,
            self.steps,
            seed=self.seed,
            block=self.block,
            workers=self.num_workers,
            rank=rank,
            world=world,
        )

"""Streamed training data: parquet or arrow files and hub data sets, read file after file."""

import logging
from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from lit_prune.data.dataset import MOST_REPLACEMENTS, InstructDataset, error_text
from lit_prune.data.resume import refuse_other_data
from lit_prune.data.samples import Fetched, Sample, Skipped
from lit_prune.data.sources import Source
from lit_prune.data.sources.locations import Location, locate
from lit_prune.data.sources.tables import Table, class_names, explained, library, load_arguments
from lit_prune.errors import BadSample, LitPruneError

KINDS = ("parquet", "arrow", "hub")
MOST_REWOUND = 1000
MOST_EMPTY = 20  # passes without a sample, for every file there is: a stream misses a file so often once in e**20 times
Place = tuple[int, int, int, int]  # pass, file of it, block of the file, rows taken of the block

log = logging.getLogger(__name__)


class Stream(IterableDataset):
    """Endless batches of samples read sequentially from a location, whose files are split over ranks and workers.

    There are `world * workers` streams, each in one worker. In every pass the files are shuffled and distributed over
    them; each reads its own files, `block` rows at a time, and shuffles the rows of a block. A stream that has finished
    its files starts the next pass independently of the others. So no sample repeats within a pass, but streams with
    smaller files reach the next one earlier. No rank waits for another: an epoch is `steps` batches on each, which may
    be less or more than a pass. A bad sample is replaced by the next one.

    `places` and `turn` are the start of the next iterator: after the batches passed to `take`. Resumed with the same
    files, ranks and workers, a stream continues exactly (it reads the current file from its start, but decodes nothing
    twice). With another number of ranks or workers the next pass starts, and the rest of the current one is dropped.

    Args:
        location: parquet or arrow files, or a hub data set; see `open_source`.
        images_root: see `open_source`.
        encode: creates the data set of a block's rows.
        name: name of the source, stored in its samples.
        batch_size: samples per batch, on each rank.
        steps: batches per epoch.
        seed: of all shuffling.
        block: rows that are shuffled together; they are held in memory with their images' bytes.
        workers: reader processes of this rank; 0: the rank's own process.
        rank: rank of this process.
        world: number of ranks.

    Raises:
        LitPruneError: the location can't be streamed, or has fewer files than streams, or no conversations.
    """

    def __init__(
        self,
        location: str,
        images_root: str | Path | None,
        encode: Callable[[Source], InstructDataset],
        name: str,
        batch_size: int,
        steps: int,
        seed: int = 0,
        block: int = 256,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
    ):
        found = streamed_location(location)
        self.location, self.encode, self.names = found, encode, [name]
        self.images_root = Path(images_root) if images_root is not None else found.folder
        self.batch_size, self.steps, self.seed, self.block = batch_size, steps, seed, block
        self.workers, self.rank, self.world = max(workers, 1), rank, world
        with explained(location):
            data = library().load_dataset(**load_arguments(found), streaming=True)
            self.data = data.with_format("arrow")  # blocks as they are stored
        streams = self.world * self.workers
        if self.data.num_shards < streams:
            raise LitPruneError(
                f"{location}: {self.data.num_shards} files cannot be dealt out to {world} processes with {self.workers}"
                " readers each; write more and smaller files, or lower data.num_workers"
            )
        self.places: list[Place] = [(0, 0, 0, 0)] * self.workers
        self.turn = 0
        self._states = deque([self._state()], maxlen=MOST_REWOUND + 1)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Fetched]:
        worker = get_worker_info()
        number = (self.turn + (worker.id if worker else 0)) % self.workers
        rows = self._samples(number, self.places[number])
        while True:
            yield self._batch(number, rows)

    # Position in the data

    def take(self, place: tuple[int, Place]) -> None:
        """Record that a batch is used for training; `place` is stored in the batch."""
        number, self.places[number] = place
        self.turn = (number + 1) % self.workers
        self._states.append(self._state())

    def state_dict(self, rewind: int = 0) -> dict[str, Any]:
        """Positions of all ranks. A collective: all ranks must call it.

        Args:
            rewind: number of last batches that were not trained on yet (at most 1,000).
        """
        mine = self._states[max(-1 - rewind, -len(self._states))]
        states = [mine]
        if self.world > 1:
            states = [None] * self.world
            torch.distributed.all_gather_object(states, mine)
        return {**self._data(), "streams": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state.

        Raises:
            LitPruneError: it belongs to other data or another seed.
        """
        refuse_other_data(state, self._data(), "stream")
        states = state["streams"]
        if (len(states), len(states[0]["places"])) == (self.world, self.workers):
            self.places = [tuple(place) for place in states[self.rank]["places"]]
            self.turn = states[self.rank]["turn"]
        else:
            following = 1 + max(place[0] for place in chain(*(rank["places"] for rank in states)))
            log.warning("another number of ranks or workers: what is left of this pass over the data is not read")
            self.places = [(following, 0, 0, 0)] * self.workers
        self._states.clear()
        self._states.append(self._state())

    def _state(self) -> dict[str, Any]:
        return {"places": [list(place) for place in self.places], "turn": self.turn}

    def _data(self) -> dict[str, Any]:
        sizes = [file.stat().st_size for file in self.location.files]  # a file of another size has other rows
        found = {"location": self.location.name, "files": self.data.num_shards, "bytes": sum(sizes)}
        return {**found, "seed": self.seed, "block": self.block}

    # Reading

    def _batch(self, number: int, samples: Iterator[tuple[Sample | Skipped, Place]]) -> Fetched:
        fetched, bad = Fetched([], []), 0
        try:
            for sample, place in samples:
                fetched.place = (number, place)
                if isinstance(sample, Skipped):
                    fetched.skipped.append(sample)
                    bad += 1
                    if bad == MOST_REPLACEMENTS:
                        raise LitPruneError(f"{bad} bad samples in a row; the last: {error_text(fetched.skipped[-1])}")
                    continue
                sample.source = self.names[0]
                fetched.samples.append(sample)
                bad = 0
                if len(fetched.samples) == self.batch_size:
                    break
        except LitPruneError as error:  # travels with the batch: raised in a worker it would arrive as a traceback
            fetched.failure = str(error)
        return fetched

    def _samples(self, number: int, place: Place) -> Iterator[tuple[Sample | Skipped, Place]]:
        """The samples of a stream from a place on, a bad one as `Skipped`, each with the place after it."""
        run, first, begun, taken = place
        passes = 0  # without a sample; files may be empty, and all of a pass's be so by chance
        while True:
            passes += 1
            for position, file in enumerate(self._files(number, run)[first:], first):
                for block, rows in self._blocks(file, begun):
                    passes = 0
                    data, start = self.encode(self._table(rows, file, block)), block * self.block
                    order = np.random.default_rng([self.seed, run, file, block]).permutation(len(rows))
                    for row in order[taken:].tolist():
                        taken += 1
                        yield _sample(data, start + row), (run, position, block, taken)
                    taken = 0
                begun = 0
            if passes > MOST_EMPTY * self.data.num_shards:
                raise LitPruneError(f"{self.location.name}: no samples in its files")
            run, first = run + 1, 0

    def _files(self, number: int, run: int) -> list[int]:
        """The files of a stream in a pass."""
        order = np.random.default_rng([self.seed, run]).permutation(self.data.num_shards)
        return order[self.rank * self.workers + number :: self.world * self.workers].tolist()

    def _blocks(self, file: int, first: int) -> Iterator[tuple[int, Any]]:
        """The blocks of a file from one on, as `pyarrow.Table`s with their numbers."""
        with explained(self._name(file)):
            blocks = self.data.shard(self.data.num_shards, file).iter(self.block)
            yield from islice(enumerate(blocks), first, None)

    def _table(self, rows: Any, file: int, block: int) -> Table:
        """The rows of a block under the indices that they have in their file."""
        start = block * self.block

        def row(index: int) -> Any:
            return rows.slice(index - start, 1)

        columns, classes = rows.column_names, class_names(self.data.features)
        return Table(row, start + len(rows), columns, self._name(file), self.images_root, classes=classes)

    def _name(self, file: int) -> str:
        return str(self.location.files[file]) if self.location.files else f"{self.location.name}, file {file}"


def streamed_location(location: str) -> Location:
    """The files of a location that can be streamed. Raises LitPruneError for another one, or without `datasets`."""
    found = locate(location)
    if found.kind not in KINDS:
        raise LitPruneError(f"{location}: only parquet, arrow and the hub are streamed; InstructData reads it")
    library()
    return found


def _sample(data: InstructDataset, row: int) -> Sample | Skipped:
    try:
        return data[row]
    except BadSample as error:
        return Skipped(*error.args, row)

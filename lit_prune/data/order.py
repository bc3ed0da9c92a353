"""Order of samples in an epoch over one or several sources, a pure function of seed and epoch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lit_prune.errors import LitPruneError

LARGEST_WEIGHT = 1e12  # keeps sums and products finite
WINDOW = 50  # groups sorted by length together, as many as in transformers' sampler [ours]


@dataclass(frozen=True, eq=False)
class Order:
    """Indices into the concatenated sources, in the order of an epoch.

    An epoch has as many samples as all sources together. Source `i` contributes the share `weights[i]` over the sum of
    all weights, rounded to whole samples by largest remainder, in passes: no sample of a source repeats before all
    others of it have been used, then the source is shuffled again; a pass continues across epochs. The sequence of
    sources is shuffled too. Without weights every sample is used once per epoch.

    With `lengths`, samples of similar length are grouped, `group` at a time: in every 50 groups the samples are sorted
    by length and the groups shuffled. An epoch holds the same samples as without.

    Args:
        sizes: number of samples of each source.
        weights: weights of the sources, or None for their sizes.
        seed: of all shuffling.
        lengths: of every sample, in the order of the indices.
        group: size of a group: the global batch.

    Raises:
        LitPruneError: a weight is no positive number, or gives less than one sample per epoch.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...] | None = None
    seed: int = 0
    lengths: np.ndarray | None = None
    group: int = 1

    def __post_init__(self) -> None:
        if self.weights is not None:
            wrong = [weight for weight in self.weights if not 0 < weight < LARGEST_WEIGHT]  # nan too
            if wrong or len(self.weights) != len(self.sizes):
                raise LitPruneError(f"data.train: weights must be positive numbers, one a source: {self.weights}")
        if not all(self.counts):
            raise LitPruneError(
                f"data.train: the weights {self.weights} give source {self.counts.index(0)} less than one sample in an "
                f"epoch of {len(self)}"
            )

    def __len__(self) -> int:
        return sum(self.sizes)

    @property
    def counts(self) -> list[int]:
        """Number of samples of each source in an epoch."""
        return list(self.sizes) if self.weights is None else apportion(len(self), self.weights)

    def epoch(self, epoch: int) -> np.ndarray:
        """Indices of an epoch (samples,), 8 bytes each; the same on every machine."""
        offsets = np.cumsum([0, *self.sizes[:-1]])
        streams = [offset + self._stream(i, epoch) for i, offset in enumerate(offsets)]
        if len(streams) == 1:
            order = streams[0]
        else:
            turns = np.repeat(np.arange(len(streams), dtype=np.int16), self.counts)
            np.random.default_rng([self.seed, epoch, len(streams)]).shuffle(turns)
            order = np.empty(len(turns), dtype=np.int64)
            for i, stream in enumerate(streams):
                order[turns == i] = stream
        return order if self.lengths is None else self._grouped(order, epoch)

    def _stream(self, source: int, epoch: int) -> np.ndarray:
        """Indices of a source in an epoch: a slice of its endless sequence of passes."""
        size, count = self.sizes[source], self.counts[source]
        at, end, pieces = epoch * count, (epoch + 1) * count, []
        while at < end:
            turn, start = divmod(at, size)
            stop = min(size, start + end - at)
            # numpy ignores a trailing 0: the first source has the same order as in a run without others
            pieces.append(np.random.default_rng([self.seed, turn, source]).permutation(size)[start:stop])
            at += stop - start
        return np.concatenate(pieces)

    def _grouped(self, order: np.ndarray, epoch: int) -> np.ndarray:
        draw = np.random.default_rng([self.seed, epoch, len(self.sizes) + 1])
        whole = len(order) // self.group * self.group
        for start in range(0, whole, WINDOW * self.group):
            window = order[start : min(start + WINDOW * self.group, whole)]
            by_length = window[np.argsort(self.lengths[window], kind="stable")].reshape(-1, self.group)
            order[start : start + len(window)] = draw.permutation(by_length).reshape(-1)
        return order


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Split `total` into whole numbers in proportion to the weights, by largest remainder (ties to the first)."""
    exact = [total * weight / math.fsum(weights) for weight in weights]
    counts = [math.floor(value) for value in exact]
    largest = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in largest[: total - sum(counts)]:
        counts[i] += 1
    return counts

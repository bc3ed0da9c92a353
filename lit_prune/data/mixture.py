"""Several sources of training samples as one data set."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import PurePath

from torch.utils.data import Dataset

from lit_prune.data.dataset import InstructDataset
from lit_prune.data.samples import Fetched
from lit_prune.errors import LitPruneError


@dataclass
class WeightedSource:
    """One source of a mixture.

    Args:
        data: where it is; see `open_source`.
        images: its image root; by default that of the data module.
        weight: its share of the samples is this over the sum of all weights. Give it for all sources or for none: then
            every sample comes once an epoch.
        name: what it is called in what is logged; by default the file's name without its suffix.
    """

    data: str
    images: str | None = None
    weight: float | None = None
    name: str | None = None


def as_sources(
    train: str | dict | WeightedSource | Sequence[str | dict | WeightedSource], images: str | None
) -> list[WeightedSource]:
    """Normalise `data.train` to sources with names and image roots; duplicate names get a number.

    Raises:
        LitPruneError: no source, an unknown key, a name given twice, or weights for some sources only.
    """
    given = [train] if isinstance(train, str | dict | WeightedSource) else list(train)
    sources = [_as_source(item) for item in given]
    if not sources:
        raise LitPruneError("data.train: an empty list of sources")
    bare = [source.data for source in sources if source.weight is None]
    if 0 < len(bare) < len(sources):
        raise LitPruneError(f"data.train: some sources have a weight, {bare[0]} has none; give it to all or to none")
    named: dict[str, WeightedSource] = {}
    for source in sources:
        name = source.name or PurePath(source.data).stem
        if source.name in named:
            raise LitPruneError(f"data.train: two sources named {name}")
        number = 2
        while name in named:
            name, number = f"{PurePath(source.data).stem}-{number}", number + 1
        named[name] = WeightedSource(source.data, source.images or images, source.weight, name)
    return list(named.values())


def _as_source(item: str | dict | WeightedSource) -> WeightedSource:
    if isinstance(item, str):
        return WeightedSource(item)
    if isinstance(item, WeightedSource):
        return item
    wrong = f"data.train: {item} is no source: it has data, images and name (text) and weight (a number) only"
    try:
        source = WeightedSource(**item)
    except TypeError as error:
        raise LitPruneError(wrong) from error
    if not isinstance(source.data, str) or not isinstance(source.weight, int | float | None):
        raise LitPruneError(wrong)
    return source


class Mixture(Dataset):
    """Concatenation of several data sets; a bad sample is replaced within its own data set. Can be pickled.

    Args:
        parts: the data sets.
        names: their names, stored in every fetched sample.
    """

    def __init__(self, parts: Sequence[InstructDataset], names: Sequence[str]):
        self.parts, self.names = list(parts), list(names)
        self.sizes = tuple(len(part) for part in self.parts)
        self.starts = [0, *accumulate(self.sizes)][:-1]

    def __len__(self) -> int:
        return sum(self.sizes)

    def place(self, index: int) -> tuple[int, int]:
        """Data set of an index, and the index within it."""
        part = bisect_right(self.starts, index) - 1
        return part, index - self.starts[part]

    def __getitems__(self, indices: list[int]) -> Fetched:
        """Fetch the samples of an index batch; called by the data loader in place of `__getitem__`."""
        fetched = Fetched([], [])
        for part, index in map(self.place, indices):
            found = self.parts[part].__getitems__([index])
            for sample in found.samples:
                sample.source = self.names[part]
            fetched.samples += found.samples
            fetched.skipped += found.skipped
            fetched.replaced += found.replaced
            fetched.failure = fetched.failure or found.failure
        return fetched

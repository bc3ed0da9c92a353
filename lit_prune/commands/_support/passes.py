"""Passes of a comparison over the data of one split. No verb itself."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from itertools import islice
from typing import Any

from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lit_prune.commands._support import console
from lit_prune.commands._support.sample_images import SampleImages
from lit_prune.commands.trainer import PruneCLI
from lit_prune.data.sampler import EvalBatches
from lit_prune.errors import LitPruneError
from lit_prune.evaluation.cells import FULL, Cell, digest_of, prepare
from lit_prune.evaluation.comparison import Comparison
from lit_prune.evaluation.groups import BLANK, DOWNSAMPLED, Groups, views
from lit_prune.evaluation.ranks import Ranks
from lit_prune.evaluation.rows import Row, row
from lit_prune.evaluation.store import Store
from lit_prune.host.parts import find

STAGES = {"val": "validate", "test": "test"}


def load_data(made: PruneCLI, split: str, limit: int | None, ranks: Ranks) -> dict[str, Any]:
    """Set the data of a split up, cut to `limit`; returns what a result depends on, the split by its file."""
    from torch.utils.data import Subset

    data = made.datamodule
    if ranks.writes:
        data.prepare_data()
    ranks.wait()
    data.bad_samples.rank = ranks.rank
    data.setup(STAGES[split])
    whole = data.datasets[split]
    file = digest_of(whole.source.files)
    if limit is not None:
        data.datasets[split] = Subset(whole, range(min(limit, len(whole))))
    given = json.loads(json.dumps(made.config["data"].as_dict(), default=str))
    size = len(data.datasets[split])
    return {"data": given, "file": file, "samples": size, "max_new_tokens": made.model.max_new_tokens}


def source_of(data: Any, split: str) -> Any:
    """The source of a split's records, whether the split was cut or not."""
    whole = data.datasets[split]
    return getattr(whole, "dataset", whole).source


@contextmanager
def seen_as(data: Any, split: str, view: Callable[[Image.Image], Image.Image]) -> Iterator[None]:
    """Inside, each image of a split is changed by `view`."""
    from torch.utils.data import Subset

    whole = data.datasets[split]
    cut = isinstance(whole, Subset)
    changed = copy(whole.dataset if cut else whole)
    changed.view = view
    data.datasets[split] = Subset(changed, whole.indices) if cut else changed
    try:
        yield
    finally:
        data.datasets[split] = whole


def run_pass(comparison: Comparison, data: Any, split: str, title: str, ranks: Ranks) -> None:
    """Run this process's share of one pass over the data, and take in the others'.

    Without a terminal the bars only appear at the end, so print the title first.
    """
    cells = len(comparison.tallies) - 1
    title = f"{title}: {cells} cells" if cells else title
    if not console.err.is_terminal and ranks.writes:
        console.say(title)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    loader = data.val_dataloader() if split == "val" else data.test_dataloader()
    batches, share = _shared(loader, len(data.datasets[split]), ranks)
    with Progress(*columns, console=console.err, disable=not ranks.writes) as progress:
        samples = progress.add_task(f"{title}, samples", total=share)
        bar = progress.add_task("  this batch, cells", total=cells + 1)
        for batch in batches:
            batch = data.on_before_batch_transfer(batch, 0)
            batch = data.transfer_batch_to_device(batch, comparison.vlm.model.device, 0)
            progress.reset(bar)
            comparison.update(batch, lambda: progress.advance(bar))
            progress.advance(samples, len(batch["ids"]))
    comparison.gather(ranks)


def _shared(loader: Any, total: int, ranks: Ranks) -> tuple[Iterator[dict[str, Any]], int]:
    """Every `world`-th batch, and how many of all samples that is.

    Batches stay as one process has them, so that each sample meets the same padding.
    """
    turns = slice(ranks.rank, None, ranks.world)
    batches = getattr(loader, "batch_sampler", None)
    if not isinstance(batches, EvalBatches):
        return islice(loader, turns.start, None, turns.step), total // ranks.world
    batches.turns = turns
    return iter(loader), sum(map(len, batches))


class Work:
    """Measure cells on one split; `results` holds those so far, by the cell's key.

    Args:
        made: model and data, after `setup`.
        split: of the data.
        store: store of the results.
        images: gives the digests of the samples' images.
        ranks: the processes that share each pass; one of them writes.
    """

    def __init__(self, made: PruneCLI, split: str, store: Store, images: SampleImages, ranks: Ranks) -> None:
        self.vlm, self.data, self.max_new_tokens = made.model.vlm, made.datamodule, made.model.max_new_tokens
        self.split, self.store, self.images, self.ranks = split, store, images, ranks
        self.full, self.results = Cell(FULL), {}

    def recall(self, cells: Sequence[Cell]) -> None:
        """Read results measured earlier."""
        self.results = {cell.key: found for cell in cells if (found := self.store.read(cell))}
        if not self.ranks.writes:
            return
        if self.results:
            console.say(f"{len(self.results)} cells were measured before")
        if self.store.other_code:
            console.say(
                f"note: {self.store.other_code} of them by other code of this package; --fresh measures them again"
            )
        if others := self.store.others(cells):
            console.say(
                f"note: {others} files in {self.store.folder} are of other methods, weights or data, and are left alone"
            )

    def measure(self, cells: Sequence[Cell], keeps: Sequence[int | str], done: Callable[[], None]) -> None:
        """Measure the remaining cells, one pass per budget; `done` is called after each."""
        visual = find(self.vlm.model).dims.visual
        passes = [keep for keep in keeps if self._pending(cells, keep)]
        for number, keep in enumerate(passes or ([] if self.full.key in self.results else [None])):
            title = f"{self.split}, {keep or visual} tokens ({number + 1} of {max(1, len(passes))})"
            self._pass(self.full, self._pending(cells, keep), title)
            done()

    def _pass(self, full: Cell, cells: Sequence[Cell], title: str) -> None:
        scorer = getattr(self.data, "scorer", None)
        comparison = Comparison(self.vlm, full, cells, self.max_new_tokens, scorer)
        run_pass(comparison, self.data, self.split, title, self.ranks)
        if not (measured := comparison.results()):
            raise LitPruneError(f"the {self.split} set gave no usable sample")
        samples = comparison.samples()
        for cell, result in measured:
            if self.ranks.writes:
                lines = [{**each.as_json(), "image": self.images.digest(each.record)} for each in samples[cell.key]]
                self.store.write(cell, result, lines)
            self.results[cell.key] = json.loads(json.dumps(result))
        self.ranks.wait()  # the others read what was written

    def _pending(self, cells: Sequence[Cell], keep: int | str | None) -> list[Cell]:
        """Cells left to measure at a budget, without duplicates."""
        here = (cell for cell in cells if cell.keep == keep and cell.key != self.full.key)
        left = {cell.key: cell for cell in here if not cell.reason and cell.key not in self.results}
        return list(left.values())

    def views(self, factor: int | None, setting: dict[str, Any]) -> dict[str, Cell]:
        """Cells of the full model on each changed view of the images; none without a factor."""
        names = {} if factor is None else {BLANK: "a blank image", DOWNSAMPLED: f"sides / {factor}"}
        cells = {view: Cell(f"{FULL}, {name}") for view, name in names.items()}
        for view, cell in cells.items():
            prepare([cell], self.vlm, {**setting, "view": names[view]})
        return cells

    def divide(self, factor: int | None, cells: dict[str, Cell]) -> Groups | None:
        """The groups of questions, by the answers of the plain model to each view, measured unless they are known."""
        if factor is None:
            return None
        right = {}
        for view, cell in cells.items():
            if cell.key not in self.results or not self.store.read_samples(cell):
                with seen_as(self.data, self.split, views(factor)[view]):
                    self._pass(cell, [], f"{self.split}, {cell.method}")
            right[view] = {each["record"]: each["right"] for each in self.store.read_samples(cell)}
        return Groups.divide(factor, right)

    def rows(self, cells: Sequence[Cell], divided: Groups | None) -> list[Row]:
        """The cells as `results.json` has them, so far."""
        return [
            row(cell, self.results.get(cell.key), self.results[self.full.key], self.split, self._figures(cell, divided))
            for cell in cells
        ]

    def _figures(self, cell: Cell, divided: Groups | None) -> dict[str, Row] | None:
        samples = [] if divided is None or cell.key not in self.results else self.store.read_samples(cell)
        return divided.figures(samples) if samples else None

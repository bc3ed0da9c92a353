"""Passes of a comparison over the data of one split. No verb itself."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lit_prune.commands._support import console
from lit_prune.commands._support.sample_images import SampleImages
from lit_prune.commands.trainer import PruneCLI
from lit_prune.errors import LitPruneError
from lit_prune.evaluation.cells import FULL, Cell, digest_of, prepare
from lit_prune.evaluation.comparison import Comparison
from lit_prune.evaluation.groups import BLANK, DOWNSAMPLED, Groups, views
from lit_prune.evaluation.rows import Row, row
from lit_prune.evaluation.store import Store
from lit_prune.host.parts import find

STAGES = {"val": "validate", "test": "test"}


def load_data(made: PruneCLI, split: str, limit: int | None) -> dict[str, Any]:
    """Set the data of a split up, cut to `limit`; returns what a result depends on, the split by its file."""
    from torch.utils.data import Subset

    data = made.datamodule
    data.prepare_data()
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
    data.datasets[split] = Subset(whole.dataset.seen_as(view), whole.indices) if cut else whole.seen_as(view)
    try:
        yield
    finally:
        data.datasets[split] = whole


def run_pass(comparison: Comparison, data: Any, split: str, title: str) -> None:
    """One pass over the data; where there is no terminal, its bars come at its end, so its title comes first."""
    cells = len(comparison.tallies) - 1
    title = f"{title}: {cells} cells" if cells else title
    if not console.err.is_terminal:
        console.say(title)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    total, loader = len(data.datasets[split]), data.val_dataloader() if split == "val" else data.test_dataloader()
    with Progress(*columns, console=console.err) as progress:
        samples = progress.add_task(f"{title}, samples", total=total)
        bar = progress.add_task("  this batch, cells", total=cells + 1)
        for batch in loader:
            batch = data.on_before_batch_transfer(batch, 0)
            batch = data.transfer_batch_to_device(batch, comparison.vlm.model.device, 0)
            progress.reset(bar)
            comparison.update(batch, lambda: progress.advance(bar))
            progress.advance(samples, len(batch["ids"]))


class Work:
    """What is measured on one split, and the results so far by the cell's key.

    Args:
        made: model and data, the data set up.
        split: of the data.
        store: where results are kept.
        images: names the samples' images.
    """

    def __init__(self, made: PruneCLI, split: str, store: Store, images: SampleImages) -> None:
        self.vlm, self.data, self.max_new_tokens = made.model.vlm, made.datamodule, made.model.max_new_tokens
        self.split, self.store, self.images = split, store, images
        self.full, self.results = Cell(FULL), {}

    def recall(self, cells: Sequence[Cell]) -> None:
        """Take over what was measured before."""
        self.results = {cell.key: found for cell in cells if (found := self.store.read(cell))}
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
        """Measure what is left, a pass for each budget; `done` is called after each."""
        visual = find(self.vlm.model).dims.visual
        passes = [keep for keep in keeps if self._pending(cells, keep)]
        for number, keep in enumerate(passes or ([] if self.full.key in self.results else [None])):
            title = f"{self.split}, {keep or visual} tokens ({number + 1} of {max(1, len(passes))})"
            self._pass(self.full, self._pending(cells, keep), title)
            done()

    def _pass(self, full: Cell, cells: Sequence[Cell], title: str) -> None:
        scorer = getattr(self.data, "scorer", None)
        comparison = Comparison(self.vlm, full, cells, self.max_new_tokens, scorer)
        run_pass(comparison, self.data, self.split, title)
        if not (measured := comparison.results()):
            raise LitPruneError(f"the {self.split} set gave no usable sample")
        samples = comparison.samples()
        for cell, result in measured:
            lines = [{**each.as_json(), "image": self.images.digest(each.record)} for each in samples[cell.key]]
            self.store.write(cell, result, lines)
            self.results[cell.key] = json.loads(json.dumps(result))

    def _pending(self, cells: Sequence[Cell], keep: int | str | None) -> list[Cell]:
        """What is left to measure at a budget; a cell that was asked for twice is measured once."""
        here = (cell for cell in cells if cell.keep == keep and cell.key != self.full.key)
        left = {cell.key: cell for cell in here if not cell.reason and cell.key not in self.results}
        return list(left.values())

    def views(self, factor: int | None, setting: dict[str, Any]) -> dict[str, Cell]:
        """A cell for each view of the images that the full model answers from; none without a factor."""
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

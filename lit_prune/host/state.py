"""What travels with one forward, by keyword from hook to hook. Nothing here is ever stored on a module."""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lit_prune.cost.trace import StageTrace
from lit_prune.host.attention import Tap
from lit_prune.host.cache import CacheState
from lit_prune.host.counting import Counter
from lit_prune.host.kinds import Kind
from lit_prune.host.lengths import Lengths
from lit_prune.host.masks import Span
from lit_prune.host.session import Record, Session
from lit_prune.host.slicing import Slices
from lit_prune.ops import selection
from lit_prune.pruners.base import Kept
from lit_prune.repair import Essence

FORWARD = "lit_prune_forward"  # keyword under which a Forward travels to layers and their hooks


@dataclass(frozen=True)
class Selected:
    """The decision of one stage about the visual columns at its layer's input.

    `columns`: where they stand among those present; `real`: no filler; `alive`: not pruned by an earlier stage. `dead`
    marks, among all columns, what the vision tower dropped and arrives here. `exact`: how many stay of each sample,
    where the method says so without a look at the device.
    """

    columns: Int[Tensor, "batch visual"]
    real: Bool[Tensor, "batch visual"]
    alive: Bool[Tensor, "batch visual"]
    kept: Kept
    dead: Bool[Tensor, "batch columns"] | None = None
    exact: list[int] | None = None

    def dropped(self, like: Bool[Tensor, "batch columns"]) -> Bool[Tensor, "batch columns"]:
        """Columns that the method drops, among all columns present."""
        return torch.zeros_like(like).scatter(1, self.columns, self.alive & ~self.kept.mask)


@dataclass
class Forward:
    """One language-model forward as the hooks see it; flags are (batch, columns now), packed along with the states."""

    session: Session
    columns: Tensor  # original column of each present one
    valid: Tensor
    visual: Tensor
    text: Tensor
    answer_mask: Tensor
    ordinal: Tensor
    seed: Tensor
    total: Tensor
    pictured: Tensor
    length: int
    image: Tensor | None = None  # number of the image of each column, where some sample has several
    sizes: Tensor | None = None  # (batch, images) visual tokens of each image at the start
    record: Record | None = None
    counts: dict[int, list[int]] = field(default_factory=dict)  # {pruning layer: kept per sample}; empty: no stages
    counter: Counter | None = None  # of a tower's FLOPs, while that runs
    reached: bool = False  # it has come down to the decoder's layers
    grid: int = 0  # visual tokens of the sample that has most, at the start
    lengths: Lengths | None = None  # None: only the device knows
    most_answers: int | None = None
    all_answers: int | None = None  # positions of all samples
    most_text: int | None = None
    cache_state: CacheState | None = None
    embeds: Tensor | None = None
    start: Tensor | None = None  # padding to the left of each sample; None: there is none
    rope: tuple[Tensor, Tensor] | None = None  # where tokens are numbered anew
    slices: Slices | None = None  # cuts what layers are handed, once columns have left
    key_slices: Slices | None = None  # cuts what has a row per key, cached ones included
    span: Span | None = None  # keys of the layers from the last stage on; None: as the decoder thinks
    masks: dict[Kind, Any] = field(default_factory=dict)  # those of this span, by kind of layer
    positions: Tensor | None = None  # where tokens are numbered anew: position ids, less those that left in front
    removed: Tensor | None = None  # and how many have left of each sample
    key_bias: Tensor | None = None
    past_bias: Tensor | None = None  # that of the cached keys
    token_sizes: Tensor | None = None  # with proportional attention: tokens that each column stands for
    gone: Tensor | None = None  # soft mode: visual columns pruned so far
    watched: Tap | None = None  # of the layer that runs now
    taps: dict[int, Tap] = field(default_factory=dict)  # by the stage that reads it
    essence: dict[int, Essence] = field(default_factory=dict)
    cumulative: Tensor | None = None  # (batch, N) gate on the image's grid

    def on_grid(self, values: Tensor, columns: Tensor, real: Tensor, fill: float) -> Tensor:
        """Values of visual columns on the image's grid of N tokens, `fill` elsewhere."""
        width = self.grid
        place = self.ordinal.gather(1, columns).masked_fill(~real, width)
        grid = torch.full((values.shape[0], width + 1), fill, dtype=values.dtype, device=values.device)
        return grid.scatter(1, place, values)[:, :width]

    def images(self, columns: Tensor, real: Tensor) -> selection.Images | None:
        """The images of some visual columns, where some sample has several."""
        if self.image is None:
            return None
        return selection.Images(self.image.gather(1, columns) * real, self.sizes)

    @property
    def alive(self) -> Tensor:
        """Visual columns that no stage has pruned."""
        return self.visual & self.valid if self.gone is None else self.visual & self.valid & ~self.gone

    @property
    def most_visual(self) -> int | None:
        """Visual columns of the sample that has most now, if known."""
        return None if self.lengths is None else max(self.lengths.visual)

    @property
    def padded(self) -> bool | None:
        """Whether there is padding or filler among the columns, if known."""
        return None if self.lengths is None else min(self.lengths.valid) < self.columns.shape[1]

    def at_answers(self, values: Tensor) -> Tensor:
        """Values (batch, columns, ...) of the positions that predict answer tokens, row by row over the batch."""
        if self.all_answers is None:
            return values[self.answer_mask]
        rows = (~self.answer_mask).flatten().to(torch.uint8).argsort(stable=True)[: self.all_answers]
        return values.flatten(0, 1).index_select(0, rows)

    def shorten(self, dropped: Tensor, exact: list[int] | None) -> bool:
        """Whether a stage drops anything; `exact` counts say it without a look at the device."""
        if exact is None:
            there = bool(dropped.any())
            self.lengths = None if there else self.lengths
            return there
        if self.lengths is None:
            return bool(dropped.any())
        return self.lengths.drop(exact)

    def move_up(self, leaving: Tensor) -> None:
        """Number the columns behind `leaving` ones anew, if this forward does so."""
        if self.positions is not None:
            self.positions = (self.positions - leaving.long().cumsum(1)).clamp(min=0)  # padding may go below
            left = leaving.sum(1)
            self.removed = left if self.removed is None else self.removed + left

    def pack(self, dropped: Tensor) -> Tensor:
        """Leave out the `dropped` columns and all padding; returns the columns that stay, for the states."""
        columns, real = selection.pack(self.valid & ~dropped, None if self.lengths is None else max(self.lengths.valid))
        for name in ("visual", "text", "answer_mask"):
            setattr(self, name, getattr(self, name).gather(1, columns) & real)
        self.columns = self.columns.gather(1, columns)
        self.ordinal = self.ordinal.gather(1, columns)
        self.valid = real
        for name in ("key_bias", "token_sizes", "gone", "image", "positions"):
            flags = getattr(self, name)
            setattr(self, name, None if flags is None else flags.gather(1, columns))
        if self.embeds is not None:
            self.embeds = selection.gather_rows(self.embeds, columns)
        self.slices = Slices(self.columns, self.length)
        return columns

    def enter_span(self, span: Span) -> None:
        """Layers from here on attend to these keys."""
        self.span, self.masks = span, {}

    def trace_layer(self, hidden: Tensor | None) -> None:
        """Note the lengths at a layer's input, and what it will compute; nothing without `hidden`: it idles."""
        if self.record is None:
            return
        trace, present = self.record.trace, self._present()
        trace.queries.append(present)
        trace.keys.append(present)
        trace.visual.append(self.alive.sum(1))
        trace.ran.append(torch.zeros_like(present) if hidden is None else self.valid.sum(1))
        learning = (part for part in (hidden, self.key_bias) if hidden is not None and part is not None)
        trace.learns.append(any(part.requires_grad for part in learning))

    def trace_stage(
        self, layer: int, reads: str | None, rows: Tensor, kept: Tensor, keys: bool, proportional: bool, whole: bool
    ) -> None:
        """Note what a stage looked at; `reads` names the layer whose attention rows it used, if any."""
        if self.record is not None:
            stage = StageTrace(layer, reads, rows, self._present(), self.alive.sum(1), kept, keys, proportional, whole)
            self.record.trace.stages.append(stage)

    def _present(self) -> Tensor:
        """Real tokens per sample that no stage has pruned, text included."""
        pruned = 0 if self.gone is None else (self.visual & self.gone).sum(1)
        return self.valid.sum(1) - pruned

"""State of one forward, passed by keyword from hook to hook. Nothing here is ever stored on a module."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lit_prune.cost.trace import StageTrace
from lit_prune.host.attention import Tap
from lit_prune.host.beside import Beside, Rows
from lit_prune.host.cache import CacheState
from lit_prune.host.counting import Counter
from lit_prune.host.deepstack import Deepstack
from lit_prune.host.devices import Transfers, move, moved
from lit_prune.host.lengths import Lengths
from lit_prune.host.masks import Span
from lit_prune.host.packing import Layout, layout
from lit_prune.host.session import Awaited, Record, Session
from lit_prune.host.slicing import Slices
from lit_prune.ops import selection
from lit_prune.pruners.base import Kept
from lit_prune.repair import Essence, Lost

SHARED = ("packed", "seed", "total", "pictured", "sizes", "removed", "deepstack", "essence", "lost", "cumulative")
FORWARD = "lit_prune_forward"  # keyword under which a Forward travels to layers and their hooks


@dataclass(frozen=True)
class Selected:
    """The decision of one stage about the visual columns at its layer's input.

    `columns`: where they stand among those present; `real`: no filler; `alive`: not pruned by an earlier stage. `dead`
    marks, among all columns, what the vision tower dropped and arrives here. `exact`: how many stay of each sample,
    where the method says so without a look at the device. `attention`: what the stage read of each, if it did.
    """

    columns: Int[Tensor, "batch visual"]
    real: Bool[Tensor, "batch visual"]
    alive: Bool[Tensor, "batch visual"]
    kept: Kept
    dead: Bool[Tensor, "batch columns"] | None = None
    exact: list[int] | None = None
    attention: Float[Tensor, "batch visual"] | None = None

    def dropped(self, like: Bool[Tensor, "batch columns"]) -> Bool[Tensor, "batch columns"]:
        """Columns that the method drops, among all columns present."""
        return torch.zeros_like(like).scatter(1, self.columns, self.alive & ~self.kept.mask)


@dataclass
class Packed:
    """Values per column that is present, packed along with the states.

    `columns`: where each stood at the start; `valid`: no padding or filler; `visual`, `text`: an image's token, one of
    the question; `answer_mask`: predicts an answer's token; `ordinal`: its place among the sample's visual tokens.
    `image`: number of its image, where some sample has several. `positions`: where tokens are renumbered, position
    ids less those that left in front. `gone`: soft mode, pruned so far. `token_sizes`: tokens that it stands for, where
    attention is proportional or a method merges. `key_bias`: what is added to the logits of attention to it. `embeds`:
    its embedding, where a method asks for it.
    """

    columns: Int[Tensor, "batch columns"]
    valid: Bool[Tensor, "batch columns"]
    visual: Bool[Tensor, "batch columns"]
    text: Bool[Tensor, "batch columns"]
    answer_mask: Bool[Tensor, "batch columns"]
    ordinal: Int[Tensor, "batch columns"]
    image: Int[Tensor, "batch columns"] | None = None
    positions: Int[Tensor, "batch columns"] | None = None
    gone: Bool[Tensor, "batch columns"] | None = None
    token_sizes: Float[Tensor, "batch columns"] | None = None
    key_bias: Float[Tensor, "batch columns"] | None = None
    embeds: Float[Tensor, "batch columns width"] | None = None

    def pack(self, dropped: Bool[Tensor, "batch columns"], most: int | None) -> Int[Tensor, "batch left"]:
        """Leave out the `dropped` columns and all padding; returns the columns that stay.

        `most`: how many the fullest sample keeps; None: the device is asked.
        """
        left, real = selection.pack(self.valid & ~dropped, most)
        for name in ("visual", "text", "answer_mask"):
            setattr(self, name, getattr(self, name).gather(1, left) & real)
        self.valid = real
        for name in ("columns", "ordinal", "image", "positions", "gone", "token_sizes", "key_bias"):
            values = getattr(self, name)
            setattr(self, name, None if values is None else values.gather(1, left))
        if self.embeds is not None:
            self.embeds = selection.gather_rows(self.embeds, left)
        return left


@dataclass
class Attended:
    """Keys that the layers from the last stage on attend to, and the readings of their attention.

    `span`: their keys; None: as the decoder thinks. `masks`: those of this span, by the first layer of a kind.
    `past_bias`: what is added to the logits of the cached keys. `slices` cuts what layers are handed, once columns have
    left, `key_slices` what has a row per key, cached ones included. `rope`: where tokens are renumbered. `start`:
    padding to the left of each sample; None: there is none. `packs`: samples share rows inside the layers, in the
    `layout` of the last stage (None: no row is saved). `taps`: attention rows by the stage that reads them;
    `watched`: those that a caller wants of the layer that runs now. `rows`: those that learn, where others don't;
    `split`: that is settled; `beside`: the others in the layer that runs now. `handed`: in decoding, what layers get,
    by the identity of what they are handed, which is kept so that it stays unique.
    """

    span: Span | None = None
    masks: dict[int, Any] = field(default_factory=dict)
    past_bias: Float[Tensor, "batch past"] | None = None
    slices: Slices | None = None
    key_slices: Slices | None = None
    rope: tuple[Tensor, Tensor] | None = None
    start: Int[Tensor, " batch"] | None = None
    packs: bool = False
    layout: Layout | None = None
    taps: dict[int, Tap] = field(default_factory=dict)
    watched: Tap | None = None
    rows: Rows | None = None
    split: bool = False
    beside: Beside | None = None
    handed: dict[tuple[int, ...], tuple[tuple, tuple, dict[str, Any]]] = field(default_factory=dict)

    def enter(self, span: Span) -> None:
        """Layers from here on attend to these keys."""
        self.span, self.masks, self.rows, self.split = span, {}, None, False


@dataclass
class Forward:
    """One language-model forward as the hooks see it.

    `counts`: {pruning layer: tokens kept of each sample}; empty: no stages. `length`: columns at the start; `grid`:
    visual tokens of the sample that has most there; `sizes`: those of each image; `videos`: those of each sample's
    videos. `lengths`, `most_text`, `most_answers`, `all_answers` (of all samples): what is known without a look at the
    device; `unmasked`: in soft mode, lengths without what is masked. `removed`: where tokens are renumbered, how many
    have left of each sample. `cumulative`: gate on the image's grid. `lost`: the states that stages have pruned so far,
    where a repair adapter averages over them all. `counter`: of a tower's FLOPs, while that runs. `reached`: it has
    come down to the decoder's layers. `settled`: no stage acts in it, and nobody looks at its layers: a step of
    decoding. `deepstack`: features that are added to visual tokens after the first layers. `awaits`: who is to get
    the embeddings, until they are there. `transfers`: where layers are on several devices, what they are handed, on the
    one where all of this is now.
    """

    session: Session
    packed: Packed
    keys: Attended
    seed: Int[Tensor, " batch"]
    total: Int[Tensor, " batch"]
    pictured: Bool[Tensor, " batch"]
    length: int
    sizes: Int[Tensor, "batch images"] | None = None
    videos: Int[Tensor, " batch"] | None = None
    record: Record | None = None
    counts: dict[int, list[int]] = field(default_factory=dict)
    grid: int = 0
    lengths: Lengths | None = None
    unmasked: Lengths | None = None
    most_answers: int | None = None
    all_answers: int | None = None
    most_text: int | None = None
    cache_state: CacheState | None = None
    removed: Int[Tensor, " batch"] | None = None
    deepstack: Deepstack | None = None
    essence: dict[int, Essence] = field(default_factory=dict)
    lost: Lost | None = None
    cumulative: Float[Tensor, "batch grid"] | None = None
    counter: Counter | None = None
    reached: bool = False
    settled: bool = False
    awaits: Awaited | None = None
    transfers: Transfers | None = None

    def take_embeds(self, embeds: Float[Tensor, "batch columns width"]) -> None:
        """Hand the embeddings to whoever waits for them."""
        awaits, self.awaits = self.awaits, None
        if awaits is not None and awaits.packed:
            self.packed.embeds = embeds
        if awaits is not None and awaits.recorded:
            columns, _ = selection.compact(self.packed.visual, self.most_visual)
            self.record.embeds = selection.gather_rows(embeds, columns)

    def follow(self, device: torch.device) -> None:
        """Take what layers share to the device of one of them; what is recorded stays where it was measured."""
        if self.transfers is not None and self.transfers.device == device:
            return
        self.transfers, self.keys.handed = Transfers(device), {}
        for name in SHARED:
            setattr(self, name, moved(getattr(self, name), device))
        move(self.keys, device)
        if self.cache_state is not None:
            move(self.cache_state, device)
        self.session = replace(self.session, hints=moved(self.session.hints, device))

    def on_grid(self, values: Tensor, columns: Tensor, real: Tensor, fill: float) -> Tensor:
        """Values of visual columns on the image's grid of N tokens, `fill` elsewhere."""
        width = self.grid
        place = self.packed.ordinal.gather(1, columns).masked_fill(~real, width)
        grid = torch.full((values.shape[0], width + 1), fill, dtype=values.dtype, device=values.device)
        return grid.scatter(1, place, values)[:, :width]

    def images(self, columns: Tensor, real: Tensor) -> selection.Images | None:
        """The images of some visual columns, where some sample has several."""
        if self.packed.image is None:
            return None
        return selection.Images(self.packed.image.gather(1, columns) * real, self.sizes)

    @property
    def alive(self) -> Tensor:
        """Visual columns that no stage has pruned."""
        there = self.packed.visual & self.packed.valid
        return there if self.packed.gone is None else there & ~self.packed.gone

    @property
    def most_visual(self) -> int | None:
        """Visual columns of the sample that has most now, if known."""
        return None if self.lengths is None else max(self.lengths.visual)

    @property
    def padded(self) -> bool | None:
        """True if there is padding or filler among the columns, if known."""
        return None if self.lengths is None else min(self.lengths.valid) < self.packed.columns.shape[1]

    def at_answers(self, values: Tensor) -> Tensor:
        """Values (batch, columns, ...) of the positions that predict answer tokens, row by row over the batch."""
        if self.all_answers is None:
            return values[self.packed.answer_mask]
        rows = (~self.packed.answer_mask).flatten().to(torch.uint8).argsort(stable=True)[: self.all_answers]
        return values.flatten(0, 1).index_select(0, rows)

    def shorten(self, dropped: Tensor, exact: list[int] | None) -> bool:
        """True if a stage drops anything; `exact` counts say it without a look at the device."""
        if exact is None:
            there = bool(dropped.any())
            self.lengths = None if there else self.lengths
            return there
        if self.lengths is None:
            return bool(dropped.any())
        return self.lengths.drop(exact)

    def move_up(self, leaving: Tensor) -> None:
        """Number the columns behind `leaving` ones anew, if this forward does so."""
        if self.packed.positions is not None:
            moved_up = self.packed.positions - leaving.long().cumsum(1)
            self.packed.positions = moved_up.clamp(min=0)  # padding may go below
            left = leaving.sum(1)
            self.removed = left if self.removed is None else self.removed + left

    def pack(self, dropped: Bool[Tensor, "batch columns"]) -> Int[Tensor, "batch left"]:
        """Leave out the `dropped` columns and all padding; returns the columns that stay, for the states."""
        left = self.packed.pack(dropped, None if self.lengths is None else max(self.lengths.valid))
        self.keys.slices = Slices(self.packed.columns, self.length)
        return left

    def learning_rows(self) -> Rows | None:
        """The rows that learn from this layer on, where those softly dropped run without autograd; None: all do."""
        wanted = self.session.backward == "kept" and self.packed.gone is not None and self.cache_state is None
        if not self.keys.split and wanted and torch.is_grad_enabled():
            learning = self.packed.valid & ~self.packed.gone
            self.keys.rows = Rows.of(learning, None if self.unmasked is None else max(self.unmasked.valid))
            self.keys.split = True
        return self.keys.rows

    def lay_out(self, one_row: bool) -> None:
        """Choose the rows that samples share from this layer on; without known lengths the device is asked."""
        valid = self.packed.valid
        lengths = valid.sum(1).tolist() if self.lengths is None else self.lengths.valid
        self.keys.layout = layout(valid, lengths, one_row)

    def trace_layer(self, hidden: Tensor | None) -> None:
        """Note the lengths at a layer's input, and what it will compute; nothing without `hidden`: it idles."""
        if self.record is None:
            return
        trace, present = self.record.trace, self._present()
        trace.queries.append(present)
        trace.keys.append(present)
        trace.visual.append(self.alive.sum(1))
        trace.ran.append(torch.zeros_like(present) if hidden is None else self.packed.valid.sum(1))
        learning = (part for part in (hidden, self.packed.key_bias) if hidden is not None and part is not None)
        trace.learns.append(any(part.requires_grad for part in learning))
        trace.learning.append(trace.ran[-1] if self.keys.rows is None else present)

    def trace_stage(
        self, layer: int, reads: str | None, rows: Tensor, kept: Tensor, keys: bool, proportional: bool, whole: bool
    ) -> None:
        """Note what a stage looked at; `reads` names the layer whose attention rows it used, if any."""
        if self.record is not None:
            stage = StageTrace(layer, reads, rows, self._present(), self.alive.sum(1), kept, keys, proportional, whole)
            self.record.trace.stages.append(stage)

    def _present(self) -> Tensor:
        """Real tokens per sample that no stage has pruned, text included."""
        pruned = 0 if self.packed.gone is None else (self.packed.visual & self.packed.gone).sum(1)
        return self.packed.valid.sum(1) - pruned

"""What travels with one forward and what outlives it. Nothing here is ever stored on a module."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad

from lit_prune import selection
from lit_prune.cost import StageTrace, Trace
from lit_prune.host.attention import Tap
from lit_prune.host.idle import Prefix
from lit_prune.host.lengths import Lengths
from lit_prune.host.places import INPUTS, Places
from lit_prune.repair import Essence

FORWARD = "lit_prune_forward"  # keyword under which a Forward travels to layers and their hooks
CACHE = "lit_prune"  # attribute of the KV cache that holds a CacheState


@dataclass(frozen=True)
class StageRecord:
    """A stage's outcome on the image's own grid of N tokens, for losses and pictures.

    `kept` is cumulative, `gate` too; `scores` are those of the tokens then alive (-inf elsewhere). Gate and scores
    carry gradients in training.
    """

    layer: int
    kept: Tensor
    gate: Tensor
    scores: Tensor | None


@dataclass
class Record:
    """Collects what the first forward inside a session did (of `generate`, the prefill); the caller owns it.

    `hidden[layer]` is (answer positions, width) after the layer, repaired where it is, row by row over the batch; of
    all layers with `keep_hidden=True`, else of those that it names. `targets` are the tokens that these positions are
    to predict, where labels were given and the session is `answers_only`.
    `attention[layer]`, of watched layers, is (batch, N): mean over heads and question tokens. With `keep_embeds`,
    `embeds` (batch, N, width) are the visual tokens as they enter the decoder.
    """

    keep_hidden: bool | frozenset[int] = False
    keep_embeds: bool = False
    hidden: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, Tensor] = field(default_factory=dict)
    stages: list[StageRecord] = field(default_factory=list)
    trace: Trace = field(default_factory=Trace)
    embeds: Tensor | None = None
    targets: Tensor | None = None
    begun: bool = False

    def keeps(self, layer: int) -> bool:
        """Whether the answer states behind a layer are wanted."""
        return self.keep_hidden if isinstance(self.keep_hidden, bool) else layer in self.keep_hidden


@dataclass(frozen=True)
class Session:
    """How the host treats the forwards inside `host.using(...)`.

    `soft` masks instead of dropping: the sequence keeps its length and gradients reach dropped tokens too. With `spare`
    only the best `spare` times as many tokens as are kept stay in the sequence, as contenders; the rest is dropped.
    `gate_clip` bounds the norm of the gradient that each sample's gate gets at each stage: the derivative of putting a
    dropped token back is unbounded, since it stands against the few tokens that were kept.
    `watch` names decoder layers whose attention from the question to the visual tokens is recorded.
    `answers_only`: the model gives logits of the positions that predict answer tokens alone, (1, answer positions,
    vocabulary) row by row over the batch, and no loss. `prefix`: states to leave or to start from. `stop`: decoder
    layers from here on idle, so that nothing behind them means anything. Both without a cache only.
    """

    prune: bool = True
    repair: bool = True
    soft: bool = False
    spare: float | None = None
    gate_clip: float | None = None
    eps: float = 1e-8
    hints: dict[str, Tensor] = field(default_factory=dict)
    record: Record | None = None
    watch: tuple[int, ...] = ()
    answers_only: bool = False
    prefix: Prefix | None = None
    stop: int | None = None

    @property
    def leaves_out(self) -> bool:
        """Whether some layers may idle."""
        return self.prefix is not None or self.stop is not None

    def idle(self, layer: int) -> bool:
        """Whether a decoder layer's work is left out."""
        started = self.prefix is not None and self.prefix.states is not None
        return (started and layer < self.prefix.layer) or (self.stop is not None and layer >= self.stop)


@dataclass
class CacheState:
    """What must outlive a forward, as an attribute of the cache, so that it lives and dies with the sequence.

    `valid[layer]`: which cached columns of a stage's layers are real. `pictured`: samples with an image, the only ones
    that are repaired. `seen`: original columns so far. `lag`: how much M-RoPE's positions are ahead of `seen` (an image
    takes fewer positions than columns), known where layer 0 is pruned. `removed[layer]`: where tokens are numbered
    anew, how many of each sample's have left before a stage's layers. `bias[layer]`: where mass is given back, what is
    added to the attention logits of the cached keys of a stage's layers; those behind have none. `soft`: pruned tokens
    are among the keys.
    """

    valid: dict[int, Tensor] = field(default_factory=dict)
    padded: dict[int, bool | None] = field(default_factory=dict)  # whether any isn't real, if known
    essence: dict[int, Essence] = field(default_factory=dict)
    pictured: Tensor | None = None
    seen: int = 0
    lag: int | Tensor = 0
    removed: dict[int, Tensor] = field(default_factory=dict)
    bias: dict[int, Tensor] = field(default_factory=dict)
    soft: bool = False

    def follow(self, cache) -> None:
        """Forget the columns that were cropped from the cache, such as rejected candidates of assisted decoding."""
        cropped = 0
        for layer, valid in self.valid.items():
            cropped = valid.shape[1] - int(cache.get_seq_length(layer))
            self.valid[layer] = valid[:, : valid.shape[1] - cropped]
            if layer in self.bias:
                self.bias[layer] = self.bias[layer][:, : valid.shape[1] - cropped]
        self.seen -= cropped


@dataclass
class Forward:
    """One language-model forward as the hooks see it; flags are (batch, columns now), packed along with the states."""

    session: Session
    columns: Tensor  # original column of each present one
    valid: Tensor
    visual: Tensor
    text: Tensor
    gate: Tensor
    ordinal: Tensor
    seed: Tensor
    total: Tensor
    pictured: Tensor
    length: int
    image: Tensor | None = None  # number of the image of each column, where some sample has several
    sizes: Tensor | None = None  # (batch, images) visual tokens of each image at the start
    record: Record | None = None
    counts: dict[int, list[int]] = field(default_factory=dict)  # {pruning layer: kept per sample}; empty: no stages
    grid: int = 0  # visual tokens of the sample that has most, at the start
    lengths: Lengths | None = None  # None: only the device knows
    most_gate: int | None = None
    all_gate: int | None = None  # positions of all samples
    most_text: int | None = None
    cache_state: CacheState | None = None
    embeds: Tensor | None = None
    rope: tuple[Tensor, Tensor] | None = None
    mask: Tensor | BlockMask | None = None
    restaged: bool = False  # some stage has passed: later layers get this forward's mask and rope
    positions: Tensor | None = None  # where tokens are numbered anew: position ids, less those that left in front
    removed: Tensor | None = None  # and how many have left of each sample
    key_bias: Tensor | None = None
    past_bias: Tensor | None = None  # that of the cached keys
    mass: Tensor | None = None  # where it is given back: tokens that each column stands for
    gone: Tensor | None = None  # soft mode: visual columns pruned so far
    tap: Tap | None = None
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

    def at_gate(self, values: Tensor) -> Tensor:
        """Values (batch, columns, ...) of the positions that predict answer tokens, row by row over the batch."""
        if self.all_gate is None:
            return values[self.gate]
        rows = (~self.gate).flatten().to(torch.uint8).argsort(stable=True)[: self.all_gate]
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
        for name in ("visual", "text", "gate"):
            setattr(self, name, getattr(self, name).gather(1, columns) & real)
        self.columns = self.columns.gather(1, columns)
        self.ordinal = self.ordinal.gather(1, columns)
        self.valid = real
        for name in ("key_bias", "mass", "gone", "image", "positions"):
            flags = getattr(self, name)
            setattr(self, name, None if flags is None else flags.gather(1, columns))
        if self.embeds is not None:
            self.embeds = selection.gather_rows(self.embeds, columns)
        return columns

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

    def trace_stage(self, layer: int, reads: str | None, rows: Tensor, kept: Tensor, keys: bool, mass: bool) -> None:
        """Note what a stage looked at; `reads` names the layer whose attention rows it used, if any."""
        if self.record is not None:
            stage = StageTrace(layer, reads, rows, self._present(), self.alive.sum(1), kept, keys, mass)
            self.record.trace.stages.append(stage)

    def _present(self) -> Tensor:
        """Real tokens per sample that no stage has pruned, text included."""
        pruned = 0 if self.gone is None else (self.visual & self.gone).sum(1)
        return self.valid.sum(1) - pruned


def begin(kwargs: dict, places: Places, session: Session, counts_for: Callable) -> Forward | None:
    """A Forward from the keyword arguments of a `*ForConditionalGeneration`, or None if there is nothing to do."""
    ids = kwargs.get("input_ids")
    if ids is None:
        return None
    valid = _validity(one_mask(kwargs.get("attention_mask")), ids)
    visual, starts, pictured = _visual(kwargs, ids, valid, places)
    labels, known = kwargs.get("labels"), _prompt_length(kwargs, ids)
    columns = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    answers = columns >= known if labels is None else labels != -100
    prompt = valid & (answers.long().cumsum(1) == 0)
    after_image = visual.flip(1).long().cumsum(1).flip(1) == 0
    text = prompt & ~visual & after_image
    total = visual.sum(1)
    gate = _gate(valid, visual, labels, ids.shape[1] - known + 1, kwargs.get("logits_to_keep", 0))
    # The one look at the device: everything that later layers need to know of lengths, at once.
    parts = (total, starts.sum(1), valid.sum(1), text.sum(1), gate.sum(1))
    totals, images, lengths, texts, gates = torch.stack(parts).tolist() if pictured else ([], [0], [], [0], [0])
    record = session.record if session.record is not None and not session.record.begun else None
    if record is not None:
        record.begun, record.trace.total_visual = True, total
    forward = Forward(
        session=session,
        record=record,
        columns=columns,
        valid=valid,
        visual=visual,
        text=text,
        gate=gate,
        ordinal=(visual.long().cumsum(1) - 1).clamp(min=0),
        seed=_seed(ids, prompt & ~visual),
        total=total,
        pictured=total > 0,
        length=ids.shape[1],
        counts=counts_for(totals) if session.prune and any(totals) else {},
    )
    if pictured:
        forward.grid, forward.most_text = max(totals), max(texts)
        forward.most_gate, forward.all_gate = max(gates), sum(gates)
        forward.lengths = Lengths(totals, lengths)
    elif ids.shape[1] == 1:
        forward.most_gate = 1
    if max(images) > 1:
        forward.image = (starts.long().cumsum(1) - 1).clamp(min=0)
        forward.sizes = total.new_zeros(len(images), max(images)).scatter_add(1, forward.image, visual.long())
    return forward


def _visual(kwargs: dict, ids: Tensor, valid: Tensor, places: Places) -> tuple[Tensor, Tensor, bool]:
    """Visual columns, the first column of every image, and whether this forward carries any image or video.

    By what is passed, not by ids alone: a decoding step may feed back a generated token with the image token's id.
    An image is a run of its tokens; where all images have one length, a run may hold several.
    """
    visual = starts = torch.zeros_like(valid)
    encoded = kwargs.get("mm_encoder_outputs") or {}
    passed = [m for m in places.tokens if kwargs.get(INPUTS[m]) is not None or encoded.get(m) is not None]
    for modality in passed:
        mine = (ids == places.tokens[modality]) & valid
        visual, starts = visual | mine, starts | (mine & ~pad(mine[:, :-1], (1, 0)))
    if passed and places.image_length is not None:
        place = visual.long().cumsum(1) - 1
        inside = place - (place * starts).cummax(1).values
        starts = starts | (visual & (inside % places.image_length == 0))
    return visual, starts, bool(passed)


def _prompt_length(kwargs: dict, ids: Tensor) -> int:
    """Columns of the prompt: all, except where `generate(use_cache=False)` feeds prompt and answer so far again.

    The prompt is remembered on the encoded image, which lives as long as that call to `generate()`.
    """
    encoded = next((out for out in (kwargs.get("mm_encoder_outputs") or {}).values() if out is not None), None)
    if encoded is None or kwargs.get("use_cache") is not False or kwargs.get("labels") is not None:
        return ids.shape[1]
    prompt = getattr(encoded, CACHE, None)
    if prompt is None or not torch.equal(prompt, ids[:, : prompt.shape[1]]):
        prompt = ids
        setattr(encoded, CACHE, prompt)
    return prompt.shape[1]


def one_mask(mask: Tensor | dict[str, Tensor] | None) -> Tensor | None:
    """The mask that sees the whole context, where `generate()` made one for each kind of layer."""
    return mask["full_attention"] if isinstance(mask, dict) else mask


def _validity(mask: Tensor | None, ids: Tensor) -> Tensor:
    """Which of the new columns are real, from a 2-D mask over all columns, a 4-D mask, or none."""
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    if mask.ndim == 4:
        if ids.shape[1] == 1:
            return torch.ones_like(ids, dtype=torch.bool)
        last = mask[:, 0, -1, : ids.shape[1]]
        return last if last.dtype == torch.bool else last >= 0
    return mask[:, -ids.shape[1] :].bool()


def _gate(valid: Tensor, visual: Tensor, labels: Tensor | None, last: int, logits_to_keep: int | Tensor) -> Tensor:
    """Positions that predict answer tokens: before each label, else the `last` real columns.

    Without labels that is the prompt's last column, and what was answered since; assisted decoding asks for the logits
    of all its candidates, which follow an answer's start, so as many columns are repaired. A label right behind an
    image has none: the visual token that would predict it may be dropped.
    """
    if labels is not None:
        return pad(labels[:, 1:] != -100, (0, 1)) & valid & ~visual
    count = logits_to_keep if isinstance(logits_to_keep, int) and logits_to_keep > last else last
    from_end = valid.flip(1).long().cumsum(1).flip(1)
    return valid & (from_end <= count)


def _seed(ids: Tensor, prompt: Tensor) -> Tensor:
    """A number per sample from its prompt's text ids and their order: the same alone, in a batch, padded or not."""
    place = prompt.long().cumsum(1)
    mixed = (ids.long() * 1000003 + place * 8191) % 2147483647
    return (mixed * prompt * (place % 251 + 1)).sum(1) % 2147483647

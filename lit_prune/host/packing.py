"""Samples of a batch in shared rows while a decoder layer runs, so that no padding is computed.

Everything outside of a layer (stages, methods, repair, losses) sees one row per sample as always: states are folded at
a layer's entrance and unfolded behind it. A mask keeps the samples of a row apart, and position ids travel along in the
rotary embeddings, so a packed forward equals an unpacked one up to rounding, whatever the method.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lit_prune.errors import LitPruneError
from lit_prune.host.masks import Masks
from lit_prune.host.slicing import Slices

FLASH = "flash_attention"


@dataclass(frozen=True)
class Layout:
    """Places of a batch's tokens in shared rows.

    `source`: number of each place's token among the (batch x columns) of the batch, 0 for filler; `target`: number of
    each token's place among the (rows x width), 0 for padding; `sample` of each place, -1 for filler. `lengths`: tokens
    of each sample, in the order of their places, if all are in one row.
    """

    source: Int[Tensor, "rows width"]
    target: Int[Tensor, "batch columns"]
    sample: Int[Tensor, "rows width"]
    lengths: tuple[int, ...]

    def fold(self, values: Tensor) -> Tensor:
        """Values (batch, columns, ...) of the samples in shared rows (rows, width, ...)."""
        return values.flatten(0, 1).index_select(0, self.source.flatten()).unflatten(0, self.source.shape)

    def unfold(self, values: Tensor) -> Tensor:
        """Values of shared rows, sample by sample; those of padding mean nothing."""
        return values.flatten(0, 1).index_select(0, self.target.flatten()).unflatten(0, self.target.shape)

    def unfold_heads(self, values: Tensor) -> Tensor:
        """Queries or keys (rows, heads, width, head), sample by sample."""
        return self.unfold(values.transpose(1, 2)).transpose(1, 2)

    @cached_property
    def allowed(self) -> Bool[Tensor, "rows 1 width width"]:
        """Pairs of query and key that are of one sample, in order; filler attends to filler."""
        same = self.sample[:, None, :, None] == self.sample[:, None, None, :]
        return same.tril()

    def arguments(self, kwargs: dict[str, Any], like: Tensor, flash: bool) -> dict[str, Any]:
        """A layer's keyword arguments in shared rows, with what keeps the samples apart."""
        folded = Folded(self)
        packed = {name: value if name in KEPT else folded.of(value) for name, value in kwargs.items()}
        if not flash:
            return {**packed, "attention_mask": self._mask(like.dtype)}
        ends = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=like.device)
        spans = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), ends)
        longest = dict.fromkeys(("max_length_q", "max_length_k"), max(self.lengths))
        return {**packed, "attention_mask": None, "position_ids": None, **spans, **longest}

    def _mask(self, dtype: torch.dtype) -> Tensor:
        """A float mask, made once: from one of booleans every layer would make its own, which autograd keeps."""
        known = vars(self).setdefault("masks", {})
        if dtype not in known:
            zeros = torch.zeros(self.allowed.shape, dtype=dtype, device=self.source.device)
            known[dtype] = zeros.masked_fill_(~self.allowed, torch.finfo(dtype).min)
        return known[dtype]


KEPT = ("lit_prune_forward", "lit_prune_attention", "attention_mask")


class Folded(Slices):
    """Values with a row per token, moved into shared rows."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout.target, layout.target.shape[1])
        self.layout = layout

    def take(self, value: Tensor) -> Tensor:
        """Values (batch, columns, ...) in shared rows."""
        return self.layout.fold(value)


def layout(valid: Bool[Tensor, "batch columns"], lengths: list[int], one_row: bool) -> Layout | None:
    """Lay out a batch's tokens in as few rows of the longest sample's length as first-fit finds.

    Args:
        valid: columns that are no padding. lengths: their number in each sample.
        one_row: all samples in a single row, as flash attention takes them.

    Returns:
        None if no row would be saved.
    """
    bins = _bins(lengths, sum(lengths) if one_row else max(lengths))
    if len(bins) == len(lengths):
        return None
    width = max(sum(lengths[i] for i in each) for each in bins)
    begin, order = [0] * len(lengths), []
    for row, members in enumerate(bins):
        for place, i in zip(accumulate((lengths[i] for i in members), initial=0), members, strict=False):
            begin[i] = row * width + place
            order.append(lengths[i])
    device, total = valid.device, sum(lengths)
    starts = torch.tensor([begin, list(accumulate(lengths, initial=0))[:-1], lengths], device=device)
    tokens = (~valid).flatten().to(torch.uint8).argsort(stable=True)[:total]
    sample = torch.arange(len(lengths), device=device).repeat_interleave(starts[2], output_size=total)
    place = (starts[0] - starts[1])[sample] + torch.arange(total, device=device)
    shape = (len(bins), width)
    source = torch.zeros(shape[0] * width, dtype=torch.long, device=device).scatter(0, place, tokens)
    owner = torch.full_like(source, -1).scatter(0, place, sample)
    target = torch.zeros(valid.numel(), dtype=torch.long, device=device).scatter(0, tokens, place)
    return Layout(source.view(shape), target.view(valid.shape), owner.view(shape), tuple(order))


def _bins(lengths: list[int], most: int) -> list[list[int]]:
    """Samples of each row, by first-fit over falling lengths."""
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((row for row, left in enumerate(room) if left >= lengths[i]), len(bins))
        if row == len(bins):
            bins.append([])
            room.append(most)
        bins[row].append(i)
        room[row] -= lengths[i]
    return bins


def check_packable(masks: Masks) -> None:
    """Raise `LitPruneError` for a model whose layers let samples of one row see each other."""
    implementation = masks.config._attn_implementation
    if implementation != "sdpa" and not implementation.startswith(FLASH):
        raise LitPruneError(f"data.pack needs sdpa or flash attention, and this model has {implementation}")
    other = [i for i, kind in enumerate(masks.kinds) if not kind.plain]
    if other or masks.own:
        layers = f"layers {other}" if other else "layers"
        raise LitPruneError(
            f"data.pack: this model has {layers} that attend to a window, to images in both directions, or carry a "
            f"state from token to token, which would mix the samples of a row; train it with data.pack: false"
        )

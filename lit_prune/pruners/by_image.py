"""Prompts with several images, for methods whose choice of a token depends on the others: prune each image alone."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lit_prune.ops import selection
from lit_prune.pruners.base import Context, Kept, Pruner

BY_TOKEN = ("visual", "ordinal", "visual_embeds", "attention", "states", "visual_keys")  # (batch, visual, ...)
BY_SAMPLE = ("text", "text_mask", "text_embeds", "text_keys", "seed")


def image_by_image(prune: Callable[..., Kept]) -> Callable[..., Kept]:
    """Decorate a `prune` so that it is applied to each image of a sample separately.

    Each image becomes a row of a larger batch, with the sample's text and a share of its count in proportion to the
    image's alive tokens, as in `selection.top_k`. Contexts without several images pass unchanged. Gates aren't
    supported, and hints are passed per sample, as they are.
    """

    @wraps(prune)
    def decide(self, context: Context) -> Kept:
        if context.images is None:
            return prune(self, context)
        rows, columns, real = _rows(context)
        kept = prune(self, rows)
        batch = context.alive.shape[0]
        columns, real = columns.reshape(batch, -1), real.reshape(batch, -1)

        def back(values: Tensor, fill: float) -> Tensor:
            # Filler columns point at tokens of other images: with the lowest value they never win the maximum.
            flat = values.reshape(batch, -1).masked_fill(~real, fill)
            full = torch.full(context.alive.shape, fill, dtype=flat.dtype, device=flat.device)
            return full.scatter_reduce(1, columns, flat, "amax")

        mask = back(kept.mask.float(), 0.0).bool()
        scores = None if kept.scores is None else back(kept.scores, float("-inf"))
        return Kept(mask, scores=scores, states=_states_back(kept, context, columns, real))

    return decide


def _rows(context: Context) -> tuple[Context, Tensor, Tensor]:
    """Split a context into one row per image; also return its tokens' columns in the sample, packed to the left."""
    images = context.images
    batch, number = images.sizes.shape
    mine = images.number[:, None] == torch.arange(number, device=images.number.device)[:, None]
    columns, real = selection.compact((mine & context.alive[:, None]).flatten(0, 1))
    wanted = columns.reshape(batch, -1)

    def split(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        rows = values.gather(1, wanted) if values.ndim == 2 else selection.gather_rows(values, wanted)
        return rows.view(*columns.shape, *values.shape[2:])

    def repeat(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.repeat_interleave(number, 0)

    each = context.row_attention
    alone = replace(
        context,
        alive=real,
        images=None,
        count=selection.share(context.count, images.sum(context.alive.long())).flatten(),
        total=images.sizes.flatten(),
        row_attention=None if each is None else split(each.transpose(1, 2)).transpose(1, 2),
        **{name: split(getattr(context, name)) for name in BY_TOKEN},
        **{name: repeat(getattr(context, name)) for name in BY_SAMPLE},
    )
    return alone, columns, real


def _states_back(kept: Kept, context: Context, columns: Tensor, real: Tensor) -> Tensor | None:
    """Scatter new states back to their columns; all others stay."""
    if kept.states is None:
        return None
    batch, width, overflow = columns.shape[0], kept.states.shape[-1], context.alive.shape[1]
    # Filler goes to one extra column at the end, which is cut off again.
    full = torch.nn.functional.pad(context.states.to(kept.states.dtype), (0, 0, 0, 1))
    index = columns.masked_fill(~real, overflow)[..., None].expand(-1, -1, width)
    return full.scatter(1, index, kept.states.reshape(batch, -1, width))[:, :overflow]


class PickedOneByOne(Pruner):
    """Base of greedy methods, which pick visual tokens one by one, each unlike those picked, image by image.

    Args:
        layers: decoder layers at whose input tokens are dropped [papers: before the decoder, so 0].
        stage_ratios, depth: see `Pruner`.
    """

    needs_embeds = True

    def __init__(
        self, layers: Sequence[int] = (0,), stage_ratios: Sequence[float] | None = None, depth: int | None = None
    ) -> None:
        super().__init__(layers, stage_ratios, depth)

    @image_by_image
    def prune(self, context: Context) -> Kept:
        """Keep the `context.count` picks of each image."""
        return super().prune(context)

    @staticmethod
    def picks_first(
        order: Int[Tensor, "batch visual"], count: Int[Tensor, " batch"], rest: Float[Tensor, "batch visual"]
    ) -> Float[Tensor, "batch visual"]:
        """Scores from the order of picks: higher for earlier ones, 1 for the last, `rest` (below 1) for the others."""
        return torch.where(order >= 0, (count[:, None] - order).to(rest.dtype), rest)

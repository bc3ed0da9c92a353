"""Positions of a pruned prompt: kept tokens keep theirs, and what follows an image goes on behind all of it.

Which tokens of an image stay is known once it is encoded, so their indices travel in channels of their embeddings, as
those of vLLM's video pruning do.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

BASE = 128  # of an index's two digits: whole numbers up to 256 are exact in bfloat16


def with_indices(
    embeds: Float[Tensor, "kept width"], indices: Int[Tensor, "kept rows"]
) -> Float[Tensor, "kept channels"]:
    """Embeddings with two more channels for each row of indices."""
    digits = torch.cat([indices // BASE, indices % BASE], 1)
    return torch.cat([embeds, digits.to(embeds)], 1)


def without_indices(
    carried: Float[Tensor, "kept channels"], rows: int
) -> tuple[Float[Tensor, "kept width"], Int[Tensor, "kept rows"]]:
    """The inverse of `with_indices`."""
    digits = carried[:, -2 * rows :].long()
    return carried[:, : -2 * rows], digits[:, :rows] * BASE + digits[:, rows:]


def outline(length: int, images: Sequence[tuple[int, int, int]]) -> Int[Tensor, "3 length"]:
    """Positions of a prompt of `length` tokens, in three equal rows; tokens of an image all have that of its start.

    `images`: where each begins, how many of its tokens are kept, and how many positions it spans.
    """
    steps = torch.ones(length + 1, dtype=torch.long)
    for start, kept, span in images:
        steps[start + 1 : start + kept] = 0
        steps[start + kept] = span
    steps[0] = 0
    return steps.cumsum(0)[:length].expand(3, -1).clone()


def placed(
    positions: Int[Tensor, "rows length"],
    visual: Int[Tensor, " length"],
    starts: Int[Tensor, " length"],
    begin: int,
    indices: Sequence[Int[Tensor, "kept some"]],
) -> Int[Tensor, "rows length"]:
    """Positions with those of the visual tokens from `begin` on replaced by their image's start plus their indices.

    `visual` marks the tokens of images, `starts` has the position of its image's start for each. `indices` are those of
    the next tokens in order, some of an image only where a prompt is read in chunks; one index serves all rows.
    """
    if not indices:
        return positions
    found = torch.cat(list(indices))
    columns = visual[begin:].nonzero()[: len(found), 0] + begin
    changed = positions.clone()
    changed[:, columns] = (starts[columns][:, None] + found).T.expand(len(positions), -1)
    return changed

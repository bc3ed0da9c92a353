"""VisionZip: dominant tokens by [CLS] attention; the rest merged into contextual tokens."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lit_prune.errors import check_choice, check_number
from lit_prune.ops import merging, selection
from lit_prune.pruners.base import Kept, VisionContext, VisionPruner


class VisionZip(VisionPruner):
    """Dominant tokens by class-token attention, contextual tokens that the others merge into (arXiv 2412.04467).

    Contextual tokens are sampled evenly from the non-dominant ones, in raster order; every other token joins the one
    with the most similar keys. The paper's counts include the class token among the dominant ones; ours count patches
    only, so that the class token, which LLaVA drops, takes nothing from the budget.

    Args:
        vision_layers: one stage after the layer that gives the features; attention and keys are that layer's.
        contextual: share of the budget for contextual tokens [paper: 30 of 192, 20 of 128, 10 of 64].
        vision_depth: see `VisionPruner`.
        merging: `added`: as the authors' code: keys are averaged over heads, one contextual token is sampled every
            floor(rest / contextual) tokens, and it becomes the sum of itself and the mean of the tokens that join it.
            `mean` [ours]: keys of all heads side by side, samples that reach to the end, and the mean of the group,
            the contextual token included, so that its norm stays that of a token.
    """

    title = "VisionZip"
    positions = "renumbered"

    def __init__(
        self,
        vision_layers: Sequence[int] = (-1,),
        contextual: float = 10 / 64,
        vision_depth: int | None = None,
        merging: Literal["added", "mean"] = "mean",
    ) -> None:
        super().__init__(vision_layers, None, vision_depth)
        check_number("pruner.contextual", contextual, least=0, below=1)
        check_choice("pruner.merging", merging, ("added", "mean"))
        self.contextual, self.merging = contextual, merging

    def prune_vision(self, context: VisionContext) -> Kept:
        """Keep dominant and contextual tokens, the latter merged."""
        contextual = (context.count * self.contextual).round().long()
        dominant = selection.top_k(context.attention, context.alive, context.count - contextual)
        rest = context.alive & ~dominant
        centres, merged = (self._added if self.merging == "added" else self._mean)(context, rest, contextual)
        states = torch.where(centres[..., None], merged, context.states.float())
        return Kept(dominant | centres, scores=context.attention, states=states)

    @staticmethod
    def _mean(
        context: VisionContext, rest: Tensor, count: Tensor
    ) -> tuple[Bool[Tensor, "tiles visual"], Float[Tensor, "tiles visual width"]]:
        """Contextual tokens, and the mean of each one's group."""
        centres = merging.evenly(rest, count)
        centre = merging.nearest(context.keys, centres)
        return centres, merging.group_means(context.states, centre, rest.float())

    @staticmethod
    def _added(
        context: VisionContext, rest: Tensor, count: Tensor
    ) -> tuple[Bool[Tensor, "tiles visual"], Float[Tensor, "tiles visual width"]]:
        """Contextual tokens, and each one plus the mean of those that join it, if any."""
        centres = merging.every(rest, count)
        centre = merging.nearest(context.head_mean_keys, centres)
        others = merging.group_means(context.states, centre, (rest & ~centres).float())
        return centres, context.states.float() + others

    def vision_flops(self, visual: Tensor, kept: Tensor, width: int, heads: int) -> Tensor:
        """Cosines between all and the contextual tokens."""
        visual, kept = visual.double(), kept.double()
        inner = width // heads if self.merging == "added" else width
        return 2 * visual * (kept * self.contextual).round() * inner

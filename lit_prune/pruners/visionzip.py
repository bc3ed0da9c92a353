"""VisionZip: dominant tokens by [CLS] attention; the rest merged into contextual tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_prune.errors import check_number
from lit_prune.ops import merging, selection
from lit_prune.pruners.base import Kept, VisionContext, VisionPruner


class VisionZip(VisionPruner):
    """Dominant tokens by class-token attention, contextual tokens that the others merge into (arXiv 2412.04467).

    Contextual tokens are sampled evenly from the non-dominant ones, in raster order; every other token joins the one
    with the most similar keys, and a contextual token becomes the mean of its group, itself included [ours: the
    weights]. The paper's counts include the class token among the dominant ones; ours count patches only.

    Args:
        vision_layers: one stage after the layer that gives the features; attention and keys are that layer's.
        contextual: share of the budget for contextual tokens [paper: 30 of 192, 20 of 128, 10 of 64].
        vision_depth: see `VisionPruner`.
    """

    title = "VisionZip"

    def __init__(
        self, vision_layers: Sequence[int] = (-1,), contextual: float = 10 / 64, vision_depth: int | None = None
    ) -> None:
        super().__init__(vision_layers, None, vision_depth)
        check_number("pruner.contextual", contextual, least=0, below=1)
        self.contextual = contextual

    def prune_vision(self, context: VisionContext) -> Kept:
        """Keep dominant and contextual tokens, the latter merged."""
        contextual = (context.count * self.contextual).round().long()
        dominant = selection.top_k(context.attention, context.alive, context.count - contextual)
        rest = context.alive & ~dominant
        centres = merging.evenly(rest, contextual)
        centre = merging.nearest(context.keys, centres)
        means = merging.group_means(context.states, centre, rest.float())
        states = torch.where(centres[..., None], means, context.states.float())
        return Kept(dominant | centres, scores=context.attention, states=states)

    def vision_flops(self, visual: Tensor, kept: Tensor, width: int, heads: int) -> Tensor:
        """Cosines between all and the contextual tokens."""
        visual, kept = visual.double(), kept.double()
        return 2 * visual * (kept * self.contextual).round() * width

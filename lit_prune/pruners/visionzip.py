"""VisionZip: the class token's favourites, and means of the rest."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_prune.errors import check_number
from lit_prune.ops import merging, selection
from lit_prune.pruners.base import Kept, VisionContext, VisionPruner


class VisionZip(VisionPruner):
    """Dominant tokens by class-token attention, contextual tokens that the others merge into (arXiv 2412.04467).

    Contextual tokens are sampled evenly from what is not dominant, in raster order; every other token joins the one
    with the most similar keys, and a contextual token becomes the mean of its group, itself included [ours: how it is
    weighted]. The paper's counts include the class token among the dominant ones; ours are patches alone.

    Args:
        vision_layers: one stage behind the layer that gives the features; attention and keys are that layer's.
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
        """Dominant and contextual tokens, the latter merged."""
        contextual = (context.count * self.contextual).round().long()
        dominant = selection.top_k(context.attention, context.alive, context.count - contextual)
        rest = context.alive & ~dominant
        centres = merging.evenly(rest, contextual)
        centre = merging.nearest(context.keys, centres)
        means = merging.group_means(context.states, centre, rest.float())
        states = torch.where(centres[..., None], means, context.states.float())
        return Kept(dominant | centres, scores=context.attention, states=states)

    def vision_flops(self, visual: Tensor, kept: Tensor, width: int, heads: int) -> Tensor:
        """Cosines of all tokens with the contextual ones."""
        visual, kept = visual.double(), kept.double()
        return 2 * visual * (kept * self.contextual).round() * width

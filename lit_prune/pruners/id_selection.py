"""ID-Selection: important tokens one by one, each suppressing those like it."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lit_prune.errors import check_number
from lit_prune.ops import graphs
from lit_prune.pruners.base import Kept, VisionContext, VisionPruner


class IDSelection(VisionPruner):
    """Importance with suppression of similar tokens (ID-Selection, arXiv 2604.05601).

    From the paper: every token gets an importance once; the most important one is picked, the scores of tokens similar
    to it decay exponentially, at a rate of 20, and so on. Of its three kinds of importance this is the visual one.

    Ours: importance is the class token's attention in the layer that gives the features, similarity is the cosine of
    these features, 0 if negative, and each pick p multiplies a token's score by exp(-gamma cos(i, p)), so that decays
    accumulate. O(kept x visual), without a matrix of all pairs.

    Args:
        vision_layers: one stage after the layer that gives the features.
        gamma: rate of the decay [paper: 20]. 0 is the top-k of importance.
        vision_depth: see `VisionPruner`.
    """

    title = "ID-Selection"
    positions = "renumbered"

    def __init__(
        self, vision_layers: Sequence[int] = (-1,), gamma: float = 20.0, vision_depth: int | None = None
    ) -> None:
        super().__init__(vision_layers, None, vision_depth)
        check_number("pruner.gamma", gamma, least=0)
        self.gamma = gamma

    def prune_vision(self, context: VisionContext) -> Kept:
        """Keep the tokens picked by decaying importance."""
        unit, importance = normalize(context.states.float(), dim=-1), context.attention.float()
        kept = graphs.suppressed(importance, unit, self.gamma, context.alive, context.count)
        return Kept(kept, scores=torch.where(kept, importance + 1, importance))

    def vision_flops(self, visual: Tensor, kept: Tensor, width: int, heads: int) -> Tensor:
        """Cosines of all tokens to each pick."""
        return 2 * visual.double() * kept.double() * width

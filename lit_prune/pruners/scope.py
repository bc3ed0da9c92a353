"""SCOPE: coverage of all patches, weighted by [CLS] attention."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lit_prune.errors import check_number
from lit_prune.ops import coverage, graphs
from lit_prune.pruners.base import Kept, VisionContext, VisionPruner


class Scope(VisionPruner):
    """Greedy facility location on patch features times class attention (SCOPE, arXiv 2510.24214).

    A token's gain is the increase in coverage of all tokens, `sum_i max(0, cos(i, j) - best_i)`, times its class
    attention. The formula needs the cosines of all pairs: 1.3 MB per tile of 576 patches in fp32. Tiles of more than
    1,024 patches never hold them.

    Args:
        vision_layers: one stage after the layer that gives the features.
        power: exponent of the class attention [ours as an argument; 1 is the formula].
        vision_depth: see `VisionPruner`.
        sample: in tiles of more than 1,024 patches, number of patches whose coverage gains count, a fixed pseudo-random
            sample [ours]; None: all, as the formula, in a time that grows with the square of the patches.
    """

    title = "SCOPE"
    positions = "renumbered"

    def __init__(
        self,
        vision_layers: Sequence[int] = (-1,),
        power: float = 1.0,
        vision_depth: int | None = None,
        sample: int | None = graphs.DENSE,
    ) -> None:
        super().__init__(vision_layers, None, vision_depth)
        check_number("pruner.power", power, least=0)
        check_number("pruner.sample", sample, least=1, whole=True)
        self.power, self.sample = power, sample

    def prune_vision(self, context: VisionContext) -> Kept:
        """Keep tokens picked greedily by gain."""
        alike = coverage.Cosines(normalize(context.states.float(), dim=-1))
        weight = context.attention.float() ** self.power
        kept = coverage.facility_location(alike, weight, context.alive, context.count, self.sample)
        return Kept(kept, scores=torch.where(kept, weight + 1, weight))

    def vision_flops(self, visual: Tensor, kept: Tensor, width: int, heads: int) -> Tensor:
        """Cosines of all pairs, or with the sample, and the gains of each pick."""
        visual, kept = visual.double(), kept.double()
        return 2 * visual * coverage.covered(visual, self.sample) * (width + kept)

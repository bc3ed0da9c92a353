"""Control: a smaller image."""

import math

from lit_prune.ops import merging
from lit_prune.pruners.base import Kept, VisionContext, VisionPruner


class Downsample(VisionPruner):
    """Scale the image down to about as many patches as the budget.

    A control that beats many methods (arXiv 2510.07143). Bicubic with antialiasing, position embeddings interpolated;
    patches get the nearest positions of the full grid. Ours, if the budget is no square: the next larger square
    (8: 3 x 3), of which evenly spaced patches are kept, so that the budget is exact.
    """

    title = "downsampling"

    def __init__(self) -> None:
        super().__init__()

    def image_side(self, keep: int, side: int) -> int:
        """Smallest side whose square reaches the budget."""
        return min(side, math.isqrt(max(keep, 1) - 1) + 1)

    def prune_vision(self, context: VisionContext) -> Kept:
        """Keep evenly spaced patches if the square is larger than the budget."""
        return Kept(merging.evenly(context.alive, context.count))

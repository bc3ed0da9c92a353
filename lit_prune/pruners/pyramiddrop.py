"""PyramidDrop: last-token attention, in stages that each halve the tokens."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from lit_prune.pruners.base import AttentionRows, Context, Pruner


class PyramidDrop(Pruner):
    """Attention from the last instruction token at the end of each segment of layers (arXiv 2410.17247, section 3).

    The paper ranks after layer l with the norm, queries and keys of the next layer: the own attention of the layer at
    whose input tokens are dropped. A decoder of 32 layers has four segments of eight, each of which passes on half of
    its tokens [paper: lambda = 0.5]. The first segment sees all tokens, so the average can't go below a quarter of
    them: smaller budgets raise an error and need earlier `layers`. Counts follow `stage_ratios`, scaled to the budget
    [ours]. The authors renumber position ids.

    Args:
        layers: decoder layers at whose input tokens are dropped [paper: 8, 16, 24 of 32].
        stage_ratios: counts of the stages relative to each other [paper: a half, a quarter, an eighth].
        depth: see `Pruner`.
    """

    title = "PyramidDrop"
    positions = "renumbered"
    attention = AttentionRows("own", "last")

    def __init__(
        self,
        layers: Sequence[int] = (8, 16, 24),
        stage_ratios: Sequence[float] | None = (0.5, 0.25, 0.125),
        depth: int | None = None,
    ) -> None:
        super().__init__(layers, stage_ratios, depth)

    def score(self, context: Context) -> Float[Tensor, "batch visual"]:
        """Head-mean attention of the last instruction token to each visual token."""
        return context.attention

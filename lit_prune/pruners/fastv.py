"""FastV: last-token attention."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from lit_prune.pruners.base import AttentionRows, Context, Pruner


class FastV(Pruner):
    """Attention from the last prompt token, read one layer before the stage (FastV, arXiv 2403.06764, section 4.1).

    The paper prunes once, before layer 2; further stages apply the same rule, for budgets that a single one can't meet.
    """

    title = "FastV"
    attention = AttentionRows("previous", "last")

    def __init__(
        self, layers: Sequence[int] = (2,), stage_ratios: Sequence[float] | None = None, depth: int | None = None
    ) -> None:
        super().__init__(layers, stage_ratios, depth)

    def score(self, context: Context) -> Float[Tensor, "batch visual"]:
        """Head-mean attention of the last prompt token to each visual token."""
        return context.attention

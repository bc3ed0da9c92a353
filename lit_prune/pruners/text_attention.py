"""All-question attention."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from lit_prune.pruners.base import AttentionRows, Context, Pruner


class TextAttention(Pruner):
    """Attention from all question tokens in the pruning layer itself: RCP's baseline without its learned correction."""

    title = "all-question attention"
    attention = AttentionRows("own", "question")

    def __init__(
        self, layers: Sequence[int] = (2,), stage_ratios: Sequence[float] | None = None, depth: int | None = None
    ) -> None:
        super().__init__(layers, stage_ratios, depth)

    def score(self, context: Context) -> Float[Tensor, "batch visual"]:
        """Attention averaged over heads and question tokens."""
        return context.attention

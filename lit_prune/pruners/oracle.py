"""The ceiling: tokens of the regions that the question is about."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from lit_prune.errors import LitPruneError
from lit_prune.ops.selection import hashed_uniform
from lit_prune.pruners.base import Context, Pruner


class Oracle(Pruner):
    """Tokens of the regions asked about, as told by the data: a ceiling, not a method.

    Reads the hint `regions`: how much of each visual token's patch each region covers, (batch, regions, N) in [0, 1].
    Every region gives its best-covered token first, then its second, and so on; what is left of the budget is random.
    """

    title = "oracle"

    def __init__(
        self, layers: Sequence[int] = (1,), stage_ratios: Sequence[float] | None = None, depth: int | None = None
    ) -> None:
        super().__init__(layers, stage_ratios, depth)

    def score(self, context: Context) -> Float[Tensor, "batch visual"]:
        """Minus the token's rank inside its region; a random number far below for tokens in none."""
        if "regions" not in context.hints:
            raise LitPruneError(
                "the oracle needs to be told the regions a question asks about: by data with `boxes`, or in "
                "`lit-prune show` by --boxes or a scene"
            )
        regions = context.hints["regions"].to(context.visual.device)
        places = regions.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1).float()
        inside = places.masked_fill(regions <= 0, float(2 * regions.shape[-1])).amin(1)
        return -inside.gather(1, context.ordinal) + 0.5 * hashed_uniform(context.seed, context.ordinal)

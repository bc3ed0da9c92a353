"""Oracle: tokens of the regions that the question asks about."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from lit_prune.errors import LitPruneError
from lit_prune.ops.selection import hashed_uniform
from lit_prune.pruners.base import Context, Pruner


class Oracle(Pruner):
    """Tokens of the labelled regions that the question asks about: an upper bound, not a method.

    Reads the hint `regions`: the share of each visual token's patch that each region covers, (batch, regions, N) in
    [0, 1]. Every region's best-covered token comes first, then its second, and so on; the rest of the budget is random.
    """

    title = "oracle"

    def __init__(
        self, layers: Sequence[int] = (1,), stage_ratios: Sequence[float] | None = None, depth: int | None = None
    ) -> None:
        super().__init__(layers, stage_ratios, depth)

    def score(self, context: Context) -> Float[Tensor, "batch visual"]:
        """Minus the token's rank inside its region; much lower random numbers for tokens outside all regions."""
        if "regions" not in context.hints:
            raise LitPruneError(
                "the oracle needs the regions that a question asks about: from data with `boxes`, or in "
                "`lit-prune show` from --boxes or a scene"
            )
        regions = context.hints["regions"].to(context.visual.device)
        places = regions.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1).float()
        inside = places.masked_fill(regions <= 0, float(2 * regions.shape[-1])).amin(1)
        return -inside.gather(1, context.ordinal) + 0.5 * hashed_uniform(context.seed, context.ordinal)

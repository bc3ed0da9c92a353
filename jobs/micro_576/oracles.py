"""Upper bounds that know which patches a question asks about: a share of them, and background for the rest."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lit_prune.errors import LitPruneError, check_number
from lit_prune.ops.selection import hashed_uniform
from lit_prune.pruners.base import Context, Pruner


class AskedShare(Pruner):
    """A share of the budget on patches asked about, the rest on random background: an upper bound, not a method.

    A decoder without any background is off-distribution, so the better bound keeps some. The parts asked about take
    turns, each with its best-covered patches first, equal ones at random. Reads the hint `regions`, as `Oracle` does.

    Args:
        share: of the budget, for the patches asked about; where they are fewer, background takes what is left, and
            the reverse.
        layers, stage_ratios, depth: see `Pruner`.
    """

    def __init__(
        self,
        share: float = 0.5,
        layers: Sequence[int] = (0,),
        stage_ratios: Sequence[float] | None = None,
        depth: int | None = None,
    ) -> None:
        super().__init__(layers, stage_ratios, depth)
        check_number("pruner.share", share, least=0.0, most=1.0)
        self.share = share

    def score(self, context: Context) -> Float[Tensor, "batch visual"]:
        """Above 1 for the patches asked about that have a place, random in [0, 1) for background, below 0 else."""
        if "regions" not in context.hints:
            raise LitPruneError("the oracle reads the regions that a question asks about: use data with `boxes`")
        regions = context.hints["regions"].to(context.visual.device)
        noise = hashed_uniform(context.seed, torch.arange(regions.shape[-1], device=regions.device)[None])
        order = (regions + 1e-3 * noise[:, None]).argsort(dim=-1, descending=True)
        places = order.argsort(dim=-1).float().masked_fill(regions <= 0, float("inf")).amin(1)
        places = places.gather(1, context.ordinal)
        noise = noise.gather(1, context.ordinal)
        asked = places.isfinite()
        turn = (places + 0.5 * noise).argsort(1).argsort(1)  # rank among the patches asked about
        quota = (self.share * context.count + 0.5).long()[:, None]
        chosen = asked & (turn < quota)
        return torch.where(chosen, 2.0, torch.where(asked, -1.0 - turn / asked.shape[1], noise))

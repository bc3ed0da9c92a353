"""Upper bounds that know which patches a question asks about: a share of them, and background for the rest."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from jobs.micro_576.figures import well_covered
from lit_prune.errors import LitPruneError, check_number
from lit_prune.micro.scenes_576 import GRID
from lit_prune.pruners.base import Context, Pruner


class AskedShare(Pruner):
    """A share of the budget on patches asked about, the rest on background: an upper bound, not a method.

    A decoder without any background is off-distribution, so the better bound keeps some. The parts asked about take
    turns, each beginning in its middle and going on far from what it has; background is spread over the image in the
    same way. Reads the hint `regions`, as `Oracle` does.

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
        """2 for the patches asked about that have a place, up to 1 for background by its order, below 0 else."""
        if "regions" not in context.hints:
            raise LitPruneError("the oracle reads the regions that a question asks about: use data with `boxes`")
        regions = context.hints["regions"].to(context.visual.device)
        parts = well_covered(regions)
        most = int(context.count.max())
        order = far_apart(parts, most)
        turn = (order + torch.arange(parts.shape[1], device=order.device)[:, None] / parts.shape[1]).amin(1)
        background = far_apart(~parts.any(1), most)
        turn, background = (ranks.gather(1, context.ordinal) for ranks in (turn, background))
        quota = (self.share * context.count + 0.5).long()[:, None]
        chosen = turn.argsort(1).argsort(1) < quota
        asked = parts.any(1).gather(1, context.ordinal)
        return torch.where(asked, torch.where(chosen, 2.0, -1.0 - 1 / (1 + 1 / turn)), 1.0 / (1.0 + background))


def far_apart(wanted: Bool[Tensor, "*rows patches"], most: int) -> Float[Tensor, "*rows patches"]:
    """Order in which to take wanted patches so that any first ones are spread over all of them; infinite for others.

    First the one nearest to their middle, then always the one farthest from those taken. After `most` it ends.
    """
    patches = wanted.shape[-1]
    index = torch.arange(patches, device=wanted.device)
    places = torch.stack([index // GRID, index % GRID], -1).float()
    middle = (wanted.float() @ places) / wanted.sum(-1, keepdim=True).clamp(min=1)
    distance = -torch.linalg.vector_norm(middle[..., None, :] - places, dim=-1)
    order = torch.full(wanted.shape, torch.inf, device=wanted.device)
    for step in range(min(most, patches)):
        left = wanted & order.isinf()
        best = distance.masked_fill(~left, -torch.inf).argmax(-1, keepdim=True)
        found = left.gather(-1, best)
        order.scatter_(-1, best, torch.where(found, float(step), order.gather(-1, best)))
        to_best = torch.linalg.vector_norm(places[best] - places, dim=-1)
        distance = to_best if step == 0 else torch.minimum(distance, to_best)
    return order

"""DivPrune: the most diverse tokens."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from lit_prune.ops import selection
from lit_prune.pruners.base import Context
from lit_prune.pruners.by_image import PickedOneByOne

BLOCK = 256  # rows of the similarity matrix held at a time


class DivPrune(PickedOneByOne):
    """Max-min diversity of the projected visual tokens, by greedy picks (DivPrune, arXiv 2503.02175, section 3).

    Distance is one minus the cosine. The first pick is the token furthest from its nearest neighbour, each further pick
    the one furthest from its nearest pick. The question isn't used. The full distance matrix is never stored: the first
    pick computes it in blocks of rows, the others keep a running minimum, O(kept x visual). Several images of a prompt
    are pruned one by one [ours]; the FLOPs are then an upper bound.
    """

    title = "DivPrune"
    positions = "renumbered"

    def score(self, context: Context) -> Float[Tensor, "batch visual"]:
        """Higher for earlier picks, 1 for the last; for the others minus the cosine to the nearest pick, less 2."""
        unit, alive = normalize(context.visual_embeds.detach().float(), dim=-1), context.alive
        order = torch.full(alive.shape, -1, device=alive.device)
        likeness = nearest_likeness(unit, alive)
        for step in range(min(int(context.count.max()), alive.shape[1])):
            best, found, order = selection.pick(-likeness, alive, order, context.count)
            to_pick = (unit @ selection.gather_rows(unit, best).transpose(1, 2)).squeeze(2)
            nearest = to_pick if step == 0 else torch.maximum(likeness, to_pick)
            likeness = torch.where(found, nearest, likeness)
        return self.picks_first(order, context.count, -2.0 - likeness)

    def flops(self, visual: Tensor, text: Tensor, width: int, kept: Tensor) -> Tensor:
        """All cosines for the first pick, then those to each pick."""
        visual = visual.to(torch.float64)
        return 2 * width * visual * (visual + kept)


def nearest_likeness(
    unit: Float[Tensor, "batch visual width"], alive: Bool[Tensor, "batch visual"]
) -> Float[Tensor, "batch visual"]:
    """Cosine of each token to the most similar other alive one, -2 where there is none; `unit` has norms of one."""
    largest = []
    for start in range(0, unit.shape[1], BLOCK):
        cosines = (unit[:, start : start + BLOCK] @ unit.transpose(1, 2)).masked_fill(~alive[:, None], -2.0)
        cosines.diagonal(start, 1, 2).fill_(-2.0)
        largest.append(cosines.amax(2))
    return torch.cat(largest, 1)

"""DivPrune: the most different tokens."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from lit_prune.ops import selection
from lit_prune.pruners.base import Context
from lit_prune.pruners.by_image import PickedOneByOne

BLOCK = 256  # rows of the similarity matrix that exist at a time


class DivPrune(PickedOneByOne):
    """Max-min diversity of the projected visual tokens, by greedy picks (DivPrune, arXiv 2503.02175, section 3).

    Distance is one minus the cosine. The first pick is the token furthest from its nearest neighbour, then always the
    one whose nearest pick is furthest. The question plays no part. The matrix of distances is never held: the start
    sees it in blocks of rows, the picks keep a running minimum, O(kept x visual). Several images of a prompt are
    pruned one by one [ours]; the price is then an upper bound.
    """

    title = "DivPrune"

    def score(self, context: Context) -> Float[Tensor, "batch visual"]:
        """The earlier a token was picked the higher, 1 for the last; of the rest minus the cosine to the nearest pick.

        The latter is moved below -1, where no pick is.
        """
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
        """All cosines once for the start, then those to each pick."""
        visual = visual.to(torch.float64)
        return 2 * width * visual * (visual + kept)


def nearest_likeness(
    unit: Float[Tensor, "batch visual width"], alive: Bool[Tensor, "batch visual"]
) -> Float[Tensor, "batch visual"]:
    """Cosine of each token to the most similar other alive one, -2 where there is none; `unit` has norms of one."""
    found = []
    for start in range(0, unit.shape[1], BLOCK):
        cosines = (unit[:, start : start + BLOCK] @ unit.transpose(1, 2)).masked_fill(~alive[:, None], -2.0)
        cosines.diagonal(start, 1, 2).fill_(-2.0)
        found.append(cosines.amax(2))
    return torch.cat(found, 1)

"""DivPrune: the most diverse tokens."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from lit_prune.ops import graphs, selection
from lit_prune.pruners.base import Context
from lit_prune.pruners.by_image import PickedOneByOne

BLOCK = 256  # rows of the similarity matrix held at a time
ROUNDING = 1e-6  # by which two computations of a cosine may differ


class DivPrune(PickedOneByOne):
    """Max-min diversity of the projected visual tokens, by greedy picks (DivPrune, arXiv 2503.02175, section 3).

    Distance is one minus the cosine. The first pick is the token furthest from its nearest neighbour, each further pick
    the one furthest from its nearest pick. The question isn't used. The full distance matrix is never stored: the first
    pick computes it in blocks of rows, or beyond 1,024 tokens in blocks of columns, without rows that can't be the
    pick any more; the others keep a running minimum, O(kept x visual). Several images of a prompt are pruned one by one
    [ours]; the FLOPs are then an upper bound, as they are beyond 1,024 tokens.
    """

    title = "DivPrune"
    positions = "renumbered"

    def score(self, context: Context) -> Float[Tensor, "batch visual"]:
        """Higher for earlier picks, 1 for the last; for the others minus the cosine to the nearest pick, less 2."""
        unit, alive = normalize(context.visual_embeds.detach().float(), dim=-1), context.alive
        order = torch.full(alive.shape, -1, device=alive.device)
        first = nearest_likeness if alive.shape[1] <= graphs.DENSE else likeness_of_loneliest
        likeness = first(unit, alive)
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


def likeness_of_loneliest(
    unit: Float[Tensor, "batch visual width"], alive: Bool[Tensor, "batch visual"]
) -> Float[Tensor, "batch visual"]:
    """As `nearest_likeness` where that is smallest; lower bounds above this minimum elsewhere.

    The largest cosine of a row only grows with the columns seen: first those next to it in the sequence, which tend to
    be similar, then all in pseudo-random order. After each block the most promising row is completed, and rows that
    exceed it already are left out of further blocks, which grow as the rows get fewer.
    """
    tokens = alive.shape[1]
    every = torch.arange(tokens, device=alive.device)
    order = selection.hashed_uniform(torch.zeros_like(every[:1]), every[None])[0].argsort()
    rows, packed, open_rows = every.expand_as(alive), unit, alive

    def to_others(mine: Tensor, states: Tensor, columns: Tensor, others: Tensor) -> Tensor:
        cosines = states @ others.transpose(1, 2)
        skipped = (mine[..., None] == columns) | ~alive.index_select(1, columns)[:, None]
        return cosines.masked_fill_(skipped, -2.0).amax(2)

    blocks = zip(rows.split(BLOCK, 1), unit.split(BLOCK, 1), every.split(BLOCK), strict=True)
    largest = torch.cat([to_others(mine, states, columns, states) for mine, states, columns in blocks], 1)
    limit, start = torch.full_like(largest[:, :1], float("inf")), 0
    while start < tokens:
        columns = order[start : start + BLOCK * tokens // rows.shape[1]]
        start += len(columns)
        seen = to_others(rows, packed, columns, unit.index_select(1, columns))
        largest = largest.scatter_reduce(1, rows, seen, "amax")
        best = largest.masked_fill(~open_rows, float("inf")).argmin(1, keepdim=True)
        limit = limit.minimum(to_others(best, selection.gather_rows(unit, best), every, unit))
        open_rows = open_rows & (largest <= limit + ROUNDING)
        if 2 * (most := max(1, int(open_rows.sum(1).max()))) <= rows.shape[1]:
            rows, _ = selection.compact(open_rows, most)
            packed = selection.gather_rows(unit, rows)
    return largest

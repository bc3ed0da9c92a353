"""Pure functions for selecting and merging tokens by similarity, which the caller computes."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from lit_prune.ops import selection

EXPONENT = 104.0  # exp(-x) is 0 in fp32 from here on
DENSE = 1024  # tokens up to which a method may hold a matrix of all pairs


def centred(
    features: Float[Tensor, "batch visual width"], alive: Bool[Tensor, "batch visual"]
) -> Float[Tensor, "batch visual width"]:
    """Unit vectors (fp32) after centring, which removes the component common to all alive tokens of a sample."""
    features, mask = features.float(), alive[..., None]
    mean = features.masked_fill(~mask, 0.0).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return normalize(features - mean, dim=-1)


def cosines(unit: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens tokens"]:
    """Cosines of all pairs of unit vectors, exactly symmetric, and exactly 1 on the diagonal.

    Two tokens that are alike gain as much by one as by the other: what decides is then their place, not rounding, which
    differs between batches.
    """
    product = unit @ unit.transpose(1, 2)
    product = (product + product.transpose(1, 2)) / 2
    return product.diagonal_scatter(product.new_ones(product.shape[:2]), dim1=1, dim2=2)


def squared_distance(
    a: Int[Tensor, "batch some"], b: Int[Tensor, "batch others"], side: int
) -> Float[Tensor, "batch some others"]:
    """Squared distance in patches between positions, numbered row by row, on a grid of `side` x `side`."""
    rows = a[:, :, None] // side - b[:, None] // side
    columns = a[:, :, None] % side - b[:, None] % side
    return (rows.square() + columns.square()).float()


def spread(
    scores: Float[Tensor, "batch visual"],
    unit: Float[Tensor, "batch visual width"],
    place: Int[Tensor, "batch visual"],
    side: int,
    width: float,
    alive: Bool[Tensor, "batch visual"],
    count: Int[Tensor, " batch"],
) -> Bool[Tensor, "batch visual"]:
    """Greedily pick the `count` best tokens; each pick lowers the scores of similar tokens nearby [ours].

    The score is multiplied by 1 - a, with a the largest affinity to a picked token: the cosine of `unit` vectors, 0 if
    negative, times exp(-distance^2 / (2 width^2)) in patches. Scores must be non-negative. O(visual) per pick, without
    a matrix of all pairs; cosines only as far as that exponential isn't 0. With `width` near 0 this is top-k; ties go
    to the earlier token.
    """
    around = _Around(place, side, math.ceil(width * math.sqrt(2 * EXPONENT)), alive)
    scores, count = scores.float(), torch.minimum(count, alive.sum(1))
    taken, near, chosen = ~alive, torch.zeros_like(scores), torch.zeros_like(alive)
    row, column = (place // side).float(), (place % side).float()
    for turn in range(int(count.max())):
        # Free tokens have values >= 0: the argmax never picks twice while a sample has picks left.
        pick = (scores * (1 - near)).masked_fill_(taken, -1.0).argmax(1, keepdim=True)
        there, absent = around(place.gather(1, pick))
        mine, rows, columns = unit, row, column
        if there is not None:
            mine, rows, columns = selection.gather_rows(unit, there), row.gather(1, there), column.gather(1, there)
        alike = (mine * selection.gather_rows(unit, pick)).sum(-1).clamp_(min=0)
        squared = (rows - row.gather(1, pick)).square_() + (columns - column.gather(1, pick)).square_()
        affinity = alike * torch.exp(-squared / (2 * width**2))
        if there is None:
            near = near.maximum(affinity)
        else:
            near = near.scatter_reduce(1, there, affinity.masked_fill(absent, 0.0), "amax")
        chosen = chosen.scatter(1, pick, chosen.gather(1, pick) | (turn < count)[:, None])
        taken = taken.scatter(1, pick, True)
    return chosen


class _Around:
    """Columns of the alive tokens within `radius` patches of a position; None: all, where that isn't fewer."""

    def __init__(self, place: Tensor, side: int, radius: int, alive: Tensor) -> None:
        self.side, self.few = side, 2 * (2 * radius + 1) ** 2 < place.shape[1]
        if self.few:
            steps = torch.arange(-radius, radius + 1, device=place.device)
            self.rows, self.columns = (steps.flatten()[None] for steps in torch.meshgrid(steps, steps, indexing="ij"))
            index = torch.arange(place.shape[1], device=place.device).where(alive, -1)
            self.token = index.new_full((len(place), side**2), -1).scatter_reduce(1, place, index, "amax")

    def __call__(self, pick: Int[Tensor, "batch 1"]) -> tuple[Tensor | None, Tensor | None]:
        """Columns (batch, some), and True where there is no such token."""
        if not self.few:
            return None, None
        rows, columns = pick // self.side + self.rows, pick % self.side + self.columns
        outside = (rows < 0) | (columns < 0) | (rows >= self.side) | (columns >= self.side)
        token = self.token.gather(1, (rows * self.side + columns).masked_fill(outside, 0))
        return token.clamp(min=0), outside | (token < 0)


def suppressed(
    importance: Float[Tensor, "batch visual"],
    unit: Float[Tensor, "batch visual width"],
    gamma: float,
    alive: Bool[Tensor, "batch visual"],
    count: Int[Tensor, " batch"],
) -> Bool[Tensor, "batch visual"]:
    """Greedily pick the `count` most important tokens; each pick p scales all others by exp(-gamma max(0, cos(i, p))).

    Importance must be non-negative; scores are compared as logarithms, since decays accumulate over the picks. `unit`
    has norms of one. O(visual) per pick, without a matrix of all pairs; ties go to the earlier token.
    """
    score = importance.float().clamp(min=torch.finfo(torch.float32).tiny).log()
    order = torch.full(alive.shape, -1, device=alive.device)
    for _ in range(min(int(count.max()), alive.shape[1])):
        best, _, order = selection.pick(score, alive, order, count)
        alike = (unit @ selection.gather_rows(unit, best).transpose(1, 2)).squeeze(2)
        score = score - gamma * alike.clamp(min=0)
    return order >= 0


def facility_location(
    similarity: Float[Tensor, "batch tokens candidates"],
    weight: Float[Tensor, "batch candidates"],
    alive: Bool[Tensor, "batch candidates"],
    count: Int[Tensor, " batch"],
    demand: Float[Tensor, "batch tokens"],
) -> Bool[Tensor, "batch candidates"]:
    """Greedy facility location: pick `count` candidates so that every token is similar to one of them.

    The gain of candidate j is `weight_j * sum_i demand_i max(0, similarity_ij - best_i)`, with best_i the largest
    similarity of token i to a picked one, initially 0. Ties, and picks without any gain, go to the candidate with the
    larger weight, then to the earlier one. O(tokens x candidates) per pick. `demand` is 0 for filler tokens.
    """
    count = torch.minimum(count, alive.sum(1))
    chosen = torch.zeros_like(alive)
    best = torch.zeros(similarity.shape[:2], dtype=similarity.dtype, device=similarity.device)
    order = weight.masked_fill(~alive, float("-inf")).argsort(dim=1, descending=True, stable=True)
    for turn in range(int(count.max())):
        gain = torch.einsum("bij,bi->bj", (similarity - best[..., None]).clamp(min=0), demand.to(best)) * weight
        gain = gain.masked_fill(chosen, -1.0).masked_fill(~alive, -2.0)
        # Argmax over candidates sorted by weight, so that ties go to the larger weight.
        pick = order.gather(1, gain.gather(1, order).argmax(1, keepdim=True))
        now = turn < count
        chosen = chosen | (now[:, None] & torch.zeros_like(chosen).scatter(1, pick, True))
        column = similarity.gather(2, pick[:, None].expand(-1, similarity.shape[1], -1))[..., 0]
        best = torch.where(now[:, None], best.maximum(column), best)
    return chosen

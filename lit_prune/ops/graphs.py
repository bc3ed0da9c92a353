"""Pure functions for selecting and merging tokens by similarity, which the caller computes."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize, pad

from lit_prune.ops import selection

EXPONENT = 18.0  # 1 - exp(-x) is 1 in fp32 from here on
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
    a matrix of all pairs; cosines only as far as that exponential counts. With `width` near 0 this is top-k; ties go
    to the earlier token.
    """
    count = torch.minimum(count, alive.sum(1))
    most = int(count.max())
    lowered = _Lowered(scores.float(), unit, place, side, width, alive, all_pairs=4 * most > place.shape[1])
    values = pad(scores.float().masked_fill(~alive, -1.0), (0, 1), value=-1.0)  # the last stands for absent tokens
    inner, picks = values[:, :-1], torch.zeros(len(place), most, dtype=torch.long, device=place.device)
    for turn in range(most):
        # Free tokens have values >= 0: the argmax never picks twice while a sample has picks left.
        pick = inner.argmax(1, keepdim=True)
        picks[:, turn : turn + 1] = pick
        # Rounding is monotone, so the least product with 1 - a is that with the largest a.
        values.scatter_reduce_(1, *lowered(pick), "amin").scatter_(1, pick, -1.0)
    within = torch.arange(most, device=place.device) < count[:, None]
    return picks.new_zeros(alive.shape).scatter_add_(1, picks, within.long()) > 0


class _Lowered:
    """Scores of the tokens around a pick, lowered by it: columns (batch, some) and values.

    `all_pairs`: those of all tokens are computed ahead, a shift of the grid at a time; else each pick's when it comes.
    Columns of absent tokens are one beyond the last.
    """

    def __init__(
        self,
        scores: Float[Tensor, "batch visual"],
        unit: Float[Tensor, "batch visual width"],
        place: Int[Tensor, "batch visual"],
        side: int,
        width: float,
        alive: Bool[Tensor, "batch visual"],
        all_pairs: bool,
    ) -> None:
        self.unit, self.width = unit, width
        self.row, self.column = (place // side).float(), (place % side).float()
        reach, furthest = min(side - 1, int(width * math.sqrt(2 * EXPONENT))), 2 * EXPONENT * width**2
        steps = [(r, c) for r in range(-reach, reach + 1) for c in range(-reach, reach + 1)]
        steps = [(r, c) for r, c in steps if r * r + c * c <= furthest]
        self.near, self.table = 2 * len(steps) < place.shape[1], None
        self.scores = pad(scores, (0, 1))
        if not self.near:
            self.everywhere = torch.arange(place.shape[1], device=place.device).expand_as(place)
            return
        pitch = side + 2 * reach
        self.offsets = torch.tensor([[r * pitch + c for r, c in steps]], device=place.device)
        squared = torch.tensor([[float(r * r + c * c) for r, c in steps]], device=place.device)
        self.weights = torch.exp(-squared / (2 * width**2))
        self.base = (place // side + reach) * pitch + place % side + reach
        index = torch.arange(place.shape[1], device=place.device).where(alive, place.shape[1])
        self.token = index.new_full((len(place), pitch**2), place.shape[1])
        self.token.scatter_reduce_(1, self.base, index, "amin")
        self.unit = torch.cat([unit, torch.zeros_like(unit[:, :1])], 1)
        if all_pairs:
            inside = self.token.view(-1, pitch, pitch)[:, reach : reach + side, reach : reach + side]
            alike = _shifted(selection.gather_rows(self.unit, inside.flatten(1)).unflatten(1, (side, side)), steps)
            there = self.token.gather(1, (self.base[..., None] + self.offsets).flatten(1)).view(*place.shape, -1)
            self.table = there, self._lower(there, selection.gather_rows(alike, place))

    def __call__(self, pick: Int[Tensor, "batch 1"]) -> tuple[Tensor, Tensor]:
        """The scores lowered by one pick of each sample."""
        if self.table is not None:
            there, values = (selection.gather_rows(part, pick)[:, 0] for part in self.table)
            return there, values
        there = self.token.gather(1, self.base.gather(1, pick) + self.offsets) if self.near else self.everywhere
        mine = selection.gather_rows(self.unit, there) if self.near else self.unit
        alike = (mine * selection.gather_rows(self.unit, pick)).sum(-1)
        if not self.near:
            squared = (self.row - self.row.gather(1, pick)).square_()
            squared += (self.column - self.column.gather(1, pick)).square_()
            self.weights = torch.exp(-squared / (2 * self.width**2))
        return there, self._lower(there, alike)

    def _lower(self, there: Tensor, alike: Tensor) -> Tensor:
        scores = self.scores.gather(1, there.flatten(1)).view(there.shape)
        return scores * (1 - alike.clamp_(min=0) * self.weights)


def _shifted(
    grid: Float[Tensor, "batch side side width"], steps: list[tuple[int, int]]
) -> Float[Tensor, "batch places steps"]:
    """Products of the vector at each place with those that lie some steps further; 0 beyond the edge.

    `steps` are sorted, and the opposite of each is among them.
    """
    side = grid.shape[1]
    found = grid.new_zeros(*grid.shape[:3], len(steps))
    for k, (down, right) in enumerate(steps[: len(steps) // 2]):
        rows, columns = ((max(0, -step), min(side, side - step)) for step in (down, right))
        here = (slice(None), slice(*rows), slice(*columns))
        beyond = (slice(None), slice(rows[0] + down, rows[1] + down), slice(columns[0] + right, columns[1] + right))
        product = (grid[here] * grid[beyond]).sum(-1)
        found[(*here, k)], found[(*beyond, len(steps) - 1 - k)] = product, product
    return found.flatten(1, 2)


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

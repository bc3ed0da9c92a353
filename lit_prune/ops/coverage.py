"""Greedy facility location over the cosines of tokens, whatever their number, without a matrix of all pairs."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lit_prune.ops import graphs, selection

FIRST = 64  # candidates whose gains are computed again at a time, doubled as long as that isn't enough

Rows = Callable[[Tensor], Tensor]  # columns of candidates (batch, some) -> similarities (batch, some, covered)


class Cosines:
    """Cosines between unit vectors: of all pairs at once up to `graphs.DENSE` tokens, otherwise when they are read."""

    def __init__(self, unit: Float[Tensor, "batch tokens width"]) -> None:
        self.unit = unit
        self.all = graphs.cosines(unit) if unit.shape[1] <= graphs.DENSE else None

    def between(
        self, columns: Int[Tensor, "batch some"], others: Int[Tensor, "batch others"]
    ) -> Float[Tensor, "batch some others"]:
        """Cosines of the tokens at `columns` with those at `others`; a token's with itself is exactly 1."""
        if self.all is not None:
            rows = selection.gather_rows(self.all, columns)
            return rows.gather(2, others[:, None].expand(-1, columns.shape[1], -1))
        product = selection.gather_rows(self.unit, columns) @ selection.gather_rows(self.unit, others).transpose(1, 2)
        return product.masked_fill_(columns[..., None] == others[:, None], 1.0)

    def to(self, columns: Int[Tensor, "batch some"]) -> Float[Tensor, "batch tokens some"]:
        """Cosines of every token with those at `columns`; a token's with itself is exactly 1."""
        if self.all is not None:
            return self.all.gather(2, columns[:, None].expand(-1, self.all.shape[1], -1))
        product = self.unit @ selection.gather_rows(self.unit, columns).transpose(1, 2)
        return product.scatter_(1, columns[:, None], 1.0)


def facility_location(
    alike: Cosines,
    weight: Float[Tensor, "batch tokens"],
    alive: Bool[Tensor, "batch tokens"],
    count: Int[Tensor, " batch"],
    sample: int | None = graphs.DENSE,
) -> Bool[Tensor, "batch tokens"]:
    """Pick `count` tokens greedily so that every token is similar to one of them, as `graphs.facility_location` does.

    Beyond `graphs.DENSE` tokens gains are sums over a fixed pseudo-random `sample` of the tokens [ours]: memory and a
    pick's time are then O(tokens x sample). With None they are exact, in O(tokens) memory: cosines are computed each
    time that a gain is, all of them for the first pick (tokens^2 x width multiplications), later only of candidates
    whose gain before could still be the best. Where gains are equal, rounding may decide.
    """
    if alike.all is not None:
        return graphs.facility_location(alike.all, weight, alive, count, alive.float())
    if sample is None:
        everyone = torch.arange(alive.shape[1], device=alive.device).expand_as(alive)
        return _lazy(lambda columns: alike.between(columns, everyone), alive, weight, alive, count)
    seen, real = _sample(alive, min(sample, alive.shape[1]))
    table = alike.to(seen)
    return _lazy(lambda columns: selection.gather_rows(table, columns), real, weight, alive, count)


def covered(tokens: Float[Tensor, " batch"], sample: int | None) -> Float[Tensor, " batch"]:
    """Number of tokens whose similarities a gain sums in `facility_location`."""
    return tokens if sample is None else torch.where(tokens > graphs.DENSE, tokens.clamp(max=sample), tokens)


def _sample(alive: Tensor, number: int) -> tuple[Int[Tensor, "batch number"], Bool[Tensor, "batch number"]]:
    """Columns of a pseudo-random sample of the alive tokens, which depends on their columns alone, and real ones."""
    column = torch.arange(alive.shape[1], device=alive.device).expand_as(alive)
    drawn = selection.hashed_uniform(torch.zeros_like(column[:, 0]), column)
    return selection.compact(selection.top_k(drawn, alive, torch.full_like(column[:, 0], number)), number)


def _lazy(
    rows: Rows,
    real: Bool[Tensor, "batch covered"],
    weight: Float[Tensor, "batch tokens"],
    alive: Bool[Tensor, "batch tokens"],
    count: Int[Tensor, " batch"],
) -> Bool[Tensor, "batch tokens"]:
    """Greedy picks by lazy evaluation (Minoux 1978): a gain never grows, so an old one bounds what it is now.

    Candidates are numbered by descending weight, so that an argmax gives ties to the larger weight, then the earlier.
    """
    order = weight.masked_fill(~alive, float("-inf")).argsort(dim=1, descending=True, stable=True)
    weight, open_to = weight.gather(1, order), alive.gather(1, order)
    best = torch.zeros(real.shape, device=weight.device).masked_fill(~real, float("inf"))  # nothing covers filler more

    def gains(which: Tensor) -> Tensor:
        parts = which.split(graphs.DENSE, dim=1)
        sums = [(rows(order.gather(1, part)) - best[:, None]).relu_().sum(2) for part in parts]
        return torch.cat(sums, 1) * weight.gather(1, which)

    tokens, count = alive.shape[1], torch.minimum(count, alive.sum(1))
    bound = gains(torch.arange(tokens, device=alive.device).expand_as(alive)).masked_fill(~open_to, -2.0)
    fresh = torch.ones_like(alive)
    for turn in range(int(count.max())):
        width, done = FIRST, (turn >= count)[:, None]
        while not bool((fresh.gather(1, pick := bound.argmax(1, keepdim=True)) | done).all()):
            stale = bound.masked_fill(fresh, -3.0).topk(min(width, tokens), dim=1).indices
            again = torch.where(fresh.gather(1, stale), bound.gather(1, stale), gains(stale))
            bound, fresh, width = bound.scatter(1, stale, again), fresh.scatter(1, stale, True), 2 * width
        best = torch.where(done, best, best.maximum(rows(order.gather(1, pick))[:, 0]))
        bound = torch.where(done, bound, bound.scatter(1, pick, -1.0))
        fresh = (bound < 0) | done
    return torch.zeros_like(alive).scatter(1, order, bound == -1.0)

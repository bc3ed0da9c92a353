"""Whole counts of a schedule, nearest to an average and then to ratios; takes milliseconds for one stage per layer."""

from collections.abc import Iterator
from itertools import accumulate, islice

import numpy as np

FEW = 4  # up to this many stages, counts stay within `REACH` tokens of the real-valued ones
REACH = 3
TIES = 1000  # of schedules that are equal up to rounding, at most this many are compared


def nearest_counts(room: int, ruled: list[int], ideal: list[float], visual: int) -> tuple[int, ...] | None:
    """Whole counts near `ideal` whose total is nearest to `room`; None if `ideal` rises.

    The total is the sum over stages of count times the number of layers it applies to, `ruled`. With up to four stages,
    counts stay within three tokens of `ideal`, since others would distort the ratios; with more, the nearest possible
    total is reached in the smallest window around `ideal` that contains it.
    """
    if len(ruled) <= FEW:
        return _within(REACH, room, ruled, ideal, visual)
    counts, reach = _within(1, room, ruled, ideal, visual), 1
    if counts is None or _spent(counts, ruled) == room:
        return counts
    goal = _nearest_sum(room, ruled, visual)
    while _spent(counts, ruled) != goal and reach < visual:
        reach *= 2
        counts = _within(reach, room, ruled, ideal, visual)
    return counts


def _spent(counts: tuple[int, ...], ruled: list[int]) -> int:
    return sum(n * count for n, count in zip(ruled, counts, strict=True))


def _within(reach: int, room: int, ruled: list[int], ideal: list[float], visual: int) -> tuple[int, ...] | None:
    """Non-increasing counts within `reach` of `ideal` with a total nearest to `room`; of these the nearest to `ideal`.

    Of two equally near totals the lower one wins; distances are relative; of equal ones the first in order wins. None
    if no such counts are non-increasing.
    """
    choices = [range(max(1, int(k) - reach), min(visual, int(k) + reach + 1) + 1) for k in ideal]
    costs = [[((count - k) / k) ** 2 for count in counts] for counts, k in zip(choices, ideal, strict=True)]
    cheapest = _cheapest(ruled, choices, costs)
    least = sum(n * counts[0] for n, counts in zip(ruled, choices, strict=True))
    sums = np.isfinite(cheapest[0]).any(0).nonzero()[0].tolist()
    if not sums:
        return None
    left = min(sums, key=lambda more: (abs(least + more - room), more))
    limit = cheapest[0][:, left].min() * (1 + 1e-9)  # the tables sum in another order, so they round differently

    def walk(stage: int, most: int, left: int, cost: float) -> Iterator[tuple[int, ...]]:
        if stage == len(ruled):
            yield ()
            return
        for index, count in enumerate(choices[stage]):
            if count > most or ruled[stage] * index > left:
                return
            if cost + cheapest[stage][index, left] <= limit:
                rest = walk(stage + 1, count, left - ruled[stage] * index, cost + costs[stage][index])
                yield from ((count, *counts) for counts in rest)

    def distance(counts: tuple[int, ...]) -> float:
        return sum(((count - k) / k) ** 2 for count, k in zip(counts, ideal, strict=True))

    return min(islice(walk(0, visual, left, 0.0), TIES), key=distance)


def _cheapest(ruled: list[int], choices: list[range], costs: list[list[float]]) -> list[np.ndarray]:
    """For each stage a table (counts, sums): lowest cost of this and all later stages, infinite if impossible.

    A sum is the total from this stage on, minus that of each stage's lowest count; counts never rise.
    """
    size = 1 + sum(n * (len(counts) - 1) for n, counts in zip(ruled, choices, strict=True))
    tables: list[np.ndarray] = []
    below, lowest = np.full((1, size), np.inf), 0  # after the last stage the remaining total is 0
    below[0, 0] = 0.0
    for n, counts, prices in zip(reversed(ruled), reversed(choices), reversed(costs), strict=True):
        table = np.full((len(counts), size), np.inf)
        for index, (count, price) in enumerate(zip(counts, prices, strict=True)):
            if count >= lowest:
                table[index, n * index :] = below[min(count - lowest, len(below) - 1), : size - n * index] + price
        tables.insert(0, table)
        below, lowest = np.minimum.accumulate(table, axis=0), counts[0]
    return tables


def _nearest_sum(room: int, ruled: list[int], visual: int) -> int:
    """Total nearest to `room` that non-increasing counts from 1 to `visual` can reach; of two equally near, the lower.

    Non-increasing counts are built from steps: one more token in the first i stages adds the layers of these stages,
    and there are at most `visual - 1` steps. So this is the change-making problem. Fewer small coins than the value of
    the largest suffice: among as many, some add up to a multiple of the largest, and can be replaced by fewer of it.
    """
    *coins, largest = accumulate(ruled)
    change, most = room - sum(ruled), visual - 1
    limit = (1 << change + largest) - 1
    best, known, new = (change, 0), 1, 1  # bit i of `new`: sum i takes `used` small coins, and no fewer
    for used in range(min(largest, most + 1)):
        for small in (bit for bit in range(new.bit_length()) if new >> bit & 1):
            for large in ((change - small) // largest, (change - small) // largest + 1):
                total = small + largest * min(max(large, 0), most - used)
                best = min(best, (abs(total - change), total))
        more = 0
        for coin in coins:
            more |= new << coin
        new = more & limit & ~known
        known |= new
    return sum(ruled) + best[1]

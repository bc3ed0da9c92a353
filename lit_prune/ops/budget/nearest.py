"""Whole counts of a schedule, the nearest to an average and then to ratios, in milliseconds for a stage per layer."""

from collections.abc import Iterator
from itertools import accumulate, islice

import numpy as np

FEW = 4  # stages: up to so many get counts within `REACH` tokens of the real-valued ones, more get what comes nearest
REACH = 3
TIES = 1000  # schedules that are equally good up to rounding, of which at most so many are looked at


def nearest_counts(room: int, ruled: list[int], ideal: list[float], visual: int) -> tuple[int, ...] | None:
    """Whole counts near `ideal` that spend what is nearest to `room`; None where `ideal` rises.

    Each count times the layers that it rules, `ruled`, is spent. Counts of more than four stages are the nearest that
    there are, in the smallest window around `ideal` that holds some; of fewer stages, where farther counts would bend
    the ratios, they are the nearest within three tokens of `ideal`.
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
    """Falling counts within `reach` of `ideal` that spend what is nearest to `room`; of these the nearest to `ideal`.

    Of two sums that are equally near the lower one; distances are relative; of equal ones what comes first in order.
    None: no such counts fall.
    """
    choices = [range(max(1, int(k) - reach), min(visual, int(k) + reach + 1) + 1) for k in ideal]
    costs = [[((count - k) / k) ** 2 for count in counts] for counts, k in zip(choices, ideal, strict=True)]
    cheapest = _cheapest(ruled, choices, costs)
    least = sum(n * counts[0] for n, counts in zip(ruled, choices, strict=True))
    sums = np.isfinite(cheapest[0]).any(0).nonzero()[0].tolist()
    if not sums:
        return None
    left = min(sums, key=lambda more: (abs(least + more - room), more))
    limit = cheapest[0][:, left].min() * (1 + 1e-9)  # the tables add up in another order, so round otherwise

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
    """For each stage a table (its counts, sums): the lowest cost of this and all later stages, infinite where none.

    A sum is what they spend, from this stage on, beyond the lowest count of each; counts never rise.
    """
    size = 1 + sum(n * (len(counts) - 1) for n, counts in zip(ruled, choices, strict=True))
    tables: list[np.ndarray] = []
    below, lowest = np.full((1, size), np.inf), 0  # after the last stage nothing more is spent
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
    """The sum nearest to `room` that falling counts from 1 to `visual` can spend, of two equally near the lower.

    Falling counts are made of steps: one more token in the first i stages spends what these stages rule, and there are
    at most `visual - 1` steps. So this is change in coins, and fewer small coins than the largest one is worth are
    enough: of as many, some add up to a multiple of the largest, which fewer of the largest spend too.
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

"""Budgets and schedules: `keep` counts visual tokens averaged over the inputs of all decoder layers.

A schedule is solved from such a count, or given as it is.
"""

from functools import lru_cache
from itertools import pairwise, product

from lit_prune.errors import LitPruneError

Schedule = dict[int, int]  # {decoder layer: visual tokens kept from its input on}
Budget = int | Schedule  # an average to solve for, or the counts themselves


class OutOfReach(LitPruneError):
    """A budget that the layers before the first stage use up."""


def average(schedule: Schedule, visual: int, depth: int) -> float:
    """Visual tokens averaged over the inputs of `depth` decoder layers, of `visual` at the start."""
    total, now = 0, visual
    for layer in range(depth):
        now = min(now, schedule.get(layer, now))
        total += now
    return total / depth


def spans(layers: tuple[int, ...], depth: int) -> list[int]:
    """How many decoder layers each stage rules: from its own layer up to the next stage or the end."""
    return [end - start for start, end in zip(layers, (*layers[1:], depth), strict=True)]


def check_layers(layers: tuple[int, ...], depth: int) -> None:
    """Raise `LitPruneError` unless the pruning layers ascend and lie inside a decoder of `depth` layers."""
    if not layers or list(layers) != sorted(set(layers)):
        raise LitPruneError(f"pruning layers {list(layers)} must ascend, each once, and there must be at least one")
    if layers[0] < 0 or layers[-1] >= depth:
        raise LitPruneError(
            f"pruning layer {layers[0] if layers[0] < 0 else layers[-1]} is outside the model: "
            f"its decoder has {depth} layers, 0 to {depth - 1}"
        )


@lru_cache(maxsize=4096)
def solve(keep: int, visual: int, depth: int, layers: tuple[int, ...], shape: tuple[float, ...]) -> Schedule:
    """Schedule whose average is `keep`: counts near a multiple of `shape`, never rising, at least one token.

    The average is exact where whole counts allow it, else the nearest one, of two equally near the lower. Counts are
    searched around the real-valued solution; among those of the best average the one closest to `shape` wins.

    Raises `LitPruneError` if `keep` is above `visual` or below one, `OutOfReach` if it is used up by the layers before
    the first stage.
    """
    check_layers(layers, depth)
    if len(shape) != len(layers):
        raise LitPruneError(f"shape {list(shape)} needs one number for each pruning layer {list(layers)}")
    if not 1 <= keep <= visual:
        raise LitPruneError(f"keep={keep} must lie between 1 and the image's {visual} visual tokens")
    if keep == visual:
        return dict.fromkeys(layers, visual)
    ruled = spans(layers, depth)
    room = keep * depth - visual * layers[0]
    if room < sum(ruled):
        lowest = (visual * layers[0] + sum(ruled)) / depth
        raise OutOfReach(
            f"keep={keep} can't be reached: the {layers[0]} decoder layers before the first stage see all {visual} "
            f"visual tokens, so the average is at least {lowest:.1f}; prune earlier or keep more"
        )
    counts = _nearest_counts(room, ruled, _ideal(room, ruled, shape, visual), visual)
    return dict(zip(layers, counts, strict=True))


def given(schedule: Schedule, layers: tuple[int, ...]) -> Schedule:
    """The schedule itself, if it fits the pruning `layers`; a sample with fewer tokens than a count keeps them all.

    Raises `LitPruneError` for counts at other layers, below one, or rising.
    """
    if tuple(schedule) != layers:
        raise LitPruneError(
            f"the schedule {format_schedule(schedule)} counts tokens before layers {list(schedule)}, but this pruner's "
            f"stages are before layers {list(layers)}; write one count for each of them, in order"
        )
    counts = list(schedule.values())
    if min(counts) < 1 or any(a < b for a, b in pairwise(counts)):
        raise LitPruneError(f"the counts of schedule {format_schedule(schedule)} must be at least 1 and never rise")
    return dict(schedule)


def parse_budget(text: str) -> Budget:
    """`64` (an average) or `2:192,4:64,8:16` (layer:count of each stage); raises `LitPruneError` for anything else."""
    try:
        if ":" not in text:
            return int(text)
        pairs = (stage.split(":") for stage in text.split(","))
        return {int(layer): int(count) for layer, count in pairs}
    except ValueError as error:
        raise LitPruneError(
            f"budget {text!r}: write a number of visual tokens such as 64, or counts by layer such as 2:192,4:64"
        ) from error


def format_schedule(schedule: Schedule) -> str:
    """What `parse_budget` reads: `2:192,4:64`."""
    return ",".join(f"{layer}:{count}" for layer, count in schedule.items())


def _ideal(room: int, ruled: list[int], shape: tuple[float, ...], visual: int) -> list[float]:
    """Real-valued counts t * shape, clipped to [1, visual], that spend `room`; t by bisection."""

    def counts(t: float) -> list[float]:
        return [min(float(visual), max(1.0, t * s)) for s in shape]

    low, high = 0.0, visual / min(shape)
    for _ in range(80):
        t = (low + high) / 2
        spent = sum(n * k for n, k in zip(ruled, counts(t), strict=True))
        low, high = (t, high) if spent < room else (low, t)
    return counts(high)


def _nearest_counts(room: int, ruled: list[int], ideal: list[float], visual: int) -> tuple[int, ...]:
    """Whole counts that spend what is nearest to `room`, among those the nearest to `ideal` in relative terms."""
    reach = 3 if len(ideal) <= 4 else 1
    options = [range(max(1, int(k) - reach), min(visual, int(k) + reach + 1) + 1) for k in ideal]
    best, best_key = None, None
    for counts in product(*options):
        spent = sum(n * k for n, k in zip(ruled, counts, strict=True))
        falls = all(a >= b for a, b in pairwise(counts))
        if not falls:
            continue
        distance = sum(((k - i) / i) ** 2 for k, i in zip(counts, ideal, strict=True))
        key = (-abs(spent - room), -spent, -distance)
        if best_key is None or key > best_key:
            best, best_key = counts, key
    if best is None:
        raise LitPruneError(f"no falling schedule of whole tokens spends about {room} token layers over spans {ruled}")
    return best


def scale_layers(layers: tuple[int, ...], depth: int | None, host_depth: int) -> tuple[int, ...]:
    """Layers written for a decoder of `depth` layers, moved to one of `host_depth`; `None` means as written."""
    if depth is None or depth == host_depth:
        return layers
    return tuple(max(min(layer, 1), round(layer * host_depth / depth)) for layer in layers)

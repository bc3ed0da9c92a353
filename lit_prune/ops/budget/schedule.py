"""Schedules: whole counts per stage, solved from an average or given explicitly."""

from functools import lru_cache
from itertools import pairwise

from lit_prune.errors import LitPruneError
from lit_prune.ops.budget.grammar import Budget, Schedule, format_schedule, tokens
from lit_prune.ops.budget.nearest import nearest_counts


class OutOfReach(LitPruneError):
    """A budget that the layers before the first stage alone exceed."""


def average(schedule: Schedule, visual: int, depth: int) -> float:
    """Visual tokens averaged over the inputs of `depth` decoder layers, starting from `visual`."""
    total, now = 0, visual
    for layer in range(depth):
        now = min(now, schedule.get(layer, now))
        total += now
    return total / depth


def asked(budget: Budget, visual: int, depth: int) -> float:
    """Visual tokens, averaged over `depth` decoder layers, that a budget requests of a sample with `visual` tokens."""
    count = tokens(budget, visual)
    return average(count, visual, depth) if isinstance(count, dict) else float(min(count, visual))


def spans(layers: tuple[int, ...], depth: int) -> list[int]:
    """Number of decoder layers to which each stage's count applies: from its layer to the next stage or the end."""
    return [end - start for start, end in zip(layers, (*layers[1:], depth), strict=True)]


def check_layers(layers: tuple[int, ...], depth: int) -> None:
    """Raise `LitPruneError` unless the pruning layers ascend and are within a decoder of `depth` layers."""
    if not layers or list(layers) != sorted(set(layers)):
        raise LitPruneError(f"pruning layers {list(layers)} must ascend, each once, and there must be at least one")
    if layers[0] < 0 or layers[-1] >= depth:
        raise LitPruneError(
            f"pruning layer {layers[0] if layers[0] < 0 else layers[-1]} is outside the model: "
            f"its decoder has {depth} layers, 0 to {depth - 1}"
        )


@lru_cache(maxsize=4096)
def solve(keep: int, visual: int, depth: int, layers: tuple[int, ...], ratios: tuple[float, ...]) -> Schedule:
    """Schedule whose average is `keep`: counts near a multiple of `ratios`, non-increasing, at least one token.

    The average is exact if whole counts allow it, otherwise the nearest possible, of two equally near ones the lower.
    With up to four stages, counts stay within three tokens of the real-valued solution, since others would distort the
    ratios. Among schedules of the best average the one closest to `ratios` wins.

    Raises `LitPruneError` if `keep` is above `visual` or below one, `OutOfReach` if the layers before the first stage
    alone exceed it.
    """
    check_layers(layers, depth)
    if len(ratios) != len(layers):
        raise LitPruneError(f"stage_ratios {list(ratios)} needs one number for each pruning layer {list(layers)}")
    if not all(0 < part < float("inf") for part in ratios):
        raise LitPruneError(f"stage_ratios {list(ratios)}: the relative counts of the stages must be numbers above 0")
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
    counts = nearest_counts(room, ruled, _ideal(room, ruled, ratios, visual), visual)
    if counts is None:
        raise LitPruneError(
            f"stage_ratios {list(ratios)} must not rise: later stages can't keep more than earlier ones"
        )
    return dict(zip(layers, counts, strict=True))


def given(schedule: Schedule, layers: tuple[int, ...]) -> Schedule:
    """Validate a schedule for the pruning `layers` and return it; a sample with fewer tokens than a count keeps all.

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


def _ideal(room: int, ruled: list[int], ratios: tuple[float, ...], visual: int) -> list[float]:
    """Real-valued counts t * ratios, clipped to [1, visual], whose total is `room`; t by bisection."""

    def counts(t: float) -> list[float]:
        return [min(float(visual), max(1.0, t * s)) for s in ratios]

    low, high = 0.0, visual / min(ratios)
    for _ in range(80):
        t = (low + high) / 2
        spent = sum(n * k for n, k in zip(ruled, counts(t), strict=True))
        low, high = (t, high) if spent < room else (low, t)
    return counts(high)


def scale_layers(layers: tuple[int, ...], depth: int | None, host_depth: int) -> tuple[int, ...]:
    """Scale layers written for a decoder of `depth` layers to one of `host_depth`; `None` means as written."""
    if depth is None or depth == host_depth:
        return layers
    return tuple(max(min(layer, 1), round(layer * host_depth / depth)) for layer in layers)

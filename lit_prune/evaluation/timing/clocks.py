"""Clocks for the CPU and for CUDA, and a threshold for noise."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from lit_prune.errors import LitPruneError

NOISY = 0.1  # spread (interquartile range over median) above which a time is unreliable

Clock = Callable[[Callable[[], Any]], tuple[float, Any]]  # runs some work; its seconds and its result


def wall_clock(work: Callable[[], Any]) -> tuple[float, Any]:
    """Time by wall clock."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def cpu_clock(work: Callable[[], Any]) -> tuple[float, Any]:
    """Processor time of this thread, for shared machines; valid for single-threaded work only."""
    start = time.thread_time()
    result = work()
    return time.thread_time() - start, result


def cuda_clock(work: Callable[[], Any]) -> tuple[float, Any]:
    """Wall time from an idle device to the end of its last kernel, by CUDA events."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    result = work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3, result


def clock_for(name: str, device: torch.device) -> Clock:
    """Clock `wall` (on CUDA by events) or `cpu`; raises `LitPruneError` if processor time would be misleading."""
    if name == "wall":
        return cuda_clock if device.type == "cuda" else wall_clock
    if device.type != "cpu" or torch.get_num_threads() != 1:
        raise LitPruneError("clock `cpu` is the time of one thread: it needs the CPU and threads=1")
    return cpu_clock


def spread(values: Sequence[float]) -> float | None:
    """Interquartile range over the median; None for a single value."""
    if len(values) < 2:
        return None
    low, middle, high = np.percentile(values, [25, 50, 75])
    return float((high - low) / middle)


def noisy(spread: float | None) -> bool:
    """True if a time with this spread is unreliable."""
    return spread is None or spread > NOISY

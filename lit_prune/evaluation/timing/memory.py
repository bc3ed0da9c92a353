"""Peak memory of some work, beyond what is allocated when it starts."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """Peak bytes allocated by PyTorch while `work` runs, minus those allocated before.

    On the CPU from the profiler's record of every allocation, which is exact and slow: don't time the same run.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    # The public events hold allocations outside of operators only; these hold all, frees as negative numbers.
    events = (event for event in record.profiler.kineto_results.events() if event.name() == "[memory]")
    return max(0, *accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))

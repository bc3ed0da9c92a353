"""Lengths of a forward as Python numbers, so that packing need not wait for the device."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Lengths:
    """Lengths of each sample that are known without reading from the device.

    Args:
        visual: visual columns present now.
        valid: real columns present now, text included.
    """

    visual: list[int]
    valid: list[int]

    def drop(self, counts: list[int]) -> bool:
        """Keep at most `counts` visual columns of each sample; says whether any went."""
        kept = [min(now, count) for now, count in zip(self.visual, counts, strict=True)]
        gone = [now - left for now, left in zip(self.visual, kept, strict=True)]
        self.visual = kept
        self.valid = [length - less for length, less in zip(self.valid, gone, strict=True)]
        return any(gone)

    def after(self, counts: list[int] | None) -> "Lengths | None":
        """Lengths without what `drop` takes, these left as they are; None if the counts aren't known."""
        if counts is None:
            return None
        left = Lengths(self.visual, self.valid)
        left.drop(counts)
        return left


def on_device(counts: list[int], device: torch.device) -> Tensor:
    """Counts as a tensor; equal ones without a copy from the host, which would wait for the device."""
    if len(set(counts)) == 1:
        return torch.full((len(counts),), counts[0], device=device)
    return torch.tensor(counts, device=device)

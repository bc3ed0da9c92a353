"""Counts per stage for the samples of a forward, by their numbers of visual tokens and images."""

import logging

import torch
from torch import Tensor

from lit_prune.ops.budget import Budget, Schedule, asked, average
from lit_prune.pruners.base import PruningMethod

log = logging.getLogger(__name__)


class Plans:
    """Schedules of one pruner at one budget; the first sample that exceeds it is reported.

    Args:
        pruner: the method.
        keep: budget of a sample.
        depth: decoder layers.
    """

    def __init__(self, pruner: PruningMethod, keep: Budget, depth: int) -> None:
        self.pruner, self.keep, self.depth = pruner, keep, depth
        self.reported = False

    def counts(self, totals: list[int], images: list[int]) -> dict[int, list[int]]:
        """{decoder layer: kept tokens of each sample}, for samples of so many visual tokens and images."""
        stages, samples = self.pruner.stages(self.depth), list(zip(totals, images, strict=True))
        nothing = dict.fromkeys(stages, 0)
        plans = {(n, k): self.pruner.plan(self.keep, n, self.depth, k) if n else nothing for n, k in set(samples)}
        for (total, count), plan in plans.items():
            self._report(total, count, plan)
        return {layer: [plans[sample][layer] for sample in samples] for layer in stages}

    def asked(self, total: int) -> float:
        """The budget of a sample: all its `total` visual tokens where it has fewer."""
        return asked(self.keep, total, self.depth)

    def check_arrived(self, counts: dict[int, list[int]], alive: Tensor, sizes: Tensor) -> None:
        """Report a sample of several images whose vision tower let too many tokens through to layer 0.

        The tower prunes each image without knowing of the others. `alive` marks the tokens that are left (batch,
        columns), `sizes` are each image's at the start (batch, images).
        """
        if self.reported:
            return
        rows = torch.stack([alive.sum(1), sizes.sum(1), (sizes > 0).sum(1)], 1).tolist()
        for row, (left, total, images) in enumerate(rows):
            plan = {layer: count[row] for layer, count in counts.items()}
            self._report(total, images, {**plan, 0: max(plan[0], left)})

    def _report(self, total: int, images: int, plan: Schedule) -> None:
        """Log a sample that exceeds its budget by more than the rounding of whole counts."""
        planned = average(plan, total, self.depth)
        if self.reported or planned <= self.asked(total) + 0.5:
            return
        self.reported = True
        log.warning(
            "a prompt with %d visual tokens in %d %s can't be pruned to keep=%s; it is pruned as far as possible, to "
            "%.1f tokens on average. Further prompts are not reported: a record's trace.excess() has each",
            total,
            images,
            "image" if images == 1 else "images",
            self.keep,
            planned,
        )

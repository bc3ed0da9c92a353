"""The full model: no pruning, as a method like any other."""

from lit_prune.ops.budget import Budget, Schedule, Share
from lit_prune.pruners.method import PruningMethod, Stage


class Full(PruningMethod):
    """Keep every visual token: the null method, for teachers, baselines and recordings of the plain model."""

    title = "full model"
    default_keep: Budget | None = Share(100.0)

    def walk(self, depth: int) -> tuple[Stage, ...]:
        """No stages."""
        return ()

    def counts(self, keep: int, visual: int, depth: int) -> Schedule:
        """No stages, so no counts; whatever the budget, all tokens stay."""
        return {}


UNPRUNED = Full()  # has neither parameters nor state, so one serves all

"""Full model: the null pruning method."""

from lit_prune.ops.budget import Budget, Schedule, Share
from lit_prune.pruners.method import PruningMethod, Stage


class Full(PruningMethod):
    """Keep every visual token; for teachers, baselines and recordings of the plain model."""

    title = "full model"
    default_keep: Budget | None = Share(100.0)

    def walk(self, depth: int) -> tuple[Stage, ...]:
        """No stages."""
        return ()

    def counts(self, keep: int, visual: int, depth: int) -> Schedule:
        """No counts: all tokens stay, whatever the budget."""
        return {}


UNPRUNED = Full()  # shared, since it has neither parameters nor state

"""Chain of a method in the vision tower and one in the decoder."""

from lit_prune.errors import LitPruneError, check_number
from lit_prune.ops.budget import Schedule, solve
from lit_prune.pruners.base import Pruner, PruningMethod, Stage, VisionPruner


class Chain(PruningMethod):
    """Prune to a middle budget in the vision tower, then to the budget in the decoder [ours].

    With all tokens, a decoder's first layers alone exceed an ultra-low budget; after pruning in the tower they don't.
    The host walks the stages of both: the tower's arrival at layer 0 is stage 0, so that a repair adapter's `stages`
    are those of the decoder's method plus one.

    Args:
        first: tower method, with one decoder stage at layer 0.
        then: decoder method, from layer 1 on.
        middle: visual tokens that leave the tower, in multiples of the budget.
    """

    def __init__(self, first: PruningMethod, then: PruningMethod, middle: float = 3.0) -> None:
        super().__init__()
        if not isinstance(first, VisionPruner) or not isinstance(then, Pruner):
            raise LitPruneError("a chain takes a method of the vision tower first, then one of the decoder")
        if 0 in then.layers:
            raise LitPruneError("in a chain the decoder's method starts at layer 1: layer 0 is where the tower arrives")
        check_number("pruner.middle", middle, above=0)
        self.first, self.then, self.middle = first, then, middle

    @property
    def title(self) -> str:
        """Both titles, or "" if either method has none."""
        return f"{self.then.title} after {self.first.title}" if self.first.title and self.then.title else ""

    @property
    def repairs(self) -> bool:
        """True if the decoder method includes a repair adapter."""
        return self.then.repairs

    @property
    def tower(self) -> VisionPruner:
        """The tower method."""
        return self.first

    def walk(self, depth: int) -> tuple[Stage, ...]:
        """The tower's arrival at layer 0, then the stages of the decoder method."""
        return (*self.first.walk(depth), *self.then.walk(depth))

    def leaving(self, keep: int, visual: int) -> int:
        """The middle budget."""
        return min(visual, max(1, round(keep * self.middle)))

    def counts(self, keep: int, visual: int, depth: int) -> Schedule:
        """The middle budget at layer 0, and counts of the decoder method for the rest of the budget."""
        solve(keep, visual, depth, (0,), (1.0,))  # raises if no method could meet the budget
        between = self.leaving(keep, visual)
        return {0: between, **self.then.schedule(keep, between, depth)}

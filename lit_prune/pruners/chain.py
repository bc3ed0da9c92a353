"""One method inside the vision tower, another in the decoder."""

from lit_prune.errors import LitPruneError, check_number
from lit_prune.ops.budget import Schedule, solve
from lit_prune.pruners.base import Pruner, PruningMethod, Stage, VisionPruner


class Chain(PruningMethod):
    """A method of the tower down to a middle budget, then a method of the decoder down to the budget [ours].

    A decoder's first layers in full already cost more than an ultra-low budget; after a tower that lets few tokens
    through they don't. The host walks the stages of both: the tower's arrival at layer 0 is stage 0, so that a repair
    adapter's `stages` are those of the decoder's method plus one.

    Args:
        first: method of the tower, with one decoder stage at layer 0.
        then: method of the decoder, from layer 1 on.
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
        """Both names, where both have one."""
        return f"{self.then.title} after {self.first.title}" if self.first.title and self.then.title else ""

    @property
    def repairs(self) -> bool:
        """As the decoder's method says."""
        return self.then.repairs

    @property
    def tower(self) -> VisionPruner:
        """The first method."""
        return self.first

    def walk(self, depth: int) -> tuple[Stage, ...]:
        """The tower's arrival at layer 0, then the stages of the decoder's method."""
        return (*self.first.walk(depth), *self.then.walk(depth))

    def leaving(self, keep: int, visual: int) -> int:
        """The middle budget."""
        return min(visual, max(1, round(keep * self.middle)))

    def counts(self, keep: int, visual: int, depth: int) -> Schedule:
        """What leaves the tower at layer 0, and the decoder's method solved for what is left of the budget."""
        solve(keep, visual, depth, (0,), (1.0,))  # raises where no method could meet it
        between = self.leaving(keep, visual)
        return {0: between, **self.then.schedule(keep, between, depth)}

"""One method inside the vision tower, another in the decoder."""

from dataclasses import replace

from torch import Tensor

from lit_prune.errors import LitPruneError, check_number
from lit_prune.ops.budget import Budget, Schedule, given, solve, tokens
from lit_prune.pruners.base import AttentionRows, Context, Dims, Kept, Pruner, VisionContext


class Chain(Pruner):
    """A method of the tower down to a middle budget, then a method of the decoder down to the budget [ours].

    A decoder's first layers in full already cost more than an ultra-low budget; behind a tower that lets few tokens
    through they don't. Stages of the chain are counted from the tower's arrival at layer 0, so that a repair adapter's
    `stages` are those of the decoder's method plus one.

    Args:
        first: method of the tower, with one decoder stage at layer 0.
        then: method of the decoder, from layer 1 on.
        middle: visual tokens that leave the tower, in multiples of the budget.
    """

    acts_in_tower = True

    def __init__(self, first: Pruner, then: Pruner, middle: float = 3.0) -> None:
        if not first.acts_in_tower or then.acts_in_tower:
            raise LitPruneError("a chain takes a method of the vision tower first, then one of the decoder")
        if 0 in then.layers:
            raise LitPruneError("in a chain the decoder's method starts at layer 1: layer 0 is where the tower arrives")
        check_number("pruner.middle", middle, above=0)
        super().__init__([0, *then.layers], None, None)
        self.first, self.then, self.middle = first, then, middle
        self.needs_embeds = first.needs_embeds or then.needs_embeds
        self.needs_states = first.needs_states or then.needs_states
        self.needs_keys = first.needs_keys or then.needs_keys
        self.needs_values = first.needs_values

    @property
    def title(self) -> str:
        """Both names, where both have one."""
        return f"{self.then.title} after {self.first.title}" if self.first.title and self.then.title else ""

    @property
    def repairs(self) -> bool:
        """As the decoder's method says."""
        return self.then.repairs

    @property
    def random(self) -> bool:
        """True if either method draws."""
        return self.first.random or self.then.random

    def redraw(self, by: int) -> None:
        """Move the seeds of both methods on."""
        self.first.redraw(by)
        self.then.redraw(by)

    def stages(self, depth: int) -> tuple[int, ...]:
        """Layer 0, then those of the decoder's method."""
        return (0, *self.then.stages(depth))

    def _between(self, keep: int, visual: int) -> int:
        return min(visual, max(1, round(keep * self.middle)))

    def schedule(self, keep: Budget, visual: int, depth: int) -> Schedule:
        """What leaves the tower at layer 0, and the decoder's method solved for what is left of the budget."""
        keep = tokens(keep, visual)
        if isinstance(keep, dict):
            return given(keep, self.stages(depth))
        solve(keep, visual, depth, (0,), (1.0,))  # raises where no method could meet it
        between = self._between(keep, visual)
        return {0: between, **self.then.schedule(keep, between, depth)}

    def vision_schedule(self, keep: int, visual: int, depth: int) -> Schedule:
        """That of the tower's method, for the middle budget."""
        return self.first.vision_schedule(self._between(keep, visual), visual, depth)

    def image_side(self, keep: int, side: int) -> int:
        """That of the tower's method, for the middle budget."""
        return self.first.image_side(self._between(keep, side * side), side)

    def prune_vision(self, context: VisionContext) -> Kept:
        """The tower's method."""
        return self.first.prune_vision(context)

    def exact(self, stage: int) -> bool:
        """As the method of that stage says."""
        return self.first.exact(0) if stage == 0 else self.then.exact(stage - 1)

    def reads(self, stage: int) -> AttentionRows | None:
        """As the method of that stage says."""
        return self.first.reads(0) if stage == 0 else self.then.reads(stage - 1)

    def build(self, dims: Dims) -> None:
        """Both methods' parameters."""
        self.first.build(dims)
        self.then.build(dims)

    def prune(self, context: Context) -> Kept:
        """The method of that stage."""
        if context.stage == 0:
            return self.first.prune(context)
        return self.then.prune(replace(context, stage=context.stage - 1))

    def stage_flops(self, stage: int, visual: Tensor, text: Tensor, width: int, kept: Tensor) -> Tensor:
        """As the method of that stage says."""
        method = self.first if stage == 0 else self.then
        return method.stage_flops(max(0, stage - 1), visual, text, width, kept)

    def vision_flops(self, visual: Tensor, kept: Tensor, width: int) -> Tensor:
        """Those of the tower's method."""
        return self.first.vision_flops(visual, kept, width)

    def anneal(self, tau: float, noise: float) -> None:
        """Temperature and noise of both methods."""
        self.first.anneal(tau, noise)
        self.then.anneal(tau, noise)

    @property
    def free(self) -> bool:
        """Whether the decoder's method keeps as many as it likes."""
        return self.then.free

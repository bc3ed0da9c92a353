"""The contract between a pruning method of the vision tower and the model that hosts it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_prune.errors import LitPruneError, check_number, check_numbers
from lit_prune.ops.budget import Schedule, check_layers, scale_layers, solve
from lit_prune.pruners.contexts import Context, Kept, VisionContext
from lit_prune.pruners.method import Pruner, PruningMethod, Stage


class Arrived(Pruner):
    """Stage at decoder layer 0, where tokens dropped in the vision tower leave the sequence; keeps all others."""

    def __init__(self) -> None:
        super().__init__([0])

    def prune(self, context: Context) -> Kept:
        """Keep every token that the tower kept."""
        return Kept(context.alive)


class VisionPruner(PruningMethod):
    """Base class of vision-tower methods: the decoder gets the final budget from layer 0 on.

    Args:
        vision_layers: tower layers at whose input patches leave, ascending; -1: after the layer that gives features.
        vision_stage_ratios: patches after each stage in multiples of the budget, non-increasing; by default 1 for all,
            which suits methods with one stage.
        vision_depth: number of tower layers, up to the features, that `vision_layers` is written for; they are scaled
            to the host's. `None`: as written.
        arrival: pruner at decoder layer 0, applied to the tokens that arrive from the tower; by default keeps all.
    """

    needs_values: bool = False
    measured: str | None = None  # what `threshold` is compared with, (tiles,), by its key in `VisionContext.memory`
    one_head: bool = False  # attention as of a single head as wide as all, in place of the mean over heads
    reads_next: bool = False  # attention and keys of the layer after the stage, where the tower gives them
    sized: bool = False  # whether stages return `Kept.sizes`, which enter the attention of later layers

    def __init__(
        self,
        vision_layers: Sequence[int] = (-1,),
        vision_stage_ratios: Sequence[float] | None = None,
        vision_depth: int | None = None,
        arrival: Pruner | None = None,
    ) -> None:
        super().__init__()
        if hasattr(type(self), "prune"):
            raise LitPruneError(
                f"{type(self).__name__}.prune: what a method of the vision tower decides before decoder layer 0 is a "
                f"pruner of its own since version 0.2, passed to VisionPruner as `arrival`"
            )
        check_numbers("pruner.vision_layers", vision_layers, least=-1, whole=True)
        check_numbers("pruner.vision_stage_ratios", vision_stage_ratios or (), above=0)
        check_number("pruner.vision_depth", vision_depth, least=1, whole=True)
        self.vision_layers = [int(layer) for layer in vision_layers]
        self.vision_stage_ratios = (
            [1.0] * len(self.vision_layers) if vision_stage_ratios is None else [float(x) for x in vision_stage_ratios]
        )
        self.vision_depth = vision_depth
        self.arrival = Arrived() if arrival is None else arrival

    @property
    def tower(self) -> "VisionPruner":
        """This method."""
        return self

    def walk(self, depth: int) -> tuple[Stage, ...]:
        """The arrival at decoder layer 0, where tokens dropped in the tower leave the sequence."""
        return self.arrival.walk(depth)

    def counts(self, keep: int, visual: int, depth: int) -> Schedule:
        """The budget at layer 0."""
        return dict(solve(keep, visual, depth, self.stages(depth), (1.0,)))

    def vision_schedule(self, keep: int, visual: int, depth: int) -> Schedule:
        """{tower layer: patches kept per tile of `visual` from its input on}, at most all.

        `depth` layers lead to the features; a stage at `depth` comes after them. By default each stage keeps its
        entry of `vision_stage_ratios` times the budget.
        """
        inside = tuple(layer for layer in self.vision_layers if layer >= 0)
        layers = scale_layers(inside, self.vision_depth, depth)
        layers += (depth,) * (len(self.vision_layers) - len(inside))
        check_layers(layers, depth + 1)
        if len(self.vision_stage_ratios) != len(layers):
            raise LitPruneError(
                f"vision_stage_ratios {self.vision_stage_ratios} needs one number for each of {self.vision_layers}"
            )
        counts = (min(visual, round(keep * part)) for part in self.vision_stage_ratios)
        return dict(zip(layers, counts, strict=True))

    def prune_vision(self, context: VisionContext) -> Kept:
        """Decision of one stage inside the vision tower."""
        raise NotImplementedError

    def image_side(self, keep: int, side: int) -> int:
        """Patches along each side of the tower's input, at most `side`; fewer scale the image down."""
        return side

    def vision_flops(self, visual: Tensor, kept: Tensor, width: int, heads: int) -> Tensor:
        """FLOPs of a stage that keeps `kept` of `visual` patches, in a tower of hidden size `width` and `heads` heads.

        The host's projections are counted separately.
        """
        return torch.zeros_like(visual, dtype=torch.float64)

"""The contract between a pruning method of the decoder and the model that hosts it.

A pruner names the decoder layers at which it acts and what it needs there, and scores visual tokens. It never sees the
model, and nobody above it asks for its class.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lit_prune.errors import LitPruneError, check_number, check_numbers
from lit_prune.ops import selection
from lit_prune.ops.budget import Budget, Schedule, check_layers, given, scale_layers, solve, tokens
from lit_prune.ops.budget.schedule import OutOfReach
from lit_prune.pruners.contexts import AttentionRows, Context, Dims, Kept


@dataclass(frozen=True)
class Stage:
    """One pruning stage of the decoder: the pruner that decides at the input of `layer`, as its stage `index`."""

    layer: int
    pruner: "Pruner"
    index: int


class PruningMethod(nn.Module):
    """Base of everything that can be attached: a `Pruner`, a `VisionPruner`, a `Chain` of both, or `Full`.

    The host asks `walk` for the stages of the decoder and `tower` for the method inside the vision tower, and knows
    nothing else of how a method is put together. Methods that are made of others need no code to forward to them: what
    every part has to do (`build`, `anneal`, `redraw`) reaches all parts.
    """

    title: str = ""  # the method's name as people write it; without one, that of its file stands for it
    repairs: bool = False  # whether a repair adapter belongs to the method as published
    tower: "PruningMethod | None" = None  # the `VisionPruner` that acts inside the vision tower
    default_keep: Budget | None = None  # budget where none is given; None: one has to be given

    def walk(self, depth: int) -> tuple[Stage, ...]:
        """Stages in a decoder of `depth` layers, ascending; raises `LitPruneError` if one lies outside."""
        raise NotImplementedError

    def stages(self, depth: int) -> tuple[int, ...]:
        """Pruning layers in a decoder of `depth` layers; raises `LitPruneError` if one lies outside."""
        return tuple(stage.layer for stage in self.walk(depth))

    def counts(self, keep: int, visual: int, depth: int) -> Schedule:
        """Counts per stage whose average over the decoder's layers is `keep`; raises `LitPruneError` out of reach."""
        raise NotImplementedError

    def schedule(self, keep: Budget, visual: int, depth: int) -> Schedule:
        """Counts per stage for a budget of `keep` visual tokens averaged over the decoder's layers, or as given.

        A share is one of `visual`.
        """
        keep = tokens(keep, visual)
        return given(keep, self.stages(depth)) if isinstance(keep, dict) else self.counts(keep, visual, depth)

    def plan(self, keep: Budget, visual: int, depth: int, images: int = 1) -> Schedule:
        """Schedule of one sample with `visual` visual tokens of `images` images; with `keep` or fewer, all stay.

        Every stage keeps a token of each image. Where that, or the layers before the first stage, take more than
        `keep`, this is the schedule nearest to it, above it.
        """
        keep = tokens(keep, visual)
        if isinstance(keep, dict):
            return {layer: max(count, images) for layer, count in self.schedule(keep, visual, depth).items()}
        keep, lowest = min(keep, visual), dict.fromkeys(self.stages(depth), images)
        if 1 <= keep < images:
            return lowest
        try:
            schedule = self.schedule(keep, visual, depth)
            # Counts are solved for what is above one token of each image.
            if min(schedule.values(), default=images) < images:
                others = images - 1
                rest = self.schedule(keep - others, visual - others, depth)
                schedule = {layer: count + others for layer, count in rest.items()}
        except OutOfReach:
            return lowest
        return schedule

    def nominal_schedule(self, keep: Budget, dims: Dims) -> Schedule | None:
        """Schedule to show before anything ran; None where images differ and the budget doesn't fit the nominal one.

        Raises `LitPruneError` where all images have `dims.visual` tokens and `keep` can't be met.
        """
        if not dims.varies:
            return self.schedule(keep, dims.visual, dims.depth)
        self.stages(dims.depth)
        keep = tokens(keep, dims.visual)
        try:
            return self.schedule(keep if isinstance(keep, dict) else min(keep, dims.visual), dims.visual, dims.depth)
        except OutOfReach:
            return None

    def leaving(self, keep: int, visual: int) -> int:
        """Of `visual` patches, how many leave the vision tower for a budget of `keep`."""
        return visual if self.tower is None else keep

    def arriving(self, schedule: Schedule, visual: int) -> int:
        """Of `visual` visual tokens, how many arrive at decoder layer 0 under a schedule."""
        return visual if self.tower is None else min(visual, schedule[0])

    @property
    def parts(self) -> list["PruningMethod"]:
        """Methods that this one is made of; none of most."""
        return [part for part in self.modules() if isinstance(part, PruningMethod) and part is not self]

    @property
    def random(self) -> bool:
        """True if the method draws from a `seed` of its own, so that several draws are worth measuring."""
        return any(hasattr(part, "seed") for part in (self, *self.parts))

    def redraw(self, by: int) -> None:
        """Move the seed on; nothing for methods that draw nothing."""
        for part in (self, *self.parts):
            if hasattr(part, "seed"):
                part.seed += by

    @property
    def free(self) -> bool:
        """True if the method keeps as many as it likes, so that only a budget loss can hold it to its budget."""
        return any(part.free for part in self.parts)

    def anneal(self, tau: float, noise: float) -> None:
        """Set temperature and noise of the training gates, between steps; nothing for methods that don't train."""
        for part in self.parts:
            part.anneal(tau, noise)

    def build(self, dims: Dims) -> None:
        """Create what depends on the host's sizes, once; nothing for methods without parameters."""
        for part in self.parts:
            part.build(dims)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as they would stand in a YAML file."""
        return init_args(self)


class Pruner(PruningMethod):
    """Base of methods of the decoder: stages at `layers`, counts solved from the budget, top-k of `score`.

    Args:
        layers: decoder layers at whose input tokens are dropped, ascending, counted from 0.
        stage_ratios: relative counts of the stages, never rising; equal counts by default.
        depth: depth of the decoder that `layers` is written for; they are scaled to the host's. `None`: as written.
    """

    attention: AttentionRows | None = None
    needs_embeds: bool = False
    needs_states: bool = False
    needs_keys: bool = False

    def __init__(
        self, layers: Sequence[int], stage_ratios: Sequence[float] | None = None, depth: int | None = None
    ) -> None:
        super().__init__()
        check_numbers("pruner.layers", layers, whole=True)
        check_numbers("pruner.stage_ratios", stage_ratios or (), above=0)
        check_number("pruner.depth", depth, least=1, whole=True)
        self.layers = [int(layer) for layer in layers]
        self.stage_ratios = [1.0] * len(self.layers) if stage_ratios is None else [float(s) for s in stage_ratios]
        self.depth = depth

    def stages(self, depth: int) -> tuple[int, ...]:
        """`layers`, scaled to a decoder of `depth` layers."""
        layers = scale_layers(tuple(self.layers), self.depth, depth)
        check_layers(layers, depth)
        return layers

    def walk(self, depth: int) -> tuple[Stage, ...]:
        """A stage at each of `stages`."""
        return tuple(Stage(layer, self, index) for index, layer in enumerate(self.stages(depth)))

    def counts(self, keep: int, visual: int, depth: int) -> Schedule:
        """Counts near a multiple of `stage_ratios`."""
        return dict(solve(keep, visual, depth, self.stages(depth), tuple(self.stage_ratios)))

    def exact(self, stage: int) -> bool:
        """True if a stage keeps `context.count` tokens of each sample, or all where there are fewer."""
        return type(self).prune is Pruner.prune

    def reads(self, stage: int) -> AttentionRows | None:
        """Attention rows that a stage, counted from 0, wants; by default the same for all."""
        return self.attention

    def score(self, context: Context) -> Float[Tensor, "batch visual"]:
        """Score of every visual token, higher is kept."""
        raise NotImplementedError

    def prune(self, context: Context) -> Kept:
        """Keep the `context.count` best tokens of each sample, shared among its images."""
        scores = self.score(context)
        return Kept(selection.top_k(scores, context.alive, context.count, context.images), scores=scores)

    def flops(self, visual: Tensor, text: Tensor, width: int, kept: Tensor) -> Tensor:
        """FLOPs of deciding one stage (1 MAC = 2), beside the attention rows, which the host counts.

        Per sample: `visual` tokens came, `kept` of them stay, `text` rows were looked at.
        """
        return torch.zeros_like(visual, dtype=torch.float64)


def init_args(module: nn.Module) -> dict[str, Any]:
    """Constructor arguments of a plug-in, read back from attributes of the same names."""
    parameters = list(inspect.signature(type(module).__init__).parameters.values())[1:]
    names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]  # a class without its own
    missing = [name for name in names if not hasattr(module, name)]
    if missing:
        raise LitPruneError(
            f"{type(module).__name__} can't be saved: it keeps no attribute for its argument(s) {', '.join(missing)}; "
            f"store each constructor argument under its own name"
        )
    values = {name: getattr(module, name) for name in names}
    return {name: spec(value) if isinstance(value, PruningMethod) else value for name, value in values.items()}


def spec(module: nn.Module) -> dict[str, Any]:
    """A plug-in as a configuration names it: its class and its arguments."""
    kind = type(module)
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": module.config()}

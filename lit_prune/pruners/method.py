"""The contract between a pruning method of the decoder and the model that hosts it.

A pruner declares the decoder layers at which it acts and what it needs there, and scores visual tokens. It never
accesses the model, and no caller depends on its class.
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
    """Pruning stage of the decoder: `pruner` decides at the input of `layer`, as its stage `index`."""

    layer: int
    pruner: "Pruner"
    index: int


class PruningMethod(nn.Module):
    """Base class of all methods: a `Pruner`, a `VisionPruner`, a `Chain` of both, or `Full`.

    The host reads the decoder's stages from `walk` and the vision tower's method from `tower`, and depends on nothing
    else of a method's structure. Composite methods need no forwarding code: `build`, `anneal`, `relax` and `redraw`
    reach all parts.
    """

    title: str = ""  # published name; if empty, the name of the method's file is used
    positions: str = "original"  # of kept tokens in the authors' code, as in `HostOptions`; a title names others
    repairs: bool = False  # True if the published method includes a repair adapter
    tower: "PruningMethod | None" = None  # the `VisionPruner` that acts inside the vision tower
    default_keep: Budget | None = None  # default budget; None: a budget is required

    def walk(self, depth: int) -> tuple[Stage, ...]:
        """Stages in a decoder of `depth` layers, ascending; raises `LitPruneError` if one is outside it."""
        raise NotImplementedError

    def stages(self, depth: int) -> tuple[int, ...]:
        """Pruning layers in a decoder of `depth` layers; raises `LitPruneError` if one is outside it."""
        return tuple(stage.layer for stage in self.walk(depth))

    def counts(self, keep: int, visual: int, depth: int) -> Schedule:
        """Counts per stage that average to `keep` over the decoder's layers; raises `LitPruneError` if out of reach."""
        raise NotImplementedError

    def schedule(self, keep: Budget, visual: int, depth: int) -> Schedule:
        """Counts per stage for a budget of `keep` visual tokens averaged over the decoder's layers.

        A share is resolved for `visual` tokens; counts by layer are validated and returned.
        """
        keep = tokens(keep, visual)
        return given(keep, self.stages(depth)) if isinstance(keep, dict) else self.counts(keep, visual, depth)

    def plan(self, keep: Budget, visual: int, depth: int, images: int = 1) -> Schedule:
        """Schedule of one sample with `visual` visual tokens of `images` images; with `keep` or fewer, all stay.

        Every stage keeps at least one token per image. If that, or the layers before the first stage, exceed `keep`,
        the lowest possible schedule is returned.
        """
        keep = tokens(keep, visual)
        if isinstance(keep, dict):
            return {layer: max(count, images) for layer, count in self.schedule(keep, visual, depth).items()}
        keep, lowest = min(keep, visual), dict.fromkeys(self.stages(depth), images)
        if 1 <= keep < images:
            return lowest
        try:
            schedule = self.schedule(keep, visual, depth)
            # Reserve one token per image and solve for the rest.
            if min(schedule.values(), default=images) < images:
                others = images - 1
                rest = self.schedule(keep - others, visual - others, depth)
                schedule = {layer: count + others for layer, count in rest.items()}
        except OutOfReach:
            return lowest
        return schedule

    def nominal_schedule(self, keep: Budget, dims: Dims) -> Schedule | None:
        """Schedule to report before any forward; None if image sizes vary and the budget doesn't fit the nominal one.

        Raises `LitPruneError` if all images have `dims.visual` tokens and `keep` can't be met.
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
        """Number of patches, of `visual`, that leave the vision tower for a budget of `keep`."""
        return visual if self.tower is None else keep

    def arriving(self, schedule: Schedule, visual: int) -> int:
        """Number of visual tokens, of `visual`, that arrive at decoder layer 0 under a schedule."""
        return visual if self.tower is None else min(visual, schedule[0])

    @property
    def parts(self) -> list["PruningMethod"]:
        """Component methods; empty for most methods."""
        return [part for part in self.modules() if isinstance(part, PruningMethod) and part is not self]

    @property
    def random(self) -> bool:
        """True if the method has a random `seed`, so that several draws are worth measuring."""
        return any(hasattr(part, "seed") for part in (self, *self.parts))

    def redraw(self, by: int) -> None:
        """Add `by` to the seed; does nothing for deterministic methods."""
        for part in (self, *self.parts):
            if hasattr(part, "seed"):
                part.seed += by

    @property
    def free(self) -> bool:
        """True if the method itself decides how many tokens to keep, so that only a budget loss enforces the budget."""
        return any(part.free for part in self.parts)

    def anneal(self, tau: float, noise: float) -> None:
        """Set temperature and noise of the training gates, between steps; does nothing for untrained methods."""
        for part in self.parts:
            part.anneal(tau, noise)

    def relax(self, surplus: float) -> None:
        """Set, between training steps, the share of the tokens above the scheduled counts that are kept all the same.

        1: nothing is dropped, 0: as scheduled. Does nothing for methods whose counts are not raised in training.
        """
        for part in self.parts:
            part.relax(surplus)

    def build(self, dims: Dims) -> None:
        """Create parameters for the host's sizes, once; does nothing for methods without parameters."""
        for part in self.parts:
            part.build(dims)

    def config(self) -> dict[str, Any]:
        """Constructor arguments, as in a YAML file."""
        return init_args(self)


class Pruner(PruningMethod):
    """Base class of decoder methods: stages at `layers`, counts solved from the budget, top-k of `score`.

    Args:
        layers: decoder layers at whose input tokens are dropped, ascending, counted from 0.
        stage_ratios: relative counts of the stages, non-increasing; equal counts by default.
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
        """One stage at each layer of `stages`."""
        return tuple(Stage(layer, self, index) for index, layer in enumerate(self.stages(depth)))

    def counts(self, keep: int, visual: int, depth: int) -> Schedule:
        """Counts near a multiple of `stage_ratios`."""
        return dict(solve(keep, visual, depth, self.stages(depth), tuple(self.stage_ratios)))

    def exact(self, stage: int) -> bool:
        """True if a stage keeps exactly `context.count` tokens of each sample, or all if it has fewer."""
        return type(self).prune is Pruner.prune

    def reads(self, stage: int) -> AttentionRows | None:
        """Attention rows that a stage, counted from 0, requests; by default the same for all."""
        return self.attention

    def score(self, context: Context) -> Float[Tensor, "batch visual"]:
        """Score of every visual token; higher is kept."""
        raise NotImplementedError

    def prune(self, context: Context) -> Kept:
        """Keep the `context.count` best tokens of each sample, shared among its images."""
        scores = self.score(context)
        return Kept(selection.top_k(scores, context.alive, context.count, context.images), scores=scores)

    def flops(self, visual: Tensor, text: Tensor, width: int, kept: Tensor) -> Tensor:
        """FLOPs of one stage's decision (1 MAC = 2), without the attention rows, which the host counts.

        Per sample: `visual` tokens arrive, `kept` of them stay, `text` question tokens are read.
        """
        return torch.zeros_like(visual, dtype=torch.float64)


def init_args(module: nn.Module) -> dict[str, Any]:
    """Constructor arguments of a method or adapter, read from attributes of the same names."""
    parameters = list(inspect.signature(type(module).__init__).parameters.values())[1:]
    # A class without its own constructor has that of `nn.Module`, which takes *args and **kwargs.
    names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    missing = [name for name in names if not hasattr(module, name)]
    if missing:
        raise LitPruneError(
            f"{type(module).__name__} can't be saved: it keeps no attribute for its argument(s) {', '.join(missing)}; "
            f"store each constructor argument under its own name"
        )
    values = {name: getattr(module, name) for name in names}
    return {name: spec(value) if isinstance(value, PruningMethod) else value for name, value in values.items()}


def spec(module: nn.Module) -> dict[str, Any]:
    """Class path and arguments of a method or adapter, as in a configuration."""
    kind = type(module)
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": module.config()}

"""The contract between a pruning method and the model that hosts it.

A pruner says at which decoder layers it acts and what it needs, and scores visual tokens. It never sees the model, and
nobody above it asks for its class. Shapes: B batch, V visual tokens still present, T question tokens, d hidden size.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lit_prune.errors import LitPruneError, check_number, check_numbers
from lit_prune.ops import selection
from lit_prune.ops.budget import Budget, Schedule, check_layers, given, scale_layers, solve, tokens
from lit_prune.ops.budget.schedule import OutOfReach


@dataclass(frozen=True)
class Dims:
    """Sizes of the host's decoder that a pruner or adapter may be built for.

    `visual`: visual tokens of one image; a nominal number where it `varies` from image to image.
    """

    width: int
    depth: int
    visual: int
    varies: bool = False


@dataclass(frozen=True)
class AttentionRows:
    """Which rows of the frozen model's attention a pruner wants, averaged over heads and rows.

    `layer`: `own` is the pruning layer's attention, from its own norm, query and key projections, before it runs;
    `previous` is that of the layer before, read while it runs. `rows`: every question token (text after the image, up
    to the answer) or the `last` prompt token. `each`: also give the rows one by one (own attention only).
    """

    layer: Literal["own", "previous"]
    rows: Literal["question", "last"]
    each: bool = False


@dataclass(frozen=True)
class Context:
    """What a stage may look at. Rows whose mask is False are filler.

    `alive` marks the visual tokens that earlier stages kept; with physical dropping that is all real ones. `ordinal` is
    the token's place among the sample's `total` visual tokens, 0 to total-1; `images` tells several images of one
    sample apart and is None where no sample of the batch has several. `visual` and `text` are inputs of the stage's
    layer after its input norm, `states` those before it, `embeds` the inputs of the decoder itself, `keys` the layer's
    keys before their rotation (which depends on where padding put the sample), heads side by side. What a pruner has
    not asked for is None. `hints` carries what only the caller can know, such as the asked regions.
    """

    stage: int
    visual: Float[Tensor, "batch visual width"]
    alive: Bool[Tensor, "batch visual"]
    ordinal: Int[Tensor, "batch visual"]
    text: Float[Tensor, "batch text width"]
    text_mask: Bool[Tensor, "batch text"]
    visual_embeds: Float[Tensor, "batch visual width"] | None
    text_embeds: Float[Tensor, "batch text width"] | None
    attention: Float[Tensor, "batch visual"] | None
    count: Int[Tensor, " batch"]
    total: Int[Tensor, " batch"]
    seed: Int[Tensor, " batch"]
    hints: dict[str, Tensor] = field(default_factory=dict)
    images: selection.Images | None = None
    states: Float[Tensor, "batch visual width"] | None = None
    visual_keys: Float[Tensor, "batch visual inner"] | None = None
    text_keys: Float[Tensor, "batch text inner"] | None = None
    row_attention: Float[Tensor, "batch text visual"] | None = None


@dataclass(frozen=True)
class VisionContext:
    """What a stage inside the vision tower may look at: patch tokens, one row per tile (an image or one of its crops).

    `states` is the residual stream at the stage. `keys`, `values` (heads side by side; values where a pruner
    `needs_values`) and `attention` are those of the tower layer just run, None at the tower's entrance; `attention` is
    the class token's, or the mean query's in towers without one [ours], averaged over heads. `alive` is False for
    filler. `ordinal` is the patch's place on the tile's grid of `side` x `side`. `memory` travels with the forward:
    what a stage leaves there, over all side x side places, its later stages find.
    """

    stage: int
    states: Float[Tensor, "tiles visual width"]
    keys: Float[Tensor, "tiles visual inner"] | None
    values: Float[Tensor, "tiles visual inner"] | None
    attention: Float[Tensor, "tiles visual"] | None
    alive: Bool[Tensor, "tiles visual"]
    ordinal: Int[Tensor, "tiles visual"]
    count: Int[Tensor, " tiles"]
    side: int
    memory: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Kept:
    """A stage's decision: which alive tokens stay, and the gate (0 or 1 in value) that carries gradients, if any.

    `states`, in methods that merge: new states before the layer's norm; only those of kept tokens are used.
    """

    mask: Bool[Tensor, "batch visual"]
    gate: Float[Tensor, "batch visual"] | None = None
    scores: Float[Tensor, "batch visual"] | None = None
    states: Float[Tensor, "batch visual width"] | None = None


class Pruner(nn.Module):
    """Base of all methods: stages at `layers`, counts solved from the budget, top-k of `score`.

    Args:
        layers: decoder layers at whose input tokens are dropped, ascending, counted from 0.
        stage_ratios: relative counts of the stages, never rising; equal counts by default.
        depth: depth of the decoder that `layers` is written for; they are scaled to the host's. `None`: as written.
    """

    title: str = ""  # the method's name as people write it; without one, that of its file stands for it
    repairs: bool = False  # whether a repair adapter belongs to the method as published
    attention: AttentionRows | None = None
    needs_embeds: bool = False
    needs_states: bool = False
    needs_keys: bool = False
    needs_values: bool = False
    acts_in_tower: bool = False

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
        """Pruning layers in a decoder of `depth` layers; raises `LitPruneError` if one lies outside."""
        layers = scale_layers(tuple(self.layers), self.depth, depth)
        check_layers(layers, depth)
        return layers

    def schedule(self, keep: Budget, visual: int, depth: int) -> Schedule:
        """Counts per stage for a budget of `keep` visual tokens averaged over the decoder's layers, or as given.

        A share is one of `visual`.
        """
        keep = tokens(keep, visual)
        if isinstance(keep, dict):
            return given(keep, self.stages(depth))
        return dict(solve(keep, visual, depth, self.stages(depth), tuple(self.stage_ratios)))

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
            if min(schedule.values()) < images:  # counts are solved for what is above one token of each image
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

    @property
    def random(self) -> bool:
        """True if the method draws from a `seed` of its own, so that several draws are worth measuring."""
        return hasattr(self, "seed")

    def redraw(self, by: int) -> None:
        """Move the seed on; nothing for methods that draw nothing."""
        if hasattr(self, "seed"):
            self.seed += by

    @property
    def free(self) -> bool:
        """Whether the method keeps as many as it likes, so that only a budget loss can hold it to its budget."""
        return False

    def exact(self, stage: int) -> bool:
        """Whether a stage keeps `context.count` tokens of each sample, or all where there are fewer."""
        return type(self).prune is Pruner.prune

    def anneal(self, tau: float, noise: float) -> None:
        """Temperature and noise of the training gates, set between steps; nothing for methods that don't train."""

    def reads(self, stage: int) -> AttentionRows | None:
        """Attention rows that a stage, counted from 0, wants; by default the same for all."""
        return self.attention

    def vision_schedule(self, keep: int, visual: int, depth: int) -> Schedule:
        """{tower layer: patches kept per tile of `visual` from its input on}; empty for methods of the decoder alone.

        `depth` layers lead to the features; a stage at `depth` sits behind them. A pruner that acts there has its
        first decoder stage at layer 0, where the tokens that the tower dropped leave the sequence.
        """
        return {}

    def prune_vision(self, context: VisionContext) -> Kept:
        """Decision of one stage inside the vision tower."""
        raise NotImplementedError

    def image_side(self, keep: int, side: int) -> int:
        """Patches along a side of the image that the tower is to see, of `side`; fewer scales the image down."""
        return side

    def build(self, dims: Dims) -> None:
        """Create what depends on the host's sizes, once; nothing for methods without parameters."""

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

    def stage_flops(self, stage: int, visual: Tensor, text: Tensor, width: int, kept: Tensor) -> Tensor:
        """`flops` of one stage, for methods whose stages differ."""
        return self.flops(visual, text, width, kept)

    def vision_flops(self, visual: Tensor, kept: Tensor, width: int) -> Tensor:
        """FLOPs of a stage in a tower of `width` that kept `kept` of `visual` patches; the host's projections apart."""
        return torch.zeros_like(visual, dtype=torch.float64)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as they would stand in a YAML file."""
        return init_args(self)


class VisionPruner(Pruner):
    """Base of methods inside the vision tower: the decoder gets the final budget from its layer 0 on.

    Args:
        vision_layers: tower layers at whose input patches leave, ascending; -1: behind the layer that gives features.
        vision_stage_ratios: patches after each stage in multiples of the budget, never rising; by default the last
            stage alone cuts, which is for methods with one.
        vision_depth: tower layers up to the features that `vision_layers` is written for; they are scaled to the
            host's. `None`: as written.
    """

    acts_in_tower = True

    def __init__(
        self,
        vision_layers: Sequence[int] = (-1,),
        vision_stage_ratios: Sequence[float] | None = None,
        vision_depth: int | None = None,
    ) -> None:
        super().__init__([0])
        check_numbers("pruner.vision_layers", vision_layers, least=-1, whole=True)
        check_numbers("pruner.vision_stage_ratios", vision_stage_ratios or (), above=0)
        check_number("pruner.vision_depth", vision_depth, least=1, whole=True)
        self.vision_layers = [int(layer) for layer in vision_layers]
        self.vision_stage_ratios = (
            [1.0] * len(self.vision_layers) if vision_stage_ratios is None else [float(x) for x in vision_stage_ratios]
        )
        self.vision_depth = vision_depth

    def vision_schedule(self, keep: int, visual: int, depth: int) -> Schedule:
        """Patches per tile after each stage: `vision_stage_ratios` times the budget, at most all."""
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

    def prune(self, context: Context) -> Kept:
        """Everything that the tower let through."""
        return Kept(context.alive)


def init_args(module: nn.Module) -> dict[str, Any]:
    """Constructor arguments of a plug-in, read back from attributes of the same names."""
    names = [name for name in inspect.signature(type(module).__init__).parameters if name != "self"]
    missing = [name for name in names if not hasattr(module, name)]
    if missing:
        raise LitPruneError(
            f"{type(module).__name__} can't be saved: it keeps no attribute for its argument(s) {', '.join(missing)}; "
            f"store each constructor argument under its own name"
        )
    values = {name: getattr(module, name) for name in names}
    return {name: spec(value) if isinstance(value, Pruner) else value for name, value in values.items()}


def spec(module: nn.Module) -> dict[str, Any]:
    """A plug-in as a configuration names it: its class and its arguments."""
    kind = type(module)
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": module.config()}

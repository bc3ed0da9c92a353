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

from lit_prune import selection
from lit_prune.budget import Budget, Schedule, check_layers, given, scale_layers, solve
from lit_prune.errors import LitPruneError


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
    to the answer) or the `last` prompt token.
    """

    layer: Literal["own", "previous"]
    rows: Literal["question", "last"]


@dataclass(frozen=True)
class Context:
    """What a stage may look at. Rows whose mask is False are filler.

    `alive` marks the visual tokens that earlier stages kept; with physical dropping that is all real ones. `ordinal` is
    the token's place among the sample's `total` visual tokens, 0 to total-1; `images` tells several images of one
    sample apart and is None where no sample of the batch has several. `states` are inputs of the stage's layer after
    its input norm, `embeds` the inputs of the decoder itself. `hints` carries what only the caller can know, such as
    the asked regions.
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


@dataclass(frozen=True)
class Kept:
    """A stage's decision: which alive tokens stay, and the gate (0 or 1 in value) that carries gradients, if any."""

    keep: Bool[Tensor, "batch visual"]
    gate: Float[Tensor, "batch visual"] | None = None
    scores: Float[Tensor, "batch visual"] | None = None


class Pruner(nn.Module):
    """Base of all methods: stages at `layers`, counts solved from the budget, top-k of `score`.

    Args:
        layers: decoder layers at whose input tokens are dropped, ascending, counted from 0.
        shape: relative counts of the stages, never rising; equal counts by default.
        depth: depth of the decoder that `layers` is written for; they are scaled to the host's. `None`: as written.
    """

    attention: AttentionRows | None = None
    needs_embeds: bool = False

    def __init__(self, layers: Sequence[int], shape: Sequence[float] | None = None, depth: int | None = None) -> None:
        super().__init__()
        self.layers = [int(layer) for layer in layers]
        self.shape = [1.0] * len(self.layers) if shape is None else [float(s) for s in shape]
        self.depth = depth

    def stages(self, depth: int) -> tuple[int, ...]:
        """Pruning layers in a decoder of `depth` layers; raises `LitPruneError` if one lies outside."""
        layers = scale_layers(tuple(self.layers), self.depth, depth)
        check_layers(layers, depth)
        return layers

    def schedule(self, keep: Budget, visual: int, depth: int) -> Schedule:
        """Counts per stage for a budget of `keep` visual tokens averaged over the decoder's layers, or as given."""
        if isinstance(keep, dict):
            return given(keep, self.stages(depth))
        return dict(solve(keep, visual, depth, self.stages(depth), tuple(self.shape)))

    def plan(self, keep: Budget, visual: int, depth: int) -> Schedule:
        """Schedule of one sample with `visual` visual tokens, of one image or several; with `keep` or fewer, all stay.

        Raises `LitPruneError` if `keep` is used up by the layers before the first stage.
        """
        return self.schedule(keep if isinstance(keep, dict) else min(keep, visual), visual, depth)

    def nominal_schedule(self, keep: Budget, dims: Dims) -> Schedule | None:
        """Schedule to show before anything ran; None where images differ and the budget doesn't fit the nominal one.

        Raises `LitPruneError` where all images have `dims.visual` tokens and `keep` can't be met.
        """
        if not dims.varies:
            return self.schedule(keep, dims.visual, dims.depth)
        self.stages(dims.depth)
        try:
            return self.plan(keep, dims.visual, dims.depth)
        except LitPruneError:
            return None

    def build(self, dims: Dims) -> None:
        """Create what depends on the host's sizes, once; nothing for methods without parameters."""

    def score(self, context: Context) -> Float[Tensor, "batch visual"]:
        """Score of every visual token, higher is kept."""
        raise NotImplementedError

    def prune(self, context: Context) -> Kept:
        """Keep the `context.count` best tokens of each sample, shared among its images."""
        scores = self.score(context)
        return Kept(selection.top_k(scores, context.alive, context.count, context.images), scores=scores)

    def flops(self, visual: Tensor, text: Tensor, width: int) -> Tensor:
        """FLOPs of scoring one stage (1 MAC = 2), beside the attention rows, which the host counts."""
        return torch.zeros_like(visual, dtype=torch.float64)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as they would stand in a YAML file."""
        return init_args(self)


def init_args(module: nn.Module) -> dict[str, Any]:
    """Constructor arguments of a plug-in, read back from attributes of the same names."""
    names = [name for name in inspect.signature(type(module).__init__).parameters if name != "self"]
    missing = [name for name in names if not hasattr(module, name)]
    if missing:
        raise LitPruneError(
            f"{type(module).__name__} can't be saved: it keeps no attribute for its argument(s) {', '.join(missing)}; "
            f"store each constructor argument under its own name"
        )
    return {name: getattr(module, name) for name in names}

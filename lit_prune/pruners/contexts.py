"""What a pruner is given and what it returns: sizes of the host, contexts of a stage, the decision.

Shapes: B batch, V visual tokens still present, T question tokens, d hidden size.
"""

from dataclasses import dataclass, field
from typing import Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor

from lit_prune.ops import selection


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
    the class token's, or the mean query's in towers without one [ours], averaged over `heads`. `alive` is False for
    filler. `ordinal` is the patch's place on the tile's grid of `side` x `side`. `sizes` counts the patches that each
    one stands for; None as long as no stage has returned `Kept.sizes`. `memory` travels with the forward: later stages
    find there what a stage left, over all side x side places.
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
    heads: int = 1
    sizes: Float[Tensor, "tiles visual"] | None = None


@dataclass(frozen=True)
class Kept:
    """A stage's decision: which alive tokens stay, and the gate (0 or 1 in value) that carries gradients, if any.

    `states`, in methods that merge: new states before the layer's norm; only those of kept tokens are used.
    `sizes`: tokens that each kept one stands for from here on. Layers that follow add log(size) to its attention logits
    (proportional attention, arXiv 2210.09461).
    """

    mask: Bool[Tensor, "batch visual"]
    gate: Float[Tensor, "batch visual"] | None = None
    scores: Float[Tensor, "batch visual"] | None = None
    states: Float[Tensor, "batch visual width"] | None = None
    sizes: Float[Tensor, "batch visual"] | None = None

"""Inputs and outputs of pruners: sizes of the host, contexts of a stage, decisions.

Shapes: B batch, V visual tokens present, T question tokens, d hidden size.
"""

from dataclasses import dataclass, field
from typing import Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor

from lit_prune.ops import selection


@dataclass(frozen=True)
class Dims:
    """Sizes of the host's decoder for building pruners and adapters.

    `visual`: visual tokens of one image; a nominal number if it `varies` between images.
    """

    width: int
    depth: int
    visual: int
    varies: bool = False


@dataclass(frozen=True)
class AttentionRows:
    """Request for rows of the frozen model's attention, averaged over heads and rows.

    `layer`: `own` is the pruning layer's attention, computed from its norm, query and key projections before it runs;
    `previous` is that of the layer before, read while it runs. `rows`: every question token (text after the image, up
    to the answer) or the `last` prompt token. `each`: also return the rows separately (own attention only).
    `gradient`: let gradients pass through the attention to earlier gates (own attention only).
    """

    layer: Literal["own", "previous"]
    rows: Literal["question", "last"]
    each: bool = False
    gradient: bool = False


@dataclass(frozen=True)
class Context:
    """Inputs of a decoder stage. Rows whose mask is False are filler.

    `alive` marks the visual tokens that earlier stages kept; if tokens are physically dropped, these are all real ones.
    `ordinal` is the token's index among the sample's `total` visual tokens, 0 to total-1; `images` assigns tokens to
    images and is None if no sample of the batch has several. `visual` and `text` are inputs of the stage's layer after
    its input norm, `states` those before it, `embeds` the inputs of the decoder, `keys` the layer's keys before the
    rotary embedding (which depends on padding), heads concatenated. Fields that a pruner doesn't request are None.
    `hints` carries information that only the caller has, such as the regions that a question asks about.
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
    """Inputs of a vision-tower stage: patch tokens, one row per tile (an image or one of its crops).

    `states` is the residual stream at the stage. `keys`, `values` (heads concatenated; values if a pruner
    `needs_values`) and `attention` are those of the tower layer just run, None at the tower's input; `attention` is
    the class token's, or the mean query's in towers without one [ours], averaged over `heads`. `alive` is False for
    filler. `ordinal` is the patch's index on the tile's grid of `side` x `side`. `sizes` is the number of patches that
    each one represents; None until a stage has returned `Kept.sizes`. `memory` passes values from a stage to later
    ones of the same forward, over all side x side positions, or one for each tile.
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

    @property
    def head_mean_keys(self) -> Float[Tensor, "tiles visual head"]:
        """Keys averaged over heads, in fp32."""
        return self.keys.float().unflatten(2, (self.heads, -1)).mean(2)


@dataclass(frozen=True)
class Kept:
    """Decision of a stage: the keep mask over alive tokens, and the straight-through gate (0 or 1 in value), if any.

    `states`, in methods that merge: new states before the layer's norm; only those of kept tokens are used.
    `sizes`: number of tokens that each kept one represents from here on. Later layers add log(size) to its attention
    logits (proportional attention, arXiv 2210.09461).
    `slope`: derivative of each token's gate with respect to its score, at least 0, by which `gate_centre` weighs the
    tokens; `None`: all alike.
    """

    mask: Bool[Tensor, "batch visual"]
    gate: Float[Tensor, "batch visual"] | None = None
    scores: Float[Tensor, "batch visual"] | None = None
    states: Float[Tensor, "batch visual width"] | None = None
    sizes: Float[Tensor, "batch visual"] | None = None
    slope: Float[Tensor, "batch visual"] | None = None

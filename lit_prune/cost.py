"""What a forward costs: FLOPs (1 MAC = 2) and KV-cache bytes, of what ran, per sample.

Conventions: the whole prompt counts, text and visual tokens; attention is the full square (as PyTorch's counter has
it), SwiGLU has three matrices; vision tower, projector, decoder, scoring, pruner, repair and LM head are lines of their
own. Norms, activations and softmax are left out, as everywhere.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class ModelSize:
    """Sizes that the price of a forward depends on."""

    width: int
    depth: int
    heads: int
    key_heads: int
    head_dim: int
    mlp: int
    vocab: int
    vision_width: int = 0
    vision_depth: int = 0
    vision_mlp: int = 0
    vision_tokens: int = 0
    patch_values: int = 0
    patches: int = 0


@dataclass(frozen=True)
class StageTrace:
    """One pruning stage as it ran.

    `reads`: whose attention rows it used; those of its `own` layer were projected ahead, those of the `previous` one
    were read where they are computed anyway.
    """

    layer: int
    reads: str | None
    rows: Int[Tensor, " batch"]
    sequence: Int[Tensor, " batch"]
    visual: Int[Tensor, " batch"]
    kept: Int[Tensor, " batch"]


@dataclass
class Trace:
    """Lengths of one forward per sample: real tokens only, no padding; pruned tokens count as gone in soft mode too."""

    queries: list[Int[Tensor, " batch"]] = field(default_factory=list)
    keys: list[Int[Tensor, " batch"]] = field(default_factory=list)
    visual: list[Int[Tensor, " batch"]] = field(default_factory=list)
    stages: list[StageTrace] = field(default_factory=list)
    total_visual: Int[Tensor, " batch"] | None = None
    repaired: Int[Tensor, " batch"] | None = None
    repair_stages: tuple[int, ...] = ()

    def average_visual(self) -> Tensor:
        """Visual tokens averaged over the decoder layers' inputs, per sample: the budget as it was spent."""
        return torch.stack(self.visual).double().mean(0)


def decoder_layer(size: ModelSize, queries: Tensor, keys: Tensor) -> Tensor:
    """FLOPs of one decoder layer: projections, attention over `keys`, SwiGLU."""
    queries, keys = queries.double(), keys.double()
    projections = 2 * queries * size.width * size.head_dim * (2 * size.heads + 2 * size.key_heads)
    attention = 4 * queries * keys * size.heads * size.head_dim
    return projections + attention + 6 * queries * size.width * size.mlp


def vision_tower(size: ModelSize) -> float:
    """FLOPs of encoding one image: patch embedding and encoder layers with a two-matrix MLP."""
    n, d = size.vision_tokens, size.vision_width
    layer = 8 * n * d * d + 4 * n * n * d + 4 * n * d * size.vision_mlp
    return float(2 * size.patches * size.patch_values * d + size.vision_depth * layer)


def projector(size: ModelSize, visual: Tensor) -> Tensor:
    """FLOPs of LLaVA's two-layer projector."""
    return 2 * visual.double() * (size.vision_width * size.width + size.width * size.width)


def attention_rows(size: ModelSize, stage: StageTrace) -> Tensor:
    """FLOPs of reading a stage's attention rows; own rows also pay the layer's key and query projections."""
    rows, sequence = stage.rows.double(), stage.sequence.double()
    if stage.reads is None:
        return torch.zeros_like(rows)
    cost = 2 * rows * sequence * size.heads * size.head_dim
    if stage.reads == "own":
        cost = cost + 2 * size.width * size.head_dim * (sequence * size.key_heads + rows * size.heads)
    return cost


def price(trace: Trace, size: ModelSize, pruner=None, repair=None, lm_rows: int = 1) -> dict[str, Tensor]:
    """FLOPs of one prefill per sample, part by part; `total` adds the parts up.

    `pruner` and `repair` are asked what their own arithmetic costs; `lm_rows` positions go through the LM head.
    """
    zero = torch.zeros_like(trace.queries[0], dtype=torch.float64)
    visual = zero if trace.total_visual is None else trace.total_visual.double()
    parts = {
        "vision": vision_tower(size) * (visual > 0).double(),
        "projector": projector(size, visual),
        "decoder": sum((decoder_layer(size, q, k) for q, k in zip(trace.queries, trace.keys, strict=True)), zero),
        "scoring": sum((attention_rows(size, stage) for stage in trace.stages), zero),
        "pruner": zero,
        "repair": zero,
        "lm_head": zero + 2 * lm_rows * size.width * size.vocab,
    }
    if pruner is not None:
        parts["pruner"] = sum((pruner.flops(s.visual, s.rows, size.width) for s in trace.stages), zero)
    if repair is not None and trace.repaired is not None:
        for index in trace.repair_stages:
            parts["repair"] = parts["repair"] + repair.context_flops(trace.stages[index].visual, visual, size.width)
        parts["repair"] = parts["repair"] + repair.adapter_flops(trace.repaired, size.width)
    parts["total"] = sum(parts.values(), zero)
    return parts


def decoder_total(parts: dict[str, Tensor]) -> Tensor:
    """Decoder with all that pruning adds to it: what a reduction is measured on."""
    return parts["decoder"] + parts["scoring"] + parts["pruner"] + parts["repair"]


def kv_bytes(trace: Trace, size: ModelSize, bytes_per_value: int) -> Tensor:
    """Bytes of keys and values cached for the prompt, per sample."""
    return sum(k.double() for k in trace.keys) * 2 * size.key_heads * size.head_dim * bytes_per_value

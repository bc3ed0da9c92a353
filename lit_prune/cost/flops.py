"""Cost of a forward: FLOPs (1 MAC = 2) and KV-cache bytes, per sample, of what ran or of a schedule.

Conventions: the whole prompt counts, text and visual tokens; attention is the full square (as PyTorch's counter has
it), SwiGLU has three matrices; vision tower, projector, decoder, scoring, pruner, repair and LM head are lines of their
own. Norms, activations and softmax are left out, as everywhere.

There is one arithmetic: `price` of a `lit_prune.cost.trace.Trace`, whether a forward left it or a schedule.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_prune.cost.trace import ImageLoad, StageTrace, Trace, VisionTrace, step
from lit_prune.pruners.base import UNPRUNED, PruningMethod
from lit_prune.repair import RepairAdapter

CARRIER = 8  # channels that a bias per key adds to each head of queries, keys and values


@dataclass(frozen=True)
class LayerSize:
    """One decoder layer, in multiply-adds and values.

    `matrices`: multiply-adds of a token in its matrices, of experts in those that it takes. `pair`: of a (query, key)
    pair of its attention, 0 without any. `cached`: values that the cache holds of a token, of the last `window` ones
    where it says so. `state`: values of a recurrence's state, `recurrence` its multiply-adds for a token. `visual`: in
    place of `matrices` for a visual token, where it has experts of its own.
    """

    matrices: float
    pair: int
    cached: int
    window: int | None = None
    state: int = 0
    recurrence: int = 0
    visual: float | None = None


@dataclass(frozen=True)
class ModelSize:
    """Sizes that the price of a forward depends on.

    `vision_matrices`: of the tower's MLP, three where it is gated. The projector is `projectors` times two matrices,
    `projector_in` to `projector_inner` to `width`, or takes `projector_matrices` multiply-adds a row. `image`: the
    load of a usual image, for forwards whose images are known by their visual tokens only. Without `tower_known` vision
    tower and projector have no formula; `counted` are their FLOPs for a usual image and its visual tokens, if these
    were counted. `layers`: of the decoder, where they aren't all of plain attention and SwiGLU,
    which the other sizes describe.
    """

    width: int
    depth: int
    heads: int
    key_heads: int
    head_dim: int
    mlp: int
    vocab: int
    vision_width: int = 0
    vision_heads: int = 1
    vision_mlp: int = 0
    vision_matrices: int = 2
    patch_values: int = 0
    projector_in: int = 0
    projector_inner: int = 0
    projectors: int = 1
    projector_matrices: int = 0
    image: ImageLoad | None = None
    tower_known: bool = True
    counted: tuple[float, int] | None = None
    layers: tuple[LayerSize, ...] = ()


def plain_layer(size: ModelSize) -> LayerSize:
    """A layer of plain attention and SwiGLU."""
    projections = size.width * size.head_dim * (2 * size.heads + 2 * size.key_heads)
    return LayerSize(
        matrices=projections + 3 * size.width * size.mlp,
        pair=2 * size.heads * size.head_dim,
        cached=2 * size.key_heads * size.head_dim,
    )


def decoder_layer(
    size: ModelSize,
    queries: Tensor,
    keys: Tensor,
    layers: Sequence[int] | None = None,
    visual: Tensor | None = None,
) -> Tensor:
    """FLOPs of decoder layers: matrices, or projections and SwiGLU, attention over `keys`, recurrences.

    `queries`, `keys`: tokens of each layer, (layers, batch), of all layers by default; of one layer also (batch,).
    `visual`: how many of the queries are visual tokens; None: none is.
    """
    rows = queries.double()
    if size.layers:
        chosen = _chosen(size, layers)
        cost = 2 * rows * _column([layer.matrices + layer.recurrence for layer in chosen], rows)
        if visual is not None and any(layer.visual is not None for layer in chosen):
            more = [0.0 if layer.visual is None else layer.visual - layer.matrices for layer in chosen]
            cost = cost + 2 * visual.double() * _column(more, rows)
        return cost + attention(size, queries, keys, layers)
    return 2 * rows * plain_layer(size).matrices + attention(size, queries, keys)


def decoder_layers(trace: Trace, size: ModelSize) -> Tensor:
    """FLOPs of each decoder layer over a trace (layers, batch)."""
    queries, keys = torch.stack(trace.queries), torch.stack(trace.keys)
    return decoder_layer(size, queries, keys, visual=None if trace.total_visual is None else torch.stack(trace.visual))


def attention(size: ModelSize, queries: Tensor, keys: Tensor, layers: Sequence[int] | None = None) -> Tensor:
    """FLOPs of decoder layers' attention between queries and keys, without its projections.

    A prefill computes the full square, whatever its mask hides; a decoding step has a window's cached keys alone.
    """
    if not size.layers:
        return 2 * queries.double() * keys.double() * plain_layer(size).pair
    chosen, seen = _chosen(size, layers), keys.double()
    windows = _column([math.inf if layer.window is None else layer.window for layer in chosen], seen)
    seen = torch.where(queries > 1, seen, seen.minimum(windows))
    return 2 * queries.double() * seen * _column([layer.pair for layer in chosen], seen)


def _chosen(size: ModelSize, layers: Sequence[int] | None) -> list[LayerSize]:
    return list(size.layers) if layers is None else [size.layers[layer] for layer in layers]


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """One value for each layer, beside (layers, batch) tokens."""
    column = torch.tensor(values, dtype=torch.float64, device=like.device)
    return column[:, None] if like.ndim == 2 else column


def vision_tower(size: ModelSize, vision: VisionTrace) -> Tensor:
    """FLOPs of the vision tower: patch embedding and every encoder layer, also those whose output is not used."""
    d, mlp = size.vision_width, 2 * size.vision_matrices * size.vision_mlp
    tokens, pairs = (torch.stack(layers).double().sum(0) for layers in (vision.tokens, vision.pairs))
    return 2 * vision.patches.double() * size.patch_values * d + tokens * d * (8 * d + mlp) + 4 * pairs * d


def projector(size: ModelSize, rows: Tensor) -> Tensor:
    """FLOPs of the projector (or merger) over `rows` rows."""
    if size.projector_matrices:
        return 2 * rows.double() * size.projector_matrices
    return 2 * size.projectors * rows.double() * size.projector_inner * (size.projector_in + size.width)


def attention_rows(size: ModelSize, stage: StageTrace, searched: Tensor | None = None) -> Tensor:
    """FLOPs of reading a stage's attention rows and keys, and of proportional attention's search.

    Own rows pay the layer's key and query projections too. `searched` visual tokens look for the kept one that their
    size is added to, by default those that the stage found.
    """
    rows, sequence = stage.rows.double(), stage.sequence.double()
    key_projection = 2 * size.width * size.head_dim * sequence * size.key_heads
    cost = key_projection if stage.keys else torch.zeros_like(rows)
    if stage.proportional:
        cost = cost + 2 * (stage.visual if searched is None else searched) * stage.kept * size.width
    if stage.reads is not None:
        cost = cost + 2 * rows * sequence * size.heads * size.head_dim
    if stage.reads == "own":
        cost = cost + key_projection + 2 * size.width * size.head_dim * rows * size.heads
    return cost


def _searched(trace: Trace, stage: StageTrace) -> Tensor:
    """Visual tokens that look for the nearest kept one: where a tower's tokens arrive, those that it dropped too."""
    return stage.visual if trace.tower is None or stage.layer else trace.total_visual


def _size_channels(size: ModelSize, trace: Trace) -> Tensor | float:
    """FLOPs of the channels that carry the sizes of kept tokens through a prefill's attention, as a bias per key."""
    first = min((stage.layer for stage in trace.stages if stage.proportional), default=len(trace.queries))
    layers = zip(trace.queries[first:], trace.keys[first:], strict=True)
    return sum((4 * queries.double() * keys.double() * size.heads * CARRIER for queries, keys in layers), 0.0)


def price(
    trace: Trace,
    size: ModelSize,
    pruner: PruningMethod = UNPRUNED,
    repair: RepairAdapter | None = None,
    lm_rows: int = 1,
) -> dict[str, Tensor]:
    """FLOPs of one forward per sample, part by part; `total` adds the parts up.

    `vision` and `projector` of a tower without a formula are one part, `vision`, where they were counted, as they ran
    or for a usual image; else they are left out, and where a method prunes inside such a tower. `pruner` and `repair`
    are asked what their own arithmetic costs; `lm_rows` positions go through the LM head.
    """
    zero = torch.zeros_like(trace.queries[0], dtype=torch.float64)
    visual = zero if trace.total_visual is None else trace.total_visual.double()
    vision = _usual_images(size.image, visual) if trace.vision is None else trace.vision
    if trace.tower is not None:
        vision = trace.tower.per_sample(visual if vision is None else vision.patches.to(visual))
    parts = {
        **_tower(trace, size, vision, visual),
        "decoder": decoder_layers(trace, size).sum(0) + _size_channels(size, trace),
        "scoring": sum((attention_rows(size, stage, _searched(trace, stage)) for stage in trace.stages), zero),
        "pruner": zero,
        "repair": zero,
        "lm_head": zero + 2 * lm_rows * size.width * size.vocab,
    }
    if vision is not None and vision.scored is not None:
        looked_at = vision.scored * size.vision_width + vision.rated
        parts["scoring"] = parts["scoring"] + 2 * looked_at * size.vision_width
    deciding = zip(trace.stages, pruner.walk(len(trace.queries)), strict=False)  # no stages ran in a decoding step
    costs = (stage.pruner.flops(s.visual, s.rows, size.width, s.kept) for s, stage in deciding)
    parts["pruner"] = sum(costs, zero)
    if trace.tower is not None and pruner.tower is not None:
        for found, kept in trace.tower.stages:
            width = size.vision_width * trace.tower.unit
            inside = pruner.tower.vision_flops(found, kept, width, size.vision_heads)
            parts["pruner"] = parts["pruner"] + trace.tower.share(inside, visual)
    if repair is not None and trace.repaired is not None:
        for index, stage in enumerate(trace.stages[: max(trace.repair_stages, default=-1) + 1]):
            context = repair.context_flops(stage.visual, visual, size.width, feeds=index in trace.repair_stages)
            parts["repair"] = parts["repair"] + context
        parts["repair"] = parts["repair"] + repair.adapter_flops(trace.repaired, size.width)
    parts["total"] = sum(parts.values(), zero)
    return parts


def _tower(trace: Trace, size: ModelSize, vision: VisionTrace | None, visual: Tensor) -> dict[str, Tensor]:
    """Vision tower and projector, as far as they are known."""
    zero = torch.zeros_like(visual)
    if trace.counted is not None:
        return {"vision": trace.counted.to(zero)}
    if size.tower_known:
        return {
            "vision": zero if vision is None else vision_tower(size, vision).to(zero),
            "projector": zero if vision is None else projector(size, vision.projected).to(zero),
        }
    if size.counted is None or trace.tower is not None:
        return {}
    flops, tokens = size.counted
    return {"vision": flops * visual / tokens}


def _usual_images(image: ImageLoad | None, visual: Tensor) -> VisionTrace | None:
    """As many usual images as give so many visual tokens, in proportion."""
    if image is None:
        return None
    count = visual / image.visual
    tokens, pairs = ([count * layer for layer in layers] for layers in (image.tokens, image.pairs))
    return VisionTrace(count * image.patches, tokens, pairs, count * image.projected)


def decode(trace: Trace, size: ModelSize, steps: int, repair=None) -> dict[str, Tensor]:
    """FLOPs of `steps` decoding steps after a prefill, part by part.

    An answer of n tokens is a prefill and n - 1 steps: the prefill gives the first token, the last is not fed back.
    """
    first, last = (price(step(trace, index), size, repair=repair) for index in (1, max(1, steps)))
    # Each part is linear in the length of the cache, which grows by one: an arithmetic series.
    return {name: steps * (first[name] + last[name]) / 2 for name in first}


def decoder_total(parts: dict[str, Tensor]) -> Tensor:
    """Decoder with all that pruning adds to it: what a reduction is measured on."""
    return parts["decoder"] + parts["scoring"] + parts["pruner"] + parts["repair"]


def kv_bytes(trace: Trace, size: ModelSize, bytes_per_value: int) -> Tensor:
    """Bytes of keys and values cached after the forward, per sample."""
    keys = torch.stack(trace.keys).double()
    if not size.layers:
        return keys.sum(0) * plain_layer(size).cached * bytes_per_value
    held = _column([math.inf if layer.window is None else layer.window - 1 for layer in size.layers], keys)
    values = keys.minimum(held) * _column([layer.cached for layer in size.layers], keys)
    return (values.sum(0) + sum(layer.state for layer in size.layers)) * bytes_per_value

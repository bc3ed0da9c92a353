"""What a forward costs: FLOPs (1 MAC = 2) and KV-cache bytes, per sample, of what ran or of a schedule.

Conventions: the whole prompt counts, text and visual tokens; attention is the full square (as PyTorch's counter has
it), SwiGLU has three matrices; vision tower, projector, decoder, scoring, pruner, repair and LM head are lines of their
own. Norms, activations and softmax are left out, as everywhere.

There is one arithmetic: `price` of a `Trace`. The host records the trace of a forward, `plan` writes the one that a
schedule would leave, `step` the one of a decoding step.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Int, Num
from torch import Tensor


@dataclass(frozen=True)
class ImageLoad:
    """What one image asks of the vision tower, all its crops together, and what it gives the decoder.

    `tokens[i]`: at the input of tower layer i, class tokens included. `pairs[i]`: (query, key) pairs of its attention,
    which never leaves a crop or a window. `projected`: rows through the projector. `visual`: tokens that the decoder
    is given, line breaks included.
    """

    patches: int
    tokens: tuple[int, ...]
    pairs: tuple[int, ...]
    projected: int
    visual: int


@dataclass(frozen=True)
class ModelSize:
    """Sizes that the price of a forward depends on.

    `vision_matrices`: of the tower's MLP, three where it is gated. The projector is `projectors` times two matrices,
    `projector_in` to `projector_inner` to `width`. `image`: the load of a usual image, for forwards whose images are
    known by their visual tokens only.
    """

    width: int
    depth: int
    heads: int
    key_heads: int
    head_dim: int
    mlp: int
    vocab: int
    vision_width: int = 0
    vision_mlp: int = 0
    vision_matrices: int = 2
    patch_values: int = 0
    projector_in: int = 0
    projector_inner: int = 0
    projectors: int = 1
    image: ImageLoad | None = None


@dataclass(frozen=True)
class VisionTrace:
    """What the vision tower ran: the fields of `ImageLoad` summed over each sample's images.

    A method that drops tokens inside the tower leaves fewer `tokens`, `pairs` and `projected` behind.
    """

    patches: Num[Tensor, " batch"]
    tokens: list[Num[Tensor, " batch"]]
    pairs: list[Num[Tensor, " batch"]]
    projected: Num[Tensor, " batch"]
    scored: Num[Tensor, " batch"] | None = None  # tokens whose keys (or values) a stage projected once more

    @classmethod
    def of(cls, samples: Sequence[Sequence[ImageLoad]]) -> "VisionTrace":
        """The sums over each sample's images; at least one sample has one."""
        depth = max(len(load.pairs) for loads in samples for load in loads)

        def total(of: Callable[[ImageLoad], int]) -> Tensor:
            return torch.tensor([sum(of(load) for load in loads) for loads in samples])

        return cls(
            patches=total(lambda load: load.patches),
            tokens=[total(lambda load, i=i: load.tokens[i]) for i in range(depth)],
            pairs=[total(lambda load, i=i: load.pairs[i]) for i in range(depth)],
            projected=total(lambda load: load.projected),
        )


@dataclass
class TowerTrace:
    """One forward of a tower with stages, tile by tile: a tile is an image or one of its crops.

    `patches` entered, `tokens` at each layer's input, class token included, `projected` left; `scored` tokens had their
    keys (or values) projected once more for a stage. `stages`: patches that each stage found and kept.
    """

    patches: Int[Tensor, " tiles"]
    tokens: list[Int[Tensor, " tiles"]]
    projected: Int[Tensor, " tiles"]
    scored: Int[Tensor, " tiles"]
    stages: list[tuple[Int[Tensor, " tiles"], Int[Tensor, " tiles"]]] = field(default_factory=list)

    def share(self, values: Num[Tensor, " tiles"], visual: Num[Tensor, " batch"]) -> Num[Tensor, " batch"]:
        """Tiles handed to samples: one each where the numbers agree, else in proportion to their visual tokens."""
        values = values.double().to(visual.device)
        if len(values) == int((visual > 0).sum()):
            return torch.zeros_like(visual, dtype=torch.float64).masked_scatter(visual > 0, values)
        return values.sum() * visual.double() / visual.double().sum()

    def per_sample(self, visual: Num[Tensor, " batch"]) -> VisionTrace:
        """What each sample's tiles ran."""
        tokens = [self.share(layer, visual) for layer in self.tokens]
        pairs = [self.share(layer.square(), visual) for layer in self.tokens]
        patches, projected, scored = (self.share(v, visual) for v in (self.patches, self.projected, self.scored))
        return VisionTrace(patches, tokens, pairs, projected, scored)


@dataclass(frozen=True)
class StageTrace:
    """One pruning stage as it ran.

    `reads`: whose attention rows it used; those of its `own` layer were projected ahead, those of the `previous` one
    were read where they are computed anyway. `keys`: it also had the layer's keys projected, for themselves. `mass`:
    the nearest kept token of each dropped one was looked for.
    """

    layer: int
    reads: str | None
    rows: Int[Tensor, " batch"]
    sequence: Int[Tensor, " batch"]
    visual: Int[Tensor, " batch"]
    kept: Int[Tensor, " batch"]
    keys: bool = False
    mass: bool = False


@dataclass
class Trace:
    """Lengths of one forward per sample: real tokens only, no padding; pruned tokens count as gone in soft mode too.

    Of a forward that ran, `ran` are the tokens that each layer computed, softly masked ones included, none where it
    idled, and `learns` says which layers gradients go back through.
    `tower` is there when a method has stages inside it. Without it and `vision`, the tower is priced in proportion to
    `total_visual`: right for models whose crops all give the same number of tokens.
    """

    queries: list[Int[Tensor, " batch"]] = field(default_factory=list)
    keys: list[Int[Tensor, " batch"]] = field(default_factory=list)
    visual: list[Int[Tensor, " batch"]] = field(default_factory=list)
    stages: list[StageTrace] = field(default_factory=list)
    total_visual: Int[Tensor, " batch"] | None = None
    vision: VisionTrace | None = None
    tower: TowerTrace | None = None
    repaired: Int[Tensor, " batch"] | None = None
    repair_stages: tuple[int, ...] = ()
    ran: list[Int[Tensor, " batch"]] = field(default_factory=list)
    learns: list[bool] = field(default_factory=list)

    def average_visual(self) -> Tensor:
        """Visual tokens averaged over the decoder layers' inputs, per sample: the budget as it was spent."""
        return torch.stack(self.visual).double().mean(0)


def plan(
    schedule: Mapping[int, int],
    visual: int,
    text: int,
    depth: int,
    pruner=None,
    repair=None,
    question: int | None = None,
) -> Trace:
    """The trace that one prompt would leave under a schedule; nothing runs.

    `schedule` is {decoder layer: visual tokens kept from its input on}, empty for the full model. `question` of the
    `text` tokens stand behind the image [ours: all of them unless told otherwise]; they are what a pruner reads.
    `pruner` and `repair` are asked what they read and which stages feed the repair; one position is repaired. What a
    method does inside the vision tower is the caller's to add, as `Trace.tower`.
    """
    trace, now = Trace(total_visual=_one(visual)), visual
    for layer in range(depth):
        if layer in schedule:
            kept = min(now, schedule[layer])
            if layer == 0 and getattr(pruner, "acts_in_tower", False):
                now = kept  # no more than these leave the tower
            reads = None if pruner is None else pruner.reads(len(trace.stages))
            rows = 1 if reads is not None and reads.rows == "last" else text if question is None else question
            sizes = (_one(size) for size in (rows, now + text, now, kept))
            keys = getattr(pruner, "needs_keys", False)
            trace.stages.append(StageTrace(layer, None if reads is None else reads.layer, *sizes, keys))
            now = kept
        trace.queries.append(_one(now + text))
        trace.keys.append(_one(now + text))
        trace.visual.append(_one(now))
    if repair is not None and schedule:
        trace.repaired = _one(int(visual > 0))
        feeds = repair.feeds(sorted(schedule), depth)
        trace.repair_stages = tuple(sorted({stage for _, stage in feeds.values()}))
    return trace


def _one(value: int) -> Tensor:
    return torch.tensor([value])


def step(trace: Trace, index: int) -> Trace:
    """The trace of the `index`-th decoding step (from 1) after a prefill: one query, one more key with each step."""
    one = torch.ones_like(trace.queries[0])
    return Trace(
        queries=[one] * len(trace.queries),
        keys=[keys + index for keys in trace.keys],
        visual=trace.visual,
        repaired=None if trace.repaired is None else (trace.repaired > 0).to(one),
    )


def decoder_layer(size: ModelSize, queries: Tensor, keys: Tensor) -> Tensor:
    """FLOPs of one decoder layer: projections, attention over `keys`, SwiGLU."""
    rows = queries.double()
    projections = 2 * rows * size.width * size.head_dim * (2 * size.heads + 2 * size.key_heads)
    return projections + attention(size, queries, keys) + 6 * rows * size.width * size.mlp


def attention(size: ModelSize, queries: Tensor, keys: Tensor) -> Tensor:
    """FLOPs of one decoder layer's attention between queries and keys, without its projections."""
    return 4 * queries.double() * keys.double() * size.heads * size.head_dim


def vision_tower(size: ModelSize, vision: VisionTrace) -> Tensor:
    """FLOPs of the vision tower: patch embedding and every encoder layer, also those whose output is not used."""
    d, mlp = size.vision_width, 2 * size.vision_matrices * size.vision_mlp
    tokens, pairs = (torch.stack(layers).double().sum(0) for layers in (vision.tokens, vision.pairs))
    return 2 * vision.patches.double() * size.patch_values * d + tokens * d * (8 * d + mlp) + 4 * pairs * d


def projector(size: ModelSize, rows: Tensor) -> Tensor:
    """FLOPs of the projector (or merger) over `rows` rows."""
    return 2 * size.projectors * rows.double() * size.projector_inner * (size.projector_in + size.width)


def attention_rows(size: ModelSize, stage: StageTrace) -> Tensor:
    """FLOPs of reading a stage's attention rows and keys, and of handing mass on.

    Own rows pay the layer's key and query projections too.
    """
    rows, sequence = stage.rows.double(), stage.sequence.double()
    key_projection = 2 * size.width * size.head_dim * sequence * size.key_heads
    cost = key_projection if stage.keys else torch.zeros_like(rows)
    if stage.mass:
        cost = cost + 2 * stage.visual * stage.kept * size.width
    if stage.reads is not None:
        cost = cost + 2 * rows * sequence * size.heads * size.head_dim
    if stage.reads == "own":
        cost = cost + key_projection + 2 * size.width * size.head_dim * rows * size.heads
    return cost


def price(trace: Trace, size: ModelSize, pruner=None, repair=None, lm_rows: int = 1) -> dict[str, Tensor]:
    """FLOPs of one forward per sample, part by part; `total` adds the parts up.

    `pruner` and `repair` are asked what their own arithmetic costs; `lm_rows` positions go through the LM head.
    """
    zero = torch.zeros_like(trace.queries[0], dtype=torch.float64)
    visual = zero if trace.total_visual is None else trace.total_visual.double()
    vision = _usual_images(size.image, visual) if trace.vision is None else trace.vision
    if trace.tower is not None:
        vision = trace.tower.per_sample(visual if vision is None else vision.patches.to(visual))
    parts = {
        "vision": zero if vision is None else vision_tower(size, vision).to(zero),
        "projector": zero if vision is None else projector(size, vision.projected).to(zero),
        "decoder": decoder_layer(size, torch.stack(trace.queries), torch.stack(trace.keys)).sum(0),
        "scoring": sum((attention_rows(size, stage) for stage in trace.stages), zero),
        "pruner": zero,
        "repair": zero,
        "lm_head": zero + 2 * lm_rows * size.width * size.vocab,
    }
    if vision is not None and vision.scored is not None:
        parts["scoring"] = parts["scoring"] + 2 * vision.scored * size.vision_width**2
    if pruner is not None:
        stages = enumerate(trace.stages)
        costs = (pruner.stage_flops(i, s.visual, s.rows, size.width, s.kept) for i, s in stages)
        parts["pruner"] = sum(costs, zero)
        if trace.tower is not None:
            for found, kept in trace.tower.stages:
                inside = pruner.vision_flops(found, kept, size.vision_width)
                parts["pruner"] = parts["pruner"] + trace.tower.share(inside, visual)
    if repair is not None and trace.repaired is not None:
        for index in trace.repair_stages:
            parts["repair"] = parts["repair"] + repair.context_flops(trace.stages[index].visual, visual, size.width)
        parts["repair"] = parts["repair"] + repair.adapter_flops(trace.repaired, size.width)
    parts["total"] = sum(parts.values(), zero)
    return parts


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
    return sum(k.double() for k in trace.keys) * 2 * size.key_heads * size.head_dim * bytes_per_value

"""Trace of a forward that ran, or would run: lengths per sample and layer, all that its price depends on.

The host records the trace of a forward, `plan` writes the one that a schedule would leave, `step` the one of a decoding
step. `lit_prune.cost.flops` prices them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from lit_prune.pruners.base import UNPRUNED, PruningMethod
from lit_prune.repair import RepairAdapter

# Share of the rows that a stage has to drop before the others learn alone (`backward: kept`): below it, their second
# attention costs what backward saves [ours].
WORTH = 0.25


@dataclass(frozen=True)
class ImageLoad:
    """Load of one image on the vision tower, all its crops together, and the visual tokens that it gives the decoder.

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
class VisionTrace:
    """Work of the vision tower: the fields of `ImageLoad` summed over each sample's images.

    A method that drops tokens inside the tower leaves fewer `tokens`, `pairs` and `projected` behind.
    """

    patches: Num[Tensor, " batch"]
    tokens: list[Num[Tensor, " batch"]]
    pairs: list[Num[Tensor, " batch"]]
    projected: Num[Tensor, " batch"]
    scored: Num[Tensor, " batch"] | None = None  # tokens that a stage projected once more: to keys, values, a query
    rated: Num[Tensor, " batch"] | None = None  # tokens whose attention from the class token a stage computed

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

    `patches` entered, `tokens` at each layer's input, class token included, `projected` left; `scored` tokens were
    projected once more for a stage, to keys, values or a query, `rated` ones got attention there. `stages`: visual
    tokens to be that each stage found and kept, `unit` patches each. `pairs`: (query, key) pairs of each layer's
    attention, where that is not over the whole tile.
    """

    patches: Int[Tensor, " tiles"]
    tokens: list[Int[Tensor, " tiles"]]
    projected: Num[Tensor, " tiles"]
    scored: Int[Tensor, " tiles"]
    rated: Int[Tensor, " tiles"]
    stages: list[tuple[Int[Tensor, " tiles"], Int[Tensor, " tiles"]]] = field(default_factory=list)
    unit: int = 1
    pairs: list[Int[Tensor, " tiles"]] | None = None

    def share(self, values: Num[Tensor, " tiles"], visual: Num[Tensor, " batch"]) -> Num[Tensor, " batch"]:
        """Tiles handed to samples: one each where the numbers agree, else in proportion to their visual tokens."""
        values = values.double().to(visual.device)
        if len(values) == int((visual > 0).sum()):
            return torch.zeros_like(visual, dtype=torch.float64).masked_scatter(visual > 0, values)
        return values.sum() * visual.double() / visual.double().sum()

    def per_sample(self, visual: Num[Tensor, " batch"]) -> VisionTrace:
        """Work of each sample's tiles."""
        tokens = [self.share(layer, visual) for layer in self.tokens]
        whole = [layer.square() for layer in self.tokens] if self.pairs is None else self.pairs
        pairs = [self.share(layer, visual) for layer in whole]
        ends = (self.patches, self.projected, self.scored, self.rated)
        patches, projected, scored, rated = (self.share(values, visual) for values in ends)
        return VisionTrace(patches, tokens, pairs, projected, scored, rated)


@dataclass(frozen=True)
class StageTrace:
    """One pruning stage as it ran.

    `reads`: whose attention rows it used; those of its `own` layer were projected ahead, those of the `previous` one
    were read where they are computed anyway. `keys`: it also had the layer's keys projected, for themselves.
    `proportional`: the nearest kept token of each dropped one was looked for. `whole`: own rows and keys come from a
    run of the layer up to its attention, where they aren't projections of their own.
    """

    layer: int
    reads: str | None
    rows: Int[Tensor, " batch"]
    sequence: Int[Tensor, " batch"]
    visual: Int[Tensor, " batch"]
    kept: Int[Tensor, " batch"]
    keys: bool = False
    proportional: bool = False
    whole: bool = False


@dataclass
class Trace:
    """Lengths of one forward per sample: real tokens only, no padding; pruned tokens count as gone in soft mode too.

    Of a forward that ran, `ran` are the tokens that each layer computed, softly masked ones included, none where it
    idled, `learns` says which layers gradients go back through, and `learning` through how many tokens there.
    `counted` are the FLOPs of a vision tower with its projector, where their arithmetic isn't known.
    `budget` is what was asked of each sample: `keep`, or all its visual tokens if it has fewer.
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
    counted: Float[Tensor, " batch"] | None = None
    repaired: Int[Tensor, " batch"] | None = None
    repair_stages: tuple[int, ...] = ()
    ran: list[Int[Tensor, " batch"]] = field(default_factory=list)
    learns: list[bool] = field(default_factory=list)
    learning: list[Int[Tensor, " batch"]] = field(default_factory=list)
    budget: Float[Tensor, " batch"] | None = None

    def average_visual(self) -> Tensor:
        """Visual tokens averaged over the decoder layers' inputs, per sample: the budget as it was spent."""
        return torch.stack(self.visual).double().mean(0)

    def excess(self) -> Float[Tensor, " batch"]:
        """Visual tokens above the budget, averaged as it is, per sample; up to half a token is rounding, and 0 here.

        A sample exceeds its budget where it has more images than the budget has tokens, or where the layers before the
        first stage see too many tokens; a method that keeps as many as it likes may exceed any.
        """
        spent = self.average_visual()
        if self.budget is None:
            return torch.zeros_like(spent)
        above = spent - self.budget.to(spent.device)
        return torch.where(above > 0.5, above, 0.0)


def left_out(trace: Trace) -> Trace:
    """The trace of a forward over the same prompts without stages, none of whose decoder layers ran."""
    whole, nothing = trace.total_visual + trace.queries[0] - trace.visual[0], torch.zeros_like(trace.queries[0])
    each, none, learns = ([part] * len(trace.queries) for part in (whole, nothing, False))
    lengths = {"queries": each, "keys": each, "visual": [trace.total_visual] * len(each)}
    ran = {"ran": none, "learning": none, "learns": learns}
    return replace(trace, stages=[], tower=None, repaired=None, repair_stages=(), budget=None, **lengths, **ran)


def plan(
    schedule: Mapping[int, int],
    visual: int,
    text: int,
    depth: int,
    pruner: PruningMethod = UNPRUNED,
    repair: RepairAdapter | None = None,
    question: int | None = None,
) -> Trace:
    """The trace that one prompt would leave under a schedule; nothing runs.

    `schedule` is {decoder layer: visual tokens kept from its input on}, empty for the full model. `question` of the
    `text` tokens stand behind the image [ours: all of them unless told otherwise]; they are what a pruner reads.
    `pruner` and `repair` are asked what they read and which stages feed the repair; one position is repaired. What a
    method does inside the vision tower is the caller's to add, as `Trace.tower`.
    """
    trace, now = Trace(total_visual=_one(visual)), pruner.arriving(schedule, visual)
    asked = {stage.layer: (stage.pruner.reads(stage.index), stage.pruner.needs_keys) for stage in pruner.walk(depth)}
    for layer in range(depth):
        if layer in schedule:
            kept = min(now, schedule[layer])
            reads, keys = asked.get(layer, (None, False))
            rows = 1 if reads is not None and reads.rows == "last" else text if question is None else question
            sizes = (_one(size) for size in (rows, now + text, now, kept))
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

"""PruMerge+: outliers of [CLS] attention and evenly spaced tokens, each merged with its nearest neighbours."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from lit_prune.errors import check_number
from lit_prune.ops import merging, selection
from lit_prune.pruners.base import Kept, VisionContext, VisionPruner


class PruMergePlus(VisionPruner):
    """Outliers of class attention plus spatially uniform tokens, then merging (LLaVA-PruMerge+, arXiv 2403.15388).

    Outliers have attention above Q3 + 1.5 (Q3 - Q1). A kept token adds the sum of its `neighbours` nearest other tokens
    by key (cosine), weighted by their class attention. The paper's count varies between images; ours is exact: of too
    many outliers the best stay, the rest of the budget is evenly spaced over the other tokens in raster order.

    Args:
        vision_layers: one stage after the layer that gives the features; attention and keys are that layer's.
        neighbours: tokens that each kept one adds [paper: 32].
        vision_depth: see `VisionPruner`.
    """

    title = "PruMerge+"

    def __init__(
        self, vision_layers: Sequence[int] = (-1,), neighbours: int = 32, vision_depth: int | None = None
    ) -> None:
        super().__init__(vision_layers, None, vision_depth)
        check_number("pruner.neighbours", neighbours, least=1, whole=True)
        self.neighbours = neighbours

    def prune_vision(self, context: VisionContext) -> Kept:
        """Keep outliers and uniform tokens, each with its nearest neighbours added."""
        attention = context.attention.float()
        outliers = (attention > _fence(attention, context.alive)[:, None]) & context.alive
        outliers = selection.top_k(attention, outliers, context.count)
        kept = outliers | merging.evenly(context.alive & ~outliers, context.count - outliers.sum(1))
        columns, _ = selection.compact(kept)
        keys = normalize(context.keys.float(), dim=-1)
        alike = selection.gather_rows(keys, columns) @ keys.transpose(1, 2)
        own = columns[..., None] == torch.arange(alike.shape[2], device=alike.device)
        alike = alike.masked_fill(own | ~context.alive[:, None], -2.0)
        near = _best(alike, min(self.neighbours, alike.shape[2])) & (alike > -2.0)
        states = context.states.float()
        merged = selection.gather_rows(states, columns) + (near * attention[:, None]) @ states
        return Kept(kept, scores=attention, states=states.scatter(1, columns[..., None].expand_as(merged), merged))

    def vision_flops(self, visual: Tensor, kept: Tensor, width: int, heads: int) -> Tensor:
        """Cosines between kept and all tokens, and the weighted sums."""
        visual, kept = visual.double(), kept.double()
        return 4 * visual * kept * width


def _best(values: Float[Tensor, "batch rows columns"], count: int) -> Bool[Tensor, "batch rows columns"]:
    """The `count` largest of each row; ties go to the earlier column."""
    order = values.argsort(dim=2, descending=True, stable=True)[..., :count]
    return torch.zeros_like(values, dtype=torch.bool).scatter(2, order, True)


def _fence(values: Float[Tensor, "batch visual"], alive: Bool[Tensor, "batch visual"]) -> Float[Tensor, " batch"]:
    """Q3 + 1.5 (Q3 - Q1) of each sample's alive values, quartiles interpolated linearly."""
    low, high = torch.nanquantile(
        values.masked_fill(~alive, float("nan")), torch.tensor([0.25, 0.75], device=values.device), dim=1
    )
    return high + 1.5 * (high - low)

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

    The authors' code has `extra_token`, `one_head` and `last_layer`, and so does `configs/pruners/prumerge_plus.yaml`.

    Args:
        vision_layers: one stage after the layer that gives the features.
        neighbours: tokens that each kept one adds [paper: 32].
        vision_depth: see `VisionPruner`.
        extra_token: one token of the budget is the sum of all dropped ones, weighted by their class attention, not
            divided by the weights' sum. It takes the place of the last dropped token, since the authors append it. Only
            where the budget is at least two.
        one_head: attention is that of a single head as wide as all together; otherwise the mean over heads [ours].
        last_layer: attention and keys are those of the layer after the features, the tower's last in LLaVA-1.5,
            projected from the features. Otherwise, and where no layer follows, those of the layer that gives them.
    """

    title = "PruMerge+"
    positions = "renumbered"

    def __init__(
        self,
        vision_layers: Sequence[int] = (-1,),
        neighbours: int = 32,
        vision_depth: int | None = None,
        extra_token: bool = False,
        one_head: bool = False,
        last_layer: bool = False,
    ) -> None:
        super().__init__(vision_layers, None, vision_depth)
        check_number("pruner.neighbours", neighbours, least=1, whole=True)
        self.neighbours, self.extra_token = neighbours, extra_token
        self.one_head, self.last_layer = one_head, last_layer

    @property
    def reads_next(self) -> bool:
        """True if attention and keys are those of the layer after the stage."""
        return self.last_layer

    def prune_vision(self, context: VisionContext) -> Kept:
        """Keep outliers and uniform tokens, each with its nearest neighbours added, and the sum of the others."""
        attention, alive = context.attention.float(), context.alive
        extra = (context.count > 1) & (context.count < alive.sum(1)) & self.extra_token
        count = context.count - extra.long()
        outliers = (attention > _fence(attention, alive)[:, None]) & alive
        outliers = selection.top_k(attention, outliers, count)
        kept = outliers | merging.evenly(alive & ~outliers, count - outliers.sum(1))
        states = self._merge(context, attention, kept)
        if self.extra_token:
            dropped = alive & ~kept
            place = _last(dropped) & extra[:, None]
            total = (attention * dropped)[:, None] @ context.states.float()
            states, kept = torch.where(place[..., None], total, states), kept | place
        return Kept(kept, scores=attention, states=states)

    def _merge(self, context: VisionContext, attention: Tensor, kept: Tensor) -> Float[Tensor, "tiles visual width"]:
        """States, with its neighbours' added to each kept token's."""
        columns, _ = selection.compact(kept)
        keys = normalize(context.keys.float(), dim=-1)
        alike = selection.gather_rows(keys, columns) @ keys.transpose(1, 2)
        own = columns[..., None] == torch.arange(alike.shape[2], device=alike.device)
        alike = alike.masked_fill(own | ~context.alive[:, None], -2.0)
        near = _best(alike, min(self.neighbours, alike.shape[2])) & (alike > -2.0)
        states = context.states.float()
        merged = selection.gather_rows(states, columns) + (near * attention[:, None]) @ states
        return states.scatter(1, columns[..., None].expand_as(merged), merged)

    def vision_flops(self, visual: Tensor, kept: Tensor, width: int, heads: int) -> Tensor:
        """Cosines between kept and all tokens, and the weighted sums, that of the extra token too."""
        extra = (kept > 1) & (kept < visual) & self.extra_token
        visual, merged = visual.double(), kept.double() - extra.double()
        return 4 * visual * merged * width + 2 * visual * width * self.extra_token


def _last(flags: Bool[Tensor, "batch visual"]) -> Bool[Tensor, "batch visual"]:
    """The last set flag of each sample alone."""
    return flags & (flags.flip(1).long().cumsum(1).flip(1) == 1)


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

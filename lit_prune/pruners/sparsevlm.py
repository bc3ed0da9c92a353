"""SparseVLM: attention from the visually relevant prompt tokens, and recycling of the best dropped tokens."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lit_prune.errors import check_choice, check_number
from lit_prune.ops import merging, selection
from lit_prune.ops.graphs import DENSE
from lit_prune.pruners.base import AttentionRows, Context, Kept, Pruner
from lit_prune.pruners.by_image import image_by_image
from lit_prune.pruners.raters import rater_attention


class SparseVLM(Pruner):
    """Text-guided sparsification with recycling (SparseVLM, arXiv 2410.04417, section 3).

    Raters are the question's tokens whose similarity to the image is at or above the mean: the softmax over the words
    of visual x word embeddings at the decoder's input, averaged over visual tokens. A token's score is the attention
    of the raters to it, averaged over heads and raters. The best dropped tokens are clustered by density peaks and
    replaced by the clusters' means.

    Ours: attention is the pruning layer's own, computed before it runs, and tokens leave at its input, where the
    authors' code prunes a layer's output by that layer's attention. Raters are chosen again at each stage, by the
    visual tokens still present. Counts are fixed by the budget instead of the attention's rank. A mean is over the
    residual stream, unweighted, and takes column and position of its cluster's centre, where the authors append it.
    Several images of a prompt are pruned one by one; the FLOPs are then approximate.

    Args:
        layers: decoder layers at whose input tokens are dropped [paper: 2, 6, 15 of 32].
        stage_ratios: relative counts of the stages [paper: 66, 30, 17 for 64 tokens; 303, 110, 36 for 128; 300, 200,
            110 for 192].
        depth: see `Pruner`.
        recycled: share of the dropped tokens, the best ones, that are clustered [paper: 0.3]. 0: no recycling.
        per_cluster: clustered tokens per cluster; there is one cluster more [paper: 10].
        neighbours: nearest neighbours in the density estimate [ours: 5]. None, the authors' code: as many as there are
            clusters, the token itself included.
        distance: unit of distances in the density estimate: `sample`, the root mean square distance [ours], or `width`,
            the square root of the hidden size, as the authors' code.
        added: if True, recycled tokens come on top of the budget's counts, as in the authors' code, where 30 tokens are
            34. They are real tokens: averages, FLOPs and KV bytes that are measured count them, those that are planned
            don't. If False, they are within the counts, at most half of them [ours], so that the budget holds.
    """

    title = "SparseVLM"
    positions = "renumbered"
    attention = AttentionRows("own", "question", each=True)
    needs_embeds = True
    needs_states = True

    def __init__(
        self,
        layers: Sequence[int] = (2, 6, 15),
        stage_ratios: Sequence[float] | None = (66.0, 30.0, 17.0),
        depth: int | None = None,
        recycled: float = 0.3,
        per_cluster: int = 10,
        neighbours: int | None = 5,
        distance: Literal["sample", "width"] = "sample",
        added: bool = False,
    ) -> None:
        super().__init__(layers, stage_ratios, depth)
        check_number("pruner.recycled", recycled, least=0, below=1)
        check_number("pruner.per_cluster", per_cluster, least=1, whole=True)
        check_number("pruner.neighbours", neighbours, least=1, whole=True)
        check_choice("pruner.distance", distance, ("sample", "width"))
        self.recycled, self.per_cluster, self.neighbours = recycled, per_cluster, neighbours
        self.distance, self.added = distance, added

    def score(self, context: Context) -> Float[Tensor, "batch visual"]:
        """Attention averaged over heads and raters."""
        return rater_attention(context)

    @image_by_image
    def prune(self, context: Context) -> Kept:
        """Keep the best tokens, and cluster centres with the means of the recycled ones."""
        scores = self.score(context)
        candidates, clusters = self._counts(context.alive.sum(1), context.count)
        count = context.count if self.added else context.count - clusters
        best = selection.top_k(scores, context.alive, count)
        columns, real = selection.compact(selection.top_k(scores, context.alive & ~best, candidates))
        if not columns.shape[1]:
            return Kept(best, scores=scores)
        states = selection.gather_rows(context.states, columns)
        centres, centre = merging.density_peaks(states.detach(), real, clusters, self.neighbours, self.distance)
        means = merging.group_means(states, centre, real.float())
        changed = torch.where(centres[..., None], means, states.float())
        states = context.states.float().scatter(1, columns[..., None].expand_as(changed), changed)
        return Kept(best | torch.zeros_like(best).scatter(1, columns, centres), scores=scores, states=states)

    def _counts(self, visual: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers of clustered tokens and of clusters if `kept` of `visual` tokens stay."""
        candidates = ((visual - kept).clamp(min=0) * self.recycled + 1e-6).long()
        most = candidates if self.added else torch.minimum(candidates, kept // 2)
        return candidates, torch.minimum(candidates // self.per_cluster + 1, most)

    def flops(self, visual: Tensor, text: Tensor, width: int, kept: Tensor) -> Tensor:
        """Visual x word embeddings, the mean over raters, and distances between clustered tokens."""
        candidates, clusters = (number.to(torch.float64) for number in self._counts(visual, kept))
        twice = (candidates > DENSE) * candidates * (candidates + clusters)  # as `density_peaks` says
        visual = visual.to(torch.float64)
        return 2 * width * (visual * text + candidates.square() + twice) + 2 * visual * text

"""TOPS: tokens that are relevant to the question, cover the image and differ from each other."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from lit_prune.errors import check_number
from lit_prune.ops import selection
from lit_prune.pruners.base import AttentionRows, Context
from lit_prune.pruners.by_image import PickedOneByOne
from lit_prune.pruners.raters import rater_attention


class TOPS(PickedOneByOne):
    """Token optimal preservation sets: relevance x coverage x diversity, by greedy picks (TOPS, arXiv 2606.27161).

    From the paper: three principles, task relevance by the attention of text raters, information coverage and semantic
    diversity; a greedy choice by their product, once before the decoder and once inside it; no training.

    The formulas are ours, since the paper's are not known to us. Relevance: attention of SparseVLM's raters in the
    stage's own layer, averaged over heads and raters. Cosines are between inputs of that layer after its norm; a
    token's nearness to the picks is its largest cosine to one of them, at least 0. Coverage: (1 + c) / 2, with c the
    mean cosine to all tokens, each weighted by one minus its nearness, which the picks so far leave uncovered.
    Diversity: one minus the token's own nearness. Both keep a running maximum: O(kept x visual), without a matrix of
    all pairs.

    Several images of a prompt are pruned one by one; the FLOPs are then an upper bound.

    Args:
        layers: decoder layers at whose input tokens are dropped [ours: 0, before the decoder, and half-way].
        stage_ratios: relative counts of the stages [ours: 3 and 1].
        depth: see `Pruner`.
        relevance: exponent of relevance in the product [ours]; 0 leaves the factor out. coverage: of coverage.
            diversity: of diversity.
    """

    title = "TOPS"
    positions = "renumbered"
    attention = AttentionRows("own", "question", each=True)

    def __init__(
        self,
        layers: Sequence[int] = (0, 16),
        stage_ratios: Sequence[float] | None = (3.0, 1.0),
        depth: int | None = None,
        relevance: float = 1.0,
        coverage: float = 1.0,
        diversity: float = 1.0,
    ) -> None:
        super().__init__(layers, stage_ratios, depth)
        for name, value in (("relevance", relevance), ("coverage", coverage), ("diversity", diversity)):
            check_number(f"pruner.{name}", value, least=0)
        self.relevance, self.coverage, self.diversity = relevance, coverage, diversity

    def score(self, context: Context) -> Float[Tensor, "batch visual"]:
        """Higher for earlier picks, 1 for the last; for the others the relevance, shifted below 0."""
        unit = normalize(context.visual.detach().float(), dim=-1) * context.alive[..., None]
        attention = rater_attention(context).float()
        order = torch.full(context.alive.shape, -1, device=unit.device)
        near = torch.zeros_like(attention)
        for _ in range(min(int(context.count.max()), unit.shape[1])):
            left = (1 - near) * context.alive
            mean = (left[:, None] @ unit).squeeze(1) / left.sum(1, keepdim=True).clamp(min=1e-6)
            covered = (1 + (unit @ mean[..., None]).squeeze(2)) / 2
            gains = attention**self.relevance * covered**self.coverage * left**self.diversity
            best, found, order = selection.pick(gains, context.alive, order, context.count)
            to_pick = (unit @ selection.gather_rows(unit, best).transpose(1, 2)).squeeze(2).clamp(min=0, max=1)
            near = torch.where(found, near.maximum(to_pick), near)
        return self.picks_first(order, context.count, attention - 2.0)

    def flops(self, visual: Tensor, text: Tensor, width: int, kept: Tensor) -> Tensor:
        """Visual x word embeddings, the mean over raters, and for each pick a mean and two products with all tokens."""
        visual, kept = visual.to(torch.float64), kept.to(torch.float64)
        return 2 * visual * (text * (width + 1) + 3 * width * kept)

"""CDPruner: tokens that are relevant to the question and differ from each other."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from lit_prune.errors import check_choice
from lit_prune.ops import selection
from lit_prune.pruners.base import Context
from lit_prune.pruners.by_image import PickedOneByOne

NOTHING = 1e-6  # residual squared length (fp32) at which a token counts as spanned by the picks


class CDPruner(PickedOneByOne):
    """Conditional diversity: greedy MAP of a determinantal point process (CDPruner, arXiv 2506.10967, section 3).

    Kernel r_i cos(i, j) r_j over the projected visual tokens; r is the relevance to the question, min-max per sample.
    Each pick has the largest residual outside the span of the previous picks, by an incremental Cholesky factor:
    O(kept x visual) memory, O(kept^2 x visual) time besides the cosines. Tokens without a residual come last, by
    relevance [ours].

    The authors' relevance is *minus* the mean cosine of a patch to the question in the joint space of CLIP, whose text
    encoder LLaVA doesn't contain. Ours is a cosine to the question's word embeddings at the decoder's input, with
    either sign, or none: then this is the authors' DPP without a question. Several images of a prompt are pruned one by
    one, min-max too [ours]; the FLOPs are then an upper bound.

    Args:
        layers, stage_ratios, depth: see `PickedOneByOne`.
        relevance: `similar`: mean cosine to the question's words [ours]; `dissimilar`: minus that, the authors' sign in
            our space; `none`: 1 for all tokens, a pure DPP, which doesn't read the question.
    """

    title = "CDPruner"
    positions = "renumbered"

    def __init__(
        self,
        layers: Sequence[int] = (0,),
        stage_ratios: Sequence[float] | None = None,
        depth: int | None = None,
        relevance: Literal["similar", "dissimilar", "none"] = "similar",
    ) -> None:
        super().__init__(layers, stage_ratios, depth)
        check_choice("pruner.relevance", relevance, ("similar", "dissimilar", "none"))
        self.relevance = relevance

    def score(self, context: Context) -> Float[Tensor, "batch visual"]:
        """Higher for earlier picks, 1 for the last; for the others the relevance, shifted below 0."""
        unit, alive = normalize(context.visual_embeds.detach().float(), dim=-1), context.alive
        relevance = self._relevance(unit, context)
        order = torch.full(alive.shape, -1, device=alive.device)
        steps = min(int(context.count.max()), alive.shape[1])
        factor = unit.new_zeros(*alive.shape, steps)  # Cholesky factor of the kernel, one column per pick
        left = relevance.square()  # diagonal of the kernel's Schur complement given the picks
        for step in range(steps):
            best, found, order = selection.pick(left, alive & (left > NOTHING), order, context.count)
            cosine = (unit @ selection.gather_rows(unit, best).transpose(1, 2)).squeeze(2)
            spanned = factor[..., :step] @ selection.gather_rows(factor, best)[..., :step].transpose(1, 2)
            kernel = relevance * cosine * relevance.gather(1, best)
            column = (kernel - spanned.squeeze(2)) * left.gather(1, best).clamp(min=NOTHING).rsqrt()
            factor[..., step] = torch.where(found, column, 0.0)
            left = left - factor[..., step].square()
        return self.picks_first(order, context.count, relevance - 2.0)

    def _relevance(self, unit: Tensor, context: Context) -> Tensor:
        """Mean cosine to the question's words, or minus that, scaled to [0, 1] over the sample; 1 if all are equal."""
        if self.relevance == "none":
            return torch.ones_like(unit[..., 0])
        words = normalize(context.text_embeds.detach().float(), dim=-1) * context.text_mask[..., None]
        mean = words.sum(1, keepdim=True) / context.text_mask.sum(1).clamp(min=1)[:, None, None]
        cosine = (unit @ mean.transpose(1, 2)).squeeze(2)
        cosine = -cosine if self.relevance == "dissimilar" else cosine
        low = cosine.masked_fill(~context.alive, float("inf")).amin(1, keepdim=True)
        high = cosine.masked_fill(~context.alive, float("-inf")).amax(1, keepdim=True)
        flat = ~(high > low)
        scaled = (cosine - low) / torch.where(flat, 1.0, high - low)
        return torch.where(flat | ~context.alive, 1.0, scaled)

    def flops(self, visual: Tensor, text: Tensor, width: int, kept: Tensor) -> Tensor:
        """Cosines to the mean word, if it is read, and to each pick, and the growing Cholesky factor."""
        visual, kept = visual.to(torch.float64), kept.to(torch.float64)
        return 2 * width * visual * (kept + (self.relevance != "none")) + visual * kept * (kept - 1)

"""CDPruner: tokens that are relevant to the question and differ from each other."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

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

    Relevance [ours]: mean cosine to the question's word embeddings, at the decoder's input. The paper uses CLIP's text
    encoder, which LLaVA doesn't contain. Several images of a prompt are pruned one by one, min-max too [ours]; the
    FLOPs are then an upper bound.
    """

    title = "CDPruner"

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

    @staticmethod
    def _relevance(unit: Tensor, context: Context) -> Tensor:
        """Mean cosine to the question's words, scaled to [0, 1] over the sample's alive tokens; 1 if all are equal."""
        words = normalize(context.text_embeds.detach().float(), dim=-1) * context.text_mask[..., None]
        mean = words.sum(1, keepdim=True) / context.text_mask.sum(1).clamp(min=1)[:, None, None]
        cosine = (unit @ mean.transpose(1, 2)).squeeze(2)
        low = cosine.masked_fill(~context.alive, float("inf")).amin(1, keepdim=True)
        high = cosine.masked_fill(~context.alive, float("-inf")).amax(1, keepdim=True)
        flat = ~(high > low)
        scaled = (cosine - low) / torch.where(flat, 1.0, high - low)
        return torch.where(flat | ~context.alive, 1.0, scaled)

    def flops(self, visual: Tensor, text: Tensor, width: int, kept: Tensor) -> Tensor:
        """Cosines to the mean word and to each pick, and the growing Cholesky factor."""
        visual, kept = visual.to(torch.float64), kept.to(torch.float64)
        return 2 * width * visual * (1 + kept) + visual * kept * (kept - 1)

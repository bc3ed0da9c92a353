"""Similarity to the question's words at the decoder's input."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from lit_prune.pruners.base import Context, Pruner


class TextSimilarity(Pruner):
    """Largest cosine between a visual token and any question word at the decoder's input; needs no attention."""

    title = "word similarity"
    needs_embeds = True

    def __init__(
        self, layers: Sequence[int] = (0,), stage_ratios: Sequence[float] | None = None, depth: int | None = None
    ) -> None:
        super().__init__(layers, stage_ratios, depth)

    def score(self, context: Context) -> Float[Tensor, "batch visual"]:
        """Largest cosine with a question word's embedding."""
        visual = normalize(context.visual_embeds.float(), dim=-1)
        words = normalize(context.text_embeds.float(), dim=-1)
        cosine = (visual @ words.transpose(1, 2)).masked_fill(~context.text_mask[:, None], -1.0)
        # Padded by one column, since `amax` fails if no prompt has a question.
        return torch.nn.functional.pad(cosine, (0, 1), value=-1.0).amax(-1)

    def flops(self, visual: Tensor, text: Tensor, width: int, kept: Tensor) -> Tensor:
        """Product of all visual with all question tokens."""
        return 2.0 * visual.to(torch.float64) * text * width

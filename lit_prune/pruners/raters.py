"""Text raters: the question's tokens that are visually relevant, whose attention rates the visual tokens."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lit_prune.ops import selection
from lit_prune.pruners.base import Context


def rater_attention(context: Context) -> Float[Tensor, "batch visual"]:
    """Attention averaged over heads and raters (SparseVLM, arXiv 2410.04417); needs embeddings and row attention."""
    return selection.row_mean(context.row_attention, raters(context))


def raters(context: Context) -> Bool[Tensor, "batch text"]:
    """Words at least as similar to the visual tokens, on average, as the mean word; all words if none is.

    Similarity is the softmax over the words of visual x word embeddings at the decoder's input, averaged over the
    visual tokens.
    """
    products = context.visual_embeds.detach().float() @ context.text_embeds.detach().float().transpose(1, 2)
    words = context.text_mask
    shares = products.masked_fill(~words[:, None], torch.finfo(products.dtype).min).softmax(2)
    visual = context.alive[..., None]
    similarity = (shares * visual).sum(1) / visual.sum(1).clamp(min=1)
    chosen = words & (similarity >= 1 / words.sum(1, keepdim=True).clamp(min=1))  # shares sum to one: their mean
    return torch.where(chosen.any(1, keepdim=True), chosen, words)

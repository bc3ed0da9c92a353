"""DART: tokens that don't duplicate a few pivots."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from lit_prune.errors import check_number
from lit_prune.ops import selection
from lit_prune.pruners.base import Context, Kept, Pruner
from lit_prune.pruners.by_image import image_by_image


class DART(Pruner):
    """Tokens least similar to a few pivots: duplication counts, not importance (DART, arXiv 2502.11494, section 3).

    Pivots are the visual and the question tokens with the largest L1 norm of their keys. The visual ones stay; then
    each pivot, by norm, the visual ones first, adds the remaining tokens with the smallest cosine to it. All add
    equally many; the first ones add the remainder [ours: exact counts]. Keys are the pruning layer's own before the
    rotary embedding, which would make the L1 norm depend on padding; cosines are between inputs of that layer after
    its norm [ours].

    Several images of a prompt are pruned one by one, each with its own pivots [ours]; the FLOPs are then a lower bound.

    Args:
        layers: decoder layers at whose input tokens are dropped. The paper prunes once, before layer 2; further
            stages apply the same rule again, for budgets that a single one can't meet.
        stage_ratios, depth: see `Pruner`.
        visual_pivots: number of visual pivots [paper: 4]. text_pivots: of question tokens [paper: 4].
    """

    title = "DART"
    needs_keys = True

    def __init__(
        self,
        layers: Sequence[int] = (2,),
        stage_ratios: Sequence[float] | None = None,
        depth: int | None = None,
        visual_pivots: int = 4,
        text_pivots: int = 4,
    ) -> None:
        super().__init__(layers, stage_ratios, depth)
        check_number("pruner.visual_pivots", visual_pivots, least=0, whole=True)
        check_number("pruner.text_pivots", text_pivots, least=0, whole=True)
        self.visual_pivots, self.text_pivots = visual_pivots, text_pivots

    @image_by_image
    def prune(self, context: Context) -> Kept:
        """Keep the pivots and the tokens they add, image by image."""
        return super().prune(context)

    def score(self, context: Context) -> Float[Tensor, "batch visual"]:
        """Minus the largest cosine to a pivot; plus 3 for the `context.count` tokens that the pivots chose."""
        count = torch.minimum(context.count, context.alive.sum(1))
        columns, real = largest(context.visual_keys, context.alive, self.visual_pivots)
        real = real & (torch.arange(columns.shape[1], device=real.device) < count[:, None])
        words, real_words = largest(context.text_keys, context.text_mask, self.text_pivots)
        pivots = [selection.gather_rows(context.visual, columns), selection.gather_rows(context.text, words)]
        unit = normalize(torch.cat(pivots, 1).detach().float(), dim=-1)
        cosines = unit @ normalize(context.visual.detach().float(), dim=-1).transpose(1, 2)

        chosen = torch.zeros_like(context.alive).scatter(1, columns, real)
        pivotal = torch.cat([real, real_words], 1)
        for index, more in enumerate(equal_parts(count - real.sum(1), pivotal).unbind(1)):
            chosen = chosen | selection.top_k(-cosines[:, index], context.alive & ~chosen, more)
        return torch.where(chosen, 3.0, 0.0) - cosines.masked_fill(~pivotal[..., None], -1.0).amax(1)

    def flops(self, visual: Tensor, text: Tensor, width: int, kept: Tensor) -> Tensor:
        """Cosines of all visual tokens to the pivots."""
        pivots = visual.clamp(max=self.visual_pivots) + text.clamp(max=self.text_pivots)
        return 2.0 * width * visual.to(torch.float64) * pivots


def largest(
    keys: Float[Tensor, "batch some inner"], alive: Bool[Tensor, "batch some"], count: int
) -> tuple[Int[Tensor, "batch pivots"], Bool[Tensor, "batch pivots"]]:
    """Columns of the `count` tokens whose keys have the largest L1 norm, in descending order, and which are real."""
    norms = keys.float().abs().sum(2).masked_fill(~alive, float("-inf"))
    columns = norms.argsort(dim=1, descending=True, stable=True)[:, :count]
    return columns, alive.gather(1, columns)


def equal_parts(total: Int[Tensor, " batch"], takers: Bool[Tensor, "batch some"]) -> Int[Tensor, "batch some"]:
    """Split `total` into whole parts over the set flags, as equal as possible; the first ones take the remainder."""
    number = takers.sum(1).clamp(min=1)
    place = takers.long().cumsum(1) - 1
    return ((total // number)[:, None] + (place < (total % number)[:, None]).long()) * takers

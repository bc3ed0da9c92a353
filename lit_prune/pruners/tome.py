"""ToMe: merge the most similar patches, some in every layer of the vision tower."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lit_prune.ops import merging, selection
from lit_prune.ops.budget import Schedule
from lit_prune.ops.graphs import DENSE
from lit_prune.pruners.base import Kept, VisionContext, VisionPruner


class ToMe(VisionPruner):
    """Bipartite soft matching with proportional attention (Token Merging, arXiv 2210.09461, section 3).

    In every layer the patches are split alternately into two sets. Each patch of the first is matched with the most
    similar one of the second, by cosine of the layer's keys averaged over heads; the most similar pairs merge into
    their mean, weighted by size, and later layers add log(size) to attention logits. The class token never merges.

    Ours: pairs merge at the next layer's input instead of between attention and MLP; patches keep raster order, by
    which they are split, and a merged one takes the position of its partner in the second set; each layer merges
    (nearly) the same number of pairs, as the paper's constant r, in several rounds of matching if more than half of
    the patches have to be merged.
    """

    title = "ToMe"
    sized = True

    def __init__(self) -> None:
        super().__init__()

    def vision_schedule(self, keep: int, visual: int, depth: int) -> Schedule:
        """Equally many patches fewer in each layer, down to the budget after the layer that gives the features."""
        keep = min(keep, visual)
        return {layer: visual - round((visual - keep) * layer / depth) for layer in range(1, depth + 1)}

    def prune_vision(self, context: VisionContext) -> Kept:
        """Merge pairs until the layer's count is reached; a round at most halves the patches."""
        alive, states = context.alive, context.states.float()
        sizes = torch.ones_like(alive, dtype=torch.float32) if context.sizes is None else context.sizes
        keys = context.head_mean_keys
        for _ in range(_rounds(alive.shape[1], int(context.count.min()))):
            left, home = _match(keys, alive, alive.sum(1) - context.count)
            received = torch.zeros_like(alive).scatter_reduce(1, home, left, "amax")
            weight = sizes * alive
            states = torch.where(received[..., None], merging.group_means(states, home, weight), states)
            keys = torch.where(received[..., None], merging.group_means(keys, home, weight), keys)
            sizes, alive = sizes.scatter_add(1, home, weight * left), alive & ~left
        return Kept(alive, states=states, sizes=sizes)

    def vision_flops(self, visual: Tensor, kept: Tensor, width: int, heads: int) -> Tensor:
        """Cosines between the two sets, in each round."""
        now, total = visual.double(), torch.zeros_like(visual, dtype=torch.float64)
        while bool((now > kept).any()):
            second = (now / 2).ceil()
            total = total + torch.where(now > kept, 2 * (now - second) * second * (width // heads), 0.0)
            now = torch.maximum(second, kept.double())
        return total


def _rounds(patches: int, count: int) -> int:
    """Rounds of matching needed to reduce `patches` to `count`."""
    rounds = 0
    while patches > max(count, 1):
        patches, rounds = max(-(-patches // 2), count), rounds + 1
    return rounds


def _match(keys: Tensor, alive: Tensor, excess: Tensor) -> tuple[Tensor, Tensor]:
    """Mask of the patches that merge, at most `excess` per tile, and each patch's target column, by default its own."""
    turn = (alive.long().cumsum(1) - 1) % 2
    unit = normalize(keys, dim=-1)
    first, is_first = selection.compact(alive & (turn == 1))  # a class token would come first and take turn 0
    second, is_second = selection.compact(alive & (turn == 0))
    partners = selection.gather_rows(unit, second).transpose(1, 2)
    blocks = [  # of rows, so that the cosines of all pairs are never held
        (rows @ partners).masked_fill_(~is_second[:, None], -2.0).max(2)
        for rows in selection.gather_rows(unit, first).split(DENSE, 1)
    ]
    best, partner = (torch.cat(parts, 1) for parts in zip(*blocks, strict=True))
    leaves = selection.top_k(best, is_first, excess.clamp(min=0))
    left = torch.zeros_like(alive).scatter(1, first, leaves)
    own = torch.arange(alive.shape[1], device=alive.device).expand_as(alive)
    target = torch.where(leaves, second.gather(1, partner), first)
    return left & alive, own.scatter(1, first, target)

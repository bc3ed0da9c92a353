"""Pure functions for methods that merge tokens: who stands for whom, and means over groups."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from lit_prune import selection


def nearest(
    features: Float[Tensor, "batch visual width"], centres: Bool[Tensor, "batch visual"]
) -> Int[Tensor, "batch visual"]:
    """Column of the centre with the largest cosine similarity to each token; a centre's own is itself.

    O(visual x centres). Ties go to the earlier centre.
    """
    unit = normalize(features.float(), dim=-1)
    columns, real = selection.compact(centres)
    likeness = unit @ selection.gather_rows(unit, columns).transpose(1, 2)
    best = columns.gather(1, likeness.masked_fill(~real[:, None], -2.0).argmax(2))
    own = torch.arange(features.shape[1], device=features.device).expand_as(best)
    return torch.where(centres, own, best)


def group_means(
    states: Float[Tensor, "batch visual width"],
    centre: Int[Tensor, "batch visual"],
    weight: Float[Tensor, "batch visual"],
) -> Float[Tensor, "batch visual width"]:
    """At each column, the weighted mean (in fp32) of the tokens whose centre it is; zeros where there are none."""
    weight = weight.float()
    index = centre[..., None].expand_as(states)
    sums = torch.zeros_like(states, dtype=torch.float32).scatter_add(1, index, states.float() * weight[..., None])
    mass = torch.zeros_like(weight).scatter_add(1, centre, weight)
    return sums / mass.clamp(min=1e-12)[..., None]


def evenly(flags: Bool[Tensor, "batch visual"], count: Int[Tensor, " batch"]) -> Bool[Tensor, "batch visual"]:
    """`count` of the set flags of each sample, evenly spaced in order; all where fewer are set."""
    place, total = flags.long().cumsum(1) - 1, flags.sum(1, keepdim=True)
    count = torch.minimum(count[:, None], total)
    # Place p starts a new one of `count` equal parts where floor(p count / total) rises: exactly `count` times.
    part = place * count // total.clamp(min=1)
    return flags & (count > 0) & ((place == 0) | (part != (place - 1) * count // total.clamp(min=1)))

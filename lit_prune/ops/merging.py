"""Pure functions for merging tokens: assignment to centres, sizes, and means over groups."""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from lit_prune.ops import selection
from lit_prune.ops.graphs import DENSE


def nearest(
    features: Float[Tensor, "batch visual width"], centres: Bool[Tensor, "batch visual"], most: int | None = None
) -> Int[Tensor, "batch visual"]:
    """Column of the centre with the largest cosine similarity to each token; a centre is assigned to itself.

    O(visual x centres). Ties go to the earlier centre. `most`: upper bound on the centres of a sample, if known.
    """
    unit = normalize(features.float(), dim=-1)
    columns, real = selection.compact(centres, most)
    own = torch.arange(features.shape[1], device=features.device).expand_as(centres)
    if not columns.shape[1]:
        return own
    likeness = unit @ selection.gather_rows(unit, columns).transpose(1, 2)
    best = columns.gather(1, likeness.masked_fill(~real[:, None], -2.0).argmax(2))
    return torch.where(centres, own, best)


def collect_sizes(
    states: Float[Tensor, "batch visual width"],
    sizes: Float[Tensor, "batch visual"],
    alive: Bool[Tensor, "batch visual"],
    kept: Bool[Tensor, "batch visual"],
    weighted: bool = False,
    most: int | None = None,
) -> Float[Tensor, "batch visual"]:
    """Size of each token after adding those alive and not kept to the nearest kept one by cosine.

    With `weighted`, their size times that cosine (at least 0) is added. Dropped tokens keep their own size.
    """
    centre = nearest(states, kept, most)
    given = sizes * (alive & ~kept)
    if weighted:
        unit = normalize(states.float(), dim=-1)
        given = given * (unit * selection.gather_rows(unit, centre)).sum(2).clamp(min=0)
    return sizes.scatter_add(1, centre, given)


def rectified_sizes(
    states: Float[Tensor, "batch visual width"],
    sizes: Float[Tensor, "batch visual"],
    alive: Bool[Tensor, "batch visual"],
    kept: Bool[Tensor, "batch visual"],
    attention: Float[Tensor, "batch visual"],
    most: int | None = None,
) -> Float[Tensor, "batch visual"]:
    """Size of each kept token, so that log(size) gives it the attention of those dropped nearest to it, by cosine.

    A size grows by the factor (own + dropped attention) / own attention: `attention` is that before the drop, with the
    sizes so far, so that exp(logit + log size) of a kept token becomes its group's sum. Own attention is at least 1e-6.
    Dropped tokens keep their own size.
    """
    centre = nearest(states, kept, most)
    dropped = torch.zeros_like(attention).scatter_add(1, centre, attention * (alive & ~kept))
    return torch.where(kept, sizes * (1 + dropped / attention.clamp(min=1e-6)), sizes)


def group_means(
    states: Float[Tensor, "batch visual width"],
    centre: Int[Tensor, "batch visual"],
    weight: Float[Tensor, "batch visual"],
) -> Float[Tensor, "batch visual width"]:
    """Weighted mean (in fp32) of the tokens assigned to each column; zeros for columns without any."""
    weight = weight.float()
    index = centre[..., None].expand_as(states)
    sums = torch.zeros_like(states, dtype=torch.float32).scatter_add(1, index, states.float() * weight[..., None])
    total = torch.zeros_like(weight).scatter_add(1, centre, weight)
    return sums / total.clamp(min=1e-12)[..., None]


def evenly(flags: Bool[Tensor, "batch visual"], count: Int[Tensor, " batch"]) -> Bool[Tensor, "batch visual"]:
    """Keep `count` of the set flags of each sample, evenly spaced in order; all if fewer are set."""
    place, total = flags.long().cumsum(1) - 1, flags.sum(1, keepdim=True)
    count = torch.minimum(count[:, None], total)
    # floor(place * count / total) increases exactly `count` times: keep the first place of each of these equal parts.
    part = place * count // total.clamp(min=1)
    return flags & (count > 0) & ((place == 0) | (part != (place - 1) * count // total.clamp(min=1)))


def every(flags: Bool[Tensor, "batch visual"], count: Int[Tensor, " batch"]) -> Bool[Tensor, "batch visual"]:
    """Keep `count` of the set flags of each sample, each floor(total / count)-th from the first; all if fewer are set.

    Unlike those of `evenly`, they leave the remainder of the division at the end.
    """
    place, total = flags.long().cumsum(1) - 1, flags.sum(1, keepdim=True)
    count = torch.minimum(count[:, None], total)
    step = total // count.clamp(min=1)
    return flags & (place % step.clamp(min=1) == 0) & (place < count * step)


def density_peaks(
    features: Float[Tensor, "batch some width"],
    real: Bool[Tensor, "batch some"],
    count: Int[Tensor, " batch"],
    neighbours: int | None,
    scale: Literal["sample", "width"] = "sample",
) -> tuple[Bool[Tensor, "batch some"], Int[Tensor, "batch some"]]:
    """Cluster by density peaks: `count` centres per sample, and the column of each token's nearest centre.

    DPC-KNN: a token's density rho is exp(-mean squared distance to its `neighbours` nearest others), its delta the
    distance to the nearest denser token (for the densest one, the largest distance); centres have the largest
    rho x delta, compared as logarithms. Of equally dense tokens the earlier counts as denser. Distances of all pairs
    are held up to `DENSE` tokens; beyond, `DENSE` rows at a time, computed twice.

    Args:
        features: states to compare. real: False for filler. count: clusters of each sample.
        neighbours: number of nearest others; None: as many tokens as clusters, each token among its own.
        scale: unit of the distances: `sample`, its root mean square distance [ours]: otherwise, for states of large
            norm, rho alone decides; `width`: the square root of the number of channels.
    """
    number = real.sum(1).clamp(min=1)[:, None, None]
    mean = (features.float() * real[..., None]).sum(1, keepdim=True) / number
    centred = (features.float() - mean) * real[..., None]  # centred, the squares' difference below loses less precision
    square = centred.square().sum(2, keepdim=True)
    unit = features.shape[2] if scale == "width" else (2 * square.sum(1, keepdim=True) / number).clamp(min=1e-30)
    rows = torch.arange(features.shape[1], device=features.device).split(DENSE)
    whole = _squared(centred, centred, unit) if len(rows) == 1 else None

    def squared(some: Tensor) -> Tensor:
        return _squared(centred[:, some], centred, unit) if whole is None else whole

    densities = [_log_density(squared(some), some, real, count, neighbours) for some in rows]
    log_rho, farthest = (torch.cat(parts, 1) for parts in zip(*densities, strict=True))
    to_denser = torch.cat([_to_denser(squared(some), some, real, log_rho) for some in rows], 1)
    delta = torch.where(to_denser < torch.finfo(to_denser.dtype).max, to_denser, farthest)
    # 0.5: `delta` is a squared distance.
    centres = selection.top_k(log_rho + 0.5 * delta.clamp(min=1e-30).log(), real, count)

    columns, true = selection.compact(centres)
    place = torch.arange(features.shape[1], device=features.device).expand_as(centres)
    if not columns.shape[1]:
        return centres, torch.zeros_like(place)
    if whole is None:
        away = _squared(centred, selection.gather_rows(centred, columns), unit)
    else:
        away = whole.gather(2, columns[:, None].expand(-1, whole.shape[1], -1))
    nearest_centre = columns.gather(1, away.masked_fill(~true[:, None], float("inf")).argmin(2))
    return centres, torch.where(centres, place, nearest_centre)


def _squared(some: Tensor, others: Tensor, unit: Tensor | int) -> Float[Tensor, "batch some others"]:
    """Squared distances in units of `unit`."""
    squares = some.square().sum(2, keepdim=True) + others.square().sum(2, keepdim=True).transpose(1, 2)
    return ((squares - 2 * some @ others.transpose(1, 2)) / unit).clamp(min=0)


def _log_density(
    squared: Tensor, rows: Tensor, real: Tensor, count: Tensor, neighbours: int | None
) -> tuple[Float[Tensor, "batch rows"], Float[Tensor, "batch rows"]]:
    """Minus the mean squared distance of each row to its nearest others, and the largest one."""
    place, far = torch.arange(real.shape[1], device=real.device), torch.finfo(squared.dtype).max
    # A token itself is left out, or is the first of its own nearest at a distance of exactly 0.
    others = squared.masked_fill(rows[:, None] == place, far if neighbours is not None else 0.0)
    others = others.masked_fill(~real[:, None], far)
    most = int(count.max()) if neighbours is None else neighbours
    closest = others.topk(min(most, others.shape[2]), largest=False).values
    counted = closest < far
    if neighbours is None:
        counted = counted & (torch.arange(closest.shape[2], device=closest.device) < count[:, None, None])
    log_rho = -(closest * counted).sum(2) / counted.sum(2).clamp(min=1)
    return log_rho, squared.masked_fill(~real[:, None], 0.0).amax(2)


def _to_denser(squared: Tensor, rows: Tensor, real: Tensor, log_rho: Tensor) -> Float[Tensor, "batch rows"]:
    """Squared distance of each row to the nearest denser token, the largest number for the densest one."""
    earlier = torch.arange(real.shape[1], device=real.device) < rows[:, None]
    own = log_rho[:, rows, None]
    denser = (log_rho[:, None] > own) | ((log_rho[:, None] == own) & earlier)
    return squared.masked_fill(~(denser & real[:, None]), torch.finfo(squared.dtype).max).amin(2)

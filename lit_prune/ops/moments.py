"""First and second moments of token states over the tokens of all ranks, and distances based on them."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Moments(NamedTuple):
    """Per-channel mean and variance (population), fp32."""

    mean: Float[Tensor, " width"]
    var: Float[Tensor, " width"]


class SampleMoments(NamedTuple):
    """Number of each sample's tokens, and per channel their mean and variance (population), fp32."""

    count: Int[Tensor, " samples"]
    mean: Float[Tensor, "samples width"]
    var: Float[Tensor, "samples width"]


class _SumOverRanks(torch.autograd.Function):
    """Sum over ranks, without communication in backward.

    Every rank computes the same loss from the sum, so all have the same gradient. A rank without an image has nothing
    to differentiate and would skip a collective in backward, for which the others would wait forever.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * dist.get_world_size()  # cancels the averaging of gradients over ranks


def _several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _sum_over_ranks(value: Tensor) -> Tensor:
    """Differentiable sum over ranks; the value itself without a process group."""
    return _SumOverRanks.apply(value) if _several_ranks() else value


def mean_over_ranks(
    value: Float[Tensor, "*shape"] | float, count: Int[Tensor, ""] | int
) -> Float[Tensor, "*shape"] | float:
    """Mean over the items of all ranks, from this rank's mean `value` over its `count` items.

    With gradients averaged over ranks, as by DDP, training equals that of one process with the whole batch. A
    collective: every rank must call it and compute the same loss from the result. `value` or `count` must be a tensor
    on the device of the process group. Without a group, or without any item, returns the value itself.
    """
    if not _several_ranks():
        return value
    device = (value if isinstance(value, Tensor) else count).device
    value, count = (torch.as_tensor(x, dtype=torch.float32, device=device) for x in (value, count))
    total = _sum_over_ranks(count)
    return torch.where(total > 0, _sum_over_ranks(value * count) / total.clamp(min=1.0), value)


def moments(tokens: Float[Tensor, "tokens width"]) -> Moments:
    """Mean and variance per channel over the tokens of the global batch (RCP, arXiv 2604.04972, repair loss).

    Two passes in fp32, so the variance can't become negative. A collective: every rank must call it, with tokens or
    without.
    """
    tokens = tokens.float()
    count = _sum_over_ranks(torch.tensor(float(tokens.shape[0]), device=tokens.device)).clamp(min=1.0)
    mean = _sum_over_ranks(tokens.sum(0)) / count
    centre = mean.detach() if _several_ranks() else mean  # its gradient is zero summed over all ranks, but not on each
    var = _sum_over_ranks((tokens - centre).square().sum(0)) / count
    return Moments(mean, var)


def sample_moments(tokens: Float[Tensor, "tokens width"], count: Int[Tensor, " samples"]) -> SampleMoments:
    """Moments of each sample's tokens, which come one sample after the other, `count` of each."""
    tokens, samples = tokens.float(), len(count)
    owner = torch.arange(samples, device=count.device).repeat_interleave(count, output_size=len(tokens))
    number, empty = count[:, None].clamp(min=1), tokens.new_zeros(samples, tokens.shape[1])
    mean = empty.index_add(0, owner, tokens) / number
    var = empty.index_add(0, owner, (tokens - mean[owner]).square()) / number
    return SampleMoments(count, mean, var)


def joined(parts: SampleMoments) -> Moments:
    """Moments of all samples' tokens from those of each, equal to `moments` up to rounding; a collective, like that."""
    number = parts.count[:, None].float()
    count = _sum_over_ranks(number.sum()).clamp(min=1.0)
    mean = _sum_over_ranks((number * parts.mean).sum(0)) / count
    var = _sum_over_ranks((number * (parts.var + (parts.mean - mean).square())).sum(0)) / count
    return Moments(mean, var)


def moment_loss(student: Moments, teacher: Moments, variance_weight: float) -> Float[Tensor, ""]:
    """||mu_s - mu_t||^2 / d + a ||var_s - var_t||^2 / d, with a = `variance_weight` (paper's draft: 3)."""
    return (student.mean - teacher.mean).square().mean() + variance_weight * (student.var - teacher.var).square().mean()


def w2_squared(student: Moments, teacher: Moments) -> Float[Tensor, ""]:
    """Squared 2-Wasserstein distance between the two diagonal Gaussians, per channel: the logged distribution shift."""
    spread = student.var.clamp(min=0).sqrt() - teacher.var.clamp(min=0).sqrt()
    return (student.mean - teacher.mean).square().mean() + spread.square().mean()


def kappa(
    full: Float[Tensor, "batch visual width"],
    kept: Bool[Tensor, "batch visual"],
    real: Bool[Tensor, "batch visual"] | None = None,
    features: Float[Tensor, "batch visual width"] | None = None,
    variance_floor: float = 1e-6,
) -> Float[Tensor, " batch"]:
    """Distribution shift of the kept visual tokens from all of them: lower is better, 0 if all are kept.

    KL divergence of the diagonal Gaussian fitted to the kept tokens from the one fitted to all, averaged over channels:
    `0.5 * mean_c(log(var_f / var_k) + (var_k + (mu_k - mu_f)^2) / var_f - 1)`. The idea of such a metric is DCP-Prune's
    (arXiv 2606.16633), the formula is ours. It is invariant to the scale of the features.

    Args:
        full: features of all tokens.
        kept: keep mask, with at least one token per sample.
        real: False for filler. Default: all real.
        features: features of the kept tokens if a method changed them, as merging does. Default: those of `full`.
        variance_floor: lower bound of variances, as a share of the sample's mean variance [ours]: that of a single
            token is 0.
    """
    real = torch.ones_like(kept) if real is None else real
    mean_f, var_f = _masked_moments(full, real)
    mean_k, var_k = _masked_moments(full if features is None else features, kept & real)
    least = (variance_floor * var_f.mean(-1, keepdim=True)).clamp(min=1e-12)
    var_f, var_k = var_f.maximum(least), var_k.maximum(least)
    return 0.5 * ((var_f / var_k).log() + (var_k + (mean_k - mean_f).square()) / var_f - 1).mean(-1)


def _masked_moments(
    features: Float[Tensor, "batch visual width"], mask: Bool[Tensor, "batch visual"]
) -> tuple[Float[Tensor, "batch width"], Float[Tensor, "batch width"]]:
    """Mean and population variance per sample and channel over the marked tokens, fp32, in two passes."""
    features, mask = features.float(), mask[..., None]
    count = mask.sum(1).clamp(min=1)
    mean = features.masked_fill(~mask, 0.0).sum(1) / count
    spread = (features - mean[:, None]).square().masked_fill(~mask, 0.0)
    return mean, spread.sum(1) / count

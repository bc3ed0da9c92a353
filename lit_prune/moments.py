"""First and second moments of token states, over the tokens of all ranks, and the distances built on them."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor


class Moments(NamedTuple):
    """Per-channel mean and variance (population), fp32."""

    mean: Float[Tensor, " width"]
    var: Float[Tensor, " width"]


def _sum_over_ranks(value: Tensor) -> Tensor:
    """Sum over ranks that gradients flow through; the value itself without a process group."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        from torch.distributed.nn.functional import all_reduce

        return all_reduce(value)
    return value


def moments(tokens: Float[Tensor, "tokens width"]) -> Moments:
    """Mean and variance per channel over the tokens of the global batch (RCP, arXiv 2604.04972, repair loss).

    Two passes in fp32, so the variance can't go negative. Every rank must call it; a rank may hold no tokens.
    """
    tokens = tokens.float()
    count = _sum_over_ranks(torch.tensor(float(tokens.shape[0]), device=tokens.device)).clamp(min=1.0)
    mean = _sum_over_ranks(tokens.sum(0)) / count
    var = _sum_over_ranks((tokens - mean).square().sum(0)) / count
    return Moments(mean, var)


def moment_loss(student: Moments, teacher: Moments, variance_weight: float) -> Float[Tensor, ""]:
    """||mu_s - mu_t||^2 / d + a ||var_s - var_t||^2 / d, with a = `variance_weight` (paper's draft: 3)."""
    return (student.mean - teacher.mean).square().mean() + variance_weight * (student.var - teacher.var).square().mean()


def w2_squared(student: Moments, teacher: Moments) -> Float[Tensor, ""]:
    """Squared 2-Wasserstein distance of the two diagonal Gaussians per channel: the shift that is logged."""
    spread = student.var.clamp(min=0).sqrt() - teacher.var.clamp(min=0).sqrt()
    return (student.mean - teacher.mean).square().mean() + spread.square().mean()


def kappa(
    full: Float[Tensor, "batch visual width"],
    kept: Bool[Tensor, "batch visual"],
    real: Bool[Tensor, "batch visual"] | None = None,
    features: Float[Tensor, "batch visual width"] | None = None,
    floor: float = 1e-6,
) -> Float[Tensor, " batch"]:
    """How far the kept visual tokens' distribution lies from that of all: lower is better, 0 when all are kept.

    KL divergence of the diagonal Gaussian fitted to the kept tokens from the one fitted to all, averaged over channels:
    `0.5 * mean_c(log(var_f / var_k) + (var_k + (mu_k - mu_f)^2) / var_f - 1)`. That there is such a metric is
    DCP-Prune's (arXiv 2606.16633), the formula is ours. It doesn't depend on the scale of the features.

    Args:
        full: features of all tokens.
        kept: which are kept; at least one a sample.
        real: which are tokens at all, the others being filler. Default: all.
        features: the kept tokens' own features where a method changed them, as merging does. Default: those of `full`.
        floor: smallest variance, as a share of the sample's mean variance [ours]: a single token has none.
    """
    real = torch.ones_like(kept) if real is None else real
    mean_f, var_f = _masked_moments(full, real)
    mean_k, var_k = _masked_moments(full if features is None else features, kept & real)
    least = (floor * var_f.mean(-1, keepdim=True)).clamp(min=1e-12)
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

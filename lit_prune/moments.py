"""First and second moments of token states, over the tokens of all ranks, and the distances built on them."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
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

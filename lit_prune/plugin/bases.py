"""Recognise the weights that a plug-in was trained with."""

import torch
from torch import nn


def fingerprint(model: nn.Module) -> list[float]:
    """Sample a few weights, to distinguish models of the same shape; empty if weights can't be read."""
    values: list[float] = []
    named = [(name, p) for name, p in model.named_parameters() if p.ndim == 2 and "self_attn" in name]
    for _, weight in (named[0], named[len(named) // 2], named[-1]) if named else ():
        if weight.is_meta or not weight.is_floating_point() or weight.numel() < 8:
            return []
        values += weight.detach().flatten()[:8].float().cpu().tolist()
    return values


def same_weights(a: list[float], b: list[float]) -> bool:
    """Equal up to rounding to half precision."""
    if len(a) != len(b):
        return False
    return torch.allclose(torch.tensor(a), torch.tensor(b), rtol=1e-2, atol=1e-2 * max(map(abs, a)))

"""What moves the plug-in's weights: AdamW, and the course of its learning rate."""

import math

from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lit_prune.plugin import Plugin


def adamw(plugin: Plugin, lr: float, repair_lr: float | None, weight_decay: float) -> AdamW:
    """AdamW with a group for the pruner and one for the repair adapter, whose learning rate is `lr` unless given."""
    groups = [{"params": list(plugin.pruner.parameters()), "lr": lr, "name": "pruner"}]
    if plugin.repair is not None:
        rate = lr if repair_lr is None else repair_lr
        groups.append({"params": list(plugin.repair.parameters()), "lr": rate, "name": "repair"})
    return AdamW([group for group in groups if group["params"]], weight_decay=weight_decay)


def warm_cosine(optimizer: Optimizer, steps: int, warmup: float, floor: float) -> LambdaLR:
    """Linear warm-up over a share `warmup` of the `steps`, then a cosine down to `floor` times the peak."""
    warm = max(1, round(warmup * steps))

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        done = min(1.0, (step - warm) / max(1, steps - warm))
        return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * done))

    return LambdaLR(optimizer, factor)

"""AdamW and its learning-rate schedule."""

import math
from collections.abc import Callable

from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lit_prune.plugin import Plugin


def adamw(plugin: Plugin, lr: float, repair_lr: float | None, weight_decay: float) -> AdamW:
    """Create AdamW with groups for pruner, repair adapter and LoRA; the repair adapter's rate is `lr` by default."""
    groups = [{"params": list(plugin.pruner.parameters()), "lr": lr, "name": "pruner"}]
    if plugin.repair is not None:
        rate = lr if repair_lr is None else repair_lr
        groups.append({"params": list(plugin.repair.parameters()), "lr": rate, "name": "repair"})
    if plugin.lora is not None:
        groups.append({"params": list(plugin.lora.parameters()), "lr": lr, "name": "lora"})
    return AdamW([group for group in groups if group["params"]], weight_decay=weight_decay)


def follow_settings(
    optimizer: Optimizer,
    schedule: LambdaLR,
    factor: Callable[[int], float],
    lr: float,
    repair_lr: float | None,
    weight_decay: float,
) -> None:
    """Set learning rates, schedule and weight decay from the settings, in place of those loaded from a checkpoint.

    If they are equal, nothing changes, bit for bit.
    """
    schedule.lr_lambdas = [factor] * len(optimizer.param_groups)
    schedule.base_lrs = [
        repair_lr if group.get("name") == "repair" and repair_lr is not None else lr for group in optimizer.param_groups
    ]
    for group, base in zip(optimizer.param_groups, schedule.base_lrs, strict=True):
        group.update(initial_lr=base, lr=base * factor(schedule.last_epoch), weight_decay=weight_decay)
    schedule._last_lr = [group["lr"] for group in optimizer.param_groups]


def warm_cosine(steps: int, warmup: float, final_lr: float) -> Callable[[int], float]:
    """Learning-rate factor per step: linear warm-up over a share `warmup` of `steps`, then cosine to `final_lr`."""
    warm = max(1, round(warmup * steps))

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        done = min(1.0, (step - warm) / max(1, steps - warm))
        return final_lr + (1.0 - final_lr) * 0.5 * (1.0 + math.cos(math.pi * done))

    return factor

"""What moves the plug-in's weights: AdamW, and the course of its learning rate."""

import math

from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lit_prune.errors import LitPruneError
from lit_prune.plugin import Plugin
from lit_prune.ranges import check_number


def check_settings(lr: float, repair_lr: float | None, weight_decay: float, warmup: float, floor: float) -> None:
    """Raise `LitPruneError` for values that no optimizer can use, or that would train nothing."""
    check_number("model.lr", lr, least=0)
    check_number("model.repair_lr", repair_lr, least=0)
    check_number("model.weight_decay", weight_decay, least=0)
    check_number("model.warmup", warmup, least=0, most=1)
    check_number("model.floor", floor, least=0, most=1)
    if not lr and not repair_lr:
        raise LitPruneError("model.lr is 0: nothing would be trained; only model.repair_lr can be set beside it")


def adamw(plugin: Plugin, lr: float, repair_lr: float | None, weight_decay: float) -> AdamW:
    """AdamW with a group for the pruner and one for the repair adapter, whose learning rate is `lr` unless given."""
    groups = [{"params": list(plugin.pruner.parameters()), "lr": lr, "name": "pruner"}]
    if plugin.repair is not None:
        rate = lr if repair_lr is None else repair_lr
        groups.append({"params": list(plugin.repair.parameters()), "lr": rate, "name": "repair"})
    return AdamW([group for group in groups if group["params"]], weight_decay=weight_decay)


def follow_settings(
    optimizer: Optimizer, schedule: LambdaLR, lr: float, repair_lr: float | None, weight_decay: float
) -> None:
    """Set the rates and the weight decay of the settings, which a checkpoint may have replaced by its own.

    Where they are the same nothing changes, bit for bit.
    """
    schedule.base_lrs = [
        repair_lr if group.get("name") == "repair" and repair_lr is not None else lr for group in optimizer.param_groups
    ]
    for group, base, factor in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group.update(initial_lr=base, lr=base * factor(schedule.last_epoch), weight_decay=weight_decay)
    schedule._last_lr = [group["lr"] for group in optimizer.param_groups]


def warm_cosine(optimizer: Optimizer, steps: int, warmup: float, floor: float) -> LambdaLR:
    """Linear warm-up over a share `warmup` of the `steps`, then a cosine down to `floor` times the peak."""
    warm = max(1, round(warmup * steps))

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        done = min(1.0, (step - warm) / max(1, steps - warm))
        return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * done))

    return LambdaLR(optimizer, factor)

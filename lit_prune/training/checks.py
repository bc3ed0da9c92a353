"""Validate settings, batches, parameters and checkpoints of a training run."""

from typing import Any

from torch import Tensor, nn

from lit_prune.errors import LitPruneError, check_number
from lit_prune.training.losses import LossWeights
from lit_prune.training.strategies import whole_shape


def check_settings(
    loss: LossWeights,
    watch: Any,
    pruner: Any,
    plugin: str | None,
    lora: Any,
    teacher_cache: str | None = None,
    **numbers: float | None,
) -> None:
    """Raise `LitPruneError` if settings of `PruneModule` contradict each other or a number is out of range.

    Args:
        loss: weights of the losses.
        watch: decoder layers to read.
        pruner: the method.
        plugin: a plug-in folder in its place.
        lora: adapters of a new plug-in.
        teacher_cache: its folder.
        numbers: the numeric settings, by name.
    """
    for name, limits in RANGES.items():
        check_number(f"model.{name}", numbers[name], **limits)
    if not numbers["lr"] and not numbers["repair_lr"]:
        raise LitPruneError("model.lr is 0: nothing would be trained; only model.repair_lr can be set beside it")
    if loss.distill and teacher_cache:
        raise LitPruneError(
            "model.teacher_cache keeps no logits, one for each word and answer token, which model.loss.distill needs: "
            "leave one of them out"
        )
    if loss.attention and not watch:
        raise LitPruneError("model.loss.attention needs model.watch: the decoder layers to read")
    if plugin is None and pruner is None:
        raise LitPruneError("give either model.pruner (a method, see configs/pruners/) or model.plugin (a folder)")
    if plugin is not None and pruner is not None:
        raise LitPruneError("either model.pruner or model.plugin: add --model.pruner=null --model.repair=null")
    if plugin is not None and lora is not None:
        raise LitPruneError("either model.lora or model.plugin, which has its own adapters: add --model.lora=null")


def check_teaching(teaching: Any, in_step: bool, fitting: bool) -> None:
    """Raise `LitPruneError` for settings that the Trainer's strategy or, when `fitting`, the method can't follow."""
    _check_alike(teaching, in_step)
    if fitting:
        _check_losses(teaching)


def _check_losses(teaching: Any) -> None:
    """A method that can't be trained, and losses that its training wouldn't read."""
    pruner, loss = teaching.vlm.plugin.pruner, teaching.loss
    name = pruner.title or type(pruner).__name__
    if not teaching.vlm.host.stages:
        raise LitPruneError(
            f"model.pruner: {name} has no stage, so no token is pruned and there is "
            "nothing to repair; name a method of configs/pruners/"
        )
    for read in ("attention", "saliency"):
        if getattr(loss, read) and not teaching.learning:
            raise LitPruneError(
                f"model.loss.{read} trains the scores of a pruner, and {name} has none that are trained: give "
                f"--model.loss.{read}=0"
            )
    if loss.stagewise and not (pruner.free and loss.budget):
        reason = "its weight is 0" if pruner.free else f"the counts of {name} are exact, so that it has none"
        raise LitPruneError(f"model.loss.stagewise is about the budget loss, and {reason}: leave it out")


def _check_alike(teaching: Any, in_step: bool) -> None:
    """Settings with which ranks that must run the same modules would run others."""
    if in_step and teaching.backward == "kept":
        raise LitPruneError(
            "model.backward: kept runs layers in two parts where enough tokens are dropped, and under DeepSpeed all "
            "ranks must run the same; use ddp, or model.backward: all"
        )
    if in_step and teaching.cache is not None:
        raise LitPruneError(
            "model.teacher_cache spares a rank its teacher where it knows all samples, and under DeepSpeed all ranks "
            "must run the same; use ddp, or leave it out"
        )


RANGES: dict[str, dict[str, Any]] = {
    "lr": {"least": 0},
    "repair_lr": {"least": 0},
    "weight_decay": {"least": 0},
    "warmup": {"least": 0, "most": 1},
    "final_lr": {"least": 0, "most": 1},
    "contenders": {"least": 1},
    "gate_clip": {"above": 0},
    "max_new_tokens": {"least": 1, "whole": True},
    "seed": {"least": 0, "most": 2**32 - 1, "whole": True},
}


def check_batch(batch: Any) -> None:
    """Raise `LitPruneError` unless the batch is a mapping as the data modules here give it."""
    if not isinstance(batch, dict) or not {"inputs", "ids"} <= batch.keys():
        raise LitPruneError(
            f"data: the data module gives batches of type {type(batch).__name__}; this module takes those of "
            "lit_prune.data.InstructData, mappings with `inputs`, `ids` and so on"
        )


def check_parameters(module: nn.Module) -> None:
    """Check that the parameters of `plugin` train and all others of the module are frozen.

    Raises:
        LitPruneError: there is nothing to train, or the wrong parameters would train.
    """
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    stray = [name for name in trained if not name.startswith("plugin.")]
    frozen_plugin = [name for name, p in module.plugin.named_parameters() if not p.requires_grad]
    if stray or frozen_plugin or not trained:
        raise LitPruneError(f"nothing to train, or the wrong thing: {(stray or frozen_plugin or ['no parameters'])[0]}")
    count = sum(p.numel() for p in module.plugin.parameters())
    frozen = sum(p.numel() for p in module.model.parameters())
    if count + frozen != sum(p.numel() for p in module.parameters()):
        raise LitPruneError("trainable and frozen parameters don't add up to the module's")


def check_checkpoint(state: dict[str, Tensor], module: nn.Module) -> None:
    """Raise `LitPruneError` if the checkpoint's trainable names or shapes differ from the module's."""
    saved = {name: value.shape for name, value in state.items()}
    own = {name: value.shape for name, value in module.state_dict().items()}
    own |= {f"plugin.{name}": whole_shape(p) for name, p in module.plugin.named_parameters()}
    wrong = sorted(saved.keys() ^ own.keys()) or [name for name in own if own[name] != saved[name]]
    if wrong:
        where = (
            "is missing from the checkpoint"
            if wrong[0] not in saved
            else ("is not in this model" if wrong[0] not in own else "has another shape")
        )
        raise LitPruneError(
            f"the checkpoint was written for another pruner or repair: {wrong[0]} {where} "
            f"({len(wrong)} differences); use the configuration it was trained with"
        )

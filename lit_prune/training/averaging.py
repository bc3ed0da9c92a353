"""Lightning's averages of weights, kept of the plug-in alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor

from lit_prune.errors import LitPruneError
from lit_prune.plugin import Plugin

AVERAGES = (WeightAveraging, StochasticWeightAveraging)


class PluginModule(LightningModule):
    """The plug-in as a module of its own, under the names that checkpoints have."""

    def __init__(self, plugin: Plugin, device: torch.device) -> None:
        super().__init__()
        self.plugin = plugin
        self._device = device


class OfPlugin(Callback):
    """Shows a callback that averages weights the plug-in alone, in place of the whole module.

    Lightning's callbacks copy, average and save every weight of a module. The frozen model would be held and saved
    twice, and its weights would drift by rounding: an average of equal numbers is not always that number.

    `WeightAveraging` and its like put the average into the checkpoint's `state_dict`, and validate it;
    `StochasticWeightAveraging` puts it into the plug-in when training ends, after the last checkpoint.

    Args:
        inner: the callback.
    """

    def __init__(self, inner: WeightAveraging | StochasticWeightAveraging) -> None:
        self.inner = inner
        self.view: PluginModule | None = None
        self.swapped = False  # during validation the module has the average, and the average the weights
        self.in_use = False  # training is over, and the plug-in has the average

    @property
    def name(self) -> str:
        """The inner callback's class."""
        return type(self.inner).__name__

    @property
    def state_key(self) -> str:
        """The inner callback's, so that checkpoints know nothing of this one."""
        return self.inner.state_key

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin an average; raises `LitPruneError` under DeepSpeed, where no rank has the weights it would average."""
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise LitPruneError(f"{self.name} averages whole weights, which DeepSpeed splits: take DDP")
        if stage == "fit":
            self.view = PluginModule(pl_module.plugin, trainer.strategy.root_device)
            self.inner.setup(trainer, self.view, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pass it on, as what follows."""
        self.inner.on_fit_start(trainer, self.view)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.inner.on_train_epoch_start(trainer, self.view)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Take the average up again in the middle of an epoch, where Lightning would wait for the next one."""
        inner = self.inner
        if not isinstance(inner, StochasticWeightAveraging) or inner._initialized or inner._scheduler_state is None:
            return
        groups = trainer.optimizers[0].param_groups
        rates = [group["lr"] for group in groups]
        inner.on_train_epoch_start(trainer, self.view)
        for group, rate in zip(groups, rates, strict=True):  # of the checkpoint, not of the schedule that was made now
            group["lr"] = rate

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.inner.on_train_batch_end(trainer, self.view, *args)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.inner.on_train_epoch_end(trainer, self.view)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the plug-in have the average, if there is one."""
        if self._begun:
            before = _copied(self.view.state_dict())
            self.inner.on_train_end(trainer, self.view)
            after = self.view.state_dict()
            self.in_use = any(not torch.equal(after[name], value) for name, value in before.items())

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the average, if there is one."""
        if self.view is not None and self._begun and not trainer.sanity_checking:
            self.inner.on_validation_epoch_start(trainer, self.view)
            self.swapped = True

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go back to the weights that train."""
        if self.swapped:
            self.inner.on_validation_epoch_end(trainer, self.view)
            self.swapped = False

    def state_dict(self) -> dict[str, Any]:
        """The inner callback's."""
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Hand it on."""
        self.inner.load_state_dict(state_dict)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the average as the module's weights, whatever of the two is in the module now."""
        if self.view is None:
            return
        self.inner.on_save_checkpoint(trainer, self.view, checkpoint)
        if "current_model_state" in checkpoint:
            average, current = checkpoint["state_dict"], checkpoint["current_model_state"]
            if self.swapped:  # a run that is stopped during validation
                checkpoint.update(state_dict=current, current_model_state=average)
            elif not self._begun:
                checkpoint["state_dict"] = current

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Resume both; other verbs use the average, which is the module's weights in the checkpoint."""
        if self.view is not None:
            self.inner.on_load_checkpoint(trainer, self.view, checkpoint)

    @property
    def _begun(self) -> bool:
        """Whether anything was averaged yet: until then an average is what the weights were at the start."""
        if isinstance(self.inner, WeightAveraging):
            return int(self.inner._average_model.n_averaged) > 0
        return self.inner.n_averaged is not None


def of_plugin(callback: Callback) -> Callback:
    """A callback, made to average the plug-in alone if it averages weights."""
    return OfPlugin(callback) if isinstance(callback, AVERAGES) else callback


def average_in_use(trainer: Trainer) -> str | None:
    """Name of the callback whose average the plug-in has at the end of training."""
    return next((c.name for c in trainer.callbacks if isinstance(c, OfPlugin) and c.in_use), None)


def stored_average(path: Path) -> str | None:
    """What to know about the weights of a checkpoint file whose run averaged them; None for any other run."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if int(checkpoint.get("averaging_state", {}).get("n_averaged", 0)):
        return "weights: the average of the run's weights"
    if any(key.startswith(StochasticWeightAveraging.__name__) for key in checkpoint.get("callbacks", {})):
        return f"weights: those of step {checkpoint['global_step']}; only the run's own plug-in has the SWA average"
    return None


def refuse_whole_averages(trainer: Trainer) -> None:
    """Raise `LitPruneError` for a callback that would average the frozen model too."""
    for callback in trainer.callbacks:
        if isinstance(callback, AVERAGES):
            name = type(callback).__name__
            raise LitPruneError(
                f"{name} would copy, average and save the frozen model: give the trainer "
                f"lit_prune.training.averaging.of_plugin({name}(...))"
            )


def _copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}

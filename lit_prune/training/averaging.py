"""Weight averaging by Lightning's callbacks, restricted to the plug-in."""

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
    """The plug-in wrapped as a LightningModule, with parameter names as in checkpoints."""

    def __init__(self, plugin: Plugin, device: torch.device) -> None:
        super().__init__()
        self.plugin = plugin
        self._device = device


class OfPlugin(Callback):
    """Run a weight-averaging callback on the plug-in in place of the whole module.

    Lightning's callbacks copy, average and save every weight of a module. The frozen model would be held and saved
    twice, and its weights would drift by rounding: the mean of equal numbers is not always that number.

    `WeightAveraging` and its subclasses write the average to the checkpoint's `state_dict` and validate it;
    `StochasticWeightAveraging` copies it into the plug-in when training ends, after the last checkpoint.

    Args:
        inner: the averaging callback.
    """

    def __init__(self, inner: WeightAveraging | StochasticWeightAveraging) -> None:
        self.inner = inner
        self.view: PluginModule | None = None
        self.swapped = False  # during validation the module holds the average, and the averaged model the weights
        self.in_use = False  # training has ended and the plug-in holds the average

    @property
    def name(self) -> str:
        """Class name of the inner callback."""
        return type(self.inner).__name__

    @property
    def state_key(self) -> str:
        """State key of the inner callback, so that checkpoints don't depend on this wrapper."""
        return self.inner.state_key

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start averaging; raises `LitPruneError` under DeepSpeed, where no rank holds the whole weights."""
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise LitPruneError(f"{self.name} averages whole weights, which DeepSpeed splits: take DDP")
        if stage == "fit":
            self.view = PluginModule(pl_module.plugin, trainer.strategy.root_device)
            self.inner.setup(trainer, self.view, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forward to the inner callback, as the hooks below do."""
        self.inner.on_fit_start(trainer, self.view)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.inner.on_train_epoch_start(trainer, self.view)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Resume SWA in the middle of an epoch, where Lightning would wait for the next epoch."""
        inner = self.inner
        if not isinstance(inner, StochasticWeightAveraging) or inner._initialized or inner._scheduler_state is None:
            return
        groups = trainer.optimizers[0].param_groups
        rates = [group["lr"] for group in groups]
        inner.on_train_epoch_start(trainer, self.view)
        # The new SWA schedule has reset the learning rates: restore the checkpoint's.
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.inner.on_train_batch_end(trainer, self.view, *args)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.inner.on_train_epoch_end(trainer, self.view)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the average into the plug-in, if averaging has begun."""
        if self._begun:
            before = _copied(self.view.state_dict())
            self.inner.on_train_end(trainer, self.view)
            after = self.view.state_dict()
            self.in_use = any(not torch.equal(after[name], value) for name, value in before.items())

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swap in the average for validation, if averaging has begun."""
        if self.view is not None and self._begun and not trainer.sanity_checking:
            self.inner.on_validation_epoch_start(trainer, self.view)
            self.swapped = True

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swap the trained weights back in."""
        if self.swapped:
            self.inner.on_validation_epoch_end(trainer, self.view)
            self.swapped = False

    def state_dict(self) -> dict[str, Any]:
        """Return the inner callback's state."""
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the inner callback's state."""
        self.inner.load_state_dict(state_dict)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the average as the module's weights, whether or not the two are swapped."""
        if self.view is None:
            return
        self.inner.on_save_checkpoint(trainer, self.view, checkpoint)
        if "current_model_state" in checkpoint:
            average, current = checkpoint["state_dict"], checkpoint["current_model_state"]
            if self.swapped:  # the run was stopped during validation
                checkpoint.update(state_dict=current, current_model_state=average)
            elif not self._begun:
                checkpoint["state_dict"] = current

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Resume weights and average; other verbs load the average, stored as the checkpoint's `state_dict`."""
        if self.view is not None:
            self.inner.on_load_checkpoint(trainer, self.view, checkpoint)

    @property
    def _begun(self) -> bool:
        """True once something was averaged; before, the "average" holds the initial weights."""
        if isinstance(self.inner, WeightAveraging):
            return int(self.inner._average_model.n_averaged) > 0
        return self.inner.n_averaged is not None


def of_plugin(callback: Callback) -> Callback:
    """Wrap a callback that averages weights so that it averages the plug-in alone; return any other as it is."""
    return OfPlugin(callback) if isinstance(callback, AVERAGES) else callback


def average_in_use(trainer: Trainer) -> str | None:
    """Name of the callback whose average the plug-in holds at the end of training, or None."""
    return next((c.name for c in trainer.callbacks if isinstance(c, OfPlugin) and c.in_use), None)


def stored_average(path: Path) -> str | None:
    """Note on the weights in a checkpoint file of a run that averaged them; None for any other run."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if int(checkpoint.get("averaging_state", {}).get("n_averaged", 0)):
        return "weights: the average of the run's weights"
    if any(key.startswith(StochasticWeightAveraging.__name__) for key in checkpoint.get("callbacks", {})):
        return f"weights: those of step {checkpoint['global_step']}; only the run's own plug-in has the SWA average"
    return None


def refuse_whole_averages(trainer: Trainer) -> None:
    """Raise `LitPruneError` if a callback would average the frozen model too."""
    for callback in trainer.callbacks:
        if isinstance(callback, AVERAGES):
            name = type(callback).__name__
            raise LitPruneError(
                f"{name} would copy, average and save the frozen model: give the trainer "
                f"lit_prune.training.averaging.of_plugin({name}(...))"
            )


def _copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}

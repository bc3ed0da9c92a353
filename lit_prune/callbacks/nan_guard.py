"""Stop at a NaN or infinite loss or gradient, and save the step."""

from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lit_prune.callbacks.settings import settings_of
from lit_prune.errors import LitPruneError
from lit_prune.training.debug_modes import leaves_no_trace
from lit_prune.training.replay import SavedStep, save_step
from lit_prune.training.strategies import whole


class NanGuard(Callback):
    """Stop `fit` before a NaN or infinite loss or gradient changes any weight; each rank saves the step for `replay`.

    Synchronises with the device once per step, after backward, so that no checkpoint can hold such weights. With a
    gradient scaler (fp16) only the loss is checked, since the scaler skips such steps itself.

    Args:
        folder: output folder; by default `nonfinite` in the run's folder.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self.batch: dict[str, Any] | None = None
        self.key: Any = None
        self.loss: Tensor | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep a reference to the batch and the step's key."""
        self.batch, self.key = batch, pl_module.step_key()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keep the loss, without synchronising."""
        self.loss = loss.detach()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop all ranks if one has a non-finite value; raises `LitPruneError` naming the samples and the file."""
        gradients = [p.grad for p in pl_module.plugin.parameters() if p.grad is not None]
        fine = self.loss.isfinite()
        if gradients and getattr(trainer.precision_plugin, "scaler", None) is None:
            fine = fine & torch.nn.utils.get_total_norm(gradients).isfinite()
        if trainer.strategy.reduce_boolean_decision(bool(fine), all=True):
            return
        path = None if leaves_no_trace(trainer) else self._save(trainer, pl_module)
        trainer.strategy.barrier("NanGuard")
        kept = "" if path is None else f". The step is kept: lit-prune replay {path}"
        what = "gradient" if bool(self.loss.isfinite()) else "loss"
        raise LitPruneError(
            f"the {what} is not finite at step {trainer.global_step} (loss {self.loss.item()}); it has changed no "
            f"weight; samples {', '.join(map(str, self.batch['ids']))}{kept}"
        )

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Release batch and loss."""
        self.batch = self.loss = None

    def _save(self, trainer: Trainer, module: LightningModule) -> Path:
        folder = self.folder or Path(trainer.default_root_dir) / "nonfinite"
        path = folder / f"step-{trainer.global_step:06d}-rank-{trainer.global_rank}.safetensors"
        settings = settings_of(trainer)
        config = None if settings is None else str(settings.file.absolute())
        with whole(module.plugin):
            weights = {name: value.detach().cpu().clone() for name, value in module.plugin.state_dict().items()}
        step = SavedStep(
            inputs={name: value for name, value in self.batch["inputs"].items() if isinstance(value, Tensor)},
            weights=weights,
            ids=[str(i) for i in self.batch["ids"]],
            key=self.key,
            step=trainer.global_step,
            rank=trainer.global_rank,
            loss=self.loss.item() * trainer.accumulate_grad_batches,
            config=config,
            pack=self.batch.get("pack", False),
        )
        save_step(path, step)
        return path

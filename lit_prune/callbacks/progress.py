"""Progress for people at a terminal, and for a log file."""

import sys
import time
from datetime import timedelta
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from lit_prune.budget import format_budget


class Progress(RichProgressBar):
    """A bar on a terminal; elsewhere, as in a log file, a line for each logged step and validation.

    Shows the loss, the visual tokens kept over the budget, and the accuracy of the last validation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lines = not sys.stdout.isatty()
        self.begun, self.shown = 0.0, -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose between bar and lines; rank zero shows."""
        super().setup(trainer, pl_module, stage)
        self.lines = self.lines and trainer.is_global_zero
        if self.lines:
            self.disable()
        self.begun = time.monotonic()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Kept tokens over the budget; no number of the loggers' folder."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        if "kept" in metrics:
            metrics["kept"] = f"{float(metrics['kept']):.3g}/{format_budget(pl_module.keep)}"
        return metrics

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """A line where loggers get one."""
        super().on_train_batch_end(trainer, pl_module, *args, **kwargs)
        step, every = trainer.global_step, trainer.log_every_n_steps
        if self.lines and every and step % every == 0 and step != self.shown:
            self.shown = step
            self._line(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A line with the accuracy."""
        super().on_validation_end(trainer, pl_module)
        if self.lines and not trainer.sanity_checking and trainer.state.fn == "fit":
            self._line(trainer, pl_module)

    def _line(self, trainer: Trainer, pl_module: LightningModule) -> None:
        elapsed = timedelta(seconds=round(time.monotonic() - self.begun))
        parts = [f"{elapsed}", f"step {trainer.global_step}/{trainer.estimated_stepping_batches}"]
        for name, value in self.get_metrics(trainer, pl_module).items():
            parts.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
        print("  ".join(parts), flush=True)

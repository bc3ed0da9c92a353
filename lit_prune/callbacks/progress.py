"""Progress on a terminal and in a log file."""

import sys
import time
from datetime import timedelta
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import (
    BatchesProcessedColumn,
    CustomBarColumn,
    RichProgressBarTheme,
)
from rich.progress import ProgressColumn, Task, TextColumn
from rich.text import Text

from lit_prune.ops.budget import format_budget

BAR = 5  # characters of the bar itself: all columns together fit into 80
LONGEST_BUDGET = 5  # characters: counts by layer are longer, and left to the lines of a file


class Progress(RichProgressBar):
    """A bar on a terminal; elsewhere, as in a log file, a line for each logged step and validation.

    Shows the loss, the visual tokens kept over the budget, and the accuracy of the last validation. The bar fits a
    terminal of 80 columns with epochs of up to 99,999 batches.
    """

    def __init__(self) -> None:
        super().__init__(theme=RichProgressBarTheme(metrics_format=".3g"))
        self.lines = not sys.stdout.isatty()
        self.begun, self.shown = 0.0, -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose between bar and lines; rank zero shows."""
        super().setup(trainer, pl_module, stage)
        self.lines = self.lines and trainer.is_global_zero
        if self.lines:
            self.disable()
        self.begun = time.monotonic()

    def enable(self) -> None:
        """Show the bar again, after a finder of rates or batch sizes; never in a file."""
        if not self.lines:
            super().enable()

    def configure_columns(self, trainer: Trainer) -> list[ProgressColumn]:
        """Epoch, bar, batches, time; the figures follow."""
        theme = self.theme
        bar = CustomBarColumn(
            bar_width=BAR,
            complete_style=theme.progress_bar,
            finished_style=theme.progress_bar_finished,
            pulse_style=theme.progress_bar_pulse,
        )
        description = TextColumn("[progress.description]{task.description}")
        return [description, bar, BatchesProcessedColumn(style=theme.batch_progress), Clock()]

    def _get_train_description(self, current_epoch: int) -> str:
        """Epochs counted from 1; padded to the length of "Validation"."""
        total = self.trainer.max_epochs
        text = f"Epoch {current_epoch + 1}" + (f"/{total}" if total is not None and total > 0 else "")
        return text.ljust(len(self.validation_description))

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Kept tokens over the budget; no number of the loggers' folder."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        if "kept" in metrics:
            budget = format_budget(pl_module.keep)
            target = f"/{budget}" if self.lines or len(budget) <= LONGEST_BUDGET else ""
            metrics["kept"] = f"{float(metrics['kept']):.3g}{target}"
        if not self.lines and "val_accuracy" in metrics:
            metrics["val"] = metrics.pop("val_accuracy")
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


class Clock(ProgressColumn):
    """Time gone, and an estimate of the time left."""

    max_refresh = 0.5  # seconds

    def render(self, task: Task) -> Text:
        """As `01:05<1h02`, gone and left."""
        gone, left = map(_clock, (task.finished_time if task.finished else task.elapsed, task.time_remaining))
        return Text(f"{gone}<{left}", style="dim")


def _clock(seconds: float | None) -> str:
    """At most five characters: `01:05`, `1h02`, `228h`."""
    if seconds is None:
        return "--:--"
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours == 0:
        return f"{minute:02}:{second:02}"
    return f"{hours}h{minute:02}" if hours < 100 else f"{hours}h"

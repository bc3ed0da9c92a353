"""Export the plug-in of the best checkpoint."""

from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from lit_prune.errors import LitPruneError
from lit_prune.plugin import Plugin
from lit_prune.training.debug_modes import leaves_no_trace


class ExportBest(Callback):
    """Write the plug-in of the best checkpoint as a folder at the end of `fit`, beside the last step's.

    The best is that of the first `ModelCheckpoint` with a `monitor`. A run that saved none leaves the folder as it is.

    Args:
        folder: where to; replaced if it exists.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.written = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise `LitPruneError` if no callback looks for the best."""
        if _saver(trainer) is None and not leaves_no_trace(trainer) and trainer.checkpoint_callback is not None:
            raise LitPruneError("ExportBest needs a ModelCheckpoint with a `monitor`, see configs/training/best.yaml")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save on rank zero, from the checkpoint."""
        saver = _saver(trainer)
        if leaves_no_trace(trainer) or saver is None or not saver.best_model_path:
            return
        if trainer.is_global_zero:
            Plugin.from_checkpoint(saver.best_model_path).save_pretrained(self.folder)
        self.written = True
        score = "" if saver.best_model_score is None else f", {saver.monitor} {float(saver.best_model_score):.4f}"
        rank_zero_info(f"best plug-in: {self.folder} (of {Path(saver.best_model_path).name}{score})")


def _saver(trainer: Trainer) -> ModelCheckpoint | None:
    savers = [saver for saver in trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)]
    return next((saver for saver in savers if saver.monitor), None)

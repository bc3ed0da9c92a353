"""The last checkpoint of a run that came to its end."""

from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_prune.debug_modes import leaves_no_trace


class SaveLast(Callback):
    """Brings the last checkpoint up to the last step of `fit`.

    Lightning's `ModelCheckpoint` leaves that of the last multiple of `every_n_train_steps`: to test it, to export it or
    to go on from it would be to lose the steps since then. It is saved behind a batch, as the others are, so that a run
    which `max_steps` ended goes on in the middle of its epoch when it is given more.
    """

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Save behind the last batch; where nothing was saved before, `ModelCheckpoint` does so itself."""
        saver = trainer.checkpoint_callback
        if leaves_no_trace(trainer):
            return
        if _over(trainer) and isinstance(saver, ModelCheckpoint) and saver.save_last and saver.last_model_path:
            trainer.save_checkpoint(saver.last_model_path, saver.save_weights_only)


def _over(trainer: Trainer) -> bool:
    steps = trainer.max_steps >= 0 and trainer.global_step >= trainer.max_steps
    epochs = trainer.max_epochs is not None and 0 <= trainer.max_epochs <= trainer.current_epoch + 1
    return steps or (epochs and trainer.is_last_batch)

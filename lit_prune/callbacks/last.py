"""Save the last checkpoint when a run ends."""

from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_prune.training.debug_modes import leaves_no_trace


class SaveLast(Callback):
    """Update the last checkpoint to the last step of `fit`.

    Lightning's `ModelCheckpoint` leaves that of the last multiple of `every_n_train_steps`: to test it, to export it or
    to resume from it would be to lose the steps since then. Where it saved nothing, it saves when training has ended,
    and an epoch that `max_steps` broke off counts as a whole one: with `max_epochs` reached, more steps would train
    nothing. So the last checkpoint is saved after the last batch, and a run that is given more steps resumes in the
    middle of its epoch.
    """

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Save after the last batch."""
        saver = trainer.checkpoint_callback
        if leaves_no_trace(trainer):
            return
        if not _over(trainer) or not isinstance(saver, ModelCheckpoint) or not saver.save_last:
            return
        if saver.last_model_path:
            trainer.save_checkpoint(saver.last_model_path, saver.save_weights_only)
        elif saver._every_n_train_steps:  # one that saves by epochs does so at the end of this one
            saver._save_last_checkpoint(trainer, saver._monitor_candidates(trainer))
        if saver._every_n_train_steps:
            saver._last_checkpoint_saved = saver.last_model_path  # else it saves again when training ends


def _over(trainer: Trainer) -> bool:
    steps = trainer.max_steps >= 0 and trainer.global_step >= trainer.max_steps
    epochs = trainer.max_epochs is not None and 0 <= trainer.max_epochs <= trainer.current_epoch + 1
    return steps or (epochs and trainer.is_last_batch)

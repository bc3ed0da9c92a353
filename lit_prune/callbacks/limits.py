"""Check the limits of a resumed run."""

from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lit_prune.errors import LitPruneError


class Limits(Callback):
    """Raise an error if a run is resumed for more steps than its number of epochs allows.

    Lightning would train nothing and report success. A run that is over and is resumed with the limits it had, as a job
    that is queued again may be, ends at once, and says so. `fast_dev_run` takes the checkpoint's weights and counts
    from 0: its few batches would count as done.
    """

    def __init__(self) -> None:
        self.limits: dict[str, int | None] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Record the limits, to be saved."""
        self.limits = {"max_steps": trainer.max_steps, "max_epochs": trainer.max_epochs}

    def state_dict(self) -> dict[str, Any]:
        """Return the limits of this run."""
        return self.limits

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Raise `LitPruneError` if more steps are requested than before, but no epoch is left for them."""
        loop = checkpoint.get("loops", {}).get("fit_loop")
        if trainer.state.fn != "fit" or not loop or trainer.max_epochs in (None, -1):
            return
        if trainer.fast_dev_run:
            del checkpoint["loops"]
            rank_zero_info("fast_dev_run: the checkpoint's weights and optimizer, from step 0")
            return
        step, epoch = checkpoint["global_step"], loop["epoch_progress"]["current"]
        # An epoch whose last batch is done has nothing left, whether it is closed yet or not.
        epochs = epoch["ready"] if loop["epoch_loop.batch_progress"]["is_last_batch"] else epoch["processed"]
        if epochs < trainer.max_epochs:
            return
        if epoch["processed"] > trainer.max_epochs:  # which Lightning refuses too, without a way out
            raise LitPruneError(
                f"the checkpoint is of step {step}, past trainer.max_epochs={trainer.max_epochs}; to train on, raise "
                "--trainer.max_epochs, or set it to -1"
            )
        before = checkpoint.get("callbacks", {}).get(self.state_key, self.limits)
        text = (
            f"the checkpoint is of step {step}, and all epochs of trainer.max_epochs={trainer.max_epochs} count as done"
        )
        if trainer.max_steps > step and trainer.max_steps != before["max_steps"]:
            raise LitPruneError(
                f"{text}: trainer.max_steps={trainer.max_steps} would train nothing; raise --trainer.max_epochs too, "
                "or set it to -1"
            )
        rank_zero_info(f"nothing is left to train: {text}")

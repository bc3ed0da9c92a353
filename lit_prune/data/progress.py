"""Rewind a checkpoint to the last optimizer step.

Accumulated gradients are not saved. A checkpoint between two optimizer steps (saved by time or after a validation)
therefore records the position of the last step, which its weights and optimizer state belong to anyway. A resumed run
repeats the batches since then, with the same samples and the same noise.
"""

import warnings
from typing import Any

from lightning import Trainer

from lit_prune.data.sampler import TrainBatches

MANY = 1 << 60  # more batches than any epoch has


def batches_since_step(trainer: Trainer) -> int:
    """Number of batches since the last optimizer step."""
    done = trainer.fit_loop.epoch_loop.batch_progress.current.processed
    if done >= trainer.num_training_batches:  # the last one of an epoch always steps
        return 0
    return done % trainer.accumulate_grad_batches


def saved_place(trainer: Trainer, batches: TrainBatches) -> dict[str, int]:
    """State of the training batches right after the last optimizer step."""
    loop = trainer.fit_loop
    epochs, done = loop.epoch_progress.current, loop.epoch_loop.batch_progress.current.processed
    epoch, shift = max(epochs.ready - 1, 0) + batches.shift, batches.shift
    done -= batches_since_step(trainer)
    if done >= trainer.num_training_batches:
        epoch, done = epoch + 1, 0
    elif epochs.ready and epochs.processed == epochs.ready:  # ended by max_steps; Lightning resumes it as the next
        shift -= 1
    return batches.state_dict(epoch, done, shift)


def resumes(trainer: Trainer | None, state: dict[str, Any]) -> bool:
    """True if the data position of a checkpoint is restored; `fast_dev_run` tries its weights on any data."""
    return bool(state) and not (trainer is not None and trainer.fast_dev_run)


def restore_place(trainer: Trainer | None, batches: TrainBatches, state: dict[str, int]) -> None:
    """Restore the position of the training batches from a checkpoint."""
    # Lightning expects the state in the data loader.
    warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch")
    batches.load_state_dict(state)
    if trainer is not None:  # DeepSpeed restores late, when an iterator may already be at the epoch's start
        trainer.fit_loop._combined_loader = None
        if state["global_batch"] != batches.global_batch:
            trainer.reload_dataloaders_every_n_epochs = 1  # later epochs have another length


def steps_next(trainer: Trainer) -> bool:
    """True if an optimizer step follows the current batch: only then does Lightning log its metrics."""
    return not trainer.fit_loop._should_accumulate()


def rewind_to_step(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Subtract the batches since the last optimizer step from the loops' counters, in place.

    The counters become those of a checkpoint right after the step: its batch is processed, but its hooks and its log
    entry are not completed.
    """
    batches = batches_since_step(trainer)
    if not batches:
        return
    loop = checkpoint["loops"]["fit_loop"]
    progress = loop["epoch_loop.batch_progress"]
    for count in (progress["total"], progress["current"]):
        done = count["processed"] - batches
        count.update(ready=done, started=done, processed=done, completed=done - 1)
    progress["is_last_batch"] = False
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1


def end_epoch(checkpoint: dict[str, Any]) -> None:
    """Mark an epoch that a checkpoint completed as complete for any number of batches, in place.

    Lightning compares the number of batches with the current one, which changes with ranks and batch size.
    """
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress")
    if progress and progress["is_last_batch"]:
        open_ones = progress["current"]["processed"] - progress["current"]["completed"]
        progress["current"].update(ready=MANY, started=MANY, processed=MANY, completed=MANY - open_ones)

"""How far a checkpoint says that training is: the last optimizer step.

Gradients that wait for their step are in no checkpoint. So one that is saved between two steps, by the clock or after a
validation, says that training is at the last step: its weights and its optimizer are of that moment anyway. A resumed
run goes through the batches since then once more, with the same samples and the same noise.
"""

import warnings
from typing import Any

from lightning import Trainer

from lit_prune.data.sampler import TrainBatches

MANY = 1 << 60  # batches, more than any epoch has


def batches_since_step(trainer: Trainer) -> int:
    """Batches trained on whose gradients wait for their optimizer step."""
    done = trainer.fit_loop.epoch_loop.batch_progress.current.processed
    if done >= trainer.num_training_batches:  # the last one of an epoch always steps
        return 0
    return done % trainer.accumulate_grad_batches


def saved_place(trainer: Trainer, batches: TrainBatches) -> dict[str, int]:
    """The state of a run's training batches right after the last optimizer step."""
    loop = trainer.fit_loop
    epochs, done = loop.epoch_progress.current, loop.epoch_loop.batch_progress.current.processed
    epoch, shift = max(epochs.ready - 1, 0) + batches.shift, batches.shift
    done -= batches_since_step(trainer)
    if done >= trainer.num_training_batches:
        epoch, done = epoch + 1, 0
    elif epochs.ready and epochs.processed == epochs.ready:  # broken off by max_steps: goes on in Lightning's next
        shift -= 1
    return batches.state_dict(epoch, done, shift)


def resumes(trainer: Trainer | None, state: dict[str, Any]) -> bool:
    """Whether a checkpoint's data go on; `fast_dev_run` tries its weights on any data, from their start."""
    return bool(state) and not (trainer is not None and trainer.fast_dev_run)


def restore_place(trainer: Trainer | None, batches: TrainBatches, state: dict[str, int]) -> None:
    """Let the training batches go on where a checkpoint was saved."""
    # Lightning looks for the state in the loader
    warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch")
    batches.load_state_dict(state)
    if trainer is not None:  # DeepSpeed restores late: an iterator may stand at the epoch's begin by now
        trainer.fit_loop._combined_loader = None
        if state["global_batch"] != batches.global_batch:
            trainer.reload_dataloaders_every_n_epochs = 1  # later ones have another length


def steps_next(trainer: Trainer) -> bool:
    """Whether an optimizer step follows the batch under way: only then does Lightning log what it found."""
    return not trainer.fit_loop._should_accumulate()


def rewind_to_step(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Take the batches since the last optimizer step out of the loops' counters, in place.

    The counters are left as a checkpoint right behind the step would have them: its batch is processed, its hooks and
    its line in the log are not completed.
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
    """Let an epoch that a checkpoint ended be over for any number of batches, in place.

    Lightning compares the epoch's batches with those that it has now, which other ranks or batch sizes change.
    """
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress")
    if progress and progress["is_last_batch"]:
        open_ones = progress["current"]["processed"] - progress["current"]["completed"]
        progress["current"].update(ready=MANY, started=MANY, processed=MANY, completed=MANY - open_ones)

"""How far a checkpoint says that training is: the last optimizer step.

Gradients that wait for their step are in no checkpoint. So one that is saved between two steps, by the clock or after a
validation, says that training is at the last step: its weights and its optimizer are of that moment anyway. A resumed
run goes through the batches since then once more, with the same samples and the same noise.
"""

from typing import Any

from lightning import Trainer

MANY = 1 << 60  # batches, more than any epoch has


def batches_since_step(trainer: Trainer) -> int:
    """Batches trained on whose gradients wait for their optimizer step."""
    done = trainer.fit_loop.epoch_loop.batch_progress.current.processed
    if done >= trainer.num_training_batches:  # the last one of an epoch always steps
        return 0
    return done % trainer.accumulate_grad_batches


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

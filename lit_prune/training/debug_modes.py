"""Modes of the Trainer that try or time a run: they write nothing and replace nothing."""

from lightning import Trainer


def leaves_no_trace(trainer: Trainer) -> bool:
    """Whether a run is for debugging or timing: `fast_dev_run`, `overfit_batches`, `barebones`.

    Such a run, started in the folder of a trained one, must not replace its plug-in, its checkpoints or its answers.
    """
    return bool(trainer.fast_dev_run or trainer.overfit_batches or trainer.barebones)

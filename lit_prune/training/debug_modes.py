"""Modes of the Trainer that try or time a run: they write nothing and replace nothing."""

from lightning import Trainer

DEBUG_MODES = ("fast_dev_run", "overfit_batches", "barebones")  # options of the Trainer, and its attributes


def leaves_no_trace(trainer: Trainer) -> bool:
    """Whether a run is for debugging or timing, in one of `DEBUG_MODES`.

    Such a run, started in the folder of a trained one, must not replace its plug-in, its checkpoints or its answers.
    """
    return any(getattr(trainer, mode) for mode in DEBUG_MODES)

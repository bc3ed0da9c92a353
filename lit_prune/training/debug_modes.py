"""Debug modes of the Trainer, in which a run writes and replaces nothing."""

from lightning import Trainer

DEBUG_MODES = ("fast_dev_run", "overfit_batches", "barebones")  # Trainer options, and attributes of the same names


def leaves_no_trace(trainer: Trainer) -> bool:
    """True if the Trainer is in one of `DEBUG_MODES`.

    Such a run, started in the folder of a real one, must not replace its plug-in, checkpoints or answers.
    """
    return any(getattr(trainer, mode) for mode in DEBUG_MODES)

"""Which checkpoint a Lightning verb begins from."""

import os
from collections.abc import Iterable
from pathlib import Path

from lightning import Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from lit_prune.callbacks.settings import WANDB_RUN
from lit_prune.errors import LitPruneError
from lit_prune.training.checkpoints import newest, saving_folder, verify
from lit_prune.training.strategies import refuse_foreign

LIGHTNINGS = ("best", "hpc")  # what Lightning itself finds a checkpoint for


def choose_checkpoint(trainer: Trainer, folders: Iterable[Path], verb: str, given: str | None) -> str | None:
    """The checkpoint to load, checked; a run that resumes one of its own folder stays the same run in W&B.

    Args:
        trainer: before it runs.
        folders: where callbacks save checkpoints, beside the trainer's own folders.
        verb: fit, validate, test or predict. Only `fit` may begin where `last` finds nothing.
        given: a path, `last`, `best` or `hpc`, or None.

    Raises:
        LitPruneError: a checkpoint that is damaged, not there, or of another model.
    """
    if given is None and verb == "fit" and os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
        given = "last"  # a job that Slurm has put back into the queue
    if given == "last":
        given = _newest(trainer, folders, verb)
    elif given is not None and given not in LIGHTNINGS and "://" not in given:
        verify(Path(given))
    elif given is None and verb == "fit":
        _warn_of_earlier(trainer)
    if given:
        refuse_foreign(Path(given), trainer, fit=verb == "fit")
        if verb == "fit":
            _continue_in_wandb(trainer, Path(given).with_name(WANDB_RUN))
    return given


@rank_zero_only
def note_untrained(trainer: Trainer, folders: Iterable[Path]) -> None:
    """Say first that a method that learns is measured without a checkpoint."""
    text = "note: untrained plug-in: neither --ckpt_path nor --model.plugin is given"
    if any(any(folder.glob("*.ckpt")) for folder in _all(trainer, folders)):
        text += f"; {trainer.default_root_dir} has a trained one: --ckpt_path last"
    print(text, flush=True)


def _newest(trainer: Trainer, folders: Iterable[Path], verb: str) -> str | None:
    found = newest(_all(trainer, folders))
    if found is not None:
        return str(found)
    if verb != "fit":
        raise LitPruneError(f"`{verb} --ckpt_path last`: no checkpoint has been written yet")
    rank_zero_info("--ckpt_path last: no checkpoint has been written yet; training begins")
    return None


def _all(trainer: Trainer, folders: Iterable[Path]) -> set[Path]:
    """Folders where checkpoints of a run may be, whoever saved them."""
    root = Path(trainer.default_root_dir)
    return {*folders, root, root / "checkpoints"}


def _continue_in_wandb(trainer: Trainer, file: Path) -> None:
    """Give a resumed run its id in W&B, unless it was given one; a checkpoint of another folder is another run's."""
    own = saving_folder(trainer)
    same = own is not None and file.parent.resolve() == own.resolve()  # the folder of a new run is not there yet
    if same and file.exists() and "WANDB_RUN_ID" not in os.environ:
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and logger._wandb_init["id"] is None:
                logger._wandb_init["id"] = file.read_text(encoding="utf-8").strip()


def _warn_of_earlier(trainer: Trainer) -> None:
    """Warn if a run starts from scratch next to the checkpoints of another."""
    folder = saving_folder(trainer)
    if folder is not None and any(folder.glob("*.ckpt")):
        rank_zero_info(
            f"{folder} has checkpoints of an earlier run, and this one begins anew beside them: to go on with that "
            "one, --ckpt_path last; to keep them apart, another --trainer.default_root_dir"
        )

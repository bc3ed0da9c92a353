"""Remove what loggers have written for a run that failed before its first batch."""

import shutil
from pathlib import Path

from lightning import Trainer
from lightning.pytorch.loggers import WandbLogger


class Traces:
    """Folders of a trainer's loggers, to be removed if its run ends before it began.

    Lightning starts loggers before it reads data or a checkpoint, so a run that is refused would leave an empty run in
    W&B and an empty version in the others. Folders that were there before stay, and so does a run on W&B's server,
    which is marked as failed.

    Args:
        trainer: before it runs.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        folders = (logger.log_dir for logger in trainer.loggers if not isinstance(logger, WandbLogger))
        self.before = {Path(folder) for folder in folders if folder and Path(folder).exists()}
        root = Path(trainer.default_root_dir).resolve()
        self.stays = root if root.exists() else root.parent

    def remove(self) -> None:
        """Remove what this process's loggers have begun, and folders that are empty then."""
        for logger in self.trainer.loggers:
            if getattr(logger, "_experiment", None) is None:  # nothing was begun, or in another process
                continue
            folder = _end_run(logger) if isinstance(logger, WandbLogger) else Path(logger.log_dir)
            if folder is not None and folder not in self.before:
                shutil.rmtree(folder, ignore_errors=True)
                self._remove_empty(folder.parent)

    def _remove_empty(self, folder: Path) -> None:
        """Remove a folder and those above it, up to the run's, for as long as they are empty."""
        folder = folder.resolve()
        while self.stays in folder.parents and folder.is_dir():
            for link in folder.iterdir():
                if link.is_symlink() and not link.exists():  # W&B's, to the run that is gone
                    link.unlink()
            if any(folder.iterdir()):
                return
            folder.rmdir()
            folder = folder.parent


def _end_run(logger: WandbLogger) -> Path | None:
    """End a run of W&B as failed; its folder, if it was offline."""
    run = logger.experiment
    offline, folder = getattr(run, "offline", False), Path(run.dir).parent
    run.finish(exit_code=1)
    return folder if offline else None

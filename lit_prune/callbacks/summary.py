"""Summary at the end of a run: its outcome and its files."""

import shlex
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info

from lit_prune.callbacks.answers import WriteAnswers
from lit_prune.callbacks.curves import Curves
from lit_prune.callbacks.export import ExportPlugin
from lit_prune.callbacks.export_best import ExportBest
from lit_prune.callbacks.samples import SamplePictures
from lit_prune.callbacks.settings import SaveConfig, settings_of
from lit_prune.callbacks.signals import Stopped
from lit_prune.errors import LitPruneError
from lit_prune.training.debug_modes import leaves_no_trace
from lit_prune.training.loggers import MLflow, Trackio


class RunSummary(Callback):
    """Print the outcome and the files of every verb at its end, also after an error."""

    def __init__(self) -> None:
        self.begun = time.monotonic()
        self.best: tuple[float, int] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start the clock."""
        self.begun = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the best accuracy and its step."""
        accuracy = trainer.callback_metrics.get("val/accuracy/all")
        if accuracy is not None and not trainer.sanity_checking and (self.best is None or accuracy > self.best[0]):
            self.best = (float(accuracy), trainer.global_step)

    def state_dict(self) -> dict[str, tuple[float, int] | None]:
        """Return the best accuracy so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, tuple[float, int] | None]) -> None:
        """Restore the best accuracy of the resumed run."""
        self.best = state_dict["best"]

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Print the summary after an error or interrupt, unless the run failed before its first batch."""
        settings = settings_of(trainer)
        if settings is not None and not settings.already_saved:
            return
        known = {Stopped: "a signal", KeyboardInterrupt: "Ctrl-C", LitPruneError: "an error"}
        cause = next((text for kind, text in known.items() if isinstance(exception, kind)), type(exception).__name__)
        self._say(trainer, f"was stopped by {cause}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print the summary."""
        self._say(trainer, "ended")

    def _say(self, trainer: Trainer, how: str) -> None:
        if not trainer.is_global_zero:
            return
        verb = trainer.state.fn.value if trainer.state.fn is not None else "run"
        elapsed = timedelta(seconds=round(time.monotonic() - self.begun))
        steps = f" at step {trainer.global_step}{_short_of(trainer)}" if verb == "fit" else ""
        lines = [f"{verb} {how}{steps} after {elapsed}"]
        files = [*self._results(trainer, verb), *([] if leaves_no_trace(trainer) else _files(trainer))]
        width = max((len(label) for label, _ in files), default=0)
        rank_zero_info("\n".join([*lines, *(f"  {label:<{width}}  {text}" for label, text in files)]))

    def _results(self, trainer: Trainer, verb: str) -> Iterator[tuple[str, str]]:
        stage = {"test": "test", "validate": "val"}.get(verb)
        if stage is not None and (accuracy := trainer.callback_metrics.get(f"{stage}/accuracy/all")) is not None:
            untrained = ", of an untrained plug-in" if getattr(trainer.lightning_module, "untrained", False) else ""
            yield "accuracy", f"{float(accuracy):.4f}{untrained}"
        elif verb == "fit" and self.best is not None:
            last = trainer.callback_metrics.get("val/accuracy/all")
            now = "" if last is None else f", last {float(last):.4f}"
            yield "accuracy", f"best {self.best[0]:.4f} at step {self.best[1]}{now}"


def _short_of(trainer: Trainer) -> str:
    """Note on the requested steps if the epochs ended first."""
    epochs_over = trainer.max_epochs is not None and 0 <= trainer.max_epochs <= trainer.current_epoch
    if not epochs_over or trainer.global_step >= trainer.max_steps:
        return ""
    return f" of {trainer.max_steps} (trainer.max_epochs={trainer.max_epochs} came first)"


def _files(trainer: Trainer) -> Iterator[tuple[str, str]]:
    """Label and location of everything that the run has written."""
    for callback in trainer.callbacks:
        if isinstance(callback, ExportPlugin) and callback.written:
            yield "plug-in", str(callback.folder)
        if isinstance(callback, ExportBest) and callback.written:
            yield "best plug-in", str(callback.folder)
        if isinstance(callback, Curves) and callback.file is not None:
            yield "curves", str(callback.file)
        if isinstance(callback, SamplePictures) and callback.written:
            yield "pictures", str(callback.folder)
        if isinstance(callback, WriteAnswers) and callback.file is not None:
            yield "answers", str(callback.file)
        if isinstance(callback, SaveConfig) and callback.already_saved:
            yield "settings", str(callback.file)
    for saver in trainer.checkpoint_callbacks if trainer.state.fn == "fit" else ():
        if saver.dirpath is not None and any(Path(saver.dirpath).glob("*.ckpt")):
            yield "checkpoints", f"{saver.dirpath}; resume with --ckpt_path last"
    yield from _logs(trainer)
    bad = getattr(getattr(trainer, "datamodule", None), "bad_samples", None)
    if bad is not None and bad.known:
        yield "bad samples", f"{len(bad.known)}, listed in {bad.file}"


def _logs(trainer: Trainer) -> Iterator[tuple[str, str]]:
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger):
            file = Path(logger.log_dir, "metrics.csv")
            if file.is_file() or logger.experiment.metrics:  # after an error it is written later
                yield "figures", str(file)
        elif isinstance(logger, TensorBoardLogger):
            yield "TensorBoard", f"tensorboard --logdir {shlex.quote(str(logger.log_dir))}"
        elif isinstance(logger, MLflow):
            yield "MLflow", f"{logger._tracking_uri}, run {logger.run_id}"
        elif isinstance(logger, Trackio):
            yield "trackio", f"trackio show --project {shlex.quote(logger.name)}"
        elif isinstance(logger, WandbLogger) and logger._experiment is not None:  # don't start one that failed
            run = logger.experiment
            folder = Path(run.dir).parent
            parts = sorted(str(part) for part in folder.parent.glob(f"offline-run-*-{run.id}"))  # of a resumed run
            yield "W&B", f"wandb sync {shlex.join(parts)}" if run.offline else f"{run.url} ({folder})"

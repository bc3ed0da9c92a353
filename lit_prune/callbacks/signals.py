"""Stopping on a signal: a checkpoint of the batch just done, a requeue under Slurm, an exit code that says so."""

import os
import signal
import subprocess
import threading
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_prune.training.checkpoints import saving_folder
from lit_prune.training.debug_modes import leaves_no_trace


class Stopped(SystemExit):
    """A run that a signal ended: 128 + the signal on rank zero, as shells count; 0 on the others.

    A launcher that sees another rank fail would kill rank zero, which has loggers to close.
    """


class StopOnSignal(Callback):
    """Ends `fit` on SIGTERM, and on the signal of a pre-emption, behind the batch that is under way.

    It saves `stopped.ckpt` beside the other checkpoints (if there is a `ModelCheckpoint`), which ``--ckpt_path last``
    finds. All ranks stop at the same batch, whichever of them got a signal. Under Slurm the pre-emption signal is the
    environment's `requeue_signal` (SIGUSR1), and the job is put back into the queue; elsewhere it is SIGUSR1.

    It stands in for Lightning's own handlers, which save from inside the handler: in the middle of a step, where
    weights may be half updated and ranks are at different places.
    """

    def __init__(self) -> None:
        self.requeues = False
        self.preemption: int = signal.SIGUSR1
        self.received: set[int] = set()
        self.former: dict[int, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the requeueing over from Lightning, which sets its handlers later."""
        environment = trainer._accelerator_connector.cluster_environment
        if stage == "fit" and isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self.requeues, self.preemption = True, environment.requeue_signal
            environment.auto_requeue = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen. Python hears signals in its main thread only."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, self.preemption):
                self.former[number] = signal.signal(number, lambda number, _: self.received.add(number))

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Stop if a rank was told to."""
        self._stop_if_told(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """The same between the batches of a validation, which is not repeated by the resumed run."""
        if self.former:
            self._stop_if_told(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen no more."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Listen no more."""
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)
        self.former = {}

    def _stop_if_told(self, trainer: Trainer) -> None:
        agreed = trainer.strategy.reduce_boolean_decision
        if not agreed(bool(self.received), all=False):
            return
        preempted = agreed(self.preemption in self.received, all=False)
        number = self.preemption if preempted else signal.SIGTERM
        text = "no checkpoint was asked for"
        if (folder := saving_folder(trainer)) and not leaves_no_trace(trainer):
            path = folder / "stopped.ckpt"
            trainer.save_checkpoint(path, weights_only=False)
            text = f"saved {path}, go on with --ckpt_path last"
        rank_zero_info(f"{signal.Signals(number).name}: stopped at step {trainer.global_step}; {text}")
        for logger in trainer.loggers:
            logger.finalize("finished")
        if preempted and self.requeues and trainer.is_global_zero:
            _requeue()
        raise Stopped(128 + number if trainer.is_global_zero else 0)


def _requeue() -> None:
    """Put this Slurm job, or this task of its array, back into the queue."""
    job = os.environ["SLURM_JOB_ID"]
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        rank_zero_warn(f"Slurm job {job} could not be put back into the queue: {error}")
    else:
        rank_zero_info(f"Slurm job {job} is in the queue again")

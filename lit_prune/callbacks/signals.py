"""Stop on a signal: save a checkpoint after the current batch, requeue under Slurm, exit with a code by signal."""

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
    """Exit after a signal: code 128 + signal on rank zero, as in shells; 0 on the others.

    If another rank failed, the launcher would kill rank zero before it has closed its loggers.
    """


class StopOnSignal(Callback):
    """Stop `fit` after the current batch on SIGTERM and on the pre-emption signal.

    Saves `stopped.ckpt` next to the other checkpoints (if there is a `ModelCheckpoint`), where ``--ckpt_path last``
    finds it. All ranks stop at the same batch, whichever of them receives the signal. Under Slurm the pre-emption
    signal is the environment's `requeue_signal` (SIGUSR1), and the job is requeued; elsewhere it is SIGUSR1.

    Replaces Lightning's own handlers, which save inside the handler: in the middle of a step, when weights may be half
    updated and ranks are at different positions.
    """

    def __init__(self) -> None:
        self.requeues = False
        self.preemption: int = signal.SIGUSR1
        self.received: set[int] = set()
        self.former: dict[int, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Disable Lightning's requeueing, whose handlers are installed later."""
        environment = trainer._accelerator_connector.cluster_environment
        if stage == "fit" and isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self.requeues, self.preemption = True, environment.requeue_signal
            environment.auto_requeue = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the handlers; Python only allows this in the main thread."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, self.preemption):
                self.former[number] = signal.signal(number, lambda number, _: self.received.add(number))

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Stop if any rank has received a signal."""
        self._stop_if_signalled(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Stop between validation batches too; the resumed run doesn't repeat the validation."""
        if self.former:
            self._stop_if_signalled(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the former handlers."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the former handlers."""
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)
        self.former = {}

    def _stop_if_signalled(self, trainer: Trainer) -> None:
        agreed = trainer.strategy.reduce_boolean_decision
        if not agreed(bool(self.received), all=False):
            return
        preempted = agreed(self.preemption in self.received, all=False)
        number = self.preemption if preempted else signal.SIGTERM
        text = "no checkpoint was asked for"
        if (folder := saving_folder(trainer)) and not leaves_no_trace(trainer):
            path = folder / "stopped.ckpt"
            trainer.save_checkpoint(path, weights_only=False)
            text = f"saved {path}, resume with --ckpt_path last"
        rank_zero_info(f"{signal.Signals(number).name}: stopped at step {trainer.global_step}; {text}")
        for logger in trainer.loggers:
            logger.finalize("finished")
        if preempted and self.requeues and trainer.is_global_zero:
            _requeue()
        raise Stopped(128 + number if trainer.is_global_zero else 0)


def _requeue() -> None:
    """Requeue this Slurm job or array task."""
    job = os.environ["SLURM_JOB_ID"]
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        rank_zero_warn(f"Slurm job {job} could not be put back into the queue: {error}")
    else:
        rank_zero_info(f"Slurm job {job} is in the queue again")

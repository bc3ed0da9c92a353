"""What ends runs before their time, at a step or a batch that the test names: a power cut, a signal."""

import os
import subprocess
import sys

from lightning import Callback, LightningModule, Trainer


class PowerCut(Exception):
    pass


class Cut(Callback):
    """Stops a run before a step, without any farewell."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args) -> None:
        if trainer.global_step == self.step:
            raise PowerCut


class Send(Callback):
    """Sends this process a signal in the middle of a batch; or another process sends it to the whole group.

    torch's workers tell the one from the other: they forgive a SIGTERM that their parent has sent.
    """

    def __init__(self, number: int, batch: int = 2, epoch: int = 0, group: bool = False) -> None:
        self.number, self.moment, self.group = number, (epoch, batch), group

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch, index: int) -> None:
        if (trainer.current_epoch, index) == self.moment:
            if self.group:
                other = [sys.executable, "-c", f"import os; os.killpg({os.getpgrp()}, {self.number})"]
                subprocess.run(other, start_new_session=True, check=True)
            else:
                os.kill(os.getpid(), self.number)

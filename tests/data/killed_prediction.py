"""A prediction that is killed for test_submissions: python killed_prediction.py OFFICIAL OUT BATCH."""

import os
import signal
import sys
from pathlib import Path

from lightning import Callback
from tiny import trainer

from lit_prune.callbacks import WriteSubmissions
from lit_prune.data import BenchmarkData
from lit_prune.pruners.divprune import DivPrune
from lit_prune.training.module import PruneModule


class Kill(Callback):
    """Leaves the process no time for anything before a batch."""

    def on_predict_batch_start(self, trainer, module, batch, index: int) -> None:
        if index == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    data = BenchmarkData("micro", "pope", sys.argv[1], eval_batch_size=5)
    module = PruneModule("micro", DivPrune(), keep=48, max_new_tokens=4)
    trainer(Path(sys.argv[2]), [Kill(), WriteSubmissions()]).predict(module, data)

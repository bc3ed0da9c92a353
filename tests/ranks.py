"""A small run of two ranks for test_signals: python ranks.py FOLDER STEPS."""

import sys
import time
from pathlib import Path

from lightning import Callback
from test_checkpoints import fit

from lit_prune.callbacks import StopOnSignal


class Slow(Callback):
    """Gives the test time to act, and tells it how far the run is."""

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        time.sleep(0.05)
        Path(sys.argv[1], f"rank_{trainer.global_rank}").write_text(str(index))


if __name__ == "__main__":
    fit(Path(sys.argv[1]), int(sys.argv[2]), (Slow(), StopOnSignal()), devices=2, strategy="ddp")

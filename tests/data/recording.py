"""A model that notes what it is given, a trainer without noise, checkpoints at every moment."""

import json

import torch
from lightning.pytorch import Callback, LightningModule

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


class Recorder(LightningModule):
    """Notes what it is given; its weight depends on the order of what it saw."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[str]] = []
        self.evaluated: list[dict] = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["ids"])
        return (self.weight - sum(batch["records"])) ** 2

    def validation_step(self, batch, batch_idx):
        self.evaluated.append(batch)

    def test_step(self, batch, batch_idx):
        self.evaluated.append(batch)

    def predict_step(self, batch, batch_idx):
        self.evaluated.append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


class SaveEverywhere(Callback):
    """Saves after every batch, at the end of every validation and of every epoch."""

    def __init__(self, folder):
        self.folder, self.count = folder, 0

    def save(self, trainer, name):
        if not trainer.sanity_checking:
            trainer.save_checkpoint(self.folder / f"{self.count:02d}-{name}-{trainer.global_step}.ckpt")
            self.count += 1

    def on_train_batch_end(self, trainer, *_):
        self.save(trainer, "batch")

    def on_validation_end(self, trainer, *_):
        self.save(trainer, "validation")

    def on_train_epoch_end(self, trainer, *_):
        self.save(trainer, "epoch")


class TwoRanks(Recorder):
    """Writes what each rank saw."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def on_fit_end(self):
        seen = {"train": self.seen, "val": [batch["ids"] for batch in self.evaluated]}
        (self.folder / f"rank{self.global_rank}.json").write_text(json.dumps(seen))

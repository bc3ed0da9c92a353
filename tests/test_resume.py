"""Runs that are cut off and go on: nothing lost, nothing twice, the same weights at the end."""

import pytest
import torch
from lightning import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from tiny import trainer


def same(a, b) -> bool:
    """Equal bit for bit, through dictionaries and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# -- checkpoints between two optimizer steps ------------------------------------------------------------------------


class Diary(DummyLogger):
    """What was logged at which step, and which samples every batch had."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int, dict]] = []

    def log_metrics(self, metrics, step=None) -> None:
        self.lines.append((step, {name: value for name, value in metrics.items() if "time" not in name}))


class EveryBatch(Callback):
    """Saves behind every batch, and in front of every validation's end, at moments that nobody would choose."""

    def __init__(self, folder) -> None:
        self.folder, self.batches, self.samples = folder, 0, []

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        self.batches += 1
        self.samples.append(list(batch["ids"]))
        trainer.save_checkpoint(self.folder / f"{self.batches}.ckpt")

    def on_validation_batch_end(self, trainer, *args) -> None:
        trainer.save_checkpoint(self.folder / f"validation_{self.batches}.ckpt")


# 6 batches an epoch: steps behind 4, 6, 10 and 12; validation behind 3, 6, 9 and 12
OPTIONS = {"max_epochs": 2, "accumulate_grad_batches": 4, "limit_val_batches": 1, "val_check_interval": 3}


@pytest.fixture(scope="module")
def whole(student, world, tmp_path_factory):
    """An uninterrupted run: its folder, the samples of its batches, its log."""
    folder = tmp_path_factory.mktemp("whole")
    diary, saving = Diary(), EveryBatch(folder)
    run = trainer(folder, [saving], logger=diary, **OPTIONS)
    run.fit(student(), world(batch_size=2))
    assert saving.batches == 12
    assert run.global_step == 4
    run.save_checkpoint(folder / "end.ckpt")
    return folder, saving.samples, diary.lines


@pytest.mark.parametrize(("saved", "batch", "step"), [("1", 0, 0), ("validation_3", 0, 0), ("5", 4, 1), ("11", 10, 3)])
def test_a_checkpoint_between_two_steps_is_one_of_the_last_step(student, world, whole, tmp_path, saved, batch, step):
    """Whenever it was saved, the resumed run goes on behind that step's batch and ends bit for bit as the whole one."""
    folder, samples, lines = whole
    diary, saving = Diary(), EveryBatch(tmp_path)
    torch.manual_seed(99)
    run = trainer(tmp_path, [saving], logger=diary, **OPTIONS)
    run.fit(student(), world(batch_size=2), ckpt_path=folder / f"{saved}.ckpt")
    assert saving.samples == samples[batch:]
    run.save_checkpoint(tmp_path / "end.ckpt")
    ends = [torch.load(end / "end.ckpt", weights_only=True) for end in (folder, tmp_path)]
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "MicroData", "global_step"):
        assert same(ends[0][key], ends[1][key]), key
    assert diary.lines == lines[-len(diary.lines) :]
    assert diary.lines[0][0] == step

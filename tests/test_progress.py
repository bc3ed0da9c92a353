"""The progress bar, as a terminal of 80 columns shows it."""

import io
import re

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from rich.cells import cell_len

from lit_prune.callbacks import Progress
from lit_prune.callbacks.progress import _clock

WIDTH, BATCHES, DAYS = 80, 99_999, 86_400
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")
LONGEST = {"loss": -1.2345e-05, "kept": 575.96, "val_accuracy": 0.98765}


class Model(BoringModel):
    """Figures that are as long as they come."""

    def __init__(self, keep: int | dict[int, int]) -> None:
        super().__init__()
        self.keep = keep

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.log_dict(LONGEST, prog_bar=True)
        return super().training_step(batch, batch_idx)["loss"]


class Late(Callback):
    """Turns the bar's clock and count to late in a long epoch; keeps what the terminal shows then."""

    def __init__(self, bar: Progress, screen: io.StringIO) -> None:
        self.bar, self.screen, self.shown = bar, screen, []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: object) -> None:
        progress = self.bar.progress
        task = progress._tasks[self.bar.train_progress_bar_id]
        start = task.start_time
        task._get_time = lambda: start + 9.5 * DAYS
        progress.update(task.id, total=BATCHES, completed=BATCHES - 1)
        self.screen.truncate(0)
        self.screen.seek(0)
        progress.refresh()
        self.shown.append([line for line in CONTROL.sub("", self.screen.getvalue()).split("\n") if line.strip()])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "--:--"), (0, "00:00"), (3599.9, "59:59"), (3600, "1h00"), (359_999, "99h59"), (820_800, "228h")],
)
def test_times_are_short(seconds, text):
    assert _clock(seconds) == text


@pytest.mark.parametrize(("epochs", "described"), [(1, ["Epoch 1/1"]), (2, ["Epoch 1/2", "Epoch 2/2"])])
@pytest.mark.parametrize(("keep", "kept"), [(576, "576/576"), ({2: 300, 4: 200, 16: 100}, "576")])
def test_the_bar_is_one_line_of_80_columns(tmp_path, monkeypatch, epochs, described, keep, kept):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    bar, screen = Progress(), io.StringIO()
    bar._console_kwargs = {"file": screen, "width": WIDTH, "force_terminal": True, "color_system": None}
    late = Late(bar, screen)
    Trainer(
        default_root_dir=tmp_path,
        max_epochs=epochs,
        limit_train_batches=1,
        limit_val_batches=0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[bar, late],
    ).fit(Model(keep))
    assert [len(lines) for lines in late.shown] == [1] * epochs
    for (line,), text in zip(late.shown, described, strict=True):
        assert cell_len(line) <= WIDTH
        assert line.startswith(f"{text} ")
        for part in ("99998/99999", "228h<", "loss: -1.23e-05", f"kept: {kept}", "val: 0.988"):
            assert part in line, line

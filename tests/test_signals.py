"""Signals that end a run: where it stops, what it saves, how it exits; under Slurm, and with two ranks."""

import os
import signal
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning import Callback
from test_checkpoints import Line, fit
from torch.utils.data import DataLoader

from lit_prune.callbacks import StopOnSignal, Stopped
from lit_prune.checkpoints import newest

JOB = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_NAME": "train"}
TASK = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NNODES": "1"}


class Send(Callback):
    """Sends this process a signal in the middle of a batch."""

    def __init__(self, number: int, batch: int = 2, hook: str = "on_train_batch_start") -> None:
        self.number, self.batch = number, batch
        setattr(self, hook, self.send)

    def send(self, trainer, *args) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.current.ready == self.batch + 1:
            os.kill(os.getpid(), self.number)


class Validated(Line):
    """With a validation behind every third batch."""

    def validation_step(self, batch: torch.Tensor, index: int) -> None:
        self.log("loss", self.line(batch).pow(2).mean())

    def val_dataloader(self) -> DataLoader:
        return DataLoader(torch.ones(8, 8), batch_size=2)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """The environment of a Slurm task with a stand-in for `scontrol`; gives the commands it was called with."""
    log, command = tmp_path / "scontrol.log", tmp_path / "bin" / "scontrol"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\necho "$@" >> {log}\n')
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    for name, value in {**JOB, **TASK}.items():
        monkeypatch.setenv(name, value)
    return lambda: log.read_text().splitlines() if log.exists() else []


def stop(folder: Path, number: int, **options) -> int:
    """Run until a signal in batch 3 (of 8) ends it; gives the exit code."""
    handlers = [signal.getsignal(known) for known in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)]
    with pytest.raises(Stopped) as stopped:
        fit(folder, 8, (StopOnSignal(), Send(number)), **options)
    assert [signal.getsignal(known) for known in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)] == handlers
    return stopped.value.code


def test_sigterm_stops_behind_the_batch_under_way(tmp_path: Path) -> None:
    assert stop(tmp_path, signal.SIGTERM) == 143
    found = newest([tmp_path])
    assert found == tmp_path / "stopped.ckpt"
    assert torch.load(found, weights_only=True)["global_step"] == 3
    run = fit(tmp_path, 8, ckpt_path=found)
    assert run.global_step == 8
    assert newest([tmp_path]) == tmp_path / "last.ckpt"


def test_a_run_that_saves_nothing_stops_all_the_same(tmp_path: Path) -> None:
    with pytest.raises(Stopped, match="143"):
        fit(tmp_path, 8, (StopOnSignal(), Send(signal.SIGTERM)), saves=False)
    assert list(tmp_path.iterdir()) == []


def test_slurm_puts_a_pre_empted_job_back_into_the_queue(tmp_path: Path, slurm: Callable[[], list[str]]) -> None:
    assert stop(tmp_path / "run", signal.SIGUSR1) == 128 + signal.SIGUSR1
    assert slurm() == ["requeue 4711"]
    assert newest([tmp_path / "run"]).name == "stopped.ckpt"


def test_slurms_array_tasks_and_other_signals(
    tmp_path: Path, slurm: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "815")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    environment = SLURMEnvironment(requeue_signal=signal.SIGUSR2)
    assert stop(tmp_path / "run", signal.SIGUSR2, plugins=[environment]) == 128 + signal.SIGUSR2
    assert slurm() == ["requeue 815_3"]


def test_a_cancelled_or_unwilling_job_is_not_put_back(tmp_path: Path, slurm: Callable[[], list[str]]) -> None:
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    assert stop(tmp_path / "cancelled", signal.SIGTERM) == 143
    assert stop(tmp_path / "unwilling", signal.SIGUSR1, plugins=[SLURMEnvironment(auto_requeue=False)]) == 138
    assert slurm() == []


def test_a_queue_that_is_closed_is_told(
    tmp_path: Path, slurm: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.warns(UserWarning, match="Slurm job 4711 could not be put back into the queue"):
        assert stop(tmp_path / "run", signal.SIGUSR1) == 138


def test_a_signal_during_validation_does_not_wait_for_its_end(tmp_path: Path) -> None:
    """Stopped behind the second batch of a validation that follows step 3; training goes on with step 4."""
    seen = []

    class Second(Callback):
        def on_validation_batch_start(self, trainer, module, batch, index, loader=0) -> None:
            seen.append((trainer.global_step, index))
            if index == 1 and "stopped.ckpt" not in os.listdir(tmp_path):
                os.kill(os.getpid(), signal.SIGTERM)

    options = {"module": Validated(), "val_check_interval": 3, "num_sanity_val_steps": 0}
    with pytest.raises(Stopped):
        fit(tmp_path, 8, (StopOnSignal(), Second()), **options)
    assert seen == [(3, 0), (3, 1)]
    assert torch.load(tmp_path / "stopped.ckpt", weights_only=True)["global_step"] == 3
    seen.clear()
    run = fit(tmp_path, 8, (StopOnSignal(), Second()), ckpt_path=tmp_path / "stopped.ckpt", **options)
    assert run.global_step == 8
    assert seen == [(6, index) for index in range(4)]

"""Signals that end a run: where it stops, what it saves, how it exits; under Slurm, and with two ranks."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from faults import Send
from lightning import Callback
from test_checkpoints import Line, fit
from tiny import slurm_task
from torch.utils.data import DataLoader

from lit_prune.callbacks import RunSummary, StopOnSignal, Stopped
from lit_prune.training.checkpoints import newest


class Validated(Line):
    """With a validation behind every third batch."""

    def validation_step(self, batch: torch.Tensor, index: int) -> None:
        self.log("loss", self.line(batch).pow(2).mean())

    def val_dataloader(self) -> DataLoader:
        return DataLoader(torch.ones(8, 8), batch_size=2)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """The environment of a Slurm task with a stand-in for `scontrol`; gives the jobs that it put back."""
    for name, value in slurm_task(tmp_path).items():
        monkeypatch.setenv(name, value)
    queue = tmp_path / "requeue"
    return lambda: queue.read_text().splitlines() if queue.exists() else []


def stop(folder: Path, number: int, **options) -> int:
    """Run until a signal in batch 3 (of 8) ends it; gives the exit code."""
    handlers = [signal.getsignal(known) for known in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)]
    with pytest.raises(Stopped) as stopped:
        fit(folder, 8, (StopOnSignal(), RunSummary(), Send(number)), **options)
    assert [signal.getsignal(known) for known in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)] == handlers
    return stopped.value.code


def test_sigterm_stops_behind_the_batch_under_way(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        assert stop(tmp_path, signal.SIGTERM) == 143
    said = [text for text in caplog.messages if "stopped" in text or "weights_only" in text]
    assert [text.partition(";")[0].partition(" after")[0] for text in said] == [
        "SIGTERM: stopped at step 3",
        "fit was stopped by a signal at step 3",
    ]
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
    assert slurm() == ["4711"]
    assert newest([tmp_path / "run"]).name == "stopped.ckpt"


def test_slurms_array_tasks_and_other_signals(
    tmp_path: Path, slurm: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "815")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    environment = SLURMEnvironment(requeue_signal=signal.SIGUSR2)
    assert stop(tmp_path / "run", signal.SIGUSR2, plugins=[environment]) == 128 + signal.SIGUSR2
    assert slurm() == ["815_3"]


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


# Two ranks
@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[tuple[subprocess.Popen, int]]:
    """A run of two ranks that is under way: rank zero's process, and the other one's id. Nothing of it stays."""
    command = [sys.executable, str(Path(__file__).with_name("ranks.py")), str(tmp_path), "1000"]
    run = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    try:
        while not ((seen := tmp_path / "rank_1").exists() and int(seen.read_text() or 0) > 2):
            assert run.poll() is None, run.communicate()[1]
            time.sleep(0.05)
        yield run, int(Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()[0])
    finally:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        run.stderr.close()


def gone(pid: int, seconds: float) -> bool:
    """Whether a process ends within some seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.1)
                continue
        return True
    return False


def test_all_ranks_stop_at_one_batch_whichever_is_told(tmp_path: Path, ranks: tuple[subprocess.Popen, int]) -> None:
    run, other = ranks
    os.kill(other, signal.SIGTERM)
    said = run.communicate()[1]
    assert run.returncode == 143, said
    assert gone(other, 60)
    step = torch.load(newest([tmp_path]), weights_only=True)["global_step"]
    assert newest([tmp_path]).name == "stopped.ckpt"
    assert f"SIGTERM: stopped at step {step}; saved {tmp_path}/stopped.ckpt" in said
    assert {(tmp_path / f"rank_{rank}").read_text() for rank in (0, 1)} == {str(step - 1)}


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_is_killed_takes_the_other_one_along(ranks: tuple[subprocess.Popen, int], killed: int) -> None:
    run, other = ranks
    os.kill((run.pid, other)[killed], signal.SIGKILL)
    assert gone((other, run.pid)[killed], 60)

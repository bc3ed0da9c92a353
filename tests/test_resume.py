"""Runs that are cut off and go on: nothing lost, nothing twice, the same weights at the end."""

import csv
import os
import signal
import subprocess
import sys

import pytest
import torch
from lightning import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from safetensors.torch import load_file
from tiny import ROOT, same_ends, slurm_task, trainer

from lit_prune import cli
from lit_prune.training.checkpoints import SUMS, seal


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


@pytest.mark.parametrize(("saved", "batch", "step"), [("validation_3", 0, 0), ("5", 4, 1), ("11", 10, 3)])
def test_a_checkpoint_between_two_steps_is_one_of_the_last_step(student, world, whole, tmp_path, saved, batch, step):
    """Whenever it was saved, the resumed run goes on behind that step's batch and ends bit for bit as the whole one."""
    folder, samples, lines = whole
    diary, saving = Diary(), EveryBatch(tmp_path)
    torch.manual_seed(99)
    run = trainer(tmp_path, [saving], logger=diary, **OPTIONS)
    run.fit(student(), world(batch_size=2), ckpt_path=folder / f"{saved}.ckpt")
    assert saving.samples == samples[batch:]
    run.save_checkpoint(tmp_path / "end.ckpt")
    same_ends(folder / "end.ckpt", tmp_path / "end.ckpt")
    assert diary.lines == lines[-len(diary.lines) :]
    assert diary.lines[0][0] == step


class Seen(Callback):
    """The samples of every epoch; saves at some steps."""

    def __init__(self, folder, *steps: int) -> None:
        self.folder, self.steps, self.epochs = folder, steps, {}

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        self.epochs.setdefault(trainer.current_epoch, []).extend(batch["ids"])
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


@pytest.mark.parametrize("step", [1, 3], ids=["within an epoch", "at its end"])
def test_other_batch_sizes_see_each_sample_of_every_epoch_once(student, world, tmp_path, step):
    """As with another number of ranks: the epoch under way, and those after it, have other numbers of batches."""
    first, rest = Seen(tmp_path, step), Seen(tmp_path)
    trainer(tmp_path, [first], max_steps=step, max_epochs=3).fit(student(), world(batch_size=4))
    run = trainer(tmp_path, [rest], max_epochs=3)
    run.fit(student(), world(batch_size=2), ckpt_path=tmp_path / f"{step}.ckpt")
    seen = [first.epochs.get(epoch, []) + rest.epochs.get(epoch, []) for epoch in range(3)]
    assert [len(ids) for ids in seen] == [12, 12, 12]
    assert sorted(seen[0]) == sorted(seen[1]) == sorted(seen[2])
    assert len(set(seen[0])) == 12


# -- through the command line, by real signals ----------------------------------------------------------------------

TINY = {
    "model.lr": 3e-3, "data.init_args.batch_size": 2, "data.init_args.train_samples": 16,
    "data.init_args.num_workers": 2, "data.init_args.val_samples": 6, "data.init_args.test_samples": 6,
    "trainer.max_epochs": 2, "trainer.accumulate_grad_batches": 2, "trainer.limit_val_batches": 0,
    "trainer.log_every_n_steps": 1, "trainer.enable_progress_bar": False, "trainer.accelerator": "cpu",
}  # fmt: skip
SAVING = "{class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: "
SAVING += "{dirpath: FOLDER, save_last: true, every_n_train_steps: 1, save_top_k: 1}}, "
SAVING += "{class_path: lit_prune.callbacks.ExportPlugin, init_args: {folder: FOLDER/plugin}}"
SENDING = ", {class_path: faults.Send, init_args: {number: %d, batch: %d, epoch: %d, group: true}}"
LOGGER = "{class_path: lightning.pytorch.loggers.CSVLogger, init_args: "
LOGGER += "{save_dir: FOLDER, name: logs, flush_logs_every_n_steps: 1}}"


def words(folder, base, end: tuple[int, int, int] | None = None) -> list[str]:
    """The command line of a run that may send its group a signal in some batch of some epoch."""
    own = {"model.base": base, "data.init_args.root": base.parent / "world", "trainer.default_root_dir": folder}
    own["trainer.callbacks"] = f"[{SAVING}{SENDING % end if end else ''}]".replace("FOLDER", str(folder))
    own["trainer.logger"] = f"[{LOGGER}]".replace("FOLDER", str(folder))
    options = [f"--{name}={value}" for name, value in {**TINY, **own}.items()]
    return ["fit", "-c", str(ROOT / "configs" / "micro.yaml"), *options]


def fit(folder, base, *more: str, end: tuple[int, int, int] | None = None, **environment: str) -> tuple[int, str]:
    """Such a run in a process group of its own: its exit code and what it said."""
    command = [sys.executable, "-m", "lit_prune", *words(folder, base, end), *more]
    known = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), **environment}
    run = subprocess.run(command, env=known, start_new_session=True, stderr=subprocess.PIPE, text=True, check=False)
    return run.returncode, run.stderr


def logged(folder) -> dict[int, dict[str, str]]:
    """The lines of a run's CSV files by step; a later file goes on where an earlier one was cut."""
    files = sorted((folder / "logs").glob("*/metrics.csv"), key=lambda file: int(file.parent.name.partition("_")[2]))
    return {int(line["step"]): line for file in files for line in csv.DictReader(file.open())}


@pytest.mark.timeout(900)  # five starts, which a busy machine draws out
def test_a_run_with_a_hard_life_ends_as_one_that_nothing_happened_to(micro_folder, tmp_path):
    """Killed by force, then terminated, then pre-empted, workers and all; each time resumed with --ckpt_path last."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    last = "--ckpt_path=last"
    cli.main(words(whole, micro_folder))
    code, said = fit(part, micro_folder, end=(signal.SIGKILL, 3, 0))
    assert code == -signal.SIGKILL, said
    code, said = fit(part, micro_folder, last, end=(signal.SIGTERM, 6, 0))
    assert code == 128 + signal.SIGTERM, said
    assert f"saved {part}/stopped.ckpt, resume with --ckpt_path last" in said
    code, said = fit(part, micro_folder, last, end=(signal.SIGUSR1, 3, 1), **slurm_task(tmp_path))
    assert code == 128 + signal.SIGUSR1, said
    assert f"Restored all states from the checkpoint at {part}/stopped.ckpt" in said
    assert (tmp_path / "requeue").read_text() == "4711\n"
    cli.main([*words(part, micro_folder), last])
    assert same_ends(whole / "last.ckpt", part / "last.ckpt")["global_step"] == 8
    lines, found = logged(whole), logged(part)
    assert sorted(lines) == list(range(8))
    assert len(found) >= 8 - 3  # the line of the step at which a run is cut off is lost
    assert found == {step: lines[step] for step in found}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_2", "deepspeed_3"])
def test_two_ranks_that_were_killed_end_as_two_that_were_not(micro_folder, tmp_path, strategy):
    """Both processes killed by force in the middle of an epoch; weights within 1e-6 at the end."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    two = ["--config", str(ROOT / "configs" / "strategies" / f"{strategy}.yaml"), "--trainer.devices=2"]
    code, said = fit(whole, micro_folder, *two)
    assert code == 0, said
    code, said = fit(part, micro_folder, *two, end=(signal.SIGKILL, 3, 0))
    assert code == -signal.SIGKILL, said
    code, said = fit(part, micro_folder, *two, "--ckpt_path=last")
    assert code == 0, said
    plugins = [load_file(folder / "plugin" / "plugin.safetensors") for folder in (whole, part)]
    assert plugins[0].keys() == plugins[1].keys()
    assert all((plugins[0][name] - plugins[1][name]).abs().max() <= 1e-6 for name in plugins[0])
    lines, found = logged(whole), logged(part)
    assert len(found) >= 3
    assert all(float(found[step]["loss/total"]) == pytest.approx(float(lines[step]["loss/total"])) for step in found)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("strategy", ["deepspeed_2", "deepspeed_3"])
def test_nothing_in_deepspeeds_states_is_executed(micro_folder, tmp_path, strategy):
    """DeepSpeed reads any pickle; a checkpoint whose checksums are right may still come from anyone."""
    one = ["--config", str(ROOT / "configs" / "strategies" / f"{strategy}.yaml"), "--trainer.devices=1"]
    code, said = fit(tmp_path, micro_folder, *one, "--trainer.max_steps=1")
    assert code == 0, said
    last = tmp_path / "last.ckpt"
    states = next(last.glob("checkpoint/*_optim_states.pt"))
    honest = torch.load(states, weights_only=False)
    torch.save({**honest, "trap": Trap(tmp_path / "sprung")}, states)
    (last / SUMS).unlink()
    seal(last)
    code, said = fit(tmp_path, micro_folder, *one, f"--ckpt_path={last}")
    assert code == 1
    assert "is no checkpoint that can be read safely" in said
    assert not (tmp_path / "sprung").exists()
    torch.save(honest, states)
    (last / SUMS).unlink()
    seal(last)
    code, said = fit(tmp_path, micro_folder, *one, f"--ckpt_path={last}", "--trainer.max_steps=2")
    assert code == 0, said


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)

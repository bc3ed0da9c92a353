"""Checkpoints that are whole or not there: what damages them, what is found instead, and disks that are full."""

import os
import pickle
import random
import resource
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lit_prune.errors import LitPruneError
from lit_prune.training import checkpoints
from lit_prune.training.checkpoints import SUMS, SafeTrainer, newest, seal, verify


class Line(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(8, 1)

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        return self.line(batch).pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-2)


def fit(
    folder: Path, steps: int = 4, callbacks: tuple = (), module=None, ckpt_path=None, saves=True, **options
) -> SafeTrainer:
    """A run of some steps that saves every second one, and `last`."""
    saving = [ModelCheckpoint(folder, save_last=True, every_n_train_steps=2, save_top_k=1)] if saves else []
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    fixed = {"default_root_dir": folder, "enable_checkpointing": saves, **quiet}
    run = SafeTrainer(max_steps=steps, callbacks=[*saving, *callbacks], **{**fixed, **options})
    torch.manual_seed(0)
    run.fit(module or Line(), DataLoader(torch.ones(100, 8), batch_size=2), ckpt_path=ckpt_path)
    return run


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with the checkpoints of step 4: by step and `last`."""
    fit(tmp_path)
    return tmp_path


def sharded(folder: Path, ranks: int = 2) -> Path:
    """A sealed checkpoint folder, laid out as DeepSpeed's."""
    (folder / "checkpoint").mkdir(parents=True)
    for rank in range(ranks):
        torch.save({"rank": rank}, folder / "checkpoint" / f"rank_{rank}.pt", _use_new_zipfile_serialization=False)
    (folder / "latest").write_text("checkpoint")
    seal(folder)
    return folder


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 0xFF]))


# Whole or not
def test_a_run_leaves_whole_checkpoints_and_nothing_else(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == ["epoch=0-step=4.ckpt", "last.ckpt"]
    for path in saved.iterdir():
        verify(path)
    assert newest([saved]) == saved / "last.ckpt"


def test_a_file_cut_anywhere_is_not_whole(saved: Path) -> None:
    path = saved / "last.ckpt"
    content = path.read_bytes()
    for length in [0, 1, 3, len(content) // 2, *range(len(content) - 100, len(content))]:
        path.write_bytes(content[:length])
        with pytest.raises(LitPruneError, match=r"last\.ckpt: the checkpoint is (damaged|cut short)"):
            verify(path)


def test_what_is_no_checkpoint_is_not_called_a_damaged_one(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("# Notes\n" * 40)
    with pytest.raises(LitPruneError, match=r"notes\.md is no checkpoint"):
        verify(tmp_path / "notes.md")
    with pytest.raises(LitPruneError, match="it is no checkpoint, or its writing was cut off"):
        verify(tmp_path)


def test_a_flipped_byte_is_found(saved: Path) -> None:
    """Anywhere but in the checksum's own name, without which the archive's own checksums count."""
    path = saved / "last.ckpt"
    size = path.stat().st_size
    for place in [*random.Random(0).sample(range(size - 71), 300), *range(size - 64, size)]:
        flip(path, place)
        with pytest.raises(LitPruneError, match="damaged"):
            verify(path)
        flip(path, place)
    verify(path)


def test_a_sealed_file_is_an_archive_like_any_other(saved: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.ckpt"
    torch.save(torch.load(saved / "last.ckpt", weights_only=True), plain)
    with ZipFile(saved / "last.ckpt") as sealed, ZipFile(plain) as archive:
        assert sealed.comment.startswith(b"sha256 ")
        assert sealed.testzip() is None
        assert len(sealed.namelist()) == len(archive.namelist())
    verify(plain)  # saved by another Trainer
    plain.write_bytes(plain.read_bytes()[:-30])
    with pytest.raises(LitPruneError, match="damaged"):
        verify(plain)


def test_a_folder_lacks_nothing_and_its_sums_are_the_commands(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "last.ckpt")
    verify(folder)
    assert subprocess.run(["sha256sum", "-c", "--quiet", SUMS], cwd=folder, check=False).returncode == 0
    shard = folder / "checkpoint" / "rank_1.pt"
    flip(shard, 20)
    with pytest.raises(LitPruneError, match=r"checkpoint/rank_1\.pt in this checkpoint is damaged"):
        verify(folder)
    shard.unlink()
    with pytest.raises(LitPruneError, match=r"lacks checkpoint/rank_1\.pt"):
        verify(folder)
    (folder / SUMS).unlink()
    with pytest.raises(LitPruneError, match="its writing was cut off"):
        verify(folder)


def test_nothing_in_a_checkpoint_is_executed(saved: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "sprung"),)

    path = saved / "trap.ckpt"
    torch.save({"state_dict": Trap()}, path)
    verify(path)
    with pytest.raises(pickle.UnpicklingError):
        SafeTrainer(logger=False, enable_checkpointing=False, accelerator="cpu").fit(
            Line(), DataLoader(torch.ones(4, 8)), ckpt_path=path
        )
    assert not (tmp_path / "sprung").exists()


# What is found instead
def test_the_newest_whole_one_is_found_and_the_damaged_one_named(saved: Path) -> None:
    flip(saved / "last.ckpt", (saved / "last.ckpt").stat().st_size // 2)
    os.utime(saved / "epoch=0-step=4.ckpt", (1, 1))  # a file system's clock may not tell two quick writes apart
    with pytest.warns(UserWarning, match=r"last\.ckpt: the checkpoint is .*one before: .*step=4\.ckpt"):
        assert newest([saved]) == saved / "epoch=0-step=4.ckpt"
    (saved / "epoch=0-step=4.ckpt").write_bytes(b"")
    os.utime(saved / "last.ckpt", (1, 1))
    with pytest.raises(LitPruneError, match=r"no intact checkpoint is left .*step=4\.ckpt.*last\.ckpt"):
        newest([saved])
    assert newest([saved / "nowhere"]) is None


def test_slurms_checkpoint_is_found_if_it_is_the_newest(saved: Path) -> None:
    root = saved / "root"
    root.mkdir()
    (root / "hpc_ckpt_1.ckpt").write_bytes((saved / "last.ckpt").read_bytes())
    os.utime(root / "hpc_ckpt_1.ckpt", (2**32, 2**32))
    assert newest([saved, root]) == root / "hpc_ckpt_1.ckpt"
    os.utime(root / "hpc_ckpt_1.ckpt", (0, 0))
    assert newest([saved, root]) == saved / "last.ckpt"


@pytest.mark.parametrize("moment", ["writing", "sealing", "between the two names"])
def test_a_stop_at_any_moment_of_saving_leaves_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """A folder replaces a folder in two steps; whichever is the last one done, what is found is whole."""
    last, new = sharded(tmp_path / "last.ckpt"), tmp_path / "last.ckpt.part"
    sharded(new, ranks=1 if moment == "writing" else 3)
    if moment == "writing":
        (new / SUMS).unlink()
    if moment == "between the two names":
        last.rename(tmp_path / "last.ckpt.old")
    found = newest([tmp_path])
    verify(found)
    assert len(list((found / "checkpoint").iterdir())) == 2
    sharded(tmp_path / "made.part", ranks=3)
    checkpoints._replace(tmp_path / "made.part", last)  # the next save
    assert len(list((newest([tmp_path]) / "checkpoint").iterdir())) == 3


def test_a_folder_takes_the_place_of_a_file_and_the_other_way_round(saved: Path) -> None:
    last = saved / "last.ckpt"
    content = last.read_bytes()
    checkpoints._replace(sharded(saved / "new.part"), last)
    assert last.is_dir()
    (saved / "new.part").write_bytes(content)
    checkpoints._replace(saved / "new.part", last)
    assert last.is_file()
    assert sorted(path.name for path in saved.iterdir()) == ["epoch=0-step=4.ckpt", "last.ckpt"]


# Disks that are full

FULL = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from lightning import Callback
from test_checkpoints import fit

class Fill(Callback):
    def on_train_batch_start(self, trainer, module, batch, index):
        if index == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))

fit(Path(sys.argv[1]), 8, (Fill(),))
"""


def test_a_failed_write_ends_the_run_and_leaves_the_one_before(tmp_path: Path) -> None:
    """A real limit on the size of files, from step 4 on."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    result = subprocess.run([sys.executable, "-c", FULL, tmp_path], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert "LitPruneError" in last
    assert "step=6.ckpt: the checkpoint could not be written: [Errno 27] File too large" in last
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch=0-step=4.ckpt", "last.ckpt"]
    assert torch.load(newest([tmp_path]), weights_only=True)["global_step"] == 4

"""Checkpoints that are whole or not there: written aside, made durable, renamed, and checked before they are used.

A checkpoint is a file, or with DeepSpeed a folder of one file a rank. A file is PyTorch's zip archive, and the
archive's comment is the SHA-256 of all bytes before it: one file, one rename, and any reader of zip archives still
reads it. A folder has a `SHA256SUMS` of all its files, in the format of the command `sha256sum -c`.
"""

import hashlib
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lit_prune.errors import LitPruneError
from lit_prune.files.writing import ASIDE, sync

SUMS = "SHA256SUMS"
COMMENT = b"sha256 "
COMMENT_SIZE = len(COMMENT) + 64
CHUNK = 1 << 20
BEFORE = ".old"  # after a checkpoint's name, while another takes its place


class SafeTrainer(Trainer):
    """Lightning's Trainer, with checkpoints that are whole or not there, whoever saves them and with any strategy.

    All ranks must see the same folder. A write that fails ends the run: the checkpoints before it are untouched, and a
    disk that is too full for a checkpoint is too full for logs too.
    """

    def save_checkpoint(
        self, filepath: str | Path, weights_only: bool | None = None, storage_options: Any | None = None
    ) -> None:
        """Save under a temporary name beside `filepath`, then put it in the place of what is there.

        Raises:
            LitPruneError: the checkpoint could not be written.
        """
        if "://" in str(filepath):  # an object store, where a write is whole or not there
            super().save_checkpoint(filepath, weights_only, storage_options)
            return
        path = Path(filepath)
        if self.is_global_zero:
            _remove(_beside(path, ASIDE))
        name, resumed = self.strategy.broadcast((str(path), self.ckpt_path))  # and nobody writes before the old is gone
        if resumed != self.ckpt_path:
            raise LitPruneError(f"ranks went on from different checkpoints: {resumed} and {self.ckpt_path}")
        path = Path(name)
        aside = _beside(path, ASIDE)
        try:
            super().save_checkpoint(aside, weights_only, storage_options)
            if self.is_global_zero:
                seal(aside)
                _replace(aside, path)
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
                raise
            with suppress(OSError):
                _remove(aside)
            raise LitPruneError(
                f"{path}: the checkpoint could not be written: {error}; those before it are untouched: make room, and "
                "go on with --ckpt_path last"
            ) from error
        self.strategy.barrier("SafeTrainer.save_checkpoint")


def saving_folder(trainer: Trainer) -> Path | None:
    """Where a run's (first) `ModelCheckpoint` saves; None where there is none."""
    folder = getattr(trainer.checkpoint_callback, "dirpath", None)
    return Path(folder) if folder else None


def seal(path: Path) -> None:
    """Give a written checkpoint its checksums and put every file on the disk itself."""
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        sums = "".join(f"{_digest(file)}  {file.relative_to(path)}\n" for file in files)
        (path / SUMS).write_text(sums, encoding="utf-8")
        files = [*files, path / SUMS, *{file.parent for file in files}]
    else:
        _seal_archive(path)
    for file in files:
        sync(file)


def verify(path: Path) -> None:
    """Read a checkpoint from end to end and compare its checksums; nothing of it is executed.

    Raises:
        LitPruneError: it is not there, not whole, or not what was written.
    """
    if not path.exists():
        raise LitPruneError(f"{path}: there is no such checkpoint")
    if not path.is_dir():
        _verify_archive(path)
        return
    if not (path / SUMS).is_file():
        raise LitPruneError(f"{path}: no {SUMS} in this folder: it is no checkpoint, or its writing was cut off")
    for line in (path / SUMS).read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        if not (path / name).is_file():
            raise LitPruneError(f"{path}: the checkpoint lacks {name}")
        if _digest(path / name) != digest:
            raise LitPruneError(f"{path}: {name} in this checkpoint is damaged: its checksum differs")


def newest(folders: Iterable[Path]) -> Path | None:
    """The newest whole checkpoint in some folders, by time of writing; None if there is none at all.

    A damaged one that is newer is warned about and passed over.

    Raises:
        LitPruneError: there are checkpoints, all of them damaged.
    """
    found = {path for folder in folders for end in ("", BEFORE) for path in folder.glob(f"*.ckpt{end}")}
    damaged = []
    for path in sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True):
        try:
            verify(path)
        except LitPruneError as error:
            damaged.append(str(error))
            continue
        for text in damaged:
            rank_zero_warn(f"{text}. Going on from the one before: {path}")
        return path
    if damaged:
        raise LitPruneError(f"no whole checkpoint is left ({'; '.join(damaged)}); remove them to start anew")
    return None


def _seal_archive(path: Path) -> None:
    """Announce a comment in the last two bytes of the archive, its length, and append it."""
    with path.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(COMMENT_SIZE.to_bytes(2, "little"))
    digest = _digest(path)
    with path.open("ab") as file:
        file.write(COMMENT + digest.encode())


def _verify_archive(path: Path) -> None:
    size = path.stat().st_size - COMMENT_SIZE
    with path.open("rb") as file:
        begin = file.read(2)
        file.seek(max(0, size))
        comment = file.read()
    if comment.startswith(COMMENT):
        if comment != COMMENT + _digest(path, size).encode():
            raise LitPruneError(f"{path}: the checkpoint is damaged: its checksum differs")
        return
    if not b"PK".startswith(begin):  # as archives do
        raise LitPruneError(f"{path} is no checkpoint")
    if not comment.endswith(b"\0\0"):  # the end of an archive that announces no comment
        raise LitPruneError(f"{path}: the checkpoint is cut short")
    try:  # saved by another Trainer: the checksums of the archive's records have to do
        with ZipFile(path) as archive:
            bad = archive.testzip()
    except Exception as error:  # a damaged directory of the archive may raise nearly anything
        raise LitPruneError(f"{path}: the checkpoint is damaged: {error}") from error
    if bad is not None:
        raise LitPruneError(f"{path}: the checkpoint is damaged: the checksum of its record {bad} differs")


def _digest(path: Path, size: int | None = None) -> str:
    """SHA-256 of a file, or of its first `size` bytes."""
    left, digest = path.stat().st_size if size is None else size, hashlib.sha256()
    with path.open("rb") as file:
        while left > 0 and (part := file.read(min(left, CHUNK))):
            digest.update(part)
            left -= len(part)
    return digest.hexdigest()


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


def _replace(new: Path, path: Path) -> None:
    """Rename `new` to `path`. A folder can't be replaced in one step: for a moment it has another name."""
    old = _beside(path, BEFORE)
    _remove(old)
    if path.is_dir() or (new.is_dir() and path.exists()):
        path.rename(old)
    new.replace(path)
    sync(path.parent)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

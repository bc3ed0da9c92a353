"""Atomic checkpoints: written under a temporary name, synced, renamed, and verified before use.

A checkpoint is a file, or with DeepSpeed a folder with one file per rank. A file is PyTorch's zip archive with the
SHA-256 of all preceding bytes as the archive's comment: one file, one rename, and any zip reader still reads it. A
folder has a `SHA256SUMS` of all its files, in the format of `sha256sum -c`.
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
BEFORE = ".old"  # suffix of a checkpoint while another replaces it


class SafeTrainer(Trainer):
    """Lightning's Trainer with atomic checkpoints, for any strategy and any caller.

    All ranks must see the same folder. A failed write ends the run: earlier checkpoints stay untouched, and a disk too
    full for a checkpoint is too full for logs as well.
    """

    def save_checkpoint(
        self, filepath: str | Path, weights_only: bool | None = None, storage_options: Any | None = None
    ) -> None:
        """Save under a temporary name next to `filepath`, then replace `filepath` with it.

        Raises:
            LitPruneError: the checkpoint could not be written.
        """
        if "://" in str(filepath):  # an object store, whose writes are atomic
            super().save_checkpoint(filepath, weights_only, storage_options)
            return
        path = Path(filepath)
        if self.is_global_zero:
            _remove(_beside(path, ASIDE))
        # Ranks agree on the path; the broadcast also keeps them from writing before rank zero has removed leftovers.
        name, resumed = self.strategy.broadcast((str(path), self.ckpt_path))
        if resumed != self.ckpt_path:
            raise LitPruneError(f"ranks resumed from different checkpoints: {resumed} and {self.ckpt_path}")
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
                f"{path}: the checkpoint could not be written: {error}; earlier ones are untouched: free disk space, "
                "and resume with --ckpt_path last"
            ) from error
        self.strategy.barrier("SafeTrainer.save_checkpoint")


def saving_folder(trainer: Trainer) -> Path | None:
    """Folder of a run's (first) `ModelCheckpoint`, or None."""
    folder = getattr(trainer.checkpoint_callback, "dirpath", None)
    return Path(folder) if folder else None


def seal(path: Path) -> None:
    """Add checksums to a written checkpoint and sync every file to disk."""
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
    """Read a whole checkpoint and compare its checksums; nothing in it is executed.

    Raises:
        LitPruneError: the checkpoint is missing, incomplete or damaged.
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
    """Newest intact checkpoint in the folders, by modification time; None if they hold no checkpoint.

    Newer damaged ones are skipped with a warning.

    Raises:
        LitPruneError: all checkpoints are damaged.
    """
    paths = {path for folder in folders for end in ("", BEFORE) for path in folder.glob(f"*.ckpt{end}")}
    damaged = []
    for path in sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True):
        try:
            verify(path)
        except LitPruneError as error:
            damaged.append(str(error))
            continue
        for text in damaged:
            rank_zero_warn(f"{text}. Resuming from the one before: {path}")
        return path
    if damaged:
        raise LitPruneError(f"no intact checkpoint is left ({'; '.join(damaged)}); remove them to start from scratch")
    return None


def _seal_archive(path: Path) -> None:
    """Append the checksum as the archive's comment, after writing its length to the last two bytes of the archive."""
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
    if not b"PK".startswith(begin):  # the magic bytes of zip archives
        raise LitPruneError(f"{path} is no checkpoint")
    if not comment.endswith(b"\0\0"):  # an archive without a comment ends with its length, 0
        raise LitPruneError(f"{path}: the checkpoint is cut short")
    try:  # saved by another Trainer: fall back to the CRCs of the archive's records
        with ZipFile(path) as archive:
            bad = archive.testzip()
    except Exception as error:  # a damaged central directory may raise nearly anything
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
    """Rename `new` to `path`. A folder can't be replaced atomically, so the old one is briefly renamed."""
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

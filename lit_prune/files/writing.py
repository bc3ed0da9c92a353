"""Atomic writing of files."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ASIDE = ".part"


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path, whose file is synced and replaces `path` when the block succeeds.

    If the block fails or writes no file, `path` is unchanged. Several processes may write the same file: each uses its
    own temporary path, and the last one wins. A link, a pipe or a device (`/dev/stdout`) is written to as it is.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        yield path
        return
    aside = path.with_name(f".{path.name}.{os.getpid()}{ASIDE}")
    try:
        yield aside
        if aside.exists():
            sync(aside)
            aside.replace(path)
            sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

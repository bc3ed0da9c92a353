"""Files that are whole or not there, whatever happens while they are written."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ASIDE = ".part"


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path to write to, whose file is put on the disk and takes the place of `path` when the block ends well.

    A block that fails, or makes no file, leaves `path` as it was. Processes may write the same file at one time: each
    writes to its own path, and the last one's stays. A link, a pipe or a device (`/dev/stdout`) is written to as it is.
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
    """Wait until the disk has what was written to a file, or for a folder the names in it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

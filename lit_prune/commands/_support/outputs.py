"""Files that verbs write their results to, refused before the work that the results take. No verb itself."""

import json
import os
from pathlib import Path
from typing import Any

from lit_prune.errors import LitPruneError
from lit_prune.files.writing import written_whole

PICTURES = (".png", ".pdf", ".svg")


def check_file(option: str, path: Path | None) -> None:
    """Raise `LitPruneError` for a file that can't be written; None stands for an option that is not given."""
    if path is None:
        return
    if path.is_dir():
        raise LitPruneError(f"{option}: {path} is a folder; give a file")
    _check_parent(option, path)


def write_json(path: Path, report: Any, indent: int = 2) -> None:
    """Write a report as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as file:
        file.write_text(json.dumps(report, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def check_picture(option: str, path: Path | None) -> None:
    """`check_file`, and a format that pictures are written in."""
    if path is not None and path.suffix.lower() not in PICTURES:
        raise LitPruneError(f"{option}: {path}: pictures are written as {', '.join(PICTURES)}")
    check_file(option, path)


def check_folder(option: str, path: Path) -> None:
    """Raise `LitPruneError` for a folder that can't be made or written to."""
    _check_parent(option, path / "file")


def _check_parent(option: str, path: Path) -> None:
    """The closest folder that exists must be one, and take new files."""
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    if not nearest.is_dir():
        raise LitPruneError(f"{option}: {path} can't be written: {nearest} is no folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise LitPruneError(f"{option}: {path} can't be written: {nearest} takes no new files")

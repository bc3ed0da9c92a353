"""Resolve a location by its name and the files there."""

from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Literal

from lit_prune.errors import LitPruneError

HUB = "hub:"
SUFFIXES = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".tar": "tar",
}
FOLDER_KINDS = ("tar", "parquet", "arrow")
Kind = Literal["json", "parquet", "arrow", "tar", "saved", "hub"]


@dataclass(frozen=True)
class Location:
    """`files` in the order of their names; none for the hub, the folder itself for one of `Dataset.save_to_disk`."""

    name: str
    kind: Kind
    files: tuple[Path, ...]

    @property
    def folder(self) -> Path | None:
        """Default image root; None for the hub."""
        if not self.files:
            return None
        return self.files[0] if self.kind == "saved" else self.files[0].parent


def locate(location: str | Path) -> Location:
    """Find kind and files of a location, see `open_source`.

    Raises:
        LitPruneError: there are no files, or files of an unknown kind or of several kinds.
    """
    name, path = str(location), Path(location)
    if name.startswith(HUB):
        return Location(name, "hub", ())
    if path.is_dir():
        if (path / "state.json").is_file():
            return Location(name, "saved", (path,))
        _refuse_splits(path)
        files = [file for file in path.iterdir() if SUFFIXES.get(file.suffix.lower()) in FOLDER_KINDS]
    elif path.is_file():
        files = [path]
    elif any(mark in name for mark in "*?["):
        files = [Path(file) for file in glob(name, recursive=True)]
    else:
        raise LitPruneError(f"{name}: no such file")
    files = sorted(file for file in files if file.is_file())
    if not files:
        raise LitPruneError(f"{name}: no .tar, .parquet or .arrow files there")
    return Location(name, _kind(name, files), tuple(files))


def _kind(name: str, files: list[Path]) -> Kind:
    kinds = {SUFFIXES.get(file.suffix.lower()) for file in files}
    if None in kinds:
        odd = next(file for file in files if file.suffix.lower() not in SUFFIXES)
        raise LitPruneError(f"{odd}: instruction data end in {', '.join(SUFFIXES)}")
    if len(kinds) > 1:
        raise LitPruneError(
            f"{name}: {' and '.join(sorted(kinds))} files in one place; give a pattern such as *.{min(kinds)}"
        )
    kind = kinds.pop()
    if kind == "json" and len(files) > 1:
        raise LitPruneError(f"{name}: {len(files)} JSON files; give them one by one")
    return kind


def _refuse_splits(folder: Path) -> None:
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(str(state.parent) for state in folder.glob("*/state.json")))
        raise LitPruneError(f"{folder}: several splits; name one of {splits}")

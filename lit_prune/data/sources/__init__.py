"""Sources of instruction data: one module per storage format, chosen by `open_source`."""

from pathlib import Path

from lit_prune.data.references import ImageFile
from lit_prune.data.sources.base import Source, sample_name, spread
from lit_prune.data.sources.json_files import JsonFile
from lit_prune.data.sources.locations import Location, locate
from lit_prune.data.sources.shards import Shards, check_finished
from lit_prune.data.sources.tables import open_table
from lit_prune.errors import LitPruneError

__all__ = ["ImageFile", "Source", "open_source", "sample_name", "spread"]


def open_source(location: str | Path, images_root: str | Path | None = None) -> Source:
    """Open the records at a location.

    Args:
        location: a JSON list (`.json`) or JSON lines file (`.jsonl`); `.parquet` or `.arrow` files or `.tar` shards,
            given as a file, their folder or a pattern (`train-*.parquet`); a folder that `Dataset.save_to_disk` wrote;
            or `hub:OWNER/NAME[/CONFIGURATION][:SPLIT]`.
        images_root: folder that image paths in records are relative to; by default that of the file. Hub data have no
            such folder.

    Raises:
        LitPruneError: the location doesn't exist, can't be read or has no records, or the image root is no folder.
    """
    root = Path(images_root) if images_root is not None else None
    if root is not None and not root.is_dir():
        raise LitPruneError(f"image root {root} is no folder: give the one that records' paths start from (`images`)")
    found = locate(location)
    source = _open(found, root)
    if not len(source):
        raise LitPruneError(f"{location}: no samples")
    return source


def _open(location: Location, images_root: Path | None) -> Source:
    if location.kind == "json":
        return JsonFile(location.files[0], images_root)
    if location.kind == "tar":
        if Path(location.name).is_dir():
            check_finished(location.folder)
        return Shards(location.files)
    return open_table(location, images_root)

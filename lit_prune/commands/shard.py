"""Pack instruction data into tar shards (WebDataset layout), for file systems that dislike small files."""

import re
from pathlib import Path

from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lit_prune.commands._support import console
from lit_prune.data.sharding import MANIFEST, write_shards
from lit_prune.data.sources import open_source
from lit_prune.errors import BadSample, LitPruneError

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def run(data: str, out: Path, images: str | None = None, size: str = "500MB", samples: int | None = None) -> None:
    """Pack instruction data into tar shards: KEY.json with the record, KEY.0.jpg and so on with its images as they are.

    Training reads the folder like any other data: `--data.init_args.train OUT`. Run the same command again after it was
    broken off: finished shards are kept. The same data give the same bytes. Bad samples are left out and listed in
    OUT/shards.json; images are checked by their headers only.

    Args:
        data: JSON or JSON lines file, parquet or arrow files or their folder, a save_to_disk folder, tar shards, or
            hub:OWNER/NAME[/CONFIGURATION][:SPLIT].
        out: Folder for the shards.
        images: Folder of the images that records name by a path. Default: the one that holds the data.
        size: Most bytes a shard may have, such as 500MB or 2GiB.
        samples: Most samples a shard may have. Default: no such limit.

    Examples:
        lit-prune sample --out sample
        lit-prune shard --data sample/questions.json --out shards
        lit-prune shard --data data/mix.json --images data/images --out data/shards --size 2GB
    """
    limit = _bytes(size)
    if samples is not None and samples < 1:
        raise LitPruneError(f"--samples {samples}: a shard holds at least one")
    source = open_source(data, images)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console.err) as progress:
        task = progress.add_task(f"packing into {out}", total=len(source))
        done = write_shards(source, data, out, limit, samples, lambda count: progress.update(task, completed=count))
    console.say(f"{out}: {len(done.shards)} shards, {done.samples} samples, {decimal(done.bytes)}")
    if done.skipped:
        first = BadSample(**done.skipped[0])
        console.say(f"bad samples left out: {len(done.skipped)}, listed in {out / MANIFEST}; the first: {first}")
    if not done.samples:
        raise LitPruneError(f"{data}: no good sample")


def _bytes(text: str) -> int:
    """A number of bytes with a unit. Raises LitPruneError for anything else."""
    found = re.fullmatch(r"([0-9.]+)\s*([kmg]?i?)b?", text.strip(), re.IGNORECASE)
    try:
        number = int(float(found[1]) * UNITS[found[2].upper()])
    except (TypeError, KeyError, ValueError, OverflowError):
        number = 0
    if number < 1:
        raise LitPruneError(f"--size {text}: a number of bytes such as 500MB or 2GiB is wanted")
    return number

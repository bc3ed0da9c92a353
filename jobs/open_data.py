"""CPU seconds and memory to open large instruction data and to read 5,000 random samples, for each kind of source.

python jobs/open_data.py                               # 20,000 and 200,000 samples; 2 GB in a temporary folder
python jobs/open_data.py --samples 2000 --reads 500
"""

import argparse
import json
import multiprocessing
import random
import tempfile
import time
from pathlib import Path

import datasets
from PIL import Image
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from lit_prune.data.sharding import write_shards
from lit_prune.data.sources import open_source

KINDS = {"JSON lines": "data.jsonl", "JSON list": "data.json", "parquet": "parquet", "saved": "saved", "tar": "tar"}
COLUMNS = ("first opening, s", "opening, s", "before, MB", "opened, MB", "read, MB", "not of files, MB", "reading, s")


def write(folder: Path, samples: int) -> float:
    """The same samples as every kind, about 300 bytes of text and one small image each; seconds to pack shards."""
    folder.mkdir()
    Image.effect_noise((16, 16), 60).save(folder / "noise.png")
    turns = [("human", "<image>\nWhat stands beside the door of house {0}?"), ("gpt", "A bicycle, number {0}. " * 8)]
    conversations = [
        [{"from": role, "value": text.format(number)} for role, text in turns] for number in range(samples)
    ]
    records = [
        {"id": f"s{n:06d}", "image": "noise.png", "conversations": turns} for n, turns in enumerate(conversations)
    ]
    with (folder / "data.jsonl").open("w") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    (folder / "data.json").write_text(json.dumps(records))
    stored = {"bytes": (folder / "noise.png").read_bytes(), "path": "noise.png"}
    for record in records:
        record["image"] = stored
    data = datasets.Dataset.from_list(records)
    (folder / "parquet").mkdir()
    data.to_parquet(folder / "parquet" / "data.parquet")
    data.save_to_disk(folder / "saved")
    start = time.process_time()
    write_shards(open_source(folder / "data.jsonl"), "data.jsonl", folder / "tar", size=100_000_000)
    packing = time.process_time() - start
    for index in (folder / "tar").glob("*.npy"):
        index.unlink()
    return packing


def memory(key: str = "VmRSS") -> float:
    """Resident memory of this process in MB; `RssAnon` leaves out mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{key}:"))) / 1e3


def measure(location: str, reads: int) -> list[float]:
    """Open a location and read at random: the figures of `COLUMNS` but for the first."""
    ready, start = memory(), time.process_time()
    source = open_source(location)
    opened, begin = memory(), time.process_time()
    draw = random.Random(0)
    for index in (draw.randrange(len(source)) for _ in range(reads)):
        record = source[index]
        for image in source.images(index, record):
            with image.open() as file:
                file.read()
    return [begin - start, ready, opened, memory(), memory("RssAnon"), time.process_time() - begin]


def main() -> None:
    """Write, then measure each kind twice: the first opening converts parquet and makes the index of shards."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[20_000, 200_000])
    parser.add_argument("--reads", type=int, default=5000)
    options = parser.parse_args()
    datasets.disable_progress_bars()
    table = Table("samples", "source", *COLUMNS, box=MARKDOWN)
    # Every job in a process of its own, forked from this one, which has imported everything and read nothing.
    pool = multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1)
    with tempfile.TemporaryDirectory() as folder, pool:
        datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
        for samples in options.samples:
            packing = pool.apply(write, (Path(folder) / str(samples), samples))
            print(f"{samples:,} samples packed into shards: {1000 * packing / samples:.2f} ms each")
            for name, path in KINDS.items():
                location = str(Path(folder) / str(samples) / path)
                first, figures = (pool.apply(measure, (location, options.reads)) for _ in range(2))
                cells = [f"{value:.0f}" for value in figures[1:5]]
                table.add_row(f"{samples:,}", name, f"{first[0]:.2f}", f"{figures[0]:.2f}", *cells, f"{figures[5]:.2f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()

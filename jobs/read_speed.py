"""Samples per second of a configuration's data pipeline alone, beside those of training on it.

python jobs/read_speed.py                                            # micro-LLaVA
python jobs/read_speed.py configs/rcp.yaml --workers 4 8 --steps 20  # your data on your machine
"""

import argparse
import csv
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def main() -> None:
    """One line for each number of workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, default=ROOT / "configs" / "micro.yaml")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1], help="processes that read")
    parser.add_argument("--batches", type=int, default=20, help="read alone, after one that isn't counted")
    parser.add_argument("--steps", type=int, default=4, help="of training; 0: none")
    args = parser.parse_args()
    print(f"{'workers':>7}{'reading alone':>16}{'training':>12}{'waiting':>10}")
    for workers in args.workers:
        speed = reading(args.config, workers, args.batches)
        trained, waited = training(args.config, workers, args.steps) if args.steps else (float("nan"), float("nan"))
        print(f"{workers:7}{speed:14.1f}/s{trained:10.1f}/s{100 * waited:8.1f} %", flush=True)


def reading(config: Path, workers: int, batches: int) -> float:
    """Samples per second of the training loader, nothing else running."""
    described = yaml.safe_load(config.read_text(encoding="utf-8"))["data"]
    room, name = described["class_path"].rsplit(".", 1)
    data = getattr(import_module(room), name)(**{**described.get("init_args", {}), "num_workers": workers})
    data.prepare_data()
    data.setup("fit")
    samples, loader = 0, iter(data.train_dataloader())
    next(loader)
    since = time.perf_counter()
    for _, batch in zip(range(batches), loader, strict=False):
        samples += len(batch["ids"])
    return samples / (time.perf_counter() - since)


def training(config: Path, workers: int, steps: int) -> tuple[float, float]:
    """Samples per second of training, and the share of the time that it waits for data, by `Throughput`."""
    with tempfile.TemporaryDirectory() as folder:
        words = (
            f"fit -c {config} --data.num_workers={workers} --trainer.max_steps={steps + 1} --trainer.logger+=CSVLogger"
        )
        words += (
            f" --trainer.logger.save_dir={folder} --trainer.default_root_dir={folder} --trainer.log_every_n_steps=1"
        )
        words += " --trainer.limit_val_batches=0"
        subprocess.run([sys.executable, "-m", "lit_prune", *words.split()], check=True, capture_output=True)
        rows = [row for path in Path(folder).rglob("metrics.csv") for row in csv.DictReader(path.open())]
    names = ("throughput/samples_per_s", "throughput/waiting_share")
    found = [[float(row[name]) for row in rows if row.get(name)][1:] for name in names]  # the first step warms up
    return tuple(sum(values) / len(values) for values in found)


if __name__ == "__main__":
    main()

"""Write the answers of `predict` to a file."""

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer

from lit_prune.callbacks.settings import output_suffix
from lit_prune.data import BenchmarkData
from lit_prune.files.writing import written_whole
from lit_prune.training.debug_modes import leaves_no_trace


def rank_file(name: str, rank: int) -> str:
    """File of one rank's answers: `answers.jsonl` of rank 0, `answers.rank3.jsonl` of rank 3."""
    return f"{name}.rank{rank}.jsonl" if rank else f"{name}.jsonl"


class WriteAnswers(Callback):
    """Write the answers of `predict` as JSON lines with `id`, `answer`, `question` and `reference`, batch by batch.

    `reference` is the answer that the data hold, null where they hold none.

    Rank 0 writes `answers.jsonl`, rank 3 `answers.rank3.jsonl`, in place of those of a `predict` with the same settings
    before; with other settings the names are numbered, as in `SaveConfig`. At the end rank 0 joins them in
    `answers.jsonl`, in the order of the data. Runs for debugging write nothing; answers to benchmarks are written by
    `WriteSubmissions`.

    Args:
        folder: where to; by default the run's folder.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self.file: Path | None = None
        self.records: list[int] = []  # of this rank's lines: their places in the data

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start with an empty file, and remove those of an earlier run with more ranks."""
        self.file, self.records = None, []
        if leaves_no_trace(trainer) or isinstance(trainer.datamodule, BenchmarkData):
            return
        name = f"answers{output_suffix(trainer)}"
        folder = self.folder or Path(trainer.default_root_dir)
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            for old in (folder / f"{name}.jsonl", *folder.glob(f"{name}.rank*.jsonl")):
                old.unlink(missing_ok=True)
        trainer.strategy.barrier("WriteAnswers")
        self.file = folder / rank_file(name, trainer.global_rank)
        self.file.touch()

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        """Append the answers of a batch."""
        if self.file is None:
            return
        with self.file.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(answer, ensure_ascii=False) + "\n" for answer in outputs)
        self.records += batch["records"]

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Join the answers of all ranks."""
        if self.file is None or trainer.world_size == 1:
            return
        found: list[Any] = [None] * trainer.world_size
        dist.all_gather_object(found, (self.file, self.records))
        if trainer.is_global_zero:
            join(found)
        trainer.strategy.barrier("answers")


def join(parts: list[tuple[Path, list[int]]]) -> None:
    """Merge the ranks' files, each with the places of its lines in the data, in the first of them."""
    lines = []
    for file, records in parts:
        lines += zip(records, file.read_text(encoding="utf-8").split("\n")[:-1], strict=True)
    with written_whole(parts[0][0]) as whole:
        whole.write_text("".join(f"{line}\n" for _, line in sorted(lines, key=lambda pair: pair[0])), encoding="utf-8")
    for file, _ in parts[1:]:
        file.unlink()

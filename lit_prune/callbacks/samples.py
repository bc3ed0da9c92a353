"""Show a few questions of an evaluation with answers and kept tokens."""

from pathlib import Path
from typing import Any

import numpy as np
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from PIL import Image
from torch import Tensor

from lit_prune.callbacks.settings import output_suffix
from lit_prune.evaluation.measuring import Measured
from lit_prune.evaluation.pictures import Row, draw_page, titled
from lit_prune.evaluation.records import SampleRecord
from lit_prune.evaluation.views import Pixels, View, by_tiles, has_queries, patch_of, tiles_of
from lit_prune.host.parts import find
from lit_prune.training.debug_modes import leaves_no_trace
from lit_prune.training.logging import logged_step

COLUMNS = ["id", "skill", "question", "right answer", "full model", "pruned", "right", "kept tokens", "picture"]
DPI = 120
STAGES = {"validate": "val", "test": "test"}


class SamplePictures(Callback):
    """Shows a few questions of each validation and test: kept tokens at every stage, full and pruned answer.

    As PNG files in the run's folder, in W&B as the table `val/samples` (or `test/samples`), in TensorBoard as images.
    They are spread over rank zero's first batch, so that each validation shows the same ones. A model that cuts images
    into tiles has rows without a picture. Runs for debugging show none.

    Args:
        count: questions to show.
        folder: of the PNG files.
    """

    def __init__(self, count: int = 4, folder: str = "samples") -> None:
        self.count, self.folder = count, Path(folder)
        self.written = False

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: dict[str, Any] | None,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Show questions of the first batch."""
        shown = batch_idx == 0 and trainer.is_global_zero and not trainer.sanity_checking
        if shown and outputs and not leaves_no_trace(trainer):
            chosen = np.linspace(0, len(batch["ids"]) - 1, min(self.count, len(batch["ids"]))).round().astype(int)
            rows = [_row(pl_module, batch, outputs, i) for i in chosen.tolist()]
            self._show(trainer, f"{STAGES[trainer.state.stage.value]}/samples", rows)

    on_test_batch_end = on_validation_batch_end

    def _show(self, trainer: Trainer, name: str, rows: list[list[Any]]) -> None:
        step = logged_step(trainer)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                _to_wandb(logger, name, rows, step)
            elif isinstance(logger, TensorBoardLogger):
                for i, row in enumerate(rows):
                    if row[-1] is not None:
                        logger.experiment.add_image(f"{name}/{i}", row[-1], step, dataformats="HWC")
        prefix = f"{name.partition('/')[0]}{output_suffix(trainer)}_step{trainer.global_step}"
        self.written = self._write(prefix, rows) or self.written

    def _write(self, prefix: str, rows: list[list[Any]]) -> bool:
        pictures = [(i, row[-1]) for i, row in enumerate(rows) if row[-1] is not None]
        self.folder.mkdir(parents=True, exist_ok=True)
        for i, picture in pictures:
            Image.fromarray(picture).save(self.folder / f"{prefix}_{i}.png")
        return bool(pictures)


def _to_wandb(logger: WandbLogger, name: str, rows: list[list[Any]], step: int) -> None:
    import wandb

    pictured = [[*row[:-1], None if row[-1] is None else wandb.Image(row[-1])] for row in rows]
    logger.log_table(name, columns=COLUMNS, data=pictured, step=step)


def _row(module: LightningModule, batch: dict[str, Any], outputs: dict[str, Any], i: int) -> list[Any]:
    """One question, a value for each of `COLUMNS`."""
    student: Measured = outputs["student"]
    record: SampleRecord = outputs["records"][i]
    stages = {layer: there[i].bool().cpu().numpy() for layer, there in student.stages.items()}
    detail = f"{record.visual:.3g} of {record.total} tokens on average"
    name = module.plugin.title or type(module.plugin.pruner).__name__
    method = Row(name, detail, record.answer, record.right, titled(stages))
    seen = _seen(module, batch["inputs"], i)
    picture = None if seen is None else _draw(seen, method, record)
    kept = ", ".join(title for title, _ in method.stages)
    answers = (record.reference, record.full, record.answer, record.right)
    return [str(record.id), record.skill or "", record.question, *answers, kept, picture]


def _seen(module: LightningModule, inputs: dict[str, Tensor], i: int) -> View | None:
    """The image of a sample, where each sample has at most one and the model sees it whole."""
    pixels, processor = inputs.get("pixel_values"), getattr(module.vlm.processor, "image_processor", None)
    shown = find(module.model).image_columns(inputs["input_ids"])
    pictured = shown.any(1)
    if pixels is None or processor is None or pixels.ndim != 4 or len(pixels) != int(pictured.sum()) or not pictured[i]:
        return None
    place = int(pictured[:i].sum())
    mine = {name: inputs[name][place : place + 1] for name in ("pixel_values", "image_sizes") if name in inputs}
    tiles = [] if has_queries(module.model) else tiles_of(mine, processor)
    return by_tiles(tiles, int(shown[i].sum()), patch_of(module.model.config)) if tiles else None


def _draw(image: View, row: Row, record: SampleRecord) -> Pixels:
    subtitle = f"answer: {record.reference}  ·  full model: {record.full}"
    page = draw_page(image, [row], record.question, subtitle)
    page.set_dpi(DPI)
    page.canvas.draw()
    return np.asarray(page.canvas.buffer_rgba())[..., :3].copy()

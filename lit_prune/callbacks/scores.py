"""Write the official scores of `test` and `validate` to a file."""

import json
from pathlib import Path

from lightning import Callback, LightningModule, Trainer

from lit_prune.callbacks.settings import output_suffix
from lit_prune.files.writing import written_whole
from lit_prune.training.debug_modes import leaves_no_trace


class WriteScores(Callback):
    """Write the official scores of benchmarks as JSON: a list with an object for each, as `lit-prune score --out` has.

    The file is `scores.json`, or `scores_2.json` for other settings, as in `SaveConfig`. Data without official scores,
    and runs for debugging, write nothing.

    Args:
        folder: where to; by default the run's folder.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = None if folder is None else Path(folder)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the scores on rank zero, except those of a validation during training."""
        scores = getattr(pl_module, "scores", [])
        if not scores or not trainer.is_global_zero or trainer.state.fn.value == "fit" or leaves_no_trace(trainer):
            return
        path = (self.folder or Path(trainer.default_root_dir)) / f"scores{output_suffix(trainer)}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as file:
            reports = [score.report() for score in scores]
            file.write_text(json.dumps(reports, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    on_validation_end = on_test_end

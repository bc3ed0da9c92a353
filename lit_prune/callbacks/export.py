"""Export the trained plug-in."""

import json
from datetime import date
from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lit_prune.callbacks.results import labelled
from lit_prune.errors import LitPruneError
from lit_prune.ops.budget import as_json
from lit_prune.plugin import SETTINGS, WEIGHTS, Plugin
from lit_prune.plugin.reading import digest, read_settings
from lit_prune.training.averaging import average_in_use
from lit_prune.training.debug_modes import leaves_no_trace
from lit_prune.training.strategies import whole


class ExportPlugin(Callback):
    """Write the trained plug-in as a folder at the end of `fit`: safetensors and JSON, ready to attach.

    A run that trained nothing, or was for debugging, leaves the folder as it is. A whole `test` of the plug-in in the
    folder adds its figures to the model card and to `results.json`.

    Args:
        folder: where to; replaced if it exists.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.written = False

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save on rank zero; a collective, since all ranks gather the parameters."""
        if leaves_no_trace(trainer):
            return
        if not trainer.global_step:
            rank_zero_info(f"nothing was trained: no plug-in is written to {self.folder}")
            return
        with whole(pl_module.plugin):
            if trainer.is_global_zero:
                pl_module.plugin.save_pretrained(self.folder)
        self.written = True
        average = average_in_use(trainer)
        weights = f"; weights: the average of {average}" if average else ""
        rank_zero_info(f"plug-in: {self.folder} (attach it with vlm.attach('{self.folder}')){weights}")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the figures on rank zero, if the folder holds the plug-in that was tested."""
        if leaves_no_trace(trainer) or trainer.limit_test_batches != 1.0:
            return
        with whole(pl_module.plugin):
            if not trainer.is_global_zero or not self._holds(plugin := pl_module.plugin):
                return
            figures = {k.removeprefix("test/"): float(v) for k, v in trainer.callback_metrics.items() if "test/" in k}
            plugin.results = {
                "weights": digest(plugin.content()),
                "keep": as_json(plugin.keep),
                "data": type(trainer.datamodule).__name__,
                "date": date.today().isoformat(),
                "figures": labelled(figures),
            }
            plugin.save_pretrained(self.folder)
        rank_zero_info(f"figures of this test: {self.folder / 'README.md'}")

    def _holds(self, plugin: Plugin) -> bool:
        """True if the folder holds this plug-in, with these weights and this budget."""
        try:
            settings = read_settings(self.folder / SETTINGS)
            content = (self.folder / WEIGHTS).read_bytes()
        except (LitPruneError, OSError):
            return False
        return settings == json.loads(json.dumps(plugin.settings())) and content == plugin.content()

"""Export the trained plug-in."""

from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lit_prune.training.averaging import average_in_use
from lit_prune.training.debug_modes import leaves_no_trace
from lit_prune.training.strategies import whole


class ExportPlugin(Callback):
    """Write the trained plug-in as a folder at the end of `fit`: safetensors and JSON, ready to attach.

    A run that trained nothing, or was for debugging, leaves the folder as it is.

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

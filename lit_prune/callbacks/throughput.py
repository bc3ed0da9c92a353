"""How fast training goes, and what it has cost so far."""

import math
import time
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities.throughput import get_available_flops

from lit_prune.training.logging import WORK, fetched

SPEEDS = {name: f"throughput/{name}_per_s" for name in WORK}


class Throughput(Callback):
    """Logs samples, tokens and FLOPs per second, the time of a step, and samples and FLOPs since training began.

    Over all ranks, and over resumed runs. `visual_tokens` are those of the prompts, `kept_tokens` those averaged over
    the decoder layers' inputs; FLOPs are of teacher, student and backward (`lit_prune.cost.step`), on a GPU also as the
    share of its peak. A window reaches from one logged step to the next, without validation. Lightning's own
    `ThroughputMonitor` waits for the device after each step; this one does where loggers do.
    """

    def __init__(self) -> None:
        self.before = self.now = torch.zeros(len(WORK), dtype=torch.float64)  # of all ranks; `before`: the resumed run
        self.seen, self.step, self.since, self.paused = self.now, 0, 0.0, 0.0
        self.peak: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.peak = get_available_flops(trainer.strategy.root_device, pl_module.vlm.model.dtype)
        self.step, self.since = trainer.global_step, time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log a window that ends here."""
        steps, every = trainer.global_step - self.step, trainer.log_every_n_steps
        if not steps or not every or trainer.global_step % every:
            return
        self.now = self._gather(trainer, pl_module)  # waits for the device, so that the clock tells the truth
        clock = time.perf_counter()
        seconds = clock - self.since
        done = dict(zip(WORK, self.now.tolist(), strict=True))
        speed = {name: value / seconds for name, value in zip(WORK, (self.now - self.seen).tolist(), strict=True)}
        values = {SPEEDS[name]: value for name, value in speed.items()}
        values |= {"throughput/step_s": seconds / steps, "total/samples": done["samples"], "total/flops": done["flops"]}
        if self.peak is not None:
            values["throughput/share_of_peak"] = speed["flops"] / (self.peak * trainer.world_size)
        known = {name: value for name, value in values.items() if not math.isnan(value)}
        pl_module.log_dict(fetched(known), batch_size=1)
        self.step, self.since, self.seen = trainer.global_step, clock, self.now

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self.paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start it again."""
        self.since += time.perf_counter() - self.paused

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Count up to this step; Lightning makes checkpoints on all ranks."""
        self.now = self._gather(trainer, pl_module)
        checkpoint["callbacks"][self.state_key] = {"totals": self.now.tolist()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the totals of the run that is resumed."""
        self.before = self.now = self.seen = torch.tensor(state_dict["totals"], dtype=torch.float64)

    def _gather(self, trainer: Trainer, pl_module: LightningModule) -> torch.Tensor:
        """What all ranks have run, with the run that this one resumes."""
        own = pl_module.work.totals.to(trainer.strategy.root_device, copy=True)
        return self.before + trainer.strategy.reduce(own, reduce_op="sum").cpu()

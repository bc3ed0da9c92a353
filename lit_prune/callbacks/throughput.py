"""Throughput of training, and its total cost so far."""

import math
import time
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities.throughput import get_available_flops

from lit_prune.training.logging import WORK, fetched

SPEEDS = {name: f"throughput/{name}_per_s" for name in WORK}


class Throughput(Callback):
    """Log samples, tokens and FLOPs per second, the time of a step, and total samples and FLOPs of training.

    Totals cover all ranks and resumed runs. `visual_tokens` are those of the prompts, `kept_tokens` those averaged over
    the decoder layers' inputs; FLOPs are of teacher, student and backward (`lit_prune.cost.step`), on a GPU also as a
    share of its peak. A window extends from one logged step to the next, without validation. Lightning's own
    `ThroughputMonitor` synchronises after each step; this callback only does on logged steps. `waiting_share` is the
    share of the window in which this rank waited for its data, where the loader counts it.
    """

    def __init__(self) -> None:
        self.before = self.now = torch.zeros(len(WORK), dtype=torch.float64)  # of all ranks; `before`: the resumed run
        self.seen, self.step, self.since, self.paused, self.waited = self.now, 0, 0.0, 0.0, 0.0
        self.peak: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.peak = get_available_flops(trainer.strategy.root_device, pl_module.vlm.model.dtype)
        self.step, self.since, self.waited = trainer.global_step, time.perf_counter(), self._waited(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the window that ends at this step."""
        steps, every = trainer.global_step - self.step, trainer.log_every_n_steps
        if not steps or not every or trainer.global_step % every:
            return
        self.now = self._gather(trainer, pl_module)  # synchronises, so that the time is that of finished work
        clock = time.perf_counter()
        seconds = clock - self.since
        done = dict(zip(WORK, self.now.tolist(), strict=True))
        speed = {name: value / seconds for name, value in zip(WORK, (self.now - self.seen).tolist(), strict=True)}
        values = {SPEEDS[name]: value for name, value in speed.items()}
        values |= {"throughput/step_s": seconds / steps, "total/samples": done["samples"], "total/flops": done["flops"]}
        if self.peak is not None:
            values["throughput/share_of_peak"] = speed["flops"] / (self.peak * trainer.world_size)
        waited = self._waited(trainer)
        values["throughput/waiting_share"], self.waited = (waited - self.waited) / seconds, waited
        known = {name: value for name, value in values.items() if not math.isnan(value)}
        pl_module.log_dict(fetched(known), batch_size=1)
        self.step, self.since, self.seen = trainer.global_step, clock, self.now

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self.paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restart the clock."""
        self.since += time.perf_counter() - self.paused

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the totals up to this step; a collective, since Lightning calls it on all ranks."""
        self.now = self._gather(trainer, pl_module)
        checkpoint["callbacks"][self.state_key] = {"totals": self.now.tolist()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the totals of the resumed run."""
        self.before = self.now = self.seen = torch.tensor(state_dict["totals"], dtype=torch.float64)

    @staticmethod
    def _waited(trainer: Trainer) -> float:
        return getattr(trainer.train_dataloader, "waited", math.nan)

    def _gather(self, trainer: Trainer, pl_module: LightningModule) -> torch.Tensor:
        """Sum the totals over ranks and add those of the resumed run."""
        own = pl_module.work.totals.to(trainer.strategy.root_device, copy=True)
        return self.before + trainer.strategy.reduce(own, reduce_op="sum").cpu()

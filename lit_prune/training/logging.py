"""Figures of a training step, and the names of everything that a run logs."""

from collections.abc import Hashable
from typing import Any

import torch
from lightning import Trainer
from torch import Tensor

from lit_prune.cost.flops import decoder_total, price
from lit_prune.cost.step import joined, step_flops, structure
from lit_prune.cost.trace import Trace
from lit_prune.host import Record
from lit_prune.ops.moments import mean_over_ranks, moments, w2_squared
from lit_prune.plugin import Plugin
from lit_prune.training.losses import target_moments, tokens_asked
from lit_prune.training.step import Step, Teaching
from lit_prune.vlm import VLM

MEASURED = ("accuracy/*", "agreement", "kappa", "visual_tokens", "flops", "kv_bytes")
MEASURED += tuple(f"{name}/layer_*" for name in ("kept", "w2", "w2_relative", "w2_without_repair"))
NAMES = (  # patterns of all names that a run may log, which callbacks may monitor
    *(f"val/{name}" for name in MEASURED),
    *("val_accuracy", "loss", "kept"),  # on the progress bar
    *("loss/*", "tau", "budget/target", "budget/actual", "kept/layer_*", "flops/sample", "shift/layer_*"),
    *("throughput/*", "total/samples", "total/flops", "data/*", "lr-*"),
)


@torch.no_grad()
def step_figures(teaching: Teaching, step: Step, done: float, samples: int) -> dict[str, Tensor | float]:
    """Compute the figures of one training step, means over the samples or answer tokens of all ranks.

    Losses, temperature, visual tokens requested and kept, FLOPs of the student's prefill, shift at the recorded layers.
    A collective call: all ranks must make it.

    Args:
        teaching: the training settings. step: the step's result. done: share of all steps completed before it.
        samples: number of samples in this rank's batch, without a dummy one after them.
    """
    vlm, student, teacher = teaching.vlm, step.student, step.teacher
    values = {"loss/total": step.total, **{f"loss/{name}": value for name, value in step.losses.items()}}
    values["tau"] = teaching.anneal.tau(done)
    total = student.trace.total_visual
    kept = {stage.layer: stage.kept.sum(1) for stage in student.stages}
    each = {"budget/target": tokens_asked(teaching.keep, total, teaching.anneal, done, vlm.plugin.dims.depth)}
    each["budget/actual"] = student.trace.average_visual()
    each |= {f"kept/layer_{layer}": kept.get(layer, torch.zeros_like(total)) for layer in vlm.host.stages}
    if (size := vlm.size) is not None:
        each["flops/sample"] = decoder_total(price(student.trace, size, vlm.plugin.pruner, vlm.plugin.repair))
    means = torch.stack([value[:samples].double().sum() for value in each.values()]) / max(1, samples)
    values |= zip(each, mean_over_ranks(means, samples).unbind(), strict=True)
    for layer, states in sorted(student.hidden.items()):
        values[f"shift/layer_{layer}"] = w2_squared(moments(states), target_moments(teacher, layer))
    return values


WORK = ("samples", "text_tokens", "visual_tokens", "kept_tokens", "flops")


class Work:
    """Totals over the training steps of this process: samples, tokens and FLOPs.

    Traces are collected and priced together when `totals` is read, so that no step waits for the device.

    Args:
        vlm: the model that runs the steps. plugin: the plug-in attached to it.
    """

    MOST = 100  # unpriced steps held at most

    def __init__(self, vlm: VLM, plugin: Plugin) -> None:
        self.vlm, self.plugin = vlm, plugin
        self._priced = torch.zeros(len(WORK), dtype=torch.float64)
        self._steps: list[tuple[Trace, Trace, int, int]] = []

    def add(self, student: Record, teacher: Record, samples: int) -> None:
        """Add a step. `samples` leaves out a dummy sample, whose tokens and FLOPs still count."""
        self._steps.append((student.trace, teacher.trace, len(student.targets), samples))
        if len(self._steps) == self.MOST:
            self._price()

    @property
    def totals(self) -> Tensor:
        """Totals in the order of `WORK`, float64, on the device.

        Text tokens include answers. Visual tokens are counted before pruning; kept tokens are averaged over the inputs
        of the decoder layers. FLOPs are those of teacher, student and backward; NaN if the model's sizes are unknown.
        """
        self._price()
        return self._priced

    @torch.no_grad()
    def _price(self) -> None:
        # Traces of equal structure (stages, layers) can be concatenated and priced in one call.
        groups: dict[Hashable, list[tuple[Trace, Trace, int, int]]] = {}
        for step in self._steps:
            groups.setdefault(structure(list(step[:2])), []).append(step)
        for steps in groups.values():
            students, teachers, answers, counts = zip(*steps, strict=True)
            student, teacher = joined(students), joined(teachers)
            visual, parts = student.total_visual.sum(), (self.plugin.pruner, self.plugin.repair)
            size = self.vlm.size
            unknown = torch.full((), float("nan"), dtype=torch.float64, device=visual.device)
            flops = unknown if size is None else step_flops(teacher, student, size, *parts, sum(answers))
            text, kept = (student.queries[0] - student.visual[0]).sum(), student.average_visual().sum()
            priced = torch.stack([value.double() for value in (text, visual, kept, flops)])
            samples = torch.tensor([sum(counts)], dtype=torch.float64, device=priced.device)
            self._priced = self._priced.to(priced.device) + torch.cat([samples, priced])
        self._steps = []


def log_meters(module: Any, stage: str) -> None:
    """Log and reset a `PruneModule`'s meters after an evaluation, and leave its official scores on it."""
    values = {f"{stage}/{name}": value for name, value in module.meters.compute().items()}
    if not values:
        return
    # The meters have already reduced over ranks; sync_dist only avoids Lightning's warning.
    module.log_dict(values, sync_dist=True)
    if (accuracy := values.get(f"{stage}/accuracy/all")) is not None:
        module.log(f"{stage}_accuracy", accuracy, prog_bar=True, logger=False, sync_dist=True)
    module.scores = module.meters.scores()
    module.meters.reset()


def fetched(values: dict[str, Tensor | float]) -> dict[str, Tensor]:
    """Move scalars to the CPU as float64, those on a device in a single transfer."""
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    scalars = {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items() if name not in tensors}
    if tensors:
        stacked = torch.stack([value.detach().double() for value in tensors.values()]).cpu()
        scalars |= dict(zip(tensors, stacked.unbind(), strict=True))
    return {name: scalars[name] for name in values}


def logged_step(trainer: Trainer) -> int:
    """Step number under which Lightning logs the current figures; it counts from 0."""
    return max(0, trainer.global_step - 1)

"""Several methods on one teacher and one data set, batch by batch, in one process."""

from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from torchmetrics import MeanMetric

from lit_prune import evaluation
from lit_prune.evaluation import Measured
from lit_prune.host import Session
from lit_prune.metrics import Shift, SkillAccuracy
from lit_prune.plugin import Plugin
from lit_prune.vlm import VLM

COSTS = ("visual", "flops", "kv_bytes")


@dataclass
class Contestant:
    """One row: a name and the plug-ins whose results are averaged into it (draws of a random method, seeds of a run).

    Without plug-ins it stands for the full model. `repair` off leaves the repair adapter of a trained plug-in out.
    """

    name: str
    plugins: list[Plugin] = field(default_factory=list)
    repair: bool = True


class Meters:
    """Running results of one contestant."""

    def __init__(self, depth: int, width: int) -> None:
        self.accuracy, self.agreement, self.shift = SkillAccuracy(), SkillAccuracy(), Shift(depth, width)
        self.costs = {name: MeanMetric() for name in COSTS}
        self.kept: dict[int, MeanMetric] = {}

    def update(self, measured: Measured, teacher: Measured, batch: dict[str, Any]) -> None:
        """Add one batch."""
        self.accuracy.update(evaluation.matches(measured.texts, batch["answers"]), batch["skills"])
        self.agreement.update(evaluation.matches(measured.texts, teacher.texts), batch["skills"])
        self.shift.update(
            {layer: states.cpu() for layer, states in measured.hidden.items()},
            {layer: states.cpu() for layer, states in teacher.hidden.items()},
        )
        for name in COSTS:
            self.costs[name].update(getattr(measured, name).cpu().float())
        for layer, counts in measured.kept.items():
            self.kept.setdefault(layer, MeanMetric()).update(counts.cpu().float())

    def row(self, name: str, full: dict[str, float]) -> dict[str, Any]:
        """The contestant's line of the table; `full` has the full model's accuracy and FLOPs."""
        accuracy = self.accuracy.compute()
        costs = {key: meter.compute().item() for key, meter in self.costs.items()}
        shift = self.shift.compute().tolist()
        return {
            "name": name,
            "accuracy": accuracy["all"],
            "retained": accuracy["all"] / full["accuracy"] if full["accuracy"] else 0.0,
            "per_skill": {skill: value for skill, value in accuracy.items() if skill != "all"},
            "agreement": self.agreement.compute()["all"],
            "avg_visual_tokens": costs["visual"],
            "kept": {layer: meter.compute().item() for layer, meter in self.kept.items()},
            "flops": costs["flops"],
            "flops_reduction": 1.0 - costs["flops"] / full["flops"],
            "kv_bytes": costs["kv_bytes"],
            "w2": sum(shift) / len(shift),
            "w2_per_layer": shift,
        }


class Comparison:
    """Measures every contestant on every batch beside the full model, interleaved, so that they meet the same noise.

    Args:
        vlm: the teacher; plug-ins are attached to it in turn, and it is left plain.
        contestants: the rows, in order; at least one has a plug-in.
        keep: budget of all plug-ins, visual tokens averaged over the decoder layers' inputs.
        max_new_tokens: longest answer.
    """

    def __init__(self, vlm: VLM, contestants: list[Contestant], keep: int, max_new_tokens: int) -> None:
        self.vlm, self.contestants, self.keep, self.max_new_tokens = vlm, contestants, keep, max_new_tokens
        self.any = next(plugin for contestant in contestants for plugin in contestant.plugins)
        self.dims = vlm.attach(self.any, keep=keep).plugin.dims
        self.full = Meters(self.dims.depth, self.dims.width)
        self.meters = [[Meters(self.dims.depth, self.dims.width) for _ in c.plugins] for c in contestants]

    def update(self, batch: dict[str, Any]) -> None:
        """Measure one batch, already on the model's device."""
        if not batch["ids"]:
            return
        size = self.vlm.model.config.vision_config.image_size
        hints = evaluation.regions(batch, self.dims.visual, size)
        teacher = self._measure(self.any, batch, evaluation.TEACHER)
        self.full.update(teacher, teacher, batch)
        for contestant, meters in zip(self.contestants, self.meters, strict=True):
            session = Session(repair=contestant.repair, hints=hints)
            for plugin, meter in zip(contestant.plugins, meters, strict=True):
                meter.update(self._measure(plugin, batch, session), teacher, batch)

    def _measure(self, plugin: Plugin, batch: dict[str, Any], session: Session) -> Measured:
        self.vlm.attach(plugin, keep=self.keep)
        try:
            return evaluation.measure(self.vlm, batch, session, self.max_new_tokens)
        finally:
            self.vlm.detach()

    def rows(self) -> list[dict[str, Any]]:
        """The table so far, one row per contestant, averaged over its plug-ins; one without is the full model."""
        accuracy, flops = self.full.accuracy.compute().get("all", 0.0), self.full.costs["flops"].compute().item()
        full = {"accuracy": accuracy, "flops": flops}
        pairs = zip(self.contestants, self.meters, strict=True)
        return [_mean([meter.row(c.name, full) for meter in meters or [self.full]]) for c, meters in pairs]


def _mean(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One row from those of several runs: numbers averaged, the spread of the accuracy beside it."""
    accuracies = [row["accuracy"] for row in rows]
    return {**_average(rows), "runs": len(rows), "accuracy_std": stdev(accuracies) if len(rows) > 1 else 0.0}


def _average(values: list[Any]) -> Any:
    """Mean of equally built numbers, lists or dictionaries; of anything else the first."""
    first = values[0]
    if isinstance(first, dict):
        return {key: _average([value[key] for value in values]) for key in first}
    if isinstance(first, list):
        return [_average(list(items)) for items in zip(*values, strict=True)]
    return fmean(values) if isinstance(first, int | float) else first

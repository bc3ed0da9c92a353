"""Meters of an evaluation on any data, and the scorer of its answers."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric

from lit_prune.evaluation import measuring
from lit_prune.evaluation.measuring import Measured
from lit_prune.evaluation.metrics import (
    OVERALL,
    Consistency,
    LayerTokens,
    Means,
    Power,
    Shift,
    SkillAccuracy,
    figure_name,
)
from lit_prune.evaluation.records import SampleRecord
from lit_prune.evaluation.scorers.several import BenchmarkScores, Score


class ExactMatch(SkillAccuracy):
    """The scorer of data without a rule of their own: share of answers that equal the data's, by skill and overall."""

    def update(self, texts: list[str], batch: dict[str, Any]) -> None:
        """Judge a batch of answers; of the batch, `answers` and `skills` are read."""
        super().update(measuring.matches(texts, batch["answers"]), batch["skills"])

    def compute(self) -> dict[str, float]:
        """`accuracy/all` and `accuracy/SKILL`, in [0, 1]; nothing without an answer."""
        return {f"accuracy/{figure_name(skill)}": value for skill, value in super().compute().items()}


class Meters(nn.Module):
    """Metrics of an evaluation, over all batches and ranks: of `validate`, `test` and each cell of a comparison.

    Args:
        depth: decoder layers. width: channels of their states. repaired: whether to measure the shift without repair.
        priced: whether FLOPs and bytes of the cache are known.
    """

    def __init__(self, depth: int, width: int, repaired: bool = False, priced: bool = True) -> None:
        super().__init__()
        self.scorer: Metric = ExactMatch()  # the data module's own in its place, see `judged_by`
        self.agreement = SkillAccuracy()
        self.shift, self.power, self.kappa = Shift(depth, width), Power(depth), Consistency()
        self.shift_unrepaired = Shift(depth, width) if repaired else None
        self.kept = LayerTokens(depth)
        self.costs = Means(("visual_tokens", "flops", "kv_bytes") if priced else ("visual_tokens",))

    def judged_by(self, data: Any) -> None:
        """Take the scorer that a data module names, a metric whose `update` takes texts and batch; else exact match."""
        make = getattr(data, "scorer", None)
        self.scorer = ExactMatch() if make is None else make()

    def update(
        self,
        records: Sequence[SampleRecord],
        student: Measured,
        teacher: Measured,
        batch: dict[str, Any],
        unrepaired: dict[int, Tensor] | None = None,
    ) -> None:
        """Take a batch and its records into account; `unrepaired` are the student's answer states without repair."""
        self.scorer.update(student.texts, batch)
        self.agreement.update([each.agrees for each in records], [each.skill for each in records])
        self.shift.update(student.hidden, teacher.hidden)
        self.power.update(teacher.hidden)
        measuring.add_consistency(self.kappa, student, teacher)
        self.kept.update(student.per_layer)
        if self.shift_unrepaired is not None:
            self.shift_unrepaired.update(unrepaired, teacher.hidden)
        self.costs.update({"visual_tokens": student.visual, "flops": student.flops, "kv_bytes": student.kv_bytes})

    def compute(self) -> dict[str, float]:
        """The figures by name, the same on every rank; none if no batch had a sample."""
        agreement = self.agreement.compute()
        if not agreement:
            return {}
        values = {**self.scorer.compute(), "agreement": agreement[OVERALL]}
        values["kappa"] = self.kappa.compute().item()
        values |= self.costs.compute()
        values |= {f"kept/layer_{i}": v for i, v in enumerate(self.kept.compute().tolist())}
        values |= {f"w2/layer_{i}": v for i, v in enumerate(self.shift.compute().tolist())}
        values |= {f"w2_relative/layer_{i}": v for i, v in enumerate(self.relative_shift())}
        if self.shift_unrepaired is not None:
            bare = self.shift_unrepaired.compute().tolist()
            values |= {f"w2_without_repair/layer_{i}": v for i, v in enumerate(bare)}
        return values

    def relative_shift(self) -> list[float]:
        """W2^2 per decoder layer as a share of the teacher's mean square in that layer."""
        return (self.shift.compute() / self.power.compute().clamp(min=1e-12)).tolist()

    def scores(self) -> list[Score]:
        """Official scores, where the scorer has some; on all ranks."""
        return self.scorer.scores() if isinstance(self.scorer, BenchmarkScores) else []

    def reset(self) -> None:
        """Forget every batch."""
        for meter in (self.scorer, self.agreement, self.shift, self.power, self.kappa, self.kept, self.costs):
            meter.reset()
        if self.shift_unrepaired is not None:
            self.shift_unrepaired.reset()

"""Several methods on one teacher and one data set, batch by batch, in one process."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torchmetrics import Metric

from lit_prune.evaluation import measuring
from lit_prune.evaluation.cells import Cell
from lit_prune.evaluation.measuring import Measured
from lit_prune.evaluation.metrics import OVERALL, Consistency, Shift, SkillAccuracy
from lit_prune.evaluation.scorers.several import BenchmarkScores
from lit_prune.host import Session
from lit_prune.host.parts import find
from lit_prune.vlm import VLM

COSTS = ("visual", "flops", "kv_bytes")


class Meters:
    """Running results of one cell; with a `scorer` of benchmarks, official scores too."""

    def __init__(self, depth: int, width: int, scorer: BenchmarkScores | None = None) -> None:
        self.scorer = scorer
        self.accuracy, self.agreement, self.shift = SkillAccuracy(), SkillAccuracy(), Shift(depth, width)
        self.kappa = Consistency()
        self.sums: dict[str, dict[Any, float]] = {}
        self.hits: list[bool] = []
        self.samples: list[dict[str, Any]] = []
        self.seconds = 0.0

    def update(self, measured: Measured, teacher: Measured, batch: dict[str, Any]) -> None:
        """Add one batch."""
        hits = measuring.matches(measured.texts, batch["answers"])
        self.hits += hits
        if self.scorer is not None:
            self.scorer.update(measured.texts, batch)
        self.accuracy.update(hits, batch["skills"])
        agreeing = measuring.matches(measured.texts, teacher.texts)
        self.agreement.update(agreeing, batch["skills"])
        self.samples += _samples(measured, teacher, hits, agreeing, batch)
        self.shift.update(
            {layer: states.cpu() for layer, states in measured.hidden.items()},
            {layer: states.cpu() for layer, states in teacher.hidden.items()},
        )
        measuring.add_consistency(self.kappa, measured, teacher)
        self._add("costs", {name: value for name in COSTS if (value := getattr(measured, name)) is not None})
        self._add("parts", measured.parts)
        self._add("kept", measured.kept)
        self._add("layers", dict(enumerate(measured.per_layer)))

    def _add(self, group: str, values: dict[Any, Tensor]) -> None:
        sums = self.sums.setdefault(group, {})
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value.double().sum().item()

    def _mean(self, group: str) -> dict[Any, float]:
        """Means per question."""
        return {name: total / len(self.hits) for name, total in self.sums[group].items()}

    def result(self) -> dict[str, Any]:
        """What was measured, as JSON has it; FLOPs and bytes are means per sample.

        `accuracy_se` is the standard error over questions, as if they were independent; `hits` has one digit a question
        in the order of the data, for paired tests. `lost` is the share of questions that the full model answers right
        and the method wrong, `gained` the reverse, `flips` their ids. `kl` is the mean over samples of
        `measuring.divergences`, None where it isn't known. `seconds` are this thread's CPU time. Of benchmarks,
        `headlines` are the official scores that papers report, `scores` all of them, by name.
        """
        accuracy, costs, shift = self.accuracy.compute(), self._mean("costs"), self.shift.compute().tolist()
        right, count = accuracy[OVERALL], len(self.hits)
        lost = [each["id"] for each in self.samples if each["full_right"] and not each["right"]]
        gained = [each["id"] for each in self.samples if each["right"] and not each["full_right"]]
        diverging = [each["kl"] for each in self.samples if each["kl"] is not None]
        return {
            "accuracy": right,
            "accuracy_se": math.sqrt(right * (1 - right) / count),
            "questions": count,
            "per_skill": {skill: value for skill, value in accuracy.items() if skill != OVERALL},
            "agreement": self.agreement.compute()[OVERALL],
            "lost": len(lost) / count,
            "gained": len(gained) / count,
            "kl": math.fsum(diverging) / len(diverging) if diverging else None,
            "avg_visual_tokens": costs["visual"],
            "tokens_per_layer": list(self._mean("layers").values()),
            "kept": {str(layer): count for layer, count in self._mean("kept").items()},
            "flops": costs.get("flops"),
            "flops_parts": self._mean("parts"),
            "kv_bytes": costs.get("kv_bytes"),
            "kappa": self.kappa.compute().item(),
            "w2": sum(shift) / len(shift),
            "w2_per_layer": shift,
            "hits": "".join(str(int(hit)) for hit in self.hits),
            "flips": {"lost": lost, "gained": gained},
            "seconds": self.seconds,
            **self._official(),
        }

    def _official(self) -> dict[str, dict[str, float]]:
        if self.scorer is None:
            return {}
        found: dict[str, dict[str, float]] = {"headlines": {}, "scores": {}}
        for score in self.scorer.scores():
            found["headlines"] |= score.headline
            found["scores"] |= score.named
        return found


def _samples(
    measured: Measured, teacher: Measured, hits: Sequence[bool], agreeing: Sequence[bool], batch: dict[str, Any]
) -> list[dict[str, Any]]:
    """One record per sample: what was asked, what the full model and the method answered, and what the method kept."""
    kept = {str(layer): counts.tolist() for layer, counts in measured.kept.items()}
    full_hits, visual = measuring.matches(teacher.texts, batch["answers"]), measured.visual.tolist()
    apart, total = measuring.divergences(measured, teacher), measured.total.tolist()
    return [
        {
            "id": batch["ids"][row],
            "record": batch["records"][row],
            "skill": batch["skills"][row],
            "question": batch["questions"][row],
            "reference": batch["answers"][row],
            "full": teacher.texts[row],
            "answer": measured.texts[row],
            "full_right": full_hits[row],
            "right": hits[row],
            "agrees": agreeing[row],
            "kl": apart[row],
            "visual": visual[row],
            "total": total[row],
            "kept": {layer: counts[row] for layer, counts in kept.items()},
        }
        for row in range(len(hits))
    ]


def _official(scorer: Callable[[], Metric] | None) -> BenchmarkScores | None:
    made = None if scorer is None else scorer()
    return made if isinstance(made, BenchmarkScores) else None


class Comparison:
    """Measures cells on every batch beside the full model, interleaved, so that they meet the same noise.

    The full model runs once a batch for all cells, and its encoded images serve every cell that leaves the vision tower
    alone. A cell that raises an error is given up, and the others go on.

    Args:
        vlm: the teacher; plug-ins are attached to it in turn, and it is left plain.
        full: stands for the full model.
        cells: what to measure beside it, each with a plug-in that was built for this model.
        max_new_tokens: longest answer.
        scorer: makes the metric that judges answers to the data, see `InstructData.scorer`; official scores are kept.
    """

    def __init__(
        self,
        vlm: VLM,
        full: Cell,
        cells: Sequence[Cell],
        max_new_tokens: int,
        scorer: Callable[[], Metric] | None = None,
    ) -> None:
        self.vlm, self.full, self.max_new_tokens = vlm, full, max_new_tokens
        self.dims = find(vlm.model).dims
        self.meters = [(cell, Meters(self.dims.depth, self.dims.width, _official(scorer))) for cell in (full, *cells)]

    def update(self, batch: dict[str, Any], tick: Callable[[], None] = lambda: None) -> None:
        """Measure one batch, already on the model's device; `tick` is called after the full model and each cell."""
        if not batch["ids"]:
            return
        hints = batch.get("hints", {})
        plain = self.vlm.detach().encode_images(batch["inputs"])
        teacher: Measured | None = None
        for cell, meters in self.meters:
            if not cell.failed:
                start = time.thread_time()
                try:
                    measured = self._measure(cell, batch, plain, Session(repair=cell.repair, hints=hints))
                    teacher = teacher or measured
                    meters.update(measured, teacher, batch)
                except Exception as error:
                    if cell is self.full:
                        raise
                    cell.fail(error)
                finally:
                    self.vlm.detach()
                meters.seconds += time.thread_time() - start
            tick()

    def _measure(self, cell: Cell, batch: dict[str, Any], plain: dict[str, Any], session: Session) -> Measured:
        self.vlm.attach(cell.plugin, keep=cell.keep)
        return measuring.measure(self.vlm, batch, session, self.max_new_tokens, keep_logits=True, plain=plain)

    def results(self) -> list[tuple[Cell, dict[str, Any]]]:
        """The full model's result and those of all cells that didn't fail."""
        return [(cell, meters.result()) for cell, meters in self.meters if not cell.failed and meters.hits]

    def samples(self) -> dict[str, list[dict[str, Any]]]:
        """The records of the samples of every cell that has a result, by the cell's key."""
        return {cell.key: meters.samples for cell, meters in self.meters if not cell.failed and meters.hits}

"""Several methods on one teacher and one data set, batch by batch."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from torchmetrics import Metric

from lit_prune.evaluation import measuring
from lit_prune.evaluation.cells import Cell
from lit_prune.evaluation.measuring import Measured
from lit_prune.evaluation.meters import Meters
from lit_prune.evaluation.metrics import OVERALL, SkillAccuracy
from lit_prune.evaluation.ranks import Ranks
from lit_prune.evaluation.records import SampleRecord, sample_records
from lit_prune.host import Session
from lit_prune.host.parts import find
from lit_prune.vlm import VLM

TIMES = ("seconds", "latency")  # of a result: differ from run to run


@dataclass
class Tally:
    """Running results of one cell: meters, the records of all samples, sums of FLOPs part by part, times.

    `waits` are wall-clock seconds per question, one a batch; `seconds` this thread's CPU time.
    """

    cell: Cell
    meters: Meters
    records: list[SampleRecord] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)
    waits: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def update(self, measured: Measured, teacher: Measured, batch: dict[str, Any]) -> None:
        """Add one batch."""
        records = sample_records(measured, teacher, batch)
        self.meters.update(records, measured, teacher, batch)
        self.records += records
        self.waits.append(measured.seconds / len(records))
        for name, flops in measured.parts.items():
            self.parts[name] = self.parts.get(name, 0.0) + flops.double().sum().item()

    def gather(self, ranks: Ranks) -> None:
        """Take in what the other processes have measured, in the order of the data; all must call it.

        What the meters hold is gathered when they compute. A cell that failed in one process has failed in all.
        """
        cell = self.cell
        mine = (self.records, self.parts, self.waits, self.seconds, (cell.failed, cell.reason))
        found = ranks.gather(mine)
        records, parts, waits, seconds, ends = zip(*found, strict=True)
        self.records = sorted((each for part in records for each in part), key=lambda each: each.record)
        names = dict.fromkeys(name for part in parts for name in part)
        self.parts = {name: sum(part.get(name, 0.0) for part in parts) for name in names}
        self.waits, self.seconds = [wait for part in waits for wait in part], sum(seconds)
        cell.failed, cell.reason = next((end for end in ends if end[0]), ends[0])

    def result(self) -> dict[str, Any]:
        """The cell's result as JSON has it; FLOPs and bytes are means per sample.

        `accuracy_se` is the standard error over questions, as if they were independent; `hits` has one digit a question
        in the order of the data, for paired tests. `lost` is the share of questions that the full model answers right
        and the method wrong, `gained` the reverse, `flips` their ids. `kl` is the mean over samples of
        `measuring.divergences`, None where it isn't known. `seconds` are this thread's CPU time, `latency` the seconds
        of answering per question, the median over batches, and the size of most batches. Of benchmarks, `headlines` are
        the official scores that papers report, `scores` all of them, by name.
        """
        records, count = self.records, len(self.records)
        figures, costs, shift = self.meters.compute(), self.meters.costs.compute(), self.meters.shift.compute().tolist()
        right, skills = _accuracy(records)
        relative = self.meters.relative_shift()
        lost = [each.id for each in records if each.full_right and not each.right]
        gained = [each.id for each in records if each.right and not each.full_right]
        diverging = [each.kl for each in records if each.kl is not None]
        return {
            "accuracy": right,
            "accuracy_se": math.sqrt(right * (1 - right) / count),
            "questions": count,
            "per_skill": skills,
            "agreement": figures["agreement"],
            "lost": len(lost) / count,
            "gained": len(gained) / count,
            "kl": math.fsum(diverging) / len(diverging) if diverging else None,
            "avg_visual_tokens": costs["visual_tokens"],
            "tokens_per_layer": self.meters.kept.compute().tolist(),
            "kept": {str(layer): sum(each.kept[layer] for each in records) / count for layer in records[0].kept},
            "flops": costs.get("flops"),
            "flops_parts": {name: total / count for name, total in self.parts.items()},
            "kv_bytes": costs.get("kv_bytes"),
            "kappa": figures["kappa"],
            "w2": sum(shift) / len(shift),
            "w2_per_layer": shift,
            "w2_relative": sum(relative) / len(relative),
            "w2_relative_per_layer": relative,
            "hits": "".join(str(int(each.right)) for each in records),
            "flips": {"lost": lost, "gained": gained},
            "seconds": self.seconds,
            "latency": median(self.waits),
            **self._official(),
        }

    def _official(self) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {}
        for score in self.meters.scores():
            found.setdefault("headlines", {}).update(score.headline)
            found.setdefault("scores", {}).update(score.named)
        return found


def _accuracy(records: Sequence[SampleRecord]) -> tuple[float, dict[str, float]]:
    """Exact match over all records, and by skill; also where a benchmark has another rule."""
    accuracy = SkillAccuracy(sync_on_compute=False)  # the records are those of all processes
    accuracy.update([each.right for each in records], [each.skill for each in records])
    shares = accuracy.compute()
    return shares.pop(OVERALL), shares


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
        self.vlm, self.full, self.max_new_tokens, self.scorer = vlm, full, max_new_tokens, scorer
        self.dims = find(vlm.model).dims
        self.tallies = [Tally(cell, self._meters()) for cell in (full, *cells)]

    def _meters(self) -> Meters:
        meters = Meters(self.dims.depth, self.dims.width, priced=self.vlm.size is not None)
        if self.scorer is not None:
            meters.scorer = self.scorer()
        return meters.to(self.vlm.model.device)

    def update(self, batch: dict[str, Any], tick: Callable[[], None] = lambda: None) -> None:
        """Measure one batch, already on the model's device; `tick` is called after the full model and each cell."""
        if not batch["ids"]:
            return
        hints = batch.get("hints", {})
        plain = self.vlm.detach().encode_images(batch["inputs"])
        teacher: Measured | None = None
        for tally in self.tallies:
            cell = tally.cell
            if not cell.failed:
                start = time.thread_time()
                try:
                    measured = self._measure(cell, batch, plain, Session(repair=cell.repair, hints=hints))
                    teacher = teacher or measured
                    tally.update(measured, teacher, batch)
                except Exception as error:
                    if cell is self.full:
                        raise
                    cell.fail(error)
                finally:
                    self.vlm.detach()
                tally.seconds += time.thread_time() - start
            tick()

    def _measure(self, cell: Cell, batch: dict[str, Any], plain: dict[str, Any], session: Session) -> Measured:
        self.vlm.attach(cell.plugin, keep=cell.keep)
        return measuring.measure(self.vlm, batch, session, self.max_new_tokens, keep_logits=True, plain=plain)

    def gather(self, ranks: Ranks) -> None:
        """Take in the batches of the other processes, which all must call this and then `results`."""
        if ranks.world > 1:
            for tally in self.tallies:
                tally.gather(ranks)

    def results(self) -> list[tuple[Cell, dict[str, Any]]]:
        """The full model's result and those of all cells that didn't fail."""
        return [(tally.cell, tally.result()) for tally in self._measured()]

    def samples(self) -> dict[str, list[SampleRecord]]:
        """The records of the samples of every cell that has a result, by the cell's key."""
        return {tally.cell.key: tally.records for tally in self._measured()}

    def _measured(self) -> list[Tally]:
        return [tally for tally in self.tallies if not tally.cell.failed and tally.records]

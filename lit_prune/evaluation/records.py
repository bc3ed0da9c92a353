"""One record per measured sample: what tables, reports, W&B and CSV are made of."""

from dataclasses import asdict, dataclass
from typing import Any

from lit_prune.evaluation import measuring
from lit_prune.evaluation.measuring import Measured


@dataclass(frozen=True)
class SampleRecord:
    """A question, what the full model and a method answered, and what the method kept.

    Args:
        id, record: of the sample: its name in the data, and its index there.
        skill: of the question; None where the data name none.
        question, reference: what was asked, and the data's answer.
        full, answer: the full model's answer and the method's.
        full_right, right: whether each equals the reference, see `measuring.matches`.
        agrees: whether they equal each other.
        kl: see `measuring.divergences`; None where it isn't known.
        confidence: see `measuring.confidences`, of the method; None where it isn't known.
        visual: visual tokens averaged over the decoder layers' inputs.
        total: visual tokens of the prompt.
        kept: {pruning layer: visual tokens left after that stage}.
    """

    id: str | int
    record: int
    skill: str | None
    question: str
    reference: str
    full: str
    answer: str
    full_right: bool
    right: bool
    agrees: bool
    kl: float | None
    confidence: float | None
    visual: float
    total: int
    kept: dict[int, int]

    def as_json(self) -> dict[str, Any]:
        """The record as a line of `samples/` has it: keys of `kept` are text."""
        return {**asdict(self), "kept": {str(layer): count for layer, count in self.kept.items()}}


def sample_records(measured: Measured, teacher: Measured, batch: dict[str, Any]) -> list[SampleRecord]:
    """The records of a batch, in its order; `teacher` is the full model on the same batch."""
    texts, full = measured.texts, teacher.texts
    kept = {layer: counts.tolist() for layer, counts in measured.kept.items()}
    columns = zip(
        *(batch[name] for name in ("ids", "records", "skills", "questions", "answers")),
        full,
        texts,
        measuring.matches(full, batch["answers"]),
        measuring.matches(texts, batch["answers"]),
        measuring.matches(texts, full),
        measuring.divergences(measured, teacher),
        measuring.confidences(measured),
        measured.visual.tolist(),
        measured.total.tolist(),
        strict=True,
    )
    return [
        SampleRecord(*values, kept={layer: counts[row] for layer, counts in kept.items()})
        for row, values in enumerate(columns)
    ]

"""A benchmark's rule as a torchmetrics metric, the same on one process as on several."""

import json
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torchmetrics import Metric

from lit_prune.evaluation.scorers.rule import Figures, Judged, Question, Rule


class Scorer(Metric):
    """Collects judged answers and computes a rule's figures over those of all ranks.

    Every answer is kept as one JSON line in a byte tensor: bytes survive gathering between ranks, casts by DeepSpeed
    and checkpoints, and strings of any length fit. A question that several ranks answered, since distributed samplers
    repeat some to fill the last batch, counts once. Figures do not depend on the order of updates.

    Args:
        rule: e.g. `lit_prune.evaluation.scorers.pope.Pope()`.
    """

    full_state_update = False
    records: list[torch.Tensor] | torch.Tensor

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule
        self.questions = 0  # that the last `compute` judged, of all ranks
        self.add_state("records", default=[], dist_reduce_fx="cat")

    @property
    def headline(self) -> str:
        """Name of the figure that papers report."""
        return self.rule.headline

    def update(self, answers: Sequence[str], questions: Sequence[Question]) -> None:
        """Judge a batch of answers.

        Raises:
            ValueError: there are not as many answers as questions.
            LitPruneError: a reference is not what the official script takes.
        """
        lines = [
            json.dumps([each.index, each.group, str(each.id), self.rule.verdict(each, answer)])
            for answer, each in zip(answers, questions, strict=True)
        ]
        if lines:
            encoded = bytearray("".join(f"{line}\n" for line in lines).encode())
            self.records.append(torch.frombuffer(encoded, dtype=torch.uint8).to(self.device))

    def compute(self) -> Figures:
        """Figures by name, as `Rule.figures` has them; None where one is undefined. None at all without an answer."""
        judged = self.judged()
        self.questions = len(judged)
        return self.rule.figures(judged) if judged else {}

    def judged(self) -> list[Judged]:
        """Judgements of all answers in the order of the official files, each question once."""
        parts = self.records if isinstance(self.records, list) else [self.records]
        lines = {line for part in parts for line in part.cpu().numpy().tobytes().split(b"\n") if line}
        found: dict[tuple[str, str], tuple[int, Judged]] = {}
        for line in sorted(lines):  # of answers that differ, the same one is taken on every rank
            index, group, name, judged = json.loads(line)
            found.setdefault((group, name), (index, judged))
        if differing := len(lines) - len(found):
            warnings.warn(f"{differing} questions were answered twice with different results", stacklevel=2)
        return [judged for _, judged in sorted(found.values(), key=lambda pair: pair[0])]

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        """Give every rank a tensor to gather, also one that has answered nothing."""
        if isinstance(self.records, list) and not self.records:
            self.records.append(torch.zeros(0, dtype=torch.uint8, device=self.device))
        super()._sync_dist(*args, **kwargs)

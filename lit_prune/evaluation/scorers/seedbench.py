"""SEED-Bench: multiple choice by letter, as LLaVA's convert_seed_for_submission.py computes it."""

from collections.abc import Sequence
from typing import Any

from lit_prune.evaluation.scorers.rule import Figures, Judged, Question, Rule, by


class SeedBench(Rule):
    """Accuracy in percent over images, over videos, over both (`all`) and by question type.

    References: `answer`, `data_type` and `type`, the official `question_type_id`. An answer is right if it equals the
    letter, to the character. A missing answer is wrong, as in the official script.
    """

    title, headline, missing = "SEED-Bench", "image", "wrong"

    def judge(self, question: Question, answer: str | None) -> Judged:
        reference = question.reference
        return {"right": answer == reference["answer"], "data": reference["data_type"], "type": reference["type"]}

    def figures(self, judged: Sequence[Judged]) -> Figures:
        parts = {kind: _accuracy(part) for kind, part in sorted(by(judged, "data").items())}
        types = {f"type {kind}": _accuracy(part) for kind, part in sorted(by(judged, "type").items())}
        return {**parts, "all": _accuracy(judged), **types} if judged else {}

    def frozen(self, case: dict[str, Any]) -> Any:
        answers = case["predictions"]
        judged = [self.judge(question(each), answers.get(str(each["question_id"]))) for each in case["questions"]]
        return {name.removeprefix("type "): value for name, value in self.figures(judged).items()}


def question(record: dict[str, Any], **rest: Any) -> Question:
    """Read an entry of SEED-Bench.json."""
    reference = {"answer": record["answer"], "data_type": record["data_type"], "type": record["question_type_id"]}
    return Question(record["question_id"], str(record["data_id"]), record["question"], reference, **rest)


def _accuracy(judged: Sequence[Judged]) -> float:
    return 100 * sum(each["right"] for each in judged) / len(judged)


RULE = SeedBench

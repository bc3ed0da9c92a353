"""VQAv2: consensus with ten annotators, as GT-Vision-Lab/VQA's vqaEval.py computes it."""

from collections.abc import Sequence
from math import fsum
from typing import Any

from lit_prune.errors import LitPruneError
from lit_prune.evaluation.scorers.rule import Figures, Judged, Question, Rule, by, most_common
from lit_prune.evaluation.scorers.words import evalai, leave_one_out, normalise, one_line


class VQA(Rule):
    """VQA accuracy in percent, rounded to two decimals as in the official script.

    References: `answers`, the annotators' strings, and `type`, the official `answer_type`. Nothing is normalised, not
    even the case, where all annotators agree: the official script skips it then. Raw answers pass through EvalAI's
    processor first, as LLaVA's do before they are submitted.
    """

    title, headline = "VQAv2", "accuracy"
    processed = True

    def prepare(self, text: str) -> str:
        return evalai(text)

    def right(self, question: Question) -> str:
        return most_common(question.reference["answers"])

    def judge(self, question: Question, answer: str | None) -> Judged:
        references = [one_line(text) for text in question.reference["answers"]]
        if not references:
            raise LitPruneError(f"question {question.id} has no answers to compare with")
        accuracy = 0.0
        if answer is not None:
            accuracy = _agreement(references, one_line(answer))
        return {"accuracy": accuracy, "type": question.reference.get("type", "")}

    def figures(self, judged: Sequence[Judged]) -> Figures:
        types = {kind: _mean(part) for kind, part in sorted(by(judged, "type").items()) if kind}
        return {"accuracy": _mean(judged), **types} if judged else {}

    def frozen(self, case: dict[str, Any]) -> Any:
        if case["kind"] == "normalise":
            return normalise(case["text"])
        question = Question(0, "", "", {"answers": case["answers"]})
        return self.figures([self.judge(question, case["prediction"])])["accuracy"]


def _agreement(references: list[str], answer: str) -> float:
    if len(set(references)) > 1:
        references, answer = [normalise(text) for text in references], normalise(answer)
    return leave_one_out(references, answer)


def _mean(judged: Sequence[Judged]) -> float:
    return round(100 * fsum(each["accuracy"] for each in judged) / len(judged), 2)


RULE = VQA

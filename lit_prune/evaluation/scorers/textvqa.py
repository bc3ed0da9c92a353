"""TextVQA: consensus with ten annotators, as mmf's TextVQAAccuracyEvaluator (LLaVA's m4c_evaluator.py) computes it."""

from collections.abc import Sequence
from math import fsum
from typing import Any

from lit_prune.errors import LitPruneError
from lit_prune.evaluation.scorers.rule import Figures, Judged, Question, Rule, most_common
from lit_prune.evaluation.scorers.words import evalai, leave_one_out

ANNOTATORS = 10


class TextVQA(Rule):
    """TextVQA accuracy in percent. References: `answers`. Both sides are always normalised by EvalAI's processor."""

    title, headline = "TextVQA", "accuracy"

    def right(self, question: Question) -> str:
        return most_common(question.reference["answers"])

    def judge(self, question: Question, answer: str | None) -> Judged:
        references = question.reference["answers"]
        if len(references) != ANNOTATORS:
            raise LitPruneError(f"question {question.id} has {len(references)} answers; the official rule takes ten")
        if answer is None:
            return {"accuracy": 0.0}
        return {"accuracy": leave_one_out([evalai(text) for text in references], evalai(answer))}

    def figures(self, judged: Sequence[Judged]) -> Figures:
        return {"accuracy": 100 * fsum(each["accuracy"] for each in judged) / len(judged)} if judged else {}

    def frozen(self, case: dict[str, Any]) -> Any:
        if case["kind"] == "normalise":
            return evalai(case["text"])
        return self.judge(Question(0, "", "", {"answers": case["answers"]}), case["prediction"])["accuracy"]


RULE = TextVQA

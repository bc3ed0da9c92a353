"""ScienceQA: multiple choice, as LLaVA's eval_science_qa.py computes it."""

import re
from collections.abc import Sequence
from typing import Any

from lit_prune.errors import LitPruneError
from lit_prune.evaluation.scorers.rule import Figures, Judged, Question, Rule, share

OPTIONS = "ABCDE"
FAILED = "FAILED"
# The last full stop matches any character: "The answer is B" at the end of an answer is not read.
SENTENCE = re.compile(r"The answer is ([A-Z]).")


class ScienceQA(Rule):
    """Accuracy in percent over all questions, and over those with an image (`img_accuracy`, IMG in papers).

    References: `choices` (their number), `answer` (the index of the right one) and `image`, whether there is one. As
    in the official script, a missing answer is wrong and counts in no question with an image.
    """

    title, headline, missing = "ScienceQA", "img_accuracy", "wrong"
    undefined = "no question with an image was answered, so that its accuracy divides by zero"

    def right(self, question: Question) -> str:
        return OPTIONS[question.reference["answer"]]

    def judge(self, question: Question, answer: str | None) -> Judged:
        reference = question.reference
        chosen = -1 if answer is None else option(parse(answer), reference["choices"])
        return {"right": chosen == reference["answer"], "image": reference["image"] and answer is not None}

    def figures(self, judged: Sequence[Judged]) -> Figures:
        pictured = [each["right"] for each in judged if each["image"]]
        return {"img_accuracy": share(pictured), "accuracy": share([each["right"] for each in judged])}

    def frozen(self, case: dict[str, Any]) -> Any:
        if case["kind"] == "parse":
            parsed = parse(case["text"])
            return {"parsed": parsed, "index": option(parsed, case["choices"])}
        answers = case["predictions"]
        questions = {pid: question(pid, problem) for pid, problem in case["problems"].items()}
        parsed = {pid: parse(answers.get(pid, FAILED)) for pid in questions}
        figures = self.figures([self.judge(each, answers.get(pid)) for pid, each in questions.items()])
        if None in figures.values():
            raise LitPruneError(self.undefined)
        figures["img_accuracy"] = round(figures["img_accuracy"], 2)  # as printed
        index = {pid: option(parsed[pid], each.reference["choices"]) for pid, each in questions.items()}
        return {**figures, "parsed": parsed, "index": index}


def question(pid: str, problem: dict[str, Any], **rest: Any) -> Question:
    """Read an entry of problems.json."""
    image = problem.get("image")
    reference = {"choices": len(problem["choices"]), "answer": problem["answer"], "image": image is not None}
    return Question(pid, image or "", problem.get("question", ""), reference, **rest)


def parse(text: str) -> str:
    """Read the letter of an answer: the letter alone, "B. ..." or the one sentence "The answer is B."; else FAILED."""
    if len(text) == 1 and text in OPTIONS:
        return text
    if text[:1] and text[0] in OPTIONS and text[1:3] == ". ":
        return text[0]
    letters = SENTENCE.findall(text)
    return letters[0] if len(letters) == 1 else FAILED


def option(letter: str, choices: int) -> int:
    """Index of a letter among the options that a question has; -1 for any other."""
    return OPTIONS.index(letter) if len(letter) == 1 and letter in OPTIONS[:choices] else -1


RULE = ScienceQA

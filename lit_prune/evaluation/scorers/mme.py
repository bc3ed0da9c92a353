"""MME: two yes/no questions an image in 14 categories, as the official eval_tool's calculation.py computes it."""

from collections.abc import Sequence
from typing import Any

from lit_prune.errors import LitPruneError
from lit_prune.evaluation.scorers.rule import Figures, Judged, Question, Rule, by, total

PERCEPTION = ["existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"]
COGNITION = ["commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"]
CATEGORIES = PERCEPTION + COGNITION
KINDS = {"perception": PERCEPTION, "cognition": COGNITION}
PREFIX = 4  # characters of an answer that are searched


class MME(Rule):
    """Points: a category gives 100 accuracy + 100 accuracy+, the share of images with both questions right.

    `perception` sums ten categories (at most 2000), `cognition` four (800). References: `label`, "Yes" or "No"; the
    category is the question's group. Questions are paired by their image.
    """

    title, headline, unit = "MME", "perception", "points"

    def right(self, question: Question) -> str:
        return question.reference["label"]

    def judge(self, question: Question, answer: str | None) -> Judged:
        label = question.reference["label"].lower()
        if label not in ("yes", "no"):
            raise LitPruneError(f"question {question.id}: the label is {label!r}, not Yes or No")
        right = answer is not None and parse(answer) == label
        return {"category": question.group, "image": question.image, "right": right}

    def figures(self, judged: Sequence[Judged]) -> Figures:
        found = by(judged, "category")
        points = {name: _points(found[name]) for name in CATEGORIES if name in found}
        sums = {
            kind: total(points[name] for name in names if name in points)
            for kind, names in KINDS.items()
            if points.keys() & set(names)
        }
        return {**sums, **points}

    def frozen(self, case: dict[str, Any]) -> Any:
        if case["kind"] == "parse":
            return parse(case["text"])
        if any(len(rows) % 2 for rows in case["rows"].values()):
            raise LitPruneError("a category has an odd number of rows; the official script stops here")
        rows = [(category, n, *row) for category, rows in case["rows"].items() for n, row in enumerate(rows)]
        judged = [  # two successive rows are one image
            self.judge(Question(text, f"{n // 2}/{image}", text, {"label": label}, group=category), answer)
            for category, n, image, text, label, answer in rows
        ]
        return {name.capitalize() if name in KINDS else name: value for name, value in self.figures(judged).items()}


def parse(text: str) -> str:
    """Read an answer as "yes", "no" or "other": by the first characters, in which "snow" is a no."""
    start = text.lower()[:PREFIX]
    return next((word for word in ("yes", "no") if word in start), "other")


def _points(judged: Sequence[Judged]) -> float:
    images = by(judged, "image").values()
    accuracy = sum(each["right"] for each in judged) / len(judged)
    both = sum(sum(each["right"] for each in image) == 2 for image in images) / len(images)
    return accuracy * 100 + both * 100


RULE = MME

"""POPE: yes/no questions about objects, as LLaVA's eval_pope.py (RUCAIBox/POPE's evaluate.py) computes it."""

from collections.abc import Sequence
from typing import Any

from lit_prune.errors import LitPruneError
from lit_prune.evaluation.scorers.rule import Figures, Judged, Question, Rule, by

NAMES = ("f1", "accuracy", "precision", "recall", "yes_ratio")


class Pope(Rule):
    """F1, accuracy, precision, recall and share of "yes" in percent, for each split and as the mean over splits.

    References: `label`, where anything but "no" is yes; the split is the question's group. An answer is no if "No",
    "no" or "not" is among the words of its first sentence, else yes. Without any true positive F1 is 0 here; the
    official script divides by zero.
    """

    title, headline = "POPE", "f1"
    undefined = (
        "without a true positive some figure divides by zero and the official script stops; F1 is 0 here, and a "
        "precision or recall without anything to count is left out"
    )

    def right(self, question: Question) -> str:
        return question.reference["label"]

    def judge(self, question: Question, answer: str | None) -> Judged:
        label = question.reference["label"] != "no"
        yes = says_yes(answer) if answer is not None else not label
        return {"split": question.group, "yes": yes, "label": label}

    def figures(self, judged: Sequence[Judged]) -> Figures:
        splits = {split: _percent(_ratios(_counts(part))) for split, part in by(judged, "split").items()}
        if len(splits) == 1:
            return next(iter(splits.values()))
        means = {name: _mean([split[name] for split in splits.values()]) for name in NAMES if splits}
        return means | {f"{split}/{name}": value for split, row in splits.items() for name, value in row.items()}

    def remarks(self, figures: Figures) -> list[str]:
        zero = any(value in (None, 0.0) for name, value in figures.items() if name.endswith(("f1", "precision")))
        return [self.undefined] if zero else []

    def frozen(self, case: dict[str, Any]) -> Any:
        if case["kind"] == "parse":
            return "yes" if says_yes(case["text"]) else "no"
        pairs = zip(case["labels"], case["texts"], strict=True)
        judged = [self.judge(Question(0, "", "", {"label": label}), text) for label, text in pairs]
        counts = _counts(judged)
        if not counts["TP"]:
            raise LitPruneError(self.undefined)
        return counts | _ratios(counts)


def says_yes(text: str) -> bool:
    """Read an answer: only spaces part words, so that "no" before a line break is no word of its own."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def _counts(judged: Sequence[Judged]) -> dict[str, int]:
    kinds = {"TP": (True, True), "FP": (True, False), "TN": (False, False), "FN": (False, True)}
    found = [(each["yes"], each["label"]) for each in judged]
    return {name: found.count(kind) for name, kind in kinds.items()}


def _ratios(counts: dict[str, int]) -> Figures:
    tp, fp, tn, fn = counts.values()
    precision = tp / (tp + fp) if tp + fp else None
    recall = tp / (tp + fn) if tp + fn else None
    f1 = 2 * precision * recall / (precision + recall) if tp else 0.0
    values = (f1, (tp + tn) / sum(counts.values()), precision, recall, (tp + fp) / sum(counts.values()))
    return dict(zip(NAMES, values, strict=True))


def _percent(ratios: Figures) -> Figures:
    return {name: None if value is None else 100 * value for name, value in ratios.items()}


def _mean(values: list[float | None]) -> float | None:
    return None if None in values else sum(values) / len(values)


RULE = Pope

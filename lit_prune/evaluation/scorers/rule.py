"""The contract of a benchmark's scorer: a question with its reference, and the rule that judges answers."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import Any, ClassVar, Literal

from lit_prune.errors import LitPruneError

Missing = Literal["error", "wrong", "skip"]
Judged = dict[str, Any]
Figures = dict[str, float | None]


@dataclass(frozen=True)
class Question:
    """One question as the official files hold it.

    Args:
        id: identifier in the official file, unique within `group`.
        image: name of the image file as the official file gives it; "" without an image.
        text: the question, without options or instructions.
        reference: what the rule needs to judge an answer; empty where the labels are not public.
        group: part of the benchmark with figures of its own, such as POPE's split or MME's category.
        index: position in the official files. Sums run in this order, as in the official scripts.
        prompt: the prompt that LLaVA-1.5 was evaluated with, without image token and chat template.
    """

    id: str | int
    image: str
    text: str
    reference: dict[str, Any] = field(default_factory=dict)
    group: str = ""
    index: int = 0
    prompt: str = ""


class Rule(ABC):
    """A benchmark's official scoring rule.

    Answers are judged one by one, so that processes can share the work; figures come from all judgements together.
    A judgement is a small JSON object.

    Args:
        raw: answers are a model's own words, processed as LLaVA does before a submission. False: they have the
            submitted form already.
    """

    title: ClassVar[str]
    headline: ClassVar[str]
    unit: ClassVar[str] = "%"
    fine: ClassVar[tuple[str, ...]] = ()  # figures in another unit that need more decimals
    processed: ClassVar[bool] = False  # LLaVA changes answers before it submits them
    missing: ClassVar[Missing] = "error"  # what the official script makes of a question without an answer
    undefined: ClassVar[str] = "a figure divides by zero; the official script stops here"

    def __init__(self, raw: bool = True) -> None:
        self.raw = raw

    def prepare(self, text: str) -> str:
        """Turn a model's answer into the form that is submitted."""
        return text

    def right(self, question: Question) -> str:
        """An answer that counts as right: the text whose states are compared between pruned and full model."""
        return str(question.reference["answer"])

    @abstractmethod
    def judge(self, question: Question, answer: str | None) -> Judged:
        """Compare an answer with its reference; None stands for a missing answer, which is wrong.

        Raises:
            LitPruneError: the reference is not what the official script takes.
        """

    @abstractmethod
    def figures(self, judged: Sequence[Judged]) -> Figures:
        """Figures by name, in the order of the official files; None where one is undefined.

        In percent, unless the official unit is another. Groups stand before a slash: `random/f1`.
        """

    def remarks(self, figures: Figures) -> list[str]:
        """Sentences that belong beside the figures."""
        return [self.undefined] if None in figures.values() else []

    def score(self, answers: Iterable[tuple[Question, str | None]]) -> Figures:
        """Judge answers and compute the figures. The order of the answers makes no difference."""
        ordered = sorted(answers, key=lambda pair: pair[0].index)
        return self.figures([self.verdict(question, answer) for question, answer in ordered])

    def written(self, figure: str, value: float | None) -> str:
        """A figure's value for people: two decimals, four where its unit needs them."""
        return "–" if value is None else f"{value:.4f}" if figure in self.fine else f"{value:.2f}"

    def verdict(self, question: Question, answer: str | None) -> Judged:
        """Judge an answer after the processing that it needs."""
        return self.judge(question, self.prepare(answer) if self.raw and answer is not None else answer)

    def frozen(self, case: dict[str, Any]) -> Any:
        """Compute what a frozen case expects, in the case's own form and unit."""
        raise LitPruneError(f"{self.title} has no frozen cases")


def share(hits: Sequence[bool]) -> float | None:
    """Percentage of hits; None for an empty sequence."""
    return sum(hits) / len(hits) * 100 if hits else None


def total(values: Iterable[float]) -> float:
    """Sum from left to right, as the official scripts were run: since Python 3.12 `sum` compensates rounding errors."""
    return reduce(add, values, 0.0)


def most_common(answers: Sequence[str]) -> str:
    """The answer that most annotators gave, of several the first; blank ones count if there are no others."""
    given = [answer for answer in answers if answer.strip()] or list(answers)
    return max(given, key=given.count)


def by(judged: Sequence[Judged], field: str) -> dict[Any, list[Judged]]:
    """Judgements by one of their fields, in order of first appearance."""
    parts: dict[Any, list[Judged]] = {}
    for each in judged:
        parts.setdefault(each[field], []).append(each)
    return parts

"""Scores of several benchmarks in one evaluation: the metric that judges them, and the table that shows them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table
from torch import nn
from torchmetrics.wrappers.abstract import WrapperMetric

from lit_prune.evaluation.scorers.metric import Scorer
from lit_prune.evaluation.scorers.rule import Figures, Question, Rule


@dataclass(frozen=True)
class Score:
    """The official figures of one benchmark.

    Args:
        label: names the benchmark in this run, such as `pope` or `mmbench-cn`.
        rule: its rule.
        figures: by name, None where one is undefined.
        questions: how many were answered.
        asked: how many the benchmark has.
        remarks: sentences that belong beside the figures.
    """

    label: str
    rule: Rule
    figures: Figures
    questions: int
    asked: int
    remarks: list[str] = field(default_factory=list)

    @property
    def named(self) -> dict[str, float]:
        """The defined figures, named as loggers take them: `pope/random/f1`."""
        return {log_name(self.label, name): value for name, value in self.figures.items() if value is not None}

    @property
    def headline(self) -> dict[str, float]:
        """The figure that papers report, named likewise; nothing if it is undefined."""
        name = log_name(self.label, self.rule.headline)
        return {name: self.named[name]} if name in self.named else {}

    def report(self) -> dict[str, Any]:
        """Entry in a results file."""
        return {
            "benchmark": self.label,
            "headline": self.rule.headline,
            "unit": self.rule.unit,
            "figures": self.figures,
            "questions": self.questions,
            "asked": self.asked,
            "remarks": self.remarks,
        }


def log_name(label: str, figure: str) -> str:
    """A figure's name in loggers: TensorBoard takes no spaces."""
    return f"{label}/{figure}".replace(" ", "_")


class BenchmarkScores(WrapperMetric):
    """The scorers of a run's benchmarks; an answer goes to that of its question.

    Args:
        asked: rule and questions of each benchmark by its label. A sample's `records` entry counts through the
            questions of all of them, in this order.
    """

    def __init__(self, asked: Mapping[str, tuple[Rule, Sequence[Question]]]) -> None:
        super().__init__()
        self.scorers = nn.ModuleDict({label: Scorer(rule) for label, (rule, _) in asked.items()})
        self.asked = {label: len(questions) for label, (_, questions) in asked.items()}
        self._questions = [questions for _, questions in asked.values()]

    def update(self, answers: Sequence[str], batch: dict[str, Any]) -> None:
        """Judge a batch of answers; of the batch, `records` are read."""
        found: dict[str, list[tuple[str, Question]]] = {label: [] for label in self.asked}
        for answer, record in zip(answers, batch["records"], strict=True):
            label, question = self._place(record)
            found[label].append((answer, question))
        for label, pairs in found.items():
            self.scorers[label].update([answer for answer, _ in pairs], [question for _, question in pairs])

    def _place(self, record: int) -> tuple[str, Question]:
        for label, questions in zip(self.asked, self._questions, strict=True):
            if record < len(questions):
                return label, questions[record]
            record -= len(questions)
        raise IndexError(f"no question {record}")

    def compute(self) -> dict[str, float]:
        """The defined figures of all benchmarks, named as loggers take them."""
        return {name: value for score in self.scores() for name, value in score.named.items()}

    def scores(self) -> list[Score]:
        """The official figures, benchmark by benchmark, of all ranks; all must call it."""
        return [self._score(label, scorer) for label, scorer in self.scorers.items()]

    def _score(self, label: str, scorer: Scorer) -> Score:
        figures, asked = scorer.compute(), self.asked[label]
        remarks = scorer.rule.remarks(figures)
        if scorer.questions < asked:
            remarks.insert(0, f"{scorer.questions} of {asked} questions were answered: no official figure")
        return Score(label, scorer.rule, figures, scorer.questions, asked, remarks)

    def reset(self) -> None:
        """Forget every answer."""
        super().reset()
        for scorer in self.scorers.values():
            scorer.reset()


def as_table(scores: Sequence[Score]) -> Table:
    """One table of all benchmarks: the figure that papers report first, then the others."""
    table = Table(title="official scores", title_justify="left", box=SIMPLE_HEAD)
    for name in ("benchmark", "figure"):
        table.add_column(name)
    table.add_column("score", justify="right")
    table.add_column("questions", justify="right")
    for score in scores:
        for number, row in enumerate(_rows(score)):
            head = (escape(score.label), _count(score)) if number == 0 else ("", "")
            table.add_row(head[0], *row, head[1], style="bold" if number == 0 else "")
        table.add_section()
    return table


def _rows(score: Score) -> Iterator[tuple[str, str]]:
    headline = score.rule.headline
    names = list(score.figures)
    if headline in names or not names:  # else the part that was asked hasn't got it: SEED-Bench's videos
        names = [headline, *(name for name in names if name != headline)]
    for name in names:
        unit = "" if name in score.rule.fine else f", {score.rule.unit}"
        yield escape(f"{name}{unit}" if name == headline else name), score.rule.written(name, score.figures.get(name))


def _count(score: Score) -> str:
    return f"{score.questions:,}" + ("" if score.questions == score.asked else f" of {score.asked:,}")

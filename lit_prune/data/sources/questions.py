"""Questions of public benchmarks as a source: records with LLaVA-1.5's prompts, and their images."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from lit_prune.data.benchmarks import Benchmark, Labels
from lit_prune.data.references import ImageFile
from lit_prune.data.sources.base import Source
from lit_prune.errors import BadSample
from lit_prune.evaluation.scorers import Question, Rule, rule_of


@dataclass(frozen=True)
class Part:
    """One benchmark of a run.

    Args:
        label: names it in this run: its name, its split if that is not the default one, its reader's options.
        reader: of its files.
        root: folder of the official files.
        split: one of the reader's; None is the first.
        labels: its questions.
    """

    label: str
    reader: Benchmark
    root: Path
    split: str | None
    labels: Labels

    @property
    def rule(self) -> Rule | None:
        """Scoring rule; None if answers can't be scored offline."""
        return None if self.reader.rule is None else rule_of(self.reader.rule)

    def processed(self, answer: str) -> str:
        """Convert an answer to the form that is submitted."""
        return answer if self.rule is None else self.rule.prepare(answer)


def key_of(question: Question) -> tuple[str, str]:
    """Key of a question within its benchmark."""
    return question.group, str(question.id)


class Questions(Source):
    """Questions of several benchmarks, concatenated. Can be pickled.

    Args:
        parts: the benchmarks.
        system: system prompt of every question, if any.
        answered: records hold an answer that counts as right; without one a question is no sample to evaluate on.
    """

    def __init__(self, parts: Sequence[Part], system: str | None = None, answered: bool = True):
        self.parts, self.system, self.answered = list(parts), system, answered

    def __len__(self) -> int:
        return sum(len(part.labels.questions) for part in self.parts)

    def place(self, index: int) -> tuple[Part, Question]:
        """The question at an index of this source, and its benchmark."""
        if index >= 0:
            for part in self.parts:
                if index < len(part.labels.questions):
                    return part, part.labels.questions[index]
                index -= len(part.labels.questions)
        raise IndexError(f"no question {index}")

    def __getitem__(self, index: int) -> dict:
        part, question = self.place(index)
        content: list[dict] = [{"type": "text", "text": question.prompt}]
        record: dict = {"id": question.id}
        if question.image:
            content.insert(0, {"type": "image", "index": 0})
            record["images"] = [question.image]
        record["messages"] = [{"role": "user", "content": content}]
        if self.system:
            record["system"] = self.system
        if self.answered and part.rule is not None and question.reference:
            right = part.rule.right(question).strip() or "unanswerable"  # annotators may all have left it blank
            record["messages"].append({"role": "assistant", "content": right})
        return record

    def images(self, index: int, record: dict) -> list[ImageFile]:
        part, question = self.place(index)
        return [ImageFile(question.image, partial(_opened, part, question))] if question.image else []

    def file_of(self, index: int) -> str:
        return str(self.place(index)[0].labels.files[0])

    def similar_keys(self) -> list[str]:
        return []

    @property
    def files(self) -> Sequence[Path]:
        return [path for part in self.parts for path in part.labels.files]

    def indices(self) -> dict[tuple[str, Hashable], int]:
        """Index of every question, by label and key."""
        found = (self.place(index) for index in range(len(self)))
        return {(part.label, key_of(question)): index for index, (part, question) in enumerate(found)}


def _opened(part: Part, question: Question) -> BinaryIO:
    try:
        return part.reader.open_image(part.root, question, part.split)
    except OSError as error:
        raise BadSample("", None, f"image {question.image} cannot be read: {error.strerror}") from error

"""Base class of benchmarks: questions from the official files, and the ids that answers refer to."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, ClassVar

from lit_prune.errors import LitPruneError
from lit_prune.evaluation.scorers.answers import Answer
from lit_prune.evaluation.scorers.files import official
from lit_prune.evaluation.scorers.rule import Question

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


@dataclass
class Labels:
    """Questions of a benchmark, the files they were read from, and remarks about these."""

    questions: list[Question]
    files: list[Path]
    remarks: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Check that there are questions with unique ids."""
        names = ", ".join(map(str, self.files))
        if not self.questions:
            raise LitPruneError(f"{names}: no questions")
        seen: set[tuple[str, str]] = set()
        for question in self.questions:
            name = (question.group, str(question.id))
            if name in seen:
                raise LitPruneError(f"{names}: two questions have the id {'/'.join(filter(None, name))}")
            seen.add(name)


class Benchmark(ABC):
    """A benchmark's official files in a local folder.

    Attributes:
        rule: module of `lit_prune.evaluation.scorers` with its rule; None: it can't be scored offline.
        source: where the files are had, one sentence.
        image_source: where the images are had, if not with the files.
        splits: names of its splits, the default first.
        image_folders: folders that may hold the images, under the root.
        submission: name of the file that the benchmark's server takes; None: it has none, or it isn't written.
        label_suffix: what tells a reader with other options from the default one, such as "-ocr".
    """

    rule: ClassVar[str | None]
    source: ClassVar[str]
    image_source: ClassVar[str] = ""
    splits: ClassVar[tuple[str, ...]] = ()
    image_folders: ClassVar[tuple[str, ...]] = (".",)
    submission: ClassVar[str | None] = None
    label_suffix: str = ""
    question_file: ClassVar[str | None] = None  # LLaVA's, for benchmarks whose answers name nothing but its ids

    @abstractmethod
    def load(self, root: Path, split: str | None = None, answers: Sequence[Answer] = ()) -> Labels:
        """Read the questions of a split.

        Args:
            root: folder of the official files.
            split: one of `splits`; None is the first.
            answers: where several versions of a file are there, the one that they were made for is read.

        Raises:
            LitPruneError: a file is missing (with where it is had) or is not the official one; or no such split.
        """

    def keys(self, question: Question) -> Iterable[Hashable]:
        """All keys under which an answer may name a question."""
        return [str(question.id)]

    def key(self, answer: Answer) -> Hashable:
        """The key under which an answer names its question.

        Raises:
            LitPruneError: the answer does not name it.
        """
        if answer.id is None:
            raise LitPruneError(f"{answer.place}: no id of the question (`question_id`)")
        return answer.id

    def image(self, root: Path, question: Question, split: str | None = None) -> Path:
        """Find the image of a question, or the file that holds it.

        Raises:
            LitPruneError: it is in none of the folders, with where it is had.
        """
        names = [f"{folder}/{question.image}" for folder in self.image_folders]
        return official(root, names, " ".join(filter(None, (self.image_source, self.source))))

    def open_image(self, root: Path, question: Question, split: str | None = None) -> BinaryIO:
        """The encoded image of a question, as a binary file at its begin. Raises as `image` does."""
        return self.image(root, question, split).open("rb")

    def submitted(self, answers: Sequence[tuple[Question, str]], root: Path, split: str | None) -> str:
        """The text of the file that the benchmark's server takes.

        Args:
            answers: to all questions of a split, in their order, processed as LLaVA does before a submission.
            root: folder of the official files.
            split: one of `splits`; None is the first.
        """
        raise NotImplementedError(f"{type(self).__name__} has no submission file")

    def chosen(self, split: str | None) -> str:
        """The name of a split, after checking it."""
        if split is None:
            return self.splits[0]
        if split not in self.splits:
            raise LitPruneError(f"no split {split!r}; there are {', '.join(self.splits)}")
        return split


def lines(*parts: str) -> str:
    """A prompt of several lines; empty parts are left out."""
    return "\n".join(part for part in parts if part != "")


def lettered(options: Iterable[str]) -> str:
    """Options as lines "A. ...", "B. ..."."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip("ABCDEFGH", options, strict=False))


def plain(prompt: str) -> str:
    """A prompt's question: without LLaVA's instruction, spaces at the ends or several in a row."""
    return " ".join(prompt.removesuffix(SHORT).split())


def stem(image: str) -> str:
    """Name of an image without folders and suffix."""
    return Path(image).name.partition(".")[0]

"""Read answers made elsewhere, in common formats, and join them to the questions."""

import json
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lit_prune.errors import LitPruneError
from lit_prune.evaluation.scorers.files import read_lines, read_records, read_table, read_text
from lit_prune.evaluation.scorers.rule import Missing, Question

IDS = ("question_id", "questionId", "id", "index")
TEXTS = ("prediction", "answer", "text")  # the first that a record has; `text` beside another is the question
QUESTIONS = ("question", "prompt", "text")
IMAGES = ("image", "image_id")
GROUPS = ("category", "split")
FORMS = (
    "JSON lines or a JSON list of objects with the answer as `text` (LLaVA), `answer` or `prediction`, a JSON object "
    "of answers by id, a .tsv or .csv with a header, or a folder of MME's .txt files"
)


@dataclass(frozen=True)
class Answer:
    """One answer as a file holds it.

    Args:
        text: the answer.
        place: file and line, for messages.
        raw: a model's own words; False for an official submission file.
        id: of the question, as text, if the file has it.
        image: name of the image, if the file has it.
        question: the question or the prompt, if the file has it.
        group: split or category, if the file has it.
    """

    text: str
    place: str
    raw: bool = True
    id: str | None = None
    image: str | None = None
    question: str | None = None
    group: str | None = None


# Reading


def read_answers(paths: Sequence[Path]) -> list[Answer]:
    """Read answer files of any known format; a folder stands for MME's text files or for its `answers*.jsonl`.

    Raises:
        LitPruneError: a file is missing, has another format, or has a record without an answer; with its line.
    """
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise LitPruneError(f"{path}: no such file or folder")
        files += _inside(path) if path.is_dir() else [path]
    answers = [answer for file in files for answer in _read(file)]
    if not answers:
        raise LitPruneError(f"{', '.join(map(str, paths))}: no answers")
    return answers


def _inside(folder: Path) -> list[Path]:
    found = sorted(folder.glob("*.txt")) or sorted(folder.glob("answers*.jsonl"))
    if not found:
        raise LitPruneError(f"{folder}: neither MME's CATEGORY.txt nor answers*.jsonl in this folder")
    return found


def _read(path: Path) -> Iterator[Answer]:
    if path.suffix.lower() in (".xlsx", ".xls"):
        raise LitPruneError(f"{path}: save the table as .tsv or .csv first")
    if path.suffix.lower() == ".txt":
        yield from _tab_lines(path)
    elif path.suffix.lower() in (".tsv", ".csv"):
        yield from (_answer(record, place) for place, record in read_table(path))
    else:
        yield from (_answer(record, place) for place, record in _records(path))


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON file, whichever its suffix: a list, one by line, or answers by id."""
    text = read_text(path).lstrip()
    if text.startswith("["):
        yield from read_records(path)
    elif text.startswith("{") and (by_id := _answers_by_id(text)) is not None:
        yield from ((f"{path}, {name!r}", {"id": name, "text": answer}) for name, answer in by_id.items())
    elif text.startswith("{"):
        yield from read_lines(path)
    elif text:
        raise LitPruneError(f"{path}:1: unknown format; {FORMS} is expected")


def _answers_by_id(text: str) -> dict[str, str] | None:
    """One object of texts by id (MM-Vet), or LLaVA's result file for ScienceQA with such an object; else None."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None  # lines, or an error that reading them reports
    by_id = content.get("outputs", content)
    fields = {*IDS, *TEXTS}
    if (
        not isinstance(by_id, dict)
        or fields & by_id.keys()
        or not all(isinstance(each, str) for each in by_id.values())
    ):
        return None
    return by_id


def _tab_lines(path: Path) -> Iterator[Answer]:
    """MME's submission: image, question, truth and answer of each line, in a file named by the category."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            cells = line.rstrip("\r").split("\t")
            if len(cells) != 4:
                raise LitPruneError(
                    f"{path}:{number}: {len(cells)} fields, not the four of MME's files: image, question, truth, answer"
                )
            image, question, _, text = cells
            yield Answer(text, f"{path}:{number}", False, image=image, question=question, group=path.stem)


def _answer(record: dict[str, Any], place: str) -> Answer:
    name = next((name for name in TEXTS if name in record), None)
    if name is None:
        raise LitPruneError(f"{place}: no answer: one of the fields {', '.join(TEXTS)} is expected")
    text = record[name]
    if isinstance(text, bool) or not isinstance(text, str | int | float):
        raise LitPruneError(f"{place}: `{name}` is {json.dumps(text)[:40]}, not the text of an answer")
    others = {key: value for key, value in record.items() if key != name}
    return Answer(
        text=str(text),
        place=place,
        raw=name == "text" or "id" in record,  # our own answers.jsonl has `id` and `answer`
        id=_first(others, IDS),
        image=_first(others, IMAGES),
        question=_first(others, QUESTIONS),
        group=_first(others, GROUPS),
    )


def _first(record: dict[str, Any], names: tuple[str, ...]) -> str | None:
    return next((str(record[name]) for name in names if record.get(name) is not None), None)


def complete(answers: Iterable[Answer], path: Path) -> list[Answer]:
    """Add image, question and category by `question_id` from one of LLaVA's question files.

    Raises:
        LitPruneError: the file has no question of an answer's id.
    """
    known = {}
    for place, record in read_lines(path):
        if "question_id" not in record:
            raise LitPruneError(f"{place}: no field 'question_id'; one of LLaVA's question files is expected")
        known[str(record["question_id"])] = record
    completed = []
    for answer in answers:
        if answer.image is not None:
            completed.append(answer)
            continue
        if answer.id not in known:
            raise LitPruneError(f"{answer.place}: {path} has no question {answer.id}")
        record = known[answer.id]
        text, image, group = record.get("text"), record.get("image"), record.get("category")
        completed.append(replace(answer, question=text or answer.question, image=image, group=answer.group or group))
    return completed


# Joining


@dataclass
class Joined:
    """Questions with their answers, and what did not fit.

    `repeated` counts further answers to a question that say the same, `extra` are answers to no question.
    """

    answers: list[tuple[Question, Answer | None]] = field(default_factory=list)
    extra: list[Answer] = field(default_factory=list)
    repeated: int = 0

    @property
    def missing(self) -> list[Question]:
        """Questions without an answer."""
        return [question for question, answer in self.answers if answer is None]

    def pairs(self, missing: Missing) -> list[tuple[Question, str | None]]:
        """Questions to score: all, or, for "skip", those that are answered."""
        given = [(question, answer and answer.text) for question, answer in self.answers]
        return [pair for pair in given if pair[1] is not None] if missing == "skip" else given


def join(
    questions: Sequence[Question],
    answers: Iterable[Answer],
    key_of_question: Callable[[Question], Iterable[Hashable]],
    key_of_answer: Callable[[Answer], Hashable],
) -> Joined:
    """Give every question its answer by what names it, never by position.

    Args:
        questions: all that should be answered.
        answers: in any order.
        key_of_question: all keys under which an answer may name a question.
        key_of_answer: the key under which an answer names its question.

    Raises:
        LitPruneError: two different answers to one question, with their places.
    """
    known: dict[Hashable, list[int]] = {}
    for position, question in enumerate(questions):
        for key in set(key_of_question(question)):
            known.setdefault(key, []).append(position)
    taken: dict[int, Answer] = {}
    joined = Joined()
    for answer in answers:
        meant = known.get(key_of_answer(answer), ())
        fitting = [
            n for n in meant if answer.group is None or not questions[n].group or answer.group == questions[n].group
        ]
        if not fitting:
            joined.extra.append(answer)
        joined.repeated += any(position in taken for position in fitting)
        for position in fitting:
            first = taken.setdefault(position, answer)
            if first.text != answer.text:
                raise LitPruneError(
                    f"two answers to one question: {first.text!r} in {first.place}, {answer.text!r} in {answer.place}"
                )
    joined.answers = [(question, taken.get(position)) for position, question in enumerate(questions)]
    return joined

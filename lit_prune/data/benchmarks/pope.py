"""POPE: is an object in a COCO image? Three splits, by how the absent objects were chosen."""

import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from lit_prune.data.benchmarks.base import SHORT, Benchmark, Labels, lines, plain, stem
from lit_prune.errors import LitPruneError
from lit_prune.evaluation.scorers.answers import Answer
from lit_prune.evaluation.scorers.files import official, read_lines, take
from lit_prune.evaluation.scorers.rule import Question

SPLITS = ("random", "popular", "adversarial")
# Versions of the files differ in articles and in a typo: "Is there an oven in the imange?"
TEMPLATE = re.compile(r"is there an? (.+) in the ima(?:n)?ge\?", re.IGNORECASE)

# Digest of the 2,910 random questions of commit e3e3926; all of them are among the 3,000 of later versions.
RANDOM_2910 = "36751e191101a5e1f59b725e0f09d30fd6d10b9a6fd38a550319234c8d34213a"


class PopeFiles(Benchmark):
    """`coco_pope_SPLIT.json`, JSON lines, under the root or in `coco/`.

    The official script pairs answers and labels by position. Here they are joined by image and question, so a file of
    answers may be in any order, and labels may be of another version than the answers: LLaVA-1.5 was evaluated on the
    2,910 random questions of commit e3e3926, the repository has 3,000 today. Where several versions of a split are
    there, such as `coco_pope_random_2910.json`, the one with the fewest unanswered questions is read; answers to
    exactly those 2,910 are scored on them with any version.
    """

    rule = "pope"
    source = (
        "POPE's labels are at https://github.com/RUCAIBox/POPE/tree/main/output/coco (MIT), those that LLaVA-1.5 was "
        "evaluated on at https://github.com/AoiDragon/POPE/tree/e3e39262c85a6a83f26cf5094022a782cb0df58d/output/coco."
    )
    image_source = "The images are COCO's, http://images.cocodataset.org/zips/val2014.zip."
    splits = ("all", *SPLITS)
    image_folders = ("val2014", ".")
    question_file = "llava_pope_test.jsonl"

    def load(self, root: Path, split: str | None = None, answers: Sequence[Answer] = ()) -> Labels:
        split = self.chosen(split)
        questions: list[Question] = []
        files, remarks = [], []
        for name in SPLITS if split == "all" else (split,):
            answered = {self.key(each) for each in answers if each.group in (None, name)}
            part = self._version(root, name, answered)
            questions += [replace(each, index=len(questions) + each.index) for each in part.questions]
            files += part.files
            remarks += part.remarks
        return Labels(questions, files, remarks)

    def _version(self, root: Path, split: str, answered: set[Hashable]) -> Labels:
        """The version of a split that answers fit best; the official one without answers."""
        paths = self._files(root, split)
        versions = [_read(path, split) for path in (paths if answered else paths[:1])]
        best = min(versions, key=lambda version: self._unanswered(version.questions, answered))
        name = best.files[0].name
        if len(versions) > 1:
            best.remarks.append(
                f"{split}: read {name}, one of {len(versions)} versions there, whose questions the answers fit best"
            )
        asked = [question for question in best.questions if not answered.isdisjoint(self.keys(question))]
        if len(asked) < len(best.questions) and self._digest(asked) == RANDOM_2910:
            best.remarks.append(
                f"{split}: the answers are to the 2,910 questions of commit e3e3926, which LLaVA-1.5 was evaluated on; "
                f"the other {len(best.questions) - len(asked)} of {name} are left out"
            )
            best.questions = asked
        return best

    def _files(self, root: Path, split: str) -> list[Path]:
        """All versions of a split's file, the official name first."""
        name = f"coco_pope_{split}.json"
        folders = ("", "coco/", "output/coco/")
        others = [path for folder in folders for path in sorted((root / folder).glob(f"coco_pope_{split}_*.json"))]
        paths = [root / f"{folder}{name}" for folder in folders]
        existing = [path for path in paths if path.exists()] + others
        return existing or [official(root, [f"{folder}{name}" for folder in folders], self.source)]

    def _unanswered(self, questions: list[Question], answered: set[Hashable]) -> int:
        return sum(answered.isdisjoint(self.keys(question)) for question in questions)

    def _digest(self, questions: list[Question]) -> str:
        keys = sorted(f"{image} {name}" for question in questions for image, name in self.keys(question))
        return sha256("\n".join(keys).encode()).hexdigest()

    def keys(self, question: Question) -> Iterable[Hashable]:
        return [(stem(question.image), _object(question.text))]

    def key(self, answer: Answer) -> Hashable:
        if answer.image is None or answer.question is None:
            raise LitPruneError(
                f"{answer.place}: no image or no question; POPE's answers are joined by both. For LLaVA's answer files "
                f"give its question file, {self.question_file} of eval.zip, with --questions"
            )
        return stem(answer.image), _object(answer.question)


def _read(path: Path, split: str) -> Labels:
    questions = []
    for index, (place, record) in enumerate(read_lines(path)):
        number, image, text, label = take(record, place, "question_id", "image", "text", "label")
        reference, prompt = {"label": label}, lines(text, SHORT)
        questions.append(Question(number, image, text, reference, split, index, prompt))
    return Labels(questions, [path])


def _object(question: str) -> str:
    text = plain(question)
    match = TEMPLATE.fullmatch(text)
    return match[1].lower() if match else text.lower()


BENCHMARK = PopeFiles()

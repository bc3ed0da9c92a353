"""MME: two yes/no questions about each image, in 14 categories."""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path

from lit_prune.data.benchmarks.base import SHORT, Benchmark, Labels, lines, plain, stem
from lit_prune.errors import LitPruneError
from lit_prune.evaluation.scorers.answers import Answer
from lit_prune.evaluation.scorers.files import official, read_text
from lit_prune.evaluation.scorers.mme import CATEGORIES
from lit_prune.evaluation.scorers.rule import Question

YES_NO = "Please answer yes or no."
IMAGES = ("images", ".")
TEXTS = ("questions_answers_YN", ".")
SUFFIXES = (".jpg", ".png", ".jpeg")


class MMEFiles(Benchmark):
    """`MME_Benchmark_release_version` with a folder for each category, or the `CATEGORY.txt` of the eval_tool.

    A category's images and texts lie in one folder, or in `images` and `questions_answers_YN`. A split is all, or
    categories with commas between them.
    """

    rule = "mme"
    source = (
        "MME's images and its eval_tool are had as the branch Evaluation of "
        "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models says (for research only)."
    )
    splits = ("all", *CATEGORIES)
    image_folders = (".", "MME_Benchmark_release_version")

    def load(self, root: Path, split: str | None = None, answers: Sequence[Answer] = ()) -> Labels:
        chosen = [self.chosen(name.strip()) for name in (split or "all").split(",")]
        questions: list[Question] = []
        files = []
        for category in CATEGORIES if "all" in chosen else chosen:
            path = official(root, _candidates(category), self.source)
            read = _release if path.is_dir() else _eval_tool
            for place, image, text, label in read(path):
                if label not in ("Yes", "No"):
                    raise LitPruneError(f"{place}: the label is {label!r}, not Yes or No")
                prompt = lines(plain(text).removesuffix(YES_NO).strip(), SHORT)
                index, name = len(questions), f"{stem(image)}/{plain(text)}"
                questions.append(Question(name, f"{category}/{image}", text, {"label": label}, category, index, prompt))
            files.append(path)
        return Labels(questions, files)

    def keys(self, question: Question) -> Iterable[Hashable]:
        return [(question.group, stem(question.image), _bare(question.text))]

    def key(self, answer: Answer) -> Hashable:
        image = answer.image or answer.id
        group = answer.group or (image or "").partition("/")[0]
        if image is None or answer.question is None or group not in CATEGORIES:
            raise LitPruneError(
                f"{answer.place}: MME's answers are joined by category, image and question; LLaVA's files have the "
                f"first two as `question_id`, CATEGORY/IMAGE"
            )
        return group, stem(image), _bare(answer.question)


def _candidates(category: str) -> list[str]:
    folders = ("MME_Benchmark_release_version/", "", "eval_tool/Your_Results/", "Your_Results/")
    names = [f"{folder}{category}" for folder in folders[:2]]
    return names + [f"{folder}{category}.txt" for folder in folders[1:]]


def _release(folder: Path) -> Iterator[tuple[str, str, str, str]]:
    """Place, image, question and label of each question of a category, in the order of file names."""
    texts = next(folder / name for name in TEXTS if (folder / name).is_dir())
    images = next(name for name in IMAGES if (folder / name).is_dir())
    found = sorted(texts.glob("*.txt"))
    if not found:
        raise LitPruneError(f"{texts}: no questions (*.txt) in this folder")
    for path in found:
        existing = [suffix for suffix in SUFFIXES if (folder / images / f"{path.stem}{suffix}").exists()]
        image = f"{path.stem}{(existing or SUFFIXES)[0]}"
        questions = list(_cells(path, 2))
        if len(questions) != 2:
            raise LitPruneError(f"{path}: {len(questions)} questions; the official file has two an image")
        for place, (text, label) in questions:
            yield place, image if images == "." else f"{images}/{image}", text, label


def _eval_tool(path: Path) -> Iterator[tuple[str, str, str, str]]:
    for place, (image, text, label) in _cells(path, 3):
        yield place, image, text, label


def _cells(path: Path, count: int) -> Iterator[tuple[str, list[str]]]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            cells = [cell.strip() for cell in line.split("\t")]
            if len(cells) != count:
                raise LitPruneError(f"{path}:{number}: {len(cells)} fields where the official file has {count}")
            yield f"{path}:{number}", cells


def _bare(question: str) -> str:
    return plain(question).removesuffix(YES_NO).strip()


BENCHMARK = MMEFiles()

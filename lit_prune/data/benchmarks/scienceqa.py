"""ScienceQA: multiple-choice questions from school, about half of them with an image."""

from collections.abc import Sequence
from pathlib import Path

from lit_prune.data.benchmarks.base import LETTER, Benchmark, Labels, lettered, lines
from lit_prune.errors import LitPruneError
from lit_prune.evaluation.scorers.answers import Answer
from lit_prune.evaluation.scorers.files import as_object, official, read_json, reading, take
from lit_prune.evaluation.scorers.scienceqa import question

FIELDS = ("question", "choices", "answer", "hint", "image")


class ScienceQAFiles(Benchmark):
    """`problems.json` and `pid_splits.json`. Images are `SPLIT/ID/image.png`; `image` is "" without one.

    The prompt is LLaVA's CQM-A: hint, question, options. LLaVA-1.5's figure counts questions with an image only.

    Args:
        img: read only the questions with an image (ScienceQA-IMG); `img_accuracy` is the same without it.
    """

    rule = "scienceqa"
    source = "ScienceQA is at https://github.com/lupantech/ScienceQA, data/scienceqa (CC BY-NC-SA 4.0)."
    image_source = "The images are at https://scienceqa.s3.us-west-1.amazonaws.com/images/test.zip."
    splits = ("test", "val", "train", "minitest", "minival")
    image_folders = ("images", ".")

    def __init__(self, img: bool = False) -> None:
        self.img = img
        self.label_suffix = "-img" if img else ""

    def load(self, root: Path, split: str | None = None, answers: Sequence[Answer] = ()) -> Labels:
        split = self.chosen(split)
        paths = [official(root, [n, f"data/scienceqa/{n}"], self.source) for n in ("problems.json", "pid_splits.json")]
        problems = as_object(read_json(paths[0]), str(paths[0]))
        with reading(str(paths[1])):
            numbers = list(*take(read_json(paths[1]), str(paths[1]), split))
        questions = []
        for index, number in enumerate(numbers):
            if number not in problems:
                raise LitPruneError(f"{paths[0]}: no problem {number}, which {paths[1].name} names")
            problem, place = problems[number], f"{paths[0]}, problem {number}"
            with reading(place):
                text, choices, _, hint, image = take(problem, place, *FIELDS)
                if self.img and image is None:
                    continue
                hint = hint.strip()
                prompt = lines(f"Context: {hint}" if hint else "", text, lettered(choices), LETTER).replace("  ", " ")
                file = f"{split.removeprefix('mini')}/{number}/{image}" if image is not None else None
                questions.append(question(number, {**problem, "image": file}, index=index, prompt=prompt))
        return Labels(questions, paths)


BENCHMARK = ScienceQAFiles()

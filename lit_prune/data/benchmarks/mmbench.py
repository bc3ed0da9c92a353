"""MMBench: multiple choice, every question once for each rotation of its options."""

import base64
import csv
from collections.abc import Sequence
from functools import lru_cache
from io import BytesIO, StringIO
from pathlib import Path
from typing import BinaryIO

from lit_prune.data.benchmarks.base import LETTER, Benchmark, Labels, lettered, lines
from lit_prune.errors import LitPruneError
from lit_prune.evaluation.scorers.answers import Answer
from lit_prune.evaluation.scorers.files import EMPTY, official, read_table, take
from lit_prune.evaluation.scorers.mmbench import choices
from lit_prune.evaluation.scorers.rule import Question

FILES = {
    "en": ["mmbench_dev_20230712.tsv", "mmbench_dev_en_20231003.tsv", "MMBench_DEV_EN.tsv"],
    "cn": ["mmbench_dev_cn_20231003.tsv", "MMBench_DEV_CN.tsv"],
}
LEFT_OUT = ("hint", "category", "source", "image", "comment", "l2-category", "split")  # of a submission
LETTERS = {"en": LETTER, "cn": "请直接回答选项字母。"}


class MMBenchFiles(Benchmark):
    """The development set's table, `mmbench_dev_20230712.tsv`; images are in it, as base64.

    `image` of a question is its `index`; `pictures` reads the images by it. Answers name a question by `index` or, in
    LLaVA's files, `question_id`.
    """

    rule = "mmbench"
    source = (
        "MMBench's development set is at https://download.openmmlab.com/mmclassification/datasets/mmbench/ "
        "(mmbench_dev_20230712.tsv, mmbench_dev_cn_20231003.tsv; Apache-2.0)."
    )
    splits = ("en", "cn")
    submission = "submission.tsv"

    def load(self, root: Path, split: str | None = None, answers: Sequence[Answer] = ()) -> Labels:
        split = self.chosen(split)
        path = official(root, FILES[split], self.source)
        questions = []
        for index, (place, row) in enumerate(read_table(path)):
            number, text, answer = take(row, place, "index", "question", "answer")
            if not number.isdigit():
                raise LitPruneError(f"{place}: the index is {number!r}, not a number")
            options = choices({name: cell for name, cell in row.items() if cell not in EMPTY})
            reference = {"choices": options, "answer": answer, "ability": row.get("l2-category", "")}
            hint = row.get("hint", "")
            prompt = lines("" if hint in EMPTY else hint, text, lettered(options.values()), LETTERS[split])
            questions.append(Question(number, number, text, reference, index=index, prompt=prompt))
        return Labels(questions, [path])

    def image(self, root: Path, question: Question, split: str | None = None) -> Path:
        """The table that holds the image."""
        return official(root, FILES[self.chosen(split)], self.source)

    def open_image(self, root: Path, question: Question, split: str | None = None) -> BinaryIO:
        return BytesIO(pictures(self.image(root, question, split))[question.image])

    def submitted(self, answers: Sequence[tuple[Question, str]], root: Path, split: str | None) -> str:
        """The columns of LLaVA's convert_mmbench_for_submission.py, tab-separated."""
        rows = {row["index"]: row for _, row in read_table(self.image(root, answers[0][0], split))}
        out = StringIO()
        columns = [name for name in next(iter(rows.values())) if name not in LEFT_OUT]
        table = csv.DictWriter(
            out, [*columns, "prediction"], delimiter="\t", extrasaction="ignore", lineterminator="\n"
        )
        table.writeheader()
        table.writerows({**rows[str(question.id)], "prediction": answer} for question, answer in answers)
        return out.getvalue()


@lru_cache(2)  # of a table of some hundred megabytes
def pictures(path: Path) -> dict[str, bytes]:
    """Read the encoded images of a table by `index`. A cell may name the row whose image it shares.

    Raises:
        LitPruneError: a cell is neither base64 nor the index of a row with an image.
    """
    cells = {take(row, place, "index", "image")[0]: (place, row["image"]) for place, row in read_table(path)}
    found = {}
    for number, (place, cell) in cells.items():
        data = cells[cell][1] if cell in cells else cell
        try:
            found[number] = base64.b64decode(data, validate=True)
        except ValueError as error:
            raise LitPruneError(f"{place}: the image is no base64: {error}") from error
    return found


BENCHMARK = MMBenchFiles()

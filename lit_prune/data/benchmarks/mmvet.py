"""MM-Vet: open questions whose answers GPT-4 grades; there is nothing to score offline."""

import json
from collections.abc import Sequence
from pathlib import Path

from lit_prune.data.benchmarks.base import Benchmark, Labels
from lit_prune.evaluation.scorers.answers import Answer
from lit_prune.evaluation.scorers.files import as_object, official, read_json, take
from lit_prune.evaluation.scorers.rule import Question


class MMVetFiles(Benchmark):
    """`mm-vet.json`; images in `images`. Answers are uploaded as one object of texts by id."""

    rule = None
    source = "MM-Vet is at https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip (Apache-2.0)."
    splits = ("test",)
    image_folders = ("images", "mm-vet/images", ".")
    submission = "submission.json"

    def load(self, root: Path, split: str | None = None, answers: Sequence[Answer] = ()) -> Labels:
        self.chosen(split)
        path = official(root, ["mm-vet.json", "mm-vet/mm-vet.json"], self.source)
        questions = []
        for index, (number, record) in enumerate(as_object(read_json(path), str(path)).items()):
            image, text = take(record, f"{path}, {number}", "imagename", "question")
            questions.append(Question(number, image, text, index=index, prompt=text))
        return Labels(questions, [path])

    def submitted(self, answers: Sequence[tuple[Question, str]], root: Path, split: str | None) -> str:
        """An object of answers by id."""
        return json.dumps({question.id: answer for question, answer in answers}, ensure_ascii=False, indent=1)


BENCHMARK = MMVetFiles()

"""VQAv2: questions about COCO images with ten answers each."""

import json
from collections.abc import Sequence
from pathlib import Path

from lit_prune.data.benchmarks.base import SHORT, Benchmark, Labels, lines
from lit_prune.errors import LitPruneError
from lit_prune.evaluation.scorers.answers import Answer
from lit_prune.evaluation.scorers.files import official, read_records, reading, take
from lit_prune.evaluation.scorers.rule import Question


class VQAv2(Benchmark):
    """`v2_OpenEnded_mscoco_SPLIT_questions.json` and, but for the test splits, `v2_mscoco_SPLIT_annotations.json`."""

    rule = "vqa"
    source = "VQAv2's questions and annotations are at https://visualqa.org/download.html (CC BY 4.0)."
    image_source = "The images are COCO's, http://images.cocodataset.org/zips/val2014.zip and http://images.cocodataset.org/zips/test2015.zip."
    splits = ("val2014", "train2014", "test-dev2015", "test2015")
    image_folders = ("val2014", "train2014", "test2015", ".")
    submission = "submission.json"

    def load(self, root: Path, split: str | None = None, answers: Sequence[Answer] = ()) -> Labels:
        split = self.chosen(split)
        name = f"v2_OpenEnded_mscoco_{split}_questions.json"
        path = official(root, [name, f"questions/{name}"], self.source)
        files = [path]
        references: dict[int, dict] = {}
        if not split.startswith("test"):
            name = f"v2_mscoco_{split}_annotations.json"
            files.append(official(root, [name, f"annotations/{name}"], self.source))
            references = _references(files[1])
        images = split.replace("-dev", "")  # test-dev asks about a part of the test images
        questions = []
        for index, (place, record) in enumerate(read_records(path, "questions")):
            with reading(place):
                number, image, text = take(record, place, "question_id", "image_id", "question")
                if references and number not in references:
                    raise LitPruneError(f"{files[1]}: no annotation of question {number}")
                file, prompt = f"COCO_{images}_{image:012d}.jpg", lines(text, SHORT)
                questions.append(Question(number, file, text, references.get(number, {}), index=index, prompt=prompt))
        return Labels(questions, files)

    def submitted(self, answers: Sequence[tuple[Question, str]], root: Path, split: str | None) -> str:
        """A list of `question_id` and `answer`. The server takes all test questions: the others' answers are empty."""
        given = {question.id: answer for question, answer in answers}
        name = "v2_OpenEnded_mscoco_test2015_questions.json"
        places = (root / name, root / "questions" / name)
        if split == "test-dev2015" and (path := next((each for each in places if each.exists()), None)):
            numbers = [take(record, place, "question_id")[0] for place, record in read_records(path, "questions")]
            given = dict.fromkeys(numbers, "") | given
        return json.dumps([{"question_id": number, "answer": answer} for number, answer in given.items()])


def _references(path: Path) -> dict[int, dict]:
    references = {}
    for place, record in read_records(path, "annotations"):
        with reading(place):
            number, kind, answers = take(record, place, "question_id", "answer_type", "answers")
            references[number] = {"answers": [each["answer"] for each in answers], "type": kind}
    return references


BENCHMARK = VQAv2()

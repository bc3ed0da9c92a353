"""VizWiz: questions that blind people asked about their own photos, with ten answers each."""

import json
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path

from lit_prune.data.benchmarks.base import SHORT, Benchmark, Labels, lines, stem
from lit_prune.errors import LitPruneError
from lit_prune.evaluation.scorers.answers import Answer
from lit_prune.evaluation.scorers.files import official, read_records, reading, take
from lit_prune.evaluation.scorers.rule import Question

UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."


class VizWizFiles(Benchmark):
    """`Annotations/SPLIT.json`; the test split has no answers. Answers name their question by its image."""

    rule = "vizwiz"
    source = (
        "VizWiz's annotations are at https://vizwiz.cs.colorado.edu/VizWiz_final/vqa_data/Annotations.zip (CC BY 4.0)."
    )
    image_source = "The images are at https://vizwiz.cs.colorado.edu/VizWiz_final/images/val.zip and test.zip."
    splits = ("val", "train", "test")
    image_folders = ("val", "train", "test", ".")
    submission = "submission.json"
    question_file = "llava_test.jsonl"

    def load(self, root: Path, split: str | None = None, answers: Sequence[Answer] = ()) -> Labels:
        split = self.chosen(split)
        path = official(root, [f"Annotations/{split}.json", f"{split}.json"], self.source)
        questions = []
        for index, (place, record) in enumerate(read_records(path)):
            with reading(place):
                image, text = take(record, place, "image", "question")
                reference = {}
                if split != "test":
                    given, kind = take(record, place, "answers", "answer_type")
                    reference = {"answers": [each["answer"] for each in given], "type": kind}
                prompt = lines(text, UNANSWERABLE, SHORT)
                questions.append(Question(image, image, text, reference, index=index, prompt=prompt))
        return Labels(questions, [path])

    def submitted(self, answers: Sequence[tuple[Question, str]], root: Path, split: str | None) -> str:
        """A list of `image` and `answer`."""
        records = [{"image": question.image, "answer": answer} for question, answer in answers]
        return json.dumps(records, ensure_ascii=False)

    def keys(self, question: Question) -> Iterable[Hashable]:
        return [stem(question.image)]

    def key(self, answer: Answer) -> Hashable:
        name = answer.image or answer.id
        if name is None or not name.startswith("VizWiz_"):
            raise LitPruneError(f"{answer.place}: no image; VizWiz's answers name their question by `image`")
        return stem(name)


BENCHMARK = VizWizFiles()

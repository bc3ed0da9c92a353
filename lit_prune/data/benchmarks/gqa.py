"""GQA: compositional questions over scene graphs."""

from collections.abc import Sequence
from pathlib import Path

from lit_prune.data.benchmarks.base import SHORT, Benchmark, Labels, lines
from lit_prune.evaluation.scorers.answers import Answer
from lit_prune.evaluation.scorers.files import as_object, official, read_json, reading, take
from lit_prune.evaluation.scorers.rule import Question

FIELDS = ("question", "answer", "imageId", "isBalanced", "groups", "types")


class GQAFiles(Benchmark):
    """`SPLIT_questions.json`, and TIER_choices.json where it is there, for validity and plausibility.

    Questions out of the balanced set are read, and the rule leaves them out.
    """

    rule = "gqa"
    source = "GQA is at https://cs.stanford.edu/people/dorarad/gqa/download.html (CC BY 4.0)."
    image_source = "The images are at https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip."
    splits = ("testdev_balanced", "val_balanced", "testdev_all", "val_all")
    image_folders = ("images", ".")

    def load(self, root: Path, split: str | None = None, answers: Sequence[Answer] = ()) -> Labels:
        split = self.chosen(split)
        name = f"{split}_questions.json"
        path = official(root, [name, f"questions1.2/{name}", f"data/{name}", f"data/questions1.2/{name}"], self.source)
        choices_path = path.parent / f"{split.partition('_')[0]}_choices.json"
        choices = read_json(choices_path) if choices_path.exists() else {}
        questions = []
        for index, (number, record) in enumerate(as_object(read_json(path), str(path)).items()):
            place = f"{path}, question {number}"
            with reading(place):
                text, answer, image, balanced, groups, types = take(record, place, *FIELDS)
                types = {name: types[name] for name in ("structural", "semantic", "detailed")}
                reference = {"answer": answer, "isBalanced": balanced, "groups": {"global": groups["global"]}}
                reference |= {"types": types} | ({"choices": choices[number]} if number in choices else {})
                prompt = lines(text, SHORT)
                questions.append(Question(number, f"{image}.jpg", text, reference, index=index, prompt=prompt))
        return Labels(questions, [path, *([choices_path] if choices else [])])


BENCHMARK = GQAFiles()

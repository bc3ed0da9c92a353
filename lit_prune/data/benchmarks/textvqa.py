"""TextVQA: questions about text in images, with ten answers each."""

from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path

from lit_prune.data.benchmarks.base import SHORT, Benchmark, Labels, lines
from lit_prune.errors import LitPruneError
from lit_prune.evaluation.scorers.answers import Answer
from lit_prune.evaluation.scorers.files import official, read_records, reading, take
from lit_prune.evaluation.scorers.rule import Question

OCR = "Reference OCR token: "


class TextVQAFiles(Benchmark):
    """`TextVQA_0.5.1_SPLIT.json`; with `ocr`, the tokens of `TextVQA_Rosetta_OCR_v0.2_SPLIT.json` in the prompt.

    LLaVA-1.5 was evaluated with OCR tokens. Its answers name a question by image and text, in lower case, submissions
    by `question_id`.

    Args:
        ocr: put the OCR tokens into the prompt, as LLaVA-1.5's evaluation did.
    """

    rule = "textvqa"
    source = "TextVQA is at https://textvqa.org/dataset (CC BY 4.0)."
    image_source = "The images are at https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip."
    splits = ("val", "train")
    image_folders = ("train_images", "train_val_images/train_images", ".")

    def __init__(self, ocr: bool = False) -> None:
        self.ocr = ocr
        self.label_suffix = "-ocr" if ocr else ""

    def load(self, root: Path, split: str | None = None, answers: Sequence[Answer] = ()) -> Labels:
        split = self.chosen(split)
        path = official(root, [f"TextVQA_0.5.1_{split}.json"], self.source)
        files, tokens = [path], {}
        if self.ocr:
            files.append(official(root, [f"TextVQA_Rosetta_OCR_v0.2_{split}.json"], self.source))
            tokens = _tokens(files[1])
        questions = []
        for index, (place, record) in enumerate(read_records(path, "data")):
            with reading(place):
                number, image, text, given = take(record, place, "question_id", "image_id", "question", "answers")
                if self.ocr and image not in tokens:
                    raise LitPruneError(f"{files[1]}: no image {image}")
                prompt = lines(text, OCR + ", ".join(tokens[image]) if self.ocr else "", SHORT)
                reference = {"answers": list(given)}
                questions.append(Question(number, f"{image}.jpg", text, reference, index=index, prompt=prompt))
        return Labels(questions, files)

    def keys(self, question: Question) -> Iterable[Hashable]:
        return [str(question.id), (question.image.removesuffix(".jpg"), question.text.lower())]

    def key(self, answer: Answer) -> Hashable:
        image = answer.image or answer.id
        if answer.question is not None and image is not None:
            return image.removesuffix(".jpg"), question_of(answer.question).lower()
        return super().key(answer)


def question_of(prompt: str) -> str:
    """The question in one of LLaVA's prompts: the first line, or the second after OCR tokens."""
    first, _, rest = prompt.partition("\n")
    return rest.partition("\n")[0] if first.startswith(OCR.strip()) else first


def _tokens(path: Path) -> dict[str, list[str]]:
    found = {}
    for place, record in read_records(path, "data"):
        image, tokens = take(record, place, "image_id", "ocr_tokens")
        found[image] = tokens
    return found


BENCHMARK = TextVQAFiles()

"""Tiny copies of the benchmarks in their official layouts, with invented questions."""

import base64
import json
from pathlib import Path
from typing import Any

CONFIDENT = [{"answer_confidence": "yes", "answer_id": n} for n in range(1, 11)]
PICTURE = base64.b64encode(b"picture").decode()


def ten(answer: str, others: int = 0) -> list[dict[str, Any]]:
    """Ten annotators, of whom some say otherwise."""
    given = ["other"] * others + [answer] * (10 - others)
    return [{"answer": text, **rest} for text, rest in zip(given, CONFIDENT, strict=True)]


def write_vqa(root: Path) -> None:
    questions = [
        {"question_id": 11, "image_id": 1, "question": "What is it?"},
        {"question_id": 12, "image_id": 1, "question": "How many?"},
        {"question_id": 21, "image_id": 2, "question": "What is it?"},
    ]
    answers = {11: ten("cat", 7), 12: ten("2"), 21: ten("dog", 1)}
    annotations = [
        {"question_id": n, "answer_type": "number" if n == 12 else "other", "answers": given}
        for n, given in reversed(answers.items())
    ]
    dump(root / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    dump(root / "v2_mscoco_val2014_annotations.json", {"annotations": annotations})
    dump(root / "v2_OpenEnded_mscoco_test-dev2015_questions.json", {"questions": questions})


def write_vizwiz(root: Path) -> None:
    names = ["VizWiz_val_00000000.jpg", "VizWiz_val_00000001.jpg"]
    records = [{"image": name, "question": "What is this? ", "answerable": 1} for name in names]
    answers = [{"answers": ten("can"), "answer_type": "other"}]
    answers.append({"answers": ten("unanswerable", 5), "answer_type": "unanswerable"})
    dump(root / "Annotations" / "val.json", [a | b for a, b in zip(records, answers, strict=True)])
    dump(root / "Annotations" / "test.json", records)


def write_textvqa(root: Path) -> None:
    records = [
        {"question_id": 5, "image_id": "ab", "question": "What does it SAY?", "answers": ["stop"] * 10},
        {"question_id": 6, "image_id": "ab", "question": "what brand?", "answers": ["acme"] * 8 + ["none"] * 2},
    ]
    dump(root / "TextVQA_0.5.1_val.json", {"data": records})
    dump(root / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": [{"image_id": "ab", "ocr_tokens": ["STOP", "acme"]}]})


def write_gqa(root: Path) -> None:
    def record(question: str, answer: str, structural: str) -> dict[str, Any]:
        types = {"structural": structural, "semantic": "obj", "detailed": "x"}
        rest = {"imageId": "n7", "isBalanced": True, "groups": {"global": "g", "local": "l"}, "types": types}
        return {"question": question, "answer": answer, "fullAnswer": answer, **rest}

    records = {"201": record("Is it red?", "yes", "verify"), "202": record("What is it?", "cup", "query")}
    dump(root / "testdev_balanced_questions.json", records)


POPE = {
    "random": [("a.jpg", "a cat", "yes"), ("a.jpg", "an oven", "no"), ("b.jpg", "a dog", "yes")],
    "popular": [("a.jpg", "a cat", "yes"), ("b.jpg", "a person", "no")],
    "adversarial": [("a.jpg", "a cat", "yes"), ("b.jpg", "a person", "no")],
}


def write_pope(root: Path) -> None:
    for split, records in POPE.items():
        lines = [
            {"question_id": n, "image": image, "text": f"Is there {thing} in the image?", "label": label}
            for n, (image, thing, label) in enumerate(records, 1)
        ]
        dump_lines(root / f"coco_pope_{split}.json", lines)


def write_mme(root: Path) -> None:
    """Half of the categories have folders for images and texts, as in the release."""
    from lit_prune.evaluation.scorers.mme import CATEGORIES

    for n, category in enumerate(CATEGORIES):
        folder = root / "MME_Benchmark_release_version" / category
        texts, images = (folder / "questions_answers_YN", folder / "images") if n % 2 else (folder, folder)
        for path in (texts, images):
            path.mkdir(parents=True, exist_ok=True)
        (images / "0001.png").write_bytes(b"")
        lines = ["Is it a cat? Please answer yes or no.\tYes", "Is it a  dog?  Please answer yes or no.\tNo"]
        (texts / "0001.txt").write_text("\n".join(lines) + "\n")


def write_scienceqa(root: Path) -> None:
    problem = {"choices": ["red", "blue"], "hint": "", "image": None, "answer": 1}
    problems = {
        "1": {"question": "Which colour?", **problem},
        "2": {"question": "Which one?\nSay.", **problem, "hint": "Look  at it. ", "image": "image.png", "answer": 0},
        "3": {"question": "Not in this split?", **problem},
    }
    dump(root / "problems.json", problems)
    dump(root / "pid_splits.json", {"test": ["1", "2"], "train": ["3"]})


def write_mmbench(root: Path) -> None:
    header = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "l2-category", "image"]
    rows = [
        ["1", 'What "is" it?', "Look.", "cat", "dog", "", "", "A", "identity", "coarse_perception", PICTURE],
        ["1000001", 'What "is" it?', "Look.", "dog", "cat", "", "", "B", "identity", "coarse_perception", "1"],
        ["2", "How\nmany?", "nan", "one", "two", "three", "", "C", "count", "logic_reasoning", PICTURE],
    ]
    cells = [["\t".join(f'"{cell}"'.replace('"is"', '""is""') for cell in row)] for row in [header, *rows]]
    (root / "mmbench_dev_20230712.tsv").write_text("\n".join(row for (row,) in cells) + "\n")


def write_seedbench(root: Path) -> None:
    def record(number: str, kind: int, data: str, answer: str) -> dict[str, Any]:
        options = {f"choice_{letter}": f"option {letter}" for letter in "abcd"}
        rest = {"data_type": data, "data_id": "77", "question": "What?", "answer": answer}
        return {"question_id": number, "question_type_id": kind, **rest, **options}

    records = [record("101", 1, "image", "A"), record("102", 5, "image", "B"), record("v0", 10, "video", "D")]
    dump(root / "SEED-Bench.json", {"questions": records, "question_type": {"Scene Understanding": 1}})


def write_mmvet(root: Path) -> None:
    dump(root / "mm-vet.json", {"v1_0": {"imagename": "v1_0.png", "question": "What is x?", "answer": "1"}})


WRITERS = {name.removeprefix("write_"): write for name, write in list(globals().items()) if name.startswith("write_")}


def dump(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def dump_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path

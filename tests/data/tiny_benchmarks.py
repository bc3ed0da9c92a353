"""Tiny copies of public benchmarks in their official formats, of scenes and questions of the generated world.

`WRITERS[name](root)` writes the files and images of a benchmark as they are downloaded, a few questions each.
"""

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lit_prune.evaluation.scorers.mme import CATEGORIES
from lit_prune.micro.drawing import COLOURS
from lit_prune.micro.world import SAMPLE_SEED, Question, Scene, make_scene

SCENES = 3
MMBENCH = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category")


def scenes(count: int = SCENES) -> list[Scene]:
    return [make_scene(SAMPLE_SEED + number) for number in range(count)]


def save(scene: Scene, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scene.image().save(path)


def dump(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def ten(answer: str) -> list[dict[str, Any]]:
    """Ten annotators, of whom two say something else."""
    given = [answer] * 8 + ["unsure"] * 2
    return [{"answer": text, "answer_confidence": "yes", "answer_id": n} for n, text in enumerate(given, 1)]


def options(question: Question) -> list[str]:
    """Four options, the right one at a place that depends on the question."""
    others = [colour for colour in COLOURS if colour != question.answer][:3]
    place = len(question.text) % 4
    return [*others[:place], question.answer, *others[place:]]


def of_skill(scene: Scene, *skills: str) -> list[Question]:
    return [question for question in scene.questions() if question.skill in skills]


def write_vqa(root: Path) -> None:
    asked: dict[str, list[dict]] = {"val2014": [], "test2015": []}
    annotations = []
    for image, scene in enumerate(scenes(), 1):
        for split, records in asked.items():
            save(scene, root / split / f"COCO_{split}_{image:012d}.jpg")
            for number, question in enumerate(of_skill(scene, "colour", "counting", "existence")):
                name = {"question_id": 1000 * image + number, "image_id": image}
                records.append({**name, "question": question.text})
                kind = {"counting": "number", "existence": "yes/no"}.get(question.skill, "other")
                if split == "val2014":
                    rest = {"question_type": "what", "answer_type": kind, "multiple_choice_answer": question.answer}
                    annotations.append({**name, **rest, "answers": ten(question.answer)})
    dump(root / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": asked["val2014"]})
    dump(root / "v2_mscoco_val2014_annotations.json", {"annotations": annotations[::-1]})
    dump(root / "v2_OpenEnded_mscoco_test2015_questions.json", {"questions": asked["test2015"]})
    dump(root / "v2_OpenEnded_mscoco_test-dev2015_questions.json", {"questions": asked["test2015"][::2]})


def write_gqa(root: Path) -> None:
    records = {}
    for image, scene in enumerate(scenes(), 1):
        save(scene, root / "images" / f"n{image}.jpg")
        for number, question in enumerate(of_skill(scene, "colour", "existence")):
            structural = "verify" if question.skill == "existence" else "query"
            rest = {"types": {"structural": structural, "semantic": "attr", "detailed": "x"}, "fullAnswer": ""}
            groups = {"global": question.skill, "local": "x"}
            records[f"20{image}{number}"] = {
                "question": question.text, "answer": question.answer, "imageId": f"n{image}", "isBalanced": True,
                "groups": groups, "semantic": [], "entailed": [], "equivalent": [], **rest,
            }  # fmt: skip
    dump(root / "testdev_balanced_questions.json", records)


def write_textvqa(root: Path) -> None:
    records, tokens = [], []
    for image, scene in enumerate(scenes(), 1):
        name = f"00a{image}"
        save(scene, root / "train_images" / f"{name}.jpg")
        tokens.append({"image_id": name, "ocr_tokens": [q.answer for q in of_skill(scene, "digit")]})
        for number, question in enumerate(of_skill(scene, "digit", "counting")):
            ids = {"question_id": 10 * image + number, "image_id": name}
            answers = [each["answer"] for each in ten(question.answer)]
            records.append({**ids, "question": question.text, "answers": answers})
    dump(root / "TextVQA_0.5.1_val.json", {"data": records})
    dump(root / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": tokens})


def write_vizwiz(root: Path) -> None:
    for split in ("val", "test"):
        records = []
        for image, scene in enumerate(scenes()):
            name = f"VizWiz_{split}_{image:08d}.jpg"
            save(scene, root / split / name)
            question = of_skill(scene, "colour")[0]
            record = {"image": name, "question": question.text}
            if split == "val":
                record |= {"answers": ten(question.answer), "answer_type": "other", "answerable": 1}
            records.append(record)
        dump(root / "Annotations" / f"{split}.json", records)


def write_scienceqa(root: Path) -> None:
    problems = {}
    for number, scene in enumerate(scenes(), 1):
        save(scene, root / "images" / "test" / str(number) / "image.png")
        question = of_skill(scene, "colour")[0]
        choices = options(question)
        answer = choices.index(question.answer)
        rest = {"hint": "Look at it.", "image": "image.png", "split": "test", "subject": "natural science"}
        problems[str(number)] = {"question": question.text, "choices": choices, "answer": answer, **rest}
    text = {"question": "Which is a colour?", "choices": ["tile", "red"], "answer": 1, "hint": "", "image": None}
    problems["9"] = {**text, "split": "test", "subject": "language science"}
    dump(root / "problems.json", problems)
    dump(root / "pid_splits.json", {"test": list(problems), "train": []})


def write_pope(root: Path) -> None:
    for image, scene in enumerate(scenes(), 1):
        save(scene, root / "val2014" / f"COCO_val2014_{image:012d}.jpg")
    for offset, split in enumerate(("random", "popular", "adversarial")):
        lines = []
        for image, scene in enumerate(scenes(), 1):
            for question in scene.questions({"existence": 2 + offset}):
                thing = question.text.removeprefix("Is there ").removesuffix("?")
                text = {"image": f"COCO_val2014_{image:012d}.jpg", "text": f"Is there {thing} in the image?"}
                lines.append({"question_id": len(lines) + 1, **text, "label": question.answer})
        (root / "coco").mkdir(parents=True, exist_ok=True)
        (root / "coco" / f"coco_pope_{split}.json").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_mme(root: Path) -> None:
    """As released: some categories have folders of their own for images and texts."""
    for number, category in enumerate(CATEGORIES):
        folder = root / "MME_Benchmark_release_version" / category
        scene = scenes(number + 1)[-1]
        images, texts = (folder / "images", folder / "questions_answers_YN") if number % 2 else (folder, folder)
        save(scene, images / f"{number:04d}.png")
        texts.mkdir(parents=True, exist_ok=True)
        colour = of_skill(scene, "colour")[0]
        other = next(name for name in COLOURS if name != colour.answer)
        asked = [(colour.answer, "Yes"), (other, "No")]
        lines = [f"Is the object {name}? Please answer yes or no.\t{label}\n" for name, label in asked]
        (texts / f"{number:04d}.txt").write_text("".join(lines))


def write_mmbench(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, scene in enumerate(scenes(), 1):
        question = of_skill(scene, "colour")[0]
        encoded = io.BytesIO()
        scene.image().save(encoded, "PNG")
        picture, choices = base64.b64encode(encoded.getvalue()).decode(), options(question)
        for turn in range(4):
            turned = choices[turn:] + choices[:turn]
            answer = "ABCD"[turned.index(question.answer)]
            image = picture if turn == 0 else str(number)
            head = [str(number + 1_000_000 * turn), question.text, "Look.", *turned, answer]
            rows.append([*head, "identity", image, "made", "coarse_perception"])
    table = "".join("\t".join(row) + "\n" for row in [list(MMBENCH), *rows])
    for name in ("mmbench_dev_20230712.tsv", "mmbench_dev_cn_20231003.tsv"):
        (root / name).write_text(table, encoding="utf-8")


def write_seedbench(root: Path) -> None:
    records = []
    for number, scene in enumerate(scenes(), 1):
        question = of_skill(scene, "colour")[0]
        choices = options(question)
        rest = {f"choice_{letter}": choice for letter, choice in zip("abcd", choices, strict=True)}
        rest |= {"question": question.text, "answer": "ABCD"[choices.index(question.answer)]}
        save(scene, root / "SEED-Bench-image" / f"1454426_{number}.png")
        data = {"data_type": "image", "data_id": f"1454426_{number}.png", "question_type_id": number}
        records.append({"question_id": str(101 + number), **data, **rest})
    save(scene, root / "SEED-Bench-video-image" / "10_v1.png")
    data = {"data_type": "video", "data_id": "1.mp4", "question_type_id": 10}
    records.append({"question_id": "v1", **data, **rest})
    dump(root / "SEED-Bench.json", {"questions": records, "question_type": {}})


def write_mmvet(root: Path) -> None:
    records = {}
    for number, scene in enumerate(scenes()):
        question = of_skill(scene, "position")[0]
        save(scene, root / "images" / f"v1_{number}.png")
        rest = {"imagesource": "made", "capability": ["rec"]}
        records[f"v1_{number}"] = {"imagename": f"v1_{number}.png", "question": question.text, **rest}
        records[f"v1_{number}"]["answer"] = question.answer
    dump(root / "mm-vet.json", records)


WRITERS: dict[str, Callable[[Path], None]] = {
    name.removeprefix("write_"): write for name, write in list(globals().items()) if name.startswith("write_")
}

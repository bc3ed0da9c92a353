"""The same samples for every kind of source, batches to compare, and files with damage."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from instruct_samples import conversation
from PIL import Image

from lit_prune.data.dataset import Collate, InstructDataset
from lit_prune.data.sources import open_source
from lit_prune.errors import BadSample, LitPruneError
from lit_prune.files.images import decode_image


def write_shapes(folder: Path) -> None:
    """Seven samples in all shapes as `data.jsonl`: no image, one, two; one or two turns; two of them are bad."""
    (folder / "a").mkdir(parents=True)
    for name in ("a/x.png", "a/y.jpg"):
        Image.effect_noise((9, 12), 60).convert("RGB").save(folder / name)
    turns = conversation("<image>\nQ", "A", "Then", "B")
    records = [
        {"id": "one", "images": ["a/x.png"], "conversations": conversation("<image>\nQ", "yes"), "skill": "counting"},
        {"id": "two", "images": ["a/y.jpg"], "conversations": turns, "boxes": [[0, 1, 2, 3]]},
        {"id": "text", "images": None, "conversations": conversation("Hi", "Ho")},
        {"id": "both", "images": ["a/y.jpg", "a/x.png"], "conversations": conversation("<image> <image> Q", "A")},
        {"id": "bad", "images": ["a/none.png"], "conversations": conversation("<image>\nQ", "yes")},
        {"id": "open", "images": ["a/x.png"], "conversations": conversation("<image>\nQ")},
        {"id": "last", "images": ["a/x.png"], "conversations": conversation("No marker", "A")},
    ]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, records)))


def rows(folder, stored):
    """The records of the folder as table rows, with each image path as `stored(path)`."""
    for line in (folder / "data.jsonl").read_text().splitlines():
        record = json.loads(line)
        yield {"skill": None, "boxes": None, **record, "images": [stored(path) for path in record["images"] or []]}


def as_bytes(folder):
    def stored(path):
        file = folder / path
        return {"bytes": file.read_bytes() if file.is_file() else b"no image", "path": path}

    return stored


def batch_of(source, processor) -> dict:
    dataset = InstructDataset(source, processor, mode="eval")
    return Collate(0, "eval")(dataset.__getitems__(list(range(len(dataset)))))


def assert_same(found: dict, expected: dict) -> None:
    """Bit for bit, and the same samples are bad."""
    assert found["inputs"].keys() == expected["inputs"].keys()
    for part in ("inputs", "prompts"):
        assert all(torch.equal(found[part][key], value) for key, value in expected[part].items())
    for key in ("ids", "answers", "questions", "skills", "boxes", "records"):
        assert found[key] == expected[key], key
    assert [sample[1] for sample in found["skipped"]] == [sample[1] for sample in expected["skipped"]]


def damaged(file: Path, count: int) -> Iterator[Path]:
    """The file with 1, 3 or 20 bytes changed at random, `count` times over."""
    data, changed = file.read_bytes(), file.with_name(f"damaged{file.suffix}")
    for seed in range(count):
        draw, copy = random.Random(seed), bytearray(data)
        for _ in range(draw.choice([1, 3, 20])):
            copy[draw.randrange(len(copy))] = draw.randrange(256)
        changed.write_bytes(copy)
        yield changed
        for rest in file.parent.glob("damaged*"):
            rest.unlink()


def outcome(path: Path) -> str:
    """What comes of reading all samples of a location: it is refused, samples are bad, or all is well."""
    try:
        source = open_source(path)
    except LitPruneError:
        return "refused"
    bad = 0
    for index in range(len(source)):
        try:
            for image in source.images(index, source[index]):
                with image.open() as file:
                    decode_image(file, image.name)
        except BadSample:
            bad += 1
    return "bad" if bad else "fine"

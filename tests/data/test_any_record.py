"""Records in any dress, close to valid and far from it: read as what they say, or named as bad samples."""

import io
import json
from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from dressed import COLOURS, Said, anything, conversations, dressed, objects, spoilt, write_images
from hypothesis import given, settings
from hypothesis import strategies as st
from prompt_families import PROCESSORS

from lit_prune.data.conversation import IGNORED
from lit_prune.data.dataset import Collate, InstructDataset
from lit_prune.data.records import ROLES, image_paths, without_images
from lit_prune.data.references import ImageFile, image_file
from lit_prune.data.sources import Source
from lit_prune.errors import BadSample

MANY = settings(max_examples=1000, deadline=None, derandomize=True, database=None)


class Held(Source):
    """Records as JSON reads them, without a file; what JSON cannot hold is no input."""

    def __init__(self, records: list[Any], root: Path):
        self.records, self.root = records, root

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        record = deepcopy(self.records[index])
        if not isinstance(record, dict):
            raise BadSample("x", index, "a JSON object was expected")
        return record

    def images(self, index, record):
        return [image_file(value, number, self.root) for number, value in enumerate(image_paths(record))]

    def file_of(self, index):
        return "x"

    @property
    def files(self):
        return []


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("any"))


@pytest.fixture(scope="module")
def qwen():
    """Bytes: every text comes back as it went in."""
    return PROCESSORS["qwen3-vl"]()


def fetched(record: Any, processor, root: Path, mode: str = "train") -> dict:
    """The batch of one record: exactly one sample, good or bad, and no exception."""
    data = InstructDataset(Held([record], root), processor, None, mode)
    batch = Collate(0, mode)(data.__getitems__([0]))
    assert len(batch["ids"]) + len(batch["skipped"]) == 1
    for bad in batch["skipped"]:
        assert (bad.file, bad.record) == ("x", 0)
        assert bad.reason
        assert len(bad.reason) <= 500
        assert "Traceback" not in bad.reason
    return batch


def labelled(processor, inputs: dict) -> list[str]:
    """The texts that carry labels."""
    labels = inputs["labels"][0]
    runs, run = [], []
    for label in [*labels.tolist(), IGNORED]:
        if label != IGNORED:
            run.append(label)
        elif run:
            runs, run = [*runs, processor.tokenizer.decode(run)], []
    return runs


def read(processor, inputs: dict) -> str:
    """All text, each image as one token."""
    kept = []
    for token in inputs["input_ids"][0].tolist():
        if token != processor.image_token_id or not kept or kept[-1] != token:
            kept.append(token)
    return processor.tokenizer.decode(kept)


def shown(inputs: dict) -> list[str]:
    """The images by their colours, in the order in which the model gets them."""
    if "pixel_values" not in inputs:
        return []
    sizes = inputs["image_grid_thw"].prod(1).tolist()
    means = [patches.reshape(len(patches), 3, -1).mean((0, 2)) for patches in inputs["pixel_values"].split(sizes)]
    return [list(COLOURS)[int(mean.argmax())] for mean in means]


def written(said: Said) -> str:
    """The conversation as Qwen's template renders it, written by hand."""
    turn = "<|im_start|>{}\n{}<|im_end|>\n"
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    text = turn.format("system", said.system) if said.system else ""
    for images, question, answer, _ in said.turns:
        text += turn.format("user", image * len(images) + question) + turn.format("assistant", answer)
    return text.removesuffix("\n")


@MANY
@given(st.data())
def test_a_record_in_any_dress_is_read_as_what_it_says(root, qwen, data):
    said = data.draw(conversations())
    record = json.loads(json.dumps(data.draw(dressed(said, root))))
    batch = fetched(record, qwen, root)
    assert not batch["skipped"], (record, batch["skipped"])
    assert read(qwen, batch["inputs"]) == written(said)
    assert labelled(qwen, batch["inputs"]) == [f"{answer}<|im_end|>" for *_, answer, trained in said.turns if trained]
    assert shown(batch["inputs"]) == said.images
    assert batch["answers"] == [said.turns[-1][2]]
    assert batch["questions"] == [said.turns[-1][1]]


@settings(MANY, max_examples=200)
@given(st.data())
def test_evaluation_labels_every_answer(root, qwen, data):
    said = data.draw(conversations())
    batch = fetched(data.draw(dressed(said, root)), qwen, root, "eval")
    assert labelled(qwen, batch["inputs"]) == [f"{answer}<|im_end|>" for *_, answer, _ in said.turns]
    end = f"{said.turns[-1][2]}<|im_end|>"
    assert read(qwen, {"input_ids": batch["prompts"]["input_ids"]}) == written(said).removesuffix(end)


class Apart(Held):
    """As a shard stores a record: its images elsewhere, in the order of `image_paths`."""

    def __init__(self, record: dict, images: list[bytes], root: Path):
        super().__init__([record], root)
        self.stored = images

    def images(self, index, record):
        assert len(image_paths(record)) == len(self.stored)
        return [ImageFile("x", partial(io.BytesIO, data)) for data in self.stored]


@settings(MANY, max_examples=200)
@given(st.data())
def test_a_record_without_its_images_says_the_same(root, qwen, data):
    record = data.draw(dressed(data.draw(conversations()), root))
    expected = InstructDataset(Held([record], root), qwen)[0]
    images = [file.open().read() for file in Held([record], root).images(0, record)]
    stripped = json.loads(json.dumps(without_images(deepcopy(record))))
    assert "iVBORw0KGgo" not in json.dumps(stripped)
    found = InstructDataset(Apart(stripped, images, root), qwen)[0]
    assert found.inputs.keys() == expected.inputs.keys()
    assert all(torch.equal(found.inputs[key], value) for key, value in expected.inputs.items())
    assert (found.question, found.answer) == (expected.question, expected.answer)


def literal_answers(record: dict) -> Iterator[tuple[str, bool]]:
    """Every answer that a record holds after its first question, with whether it is trained on, read bluntly."""
    turns = next((record[key] for key in ("conversations", "messages", "conversation") if record.get(key)), None)
    if turns is None:
        pairs = [("instruction", "output"), ("query", "response"), ("question", "answer"), ("prompt", "completion")]
        told = next(told for asked, told in pairs if record.get(asked) and record.get(told) is not None)
        turns = [{"role": "assistant", "content": said} for _, said in record.get("history") or []]
        turns = [{"role": "user", "content": "?"}, *turns, {"role": "assistant", "content": record[told]}]
    asked = False
    for turn in turns:
        role = ROLES[(turn["from"] if turn.get("from") is not None else turn["role"]).strip().lower()]
        content = turn["value"] if turn.get("value") is not None else turn.get("content")
        asked |= role == "user"
        if role == "assistant" and asked:
            parts = content if isinstance(content, list) else [content]
            said = [part["text"] if isinstance(part, dict) else part for part in parts]
            said = [text if isinstance(text, str) else json.dumps(text) for text in said if text is not None]
            text = " ".join(text.strip() for text in said if text.strip())
            yield text, all(turn.get(key) in (None, 1) for key in ("weight", "loss", "train"))


def check(record: dict, processor, root: Path) -> bool:
    """True if the record is good; then its labels must be its answers."""
    batch = fetched(record, processor, root)
    if batch["skipped"]:
        return False
    answers = list(literal_answers(record))
    assert labelled(processor, batch["inputs"]) == [f"{text}<|im_end|>" for text, trained in answers if trained]
    return True


@MANY
@given(st.data())
def test_spoilt_records_are_bad_or_right(root, qwen, data):
    said = data.draw(conversations())
    check(data.draw(spoilt(data.draw(dressed(said, root)))), qwen, root)


@settings(MANY, max_examples=500)
@given(objects)
def test_any_object_is_bad_or_right(root, qwen, record):
    check(record, qwen, root)


@settings(MANY, max_examples=200)
@given(anything.filter(lambda value: not isinstance(value, dict)))
def test_what_is_no_object_is_bad(root, qwen, value):
    assert fetched(value, qwen, root)["skipped"]


@settings(MANY, max_examples=200)
@given(st.data(), st.sampled_from(["video", "videos", "audio", "audios", "tools", "functions"]))
def test_what_is_not_read_is_said(root, qwen, data, key):
    record = data.draw(dressed(data.draw(conversations()), root))
    record[key] = data.draw(st.sampled_from(["v.mp4", ["v.mp4"], {"path": "v.mp4"}, [{"name": "f"}]]))
    (bad,) = fetched(record, qwen, root)["skipped"]
    assert f"it has {key}: " in bad.reason

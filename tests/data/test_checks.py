"""Errors about data as a whole come before a model is loaded, and unread keys are named once."""

import json
import logging
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest
from instruct_samples import conversation, make_data, write_samples
from lightning.pytorch import Trainer
from PIL import Image
from recording import QUIET, Recorder

from lit_prune.cli import main
from lit_prune.commands.trainer import build
from lit_prune.data.instruct import InstructData
from lit_prune.data.micro import MicroData
from lit_prune.data.sources import json_files
from lit_prune.data.streamed import StreamedData
from lit_prune.errors import LitPruneError

MICRO = str(Path(__file__).parents[2] / "configs" / "micro.yaml")
TEXT = {"conversations": conversation("Q", "A")}


def write(path: Path, records: list[dict]) -> str:
    path.write_text("\n".join(map(json.dumps, records)))
    return str(path)


def check(stage: str, **options) -> None:
    InstructData(base="unused", **options).check(stage)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.json", None, "no such file"),
        ("a.json", b'[{"a": 1', "not JSON: "),
        ("a.json", b"\xff\xfe[", "not UTF-8"),
        ("a.json", b"[]", "no samples"),
        ("a.json", b"", "an empty file"),
        ("a.jsonl", b"", "no samples"),
        ("a.jsonl", b"no JSON\n", "no JSON lines"),
        ("a.jsonl", b'{"a": 1}\n{"b": 2}', "none of 2 records can be read: sample 0: neither .*; its keys are a"),
        ("a.json", b'[{"conversatons": []}]', "its keys are conversatons"),
        ("a.parquet", b"x", "cannot be read"),
        ("a.tar", b"x", "not a whole, uncompressed tar"),
        ("a.txt", b"x", "instruction data end in"),
    ],
)
@pytest.mark.parametrize(("stage", "split"), [("fit", "train"), ("fit", "val"), ("validate", "val"), ("test", "test")])
def test_data_that_cannot_be_read_are_noticed_first(tmp_path, stage, split, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    train = {"train": str(write_samples(tmp_path / "good", 4))} if split == "val" and stage == "fit" else {}
    with pytest.raises(LitPruneError, match=f"{name.partition('.')[0]}.*{words}"):
        check(stage, **train, **{split: str(tmp_path / name)})


def test_what_a_verb_does_not_read_may_be_missing(tmp_path):
    path = str(write_samples(tmp_path, 4))
    check("test", test=path, train="none.json", val="none.json")
    check("fit", train=path, test="none.json")
    MicroData(root=str(tmp_path / "none")).check("fit")
    with pytest.raises(LitPruneError, match="data: val is not given: validate needs"):
        check("validate", train=path)
    with pytest.raises(LitPruneError, match=r"none is no folder"):
        check("test", test=path, images=str(tmp_path / "none"))


def test_prediction_needs_questions_only(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"conversations": conversation("Q")}])
    check("predict", predict=path)
    with pytest.raises(LitPruneError, match="a conversation without an answer"):
        check("test", test=path)


def test_a_source_of_bad_samples_is_taken_where_all_may_be_bad(tmp_path):
    check("test", test=write(tmp_path / "a.jsonl", [{"a": 1}]), max_bad_share=1.0)


def test_what_was_opened_is_not_opened_again(processor, tmp_path, monkeypatch):
    path, opened = str(write_samples(tmp_path, 8)), []
    init = json_files.JsonFile.__init__
    monkeypatch.setattr(json_files.JsonFile, "__init__", lambda *args: opened.append(args) or init(*args))
    data = make_data(processor, train=path, test=path)
    data.check("fit")
    data.check("test")
    assert len(opened) == 2  # one for each split
    data.setup("fit")
    data.setup("test")
    assert len(opened) == 2
    data.setup("test")
    assert len(opened) == 3  # the file may have changed since


# Data without images
@pytest.mark.parametrize("key", ["image_path", "img", "imgae", "pictures", "Images"])
def test_training_without_an_image_is_an_error(tmp_path, key):
    path = write(tmp_path / "a.jsonl", [{**TEXT, key: f"{number}.png"} for number in range(12)])
    with pytest.raises(LitPruneError, match=f"none of 12 records shows an image.*nothing reads `{key}`"):
        check("fit", train=path)


def test_one_image_is_enough(tmp_path):
    texts = write(tmp_path / "a.jsonl", [TEXT] * 500)
    with pytest.raises(
        LitPruneError, match="none of 1000 records shows an image, and pruning learns from images alone"
    ):
        check("fit", train=[texts, texts])
    last = write(tmp_path / "b.jsonl", [TEXT] * 499 + [{**TEXT, "image": "a.png"}])
    check("fit", train=[texts, last])
    inside = [{"role": "user", "content": [{"type": "image", "path": "a.png"}]}, {"role": "assistant", "content": "A"}]
    check("fit", train=write(tmp_path / "c.jsonl", [{"messages": inside}]))


def test_a_column_that_nothing_reads(tmp_path, caplog):
    table = pyarrow.table({"image_file": ["a.png"], "conversations": [TEXT["conversations"]]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(LitPruneError, match="nothing reads `image_file`"):
        check("fit", train=str(tmp_path / "a.parquet"))
    check("test", test=str(tmp_path / "a.parquet"))
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'a.parquet'}: no record shows an image, and nothing reads image_file"
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_key_that_some_records_have_is_named_once(processor, tmp_path, caplog, workers):
    Image.new("RGB", (8, 8)).save(tmp_path / "red.png")
    good = {"image": "red.png", "conversations": conversation("<image>Q", "A"), "image_path": "red.png"}
    path = write(tmp_path / "a.jsonl", [good] * 12 + [{**TEXT, "img_path": "red.png"}] * 12)
    data = make_data(processor, train=path, num_workers=workers)
    Trainer(max_epochs=2, default_root_dir=tmp_path, enable_checkpointing=False, **QUIET).fit(Recorder(), data)
    (told,) = [record.getMessage() for record in caplog.records if "nothing reads" in record.getMessage()]
    assert told.startswith(f"{path}: sample ")
    assert told.endswith("has no image, and nothing reads its img_path")


def test_training_on_texts_alone_is_said(processor, tmp_path, caplog):
    """Also if `check` was never called, and for streams, whose records cannot be read in advance."""
    caplog.set_level(logging.WARNING, "lit_prune")
    options = {"max_epochs": 1, "default_root_dir": tmp_path, "enable_checkpointing": False, **QUIET}
    path = write(tmp_path / "a.jsonl", [TEXT] * 12)
    Trainer(**options).fit(Recorder(), make_data(processor, train=path))
    assert "none of the 12 samples trained on so far shows an image" in caplog.text
    caplog.clear()
    datasets.Dataset.from_list([TEXT] * 150).to_parquet(tmp_path / "b" / "a.parquet")
    data = StreamedData(base="unused", train=str(tmp_path / "b"), batch_size=10, steps=30)
    data.processor = processor
    data.check("fit")
    Trainer(**options).fit(Recorder(), data)
    assert [record.getMessage() for record in caplog.records] == [
        "none of the 100 samples trained on so far shows an image: nothing is learnt from them"
    ]
    caplog.clear()
    good = write_samples(tmp_path / "c", 8)
    Trainer(**options).fit(Recorder(), make_data(processor, train=str(good)))
    assert not caplog.records


def test_streams_are_checked(tmp_path, folder):
    with pytest.raises(LitPruneError, match="only parquet, arrow and the hub are streamed"):
        StreamedData(base="unused", train=str(folder / "data.jsonl")).check("fit")
    with pytest.raises(LitPruneError, match="no such file"):
        StreamedData(base="unused", train=str(tmp_path / "none.parquet")).check("fit")
    with pytest.raises(LitPruneError, match="train is not given"):
        StreamedData(base="unused").check("fit")


# From the command line
@pytest.mark.parametrize(
    ("verb", "options", "words"),
    [
        ("fit", ["--data.train=none.json"], "none.json: no such file"),
        ("fit", ["--data.train=text.jsonl"], "none of 3 records shows an image"),
        ("fit", [], "data: train is not given: fit needs"),
        ("validate", ["--data.val=none"], "none: no such file"),
        ("test", ["--data.test=broken.json"], "broken.json: not JSON"),
        ("predict", ["--data.predict=none.json"], "none.json: no such file"),
        ("fit", ["--data.train=good.jsonl", "--data.val=none.json"], "none.json: no such file"),
        ("fit", ["--data.train=good.jsonl", "--data.batch_size=0"], "data.batch_size is 0"),
    ],
)
def test_missing_data_leave_nothing_and_load_nothing(tmp_path, monkeypatch, capsys, verb, options, words):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "text.jsonl", [TEXT] * 3)
    write(tmp_path / "good.jsonl", [{**TEXT, "image": "a.png"}])
    (tmp_path / "broken.json").write_text('[{"a": 1')
    before = sorted(tmp_path.iterdir())

    def load(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("lit_prune.training.module.load", load)
    with pytest.raises(SystemExit) as stop:
        main([verb, "-c", MICRO, "--data=lit_prune.data.InstructData", *options])
    assert stop.value.code in (1, 2)
    told = capsys.readouterr().err
    assert words in told
    assert "Traceback" not in told
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_only_built_checks_what_it_will_read(tmp_path, monkeypatch):
    monkeypatch.setattr("lit_prune.training.module.load", None)
    with pytest.raises(LitPruneError, match=r"none.json: no such file"):
        build(MICRO, ["--data=lit_prune.data.InstructData", f"--data.val={tmp_path}/none.json"], reads="validate")

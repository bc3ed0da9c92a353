import io
import json
import pickle
import random
import re
import tracemalloc
from collections import Counter
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from instruct_samples import conversation
from PIL import Image
from source_samples import as_bytes, assert_same, batch_of, damaged, outcome, rows

from lit_prune.data.conversation import read_conversation
from lit_prune.data.sharding import write_shards
from lit_prune.data.sources import open_source
from lit_prune.errors import BadSample, LitPruneError


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


@pytest.mark.parametrize("layout", ["paths", "bytes", "feature", "saved", "arrow", "messages", "two files"])
def test_every_layout_gives_the_batch_of_json_lines(processor, folder, tmp_path, layout):
    expected = batch_of(open_source(folder / "data.jsonl"), processor)
    assert expected["ids"] == ["one", "two", "text", "both", "last"]
    assert expected["inputs"]["pixel_values"].shape == (5, 3, 8, 8)
    made = list(rows(folder, (lambda path: path) if layout == "paths" else as_bytes(folder)))
    if layout == "messages":
        roles = {"human": "user", "gpt": "assistant"}
        for row in made:
            turns = [(roles[turn["from"]], turn["value"]) for turn in row.pop("conversations")]
            row["messages"] = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    data = datasets.Dataset.from_list(made)
    if layout == "feature":
        data = data.cast_column("images", datasets.List(datasets.Image()))
    out, location = tmp_path / "table", tmp_path / "table"
    out.mkdir()
    if layout in ("saved", "arrow"):
        data.save_to_disk(out, num_shards=2)
        location = out if layout == "saved" else f"{out}/data-*.arrow"
    elif layout == "two files":
        data.select(range(3)).to_parquet(out / "1.parquet")
        data.select(range(3, 7)).to_parquet(out / "2.parquet")
    else:
        data.to_parquet(out / "data.parquet")
    source = open_source(location, folder)
    assert_same(batch_of(source, processor), expected)
    assert_same(batch_of(pickle.loads(pickle.dumps(source)), processor), expected)
    assert source.file_of(0) == str(location)
    assert all(file.is_file() for file in source.files)


def test_one_image_a_row(processor, folder, tmp_path):
    """Column `image`: bytes, a path, a struct, or nothing."""
    data = (folder / "a" / "x.png").read_bytes()
    turns = [{"from": ["human", "gpt"], "value": ["Q", "A"]}] * 2  # as a struct of lists
    for name, values in {"bytes": [data, None], "paths": ["a/x.png", None], "structs": [{"bytes": data}, None]}.items():
        table = pyarrow.table({"image": values, "conversations": turns})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
        source = open_source(tmp_path / f"{name}.parquet", folder)
        batch = batch_of(source, processor)
        assert batch["records"] == [0, 1]
        assert batch["answers"] == ["A", "A"]
        assert batch["inputs"]["pixel_values"].shape == (1, 3, 8, 8)


@pytest.mark.parametrize("stored", ["parquet", "saved"])
def test_classes_are_read_by_their_names(processor, tmp_path, stored):
    features = datasets.Features(
        {
            "question": datasets.Value("string"),
            "answer": datasets.ClassLabel(names=["cat", "dog"]),
            "skill": datasets.ClassLabel(names=["animals"]),
        }
    )
    rows = {"question": ["Q"] * 3, "answer": [1, 0, -1], "skill": [0, None, 0]}
    data = datasets.Dataset.from_dict(rows, features=features)
    data.to_parquet(tmp_path / "a.parquet") if stored == "parquet" else data.save_to_disk(tmp_path / "a.parquet")
    batch = batch_of(open_source(tmp_path / "a.parquet"), processor)
    assert batch["answers"] == ["dog", "cat"]
    assert batch["skills"][0] == "animals"
    assert len(batch["skipped"]) == 1


def test_images_inside_the_turns_as_a_feature(processor, folder, tmp_path):
    """Their bytes lie in the column of turns; packed into shards they lie beside it."""
    text, image = datasets.Value("string"), datasets.Image()
    part = {"type": text, "text": text, "image": image}
    features = datasets.Features({"messages": [{"role": text, "content": [part]}]})
    shown = {"bytes": (folder / "a" / "x.png").read_bytes(), "path": None}
    question = [{"type": "image", "text": None, "image": shown}, {"type": "text", "text": "Q", "image": None}]
    answer = [{"type": "text", "text": "A", "image": None}]
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    datasets.Dataset.from_dict({"messages": [turns]}, features=features).to_parquet(tmp_path / "a.parquet")
    record = {"image": "a/x.png", "conversations": conversation("<image>Q", "A")}
    (folder / "one.jsonl").write_text(json.dumps(record))
    expected = batch_of(open_source(folder / "one.jsonl"), processor)
    source = open_source(tmp_path / "a.parquet")
    assert_same(batch_of(source, processor), expected)
    write_shards(source, "x", tmp_path / "shards", 10**6)
    assert_same(batch_of(open_source(tmp_path / "shards"), processor), expected)


def test_reading_a_record_reads_no_image(tmp_path):
    data = random.randbytes(4_000_000)
    row = {"images": [{"bytes": data, "path": "a.png"}, {"bytes": data}], "conversations": conversation("Q", "A")}
    datasets.Dataset.from_list([row]).save_to_disk(tmp_path / "table")
    source = open_source(tmp_path / "table")
    allocated = pyarrow.total_allocated_bytes()
    tracemalloc.start()
    record = source[0]
    assert tracemalloc.get_traced_memory()[1] + pyarrow.total_allocated_bytes() - allocated < 1_000_000
    tracemalloc.stop()
    assert record == {"conversations": conversation("Q", "A"), "images": ["a.png", "number 1"]}
    with source.images(0, record)[1].open() as file:
        assert file.read() == data


def test_columns_that_no_record_has_go_unread(processor, tmp_path):
    """Not even where Python has no word for their values; in a column that counts it is a bad sample."""
    when = pyarrow.array([2**60, 1], pyarrow.timestamp("us"))
    turns = [conversation("Q", "A")] * 2
    pyarrow.parquet.write_table(pyarrow.table({"when": when, "conversations": turns}), tmp_path / "a.parquet")
    assert batch_of(open_source(tmp_path / "a.parquet"), processor)["ids"] == [0, 1]
    pyarrow.parquet.write_table(pyarrow.table({"id": when, "conversations": turns}), tmp_path / "b.parquet")
    batch = batch_of(open_source(tmp_path / "b.parquet"), processor)
    assert batch["ids"] == [1]
    assert "a value cannot be read: date value out of range" in batch["skipped"][0].reason


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"conversations": [json.dumps(conversation("Q", "A"))]}, "neither a list"),
        ({"conversations": [["Q", "A"]]}, "unknown role None"),
        ({"messages": [[{"speaker": "human", "value": "Q"}]]}, "without a role .* its keys are speaker, value"),
        ({"conversations": [1]}, "neither a list"),
        ({"conversations": [conversation("Q", "A")], "image": [1]}, "neither a path nor bytes"),
        ({"conversations": [conversation("Q", "A")], "images": [[[b"x"]]]}, "neither a path nor bytes"),
        ({"conversations": [conversation("Q", "A")], "images": [[{"url": "a.png"}]]}, "neither a path nor bytes"),
        ({"conversations": [conversation("Q", "A")], "image": ["iVBORw0KGgo" * 10_000]}, "cannot be read"),
    ],
)
def test_columns_of_other_types(processor, tmp_path, columns, reason):
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    batch = batch_of(open_source(tmp_path / "a.parquet"), processor)
    assert not batch["ids"]
    assert re.search(reason, batch["skipped"][0].reason)
    assert len(batch["skipped"][0].reason) <= 500


@pytest.mark.parametrize(
    "make",
    [
        lambda data: pyarrow.array([data, None], pyarrow.large_binary()),
        lambda data: pyarrow.array([data, None], pyarrow.binary(len(data))),
        lambda data: pyarrow.array([data, None]).dictionary_encode(),
        lambda data: pyarrow.array([[data], []], pyarrow.large_list(pyarrow.binary())),
        lambda data: pyarrow.array(["a/x.png", None]).dictionary_encode(),
    ],
    ids=["large", "fixed", "dictionary", "large list", "paths in a dictionary"],
)
def test_images_as_others_store_them(processor, folder, tmp_path, make):
    turns = [conversation("Q", "A")] * 2
    table = pyarrow.table({"image": make((folder / "a" / "x.png").read_bytes()), "conversations": turns})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    batch = batch_of(open_source(tmp_path / "a.parquet", folder), processor)
    assert batch["ids"] == [0, 1]
    assert batch["inputs"]["pixel_values"].shape == (1, 3, 8, 8)


def test_brackets_in_names_and_files_without_rows(tmp_path):
    """`datasets` takes names for patterns, and stumbles over row groups of no rows."""
    (tmp_path / "a[1]").mkdir()
    table = pyarrow.table({"conversations": [conversation("Q", "A")] * 3})
    for name, count in {"0": 0, "1[b]": 3, "2": 0}.items():
        pyarrow.parquet.write_table(table.slice(0, count), tmp_path / "a[1]" / f"{name}.parquet")
    assert len(open_source(tmp_path / "a[1]")) == 3
    assert len(open_source(tmp_path / "a[1]" / "1[b].parquet")) == 3
    with pytest.raises(LitPruneError, match=r"0.parquet: .* no data"):
        open_source(tmp_path / "a[1]" / "0.parquet")


@pytest.mark.parametrize("up", [True, False])
def test_a_saved_folder_stays_in_itself(tmp_path, up):
    datasets.Dataset.from_list([{"conversations": conversation("Q", "A")}]).save_to_disk(tmp_path / "table")
    next((tmp_path / "table").glob("*.arrow")).rename(tmp_path / "other.arrow")
    state = json.loads((tmp_path / "table" / "state.json").read_text())
    state["_data_files"] = [{"filename": "../other.arrow" if up else str(tmp_path / "other.arrow")}]
    (tmp_path / "table" / "state.json").write_text(json.dumps(state))
    with pytest.raises(LitPruneError, match="names a file outside the folder"):
        open_source(tmp_path / "table")


def test_images_that_cannot_be_had(folder, tmp_path):
    turns = conversation("Q", "A")
    stored = [{"bytes": None, "path": path} for path in ("/etc/passwd", "../data.jsonl", "a/x.png", None)]
    data = datasets.Dataset.from_list([{"images": [image], "conversations": turns} for image in stored])
    data.save_to_disk(tmp_path / "table")
    source = open_source(tmp_path / "table", folder)
    for index, reason in enumerate(["is absolute", "leaves the image root"]):
        with pytest.raises(BadSample, match=reason):
            source.images(index, source[index])[0].open()
    with pytest.raises(BadSample, match=r"table: sample 3: image 0 is neither a path nor bytes"):
        source[3]
    source.images_root = None  # as on the hub
    with pytest.raises(BadSample, match=r"a/x.png is only a path: the folder"):
        source.images(2, source[2])[0].open()


def test_text_that_is_no_utf8_is_a_bad_sample(tmp_path):
    skills = pyarrow.array([b"ok", b"\xff"]).view(pyarrow.string())
    table = pyarrow.table({"skill": skills, "conversations": [conversation("Q", "A")] * 2})
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", table.schema) as out:
        out.write_table(table)
    source = open_source(tmp_path / "a.arrow")
    assert source[0]["skill"] == "ok"
    with pytest.raises(BadSample, match=r"a.arrow: sample 1: the row is damaged: .*UTF8"):
        source[1]


def test_damaged_tables_end_in_words(folder, tmp_path):
    """And not in a crash: pyarrow itself believes the offsets of an arrow file."""
    datasets.Dataset.from_list(list(rows(folder, as_bytes(folder))) * 3).save_to_disk(tmp_path / "table")
    found = Counter(map(outcome, damaged(next((tmp_path / "table").glob("*.arrow")), 100)))
    assert set(found) <= {"refused", "bad"}  # one sample is bad anyway
    assert min(found.values()) > 10


def test_pillow_of_ours_decodes(processor, tmp_path):
    """The limits of `decode_image` hold for bytes in rows: an EPS, which would start another program, is refused."""
    script = io.BytesIO()
    Image.new("RGB", (4, 4)).save(script, "EPS")
    row = {"image": {"bytes": script.getvalue(), "path": "x.png"}, "conversations": conversation("Q", "A")}
    datasets.Dataset.from_list([row]).cast_column("image", datasets.Image()).to_parquet(tmp_path / "a.parquet")
    batch = batch_of(open_source(tmp_path / "a.parquet"), processor)
    assert batch["ids"] == []
    assert "image x.png cannot be read" in batch["skipped"][0][2]


def test_bad_locations(folder, tmp_path):
    (tmp_path / "broken.parquet").write_text("no parquet")
    (tmp_path / "broken.arrow").write_text("no arrow")
    (tmp_path / "empty").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x"]}), tmp_path / "other.parquet")
    split = datasets.Dataset.from_list([{"messages": []}])
    datasets.DatasetDict(train=split, test=split).save_to_disk(tmp_path / "splits")
    for location, message in {
        "broken.parquet": "broken.parquet: .*Parquet",
        "broken.arrow": "broken.arrow: ",
        "broken.*": "arrow and parquet files in one place",
        "empty": "no .tar, .parquet or .arrow files there",
        "none*.parquet": "no .tar, .parquet or .arrow files there",
        "other.parquet": "no column conversations or messages; it has text",
        "splits": "several splits; name one of .*splits/test, .*splits/train",
        "data/a/x.png": "x.png: instruction data end in .json",
    }.items():
        with pytest.raises(LitPruneError, match=message):
            open_source(tmp_path / location)
    with pytest.raises(LitPruneError, match=r"hub:a/b:train: Couldn't reach .*; without a network"):
        open_source("hub:a/b:train")
    with pytest.raises(LitPruneError, match="is written hub:OWNER/NAME"):
        open_source("hub:../b")


def test_the_records_in_the_docs():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    records = [json.loads(line) for line in page.partition("```json\n")[2].partition("```")[0].splitlines()]
    assert [read_conversation(record).answer for record in records] == ["A cat.", "No."]
    assert [read_conversation(record).images for record in records] == [1, 2]

"""Files of records in any state: every record is good or bad, none is lost, and what is read is what was written."""

import io
import json
import tarfile
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from dressed import COLOURS, anything, conversations, dressed, file_of, texts, write_images
from hypothesis import given, settings
from hypothesis import strategies as st
from instruct_samples import conversation
from prompt_families import PROCESSORS

from lit_prune.data.dataset import Collate, InstructDataset
from lit_prune.data.sources import Source, open_source
from lit_prune.data.sources.tables import Table
from lit_prune.errors import LitPruneError

MANY = settings(max_examples=1000, deadline=None, derandomize=True, database=None)
FEW = settings(MANY, max_examples=25)
FILES = {name: file_of(name) for name in COLOURS}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    datasets.disable_progress_bars()
    return write_images(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def qwen():
    return PROCESSORS["qwen3-vl"]()


def opened(path: Path) -> Source | str:
    """The source, or why there is none."""
    try:
        return open_source(path)
    except LitPruneError as error:
        return str(error)


def outcomes(source: Source, processor) -> dict[int, str | None]:
    """The answer of every record, None for a bad one. Counts add up."""
    data = InstructDataset(source, processor, mode="eval")
    batch = Collate(0, "eval")(data.__getitems__(list(range(len(source)))))
    bad = [skipped.record for skipped in batch["skipped"]]
    assert sorted([*batch["records"], *bad]) == list(range(len(source)))
    assert all(skipped.reason and len(skipped.reason) <= 500 for skipped in batch["skipped"])
    return dict.fromkeys(bad) | dict(zip(batch["records"], batch["answers"], strict=True))


@st.composite
def lines(draw, root: Path) -> list[tuple[bytes, str | None]]:
    """Lines of a file, each with the answer that it holds, or None where it is broken."""
    made = []
    for _ in range(draw(st.integers(1, 3))):
        if draw(st.booleans()):
            said = draw(conversations())
            text = json.dumps(draw(dressed(said, root)), ensure_ascii=draw(st.booleans()))
            made.append((text.encode(), said.turns[-1][2]))
        else:
            broken = st.one_of(
                st.binary(min_size=1, max_size=30).map(lambda data: data.replace(b"\n", b"?").replace(b"\r", b"?")),
                anything.filter(lambda value: not isinstance(value, dict)).map(
                    lambda value: json.dumps(value).encode()
                ),
                st.sampled_from(
                    [b"{", b"[]", b'{"a": NaN', b"\xff\xfe", b"[" * 2000, b"9" * 5000, b'{"a": "\\ud800"}']
                ),
            )
            made.append((draw(broken.filter(bytes.strip)), None))
    return made


@settings(MANY, max_examples=500)  # of two lines on average
@given(st.data())
def test_json_lines(root, qwen, data):
    made = data.draw(lines(root))
    path = root / "data.jsonl"
    path.write_bytes(data.draw(st.sampled_from([b"\n", b"\r\n", b"\n\n"])).join(line for line, _ in made))
    source = opened(path)
    if isinstance(source, str):
        assert made[0][1] is None, "the first line says that these are no JSON lines"
        assert source.startswith(f"{path}: no JSON lines: ")
        return
    assert len(source) == len(made)
    assert outcomes(source, qwen) == {number: answer for number, (_, answer) in enumerate(made)}


@settings(MANY, max_examples=200)
@given(st.data())
def test_json_lists(root, qwen, data):
    said = data.draw(st.lists(conversations(), min_size=1, max_size=3))
    records = [data.draw(dressed(each, root)) for each in said]
    text = json.dumps(records, indent=data.draw(st.sampled_from([None, 1])), ensure_ascii=data.draw(st.booleans()))
    path = root / "data.json"
    path.write_text(text)
    assert outcomes(open_source(path), qwen) == {number: each.turns[-1][2] for number, each in enumerate(said)}
    broken = bytearray(text.encode())
    for place, value in data.draw(
        st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4)
    ):
        broken[int(place * len(broken))] = value
    path.write_bytes(broken[: int(data.draw(st.floats(0.5, 1)) * len(broken))])
    source = opened(path)
    assert source.startswith(str(path)) if isinstance(source, str) else outcomes(source, qwen)


@st.composite
def members(draw) -> tuple[list[tuple[str, bytes]], list[str | None]]:
    """Members of a shard and the answers of its samples: images by number, in any order; some records are missing."""
    found, answers = [], []
    for key in range(draw(st.integers(1, 3))):
        names, answer = draw(st.lists(st.sampled_from(sorted(COLOURS)), max_size=2)), draw(texts)
        named = draw(
            st.sampled_from([{}, {"images": names}, {"images": [None]}] if not names else [{}, {"images": names}])
        )
        marks = "<image>" * len(names) if draw(st.booleans()) else ""
        record = json.dumps({**named, "conversations": conversation(f"{marks} Q", answer)}).encode()
        images = [(f"{key:03d}.{number}.png", FILES[name]) for number, name in enumerate(names)]
        kind = draw(st.sampled_from(["whole", "whole", "no record", "broken", "an image too few"]))
        lost = kind == "an image too few" and names and (named or marks)
        images = images[:-1] if lost else images
        record = record[:-9] if kind == "broken" else record
        sample = [*images, (f"{key:03d}.txt", b"?"), *([] if kind == "no record" else [(f"{key:03d}.json", record)])]
        found += draw(st.permutations(sample))
        if kind != "no record" or images:
            answers.append(None if lost or kind in ("no record", "broken") else answer)
    return found, answers


@settings(MANY, max_examples=500)  # of two samples on average
@given(members())
def test_tar_shards(root, qwen, made):
    found, answers = made
    path = root / "data.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in found:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    path.with_name("data.tar.index.npy").unlink(missing_ok=True)
    source = opened(path)
    if isinstance(source, str):
        assert not answers
        assert source.endswith("no samples")
        return
    assert outcomes(source, qwen) == dict(enumerate(answers))


@st.composite
def rows(draw) -> tuple[dict, str | None]:
    """A row of a table with the answer that it holds, None where its image cannot be had."""
    answer = draw(texts)
    name = draw(st.sampled_from([*COLOURS, "none.png", None]))
    data = None if name is None or draw(st.booleans()) else b"?" if name == "none.png" else FILES[name]
    images = [] if name is None else [{"bytes": data, "path": name}]
    row = {"id": draw(st.sampled_from(["a", None])), "images": draw(st.sampled_from([images, images or None]))}
    marks = "<image>" * len(images) if draw(st.booleans()) else ""
    row["conversations"] = [
        {"from": draw(st.sampled_from(["human", "User"])), "value": f"{marks}{draw(texts)}", "weight": None},
        {"from": draw(st.sampled_from(["gpt", "Assistant"])), "value": answer, "weight": 1.0},
    ]
    row["system"] = draw(st.sampled_from([None, "Be brief."]))
    return row, None if name == "none.png" else answer


SCHEMA = pyarrow.schema(
    {
        "id": pyarrow.string(),
        "images": pyarrow.list_(pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})),
        "conversations": pyarrow.list_(
            pyarrow.struct({"from": pyarrow.string(), "value": pyarrow.string(), "weight": pyarrow.float64()})
        ),
        "system": pyarrow.string(),
    }
)


@MANY
@given(rows())
def test_rows_of_tables(root, qwen, made):
    row, answer = made
    table = pyarrow.Table.from_pylist([row], SCHEMA)
    source = Table(lambda index: table.slice(index, 1), 1, table.column_names, "x", root)
    assert outcomes(source, qwen) == {0: answer}


@FEW
@given(st.lists(rows(), max_size=40))
def test_parquet(root, qwen, made):
    path = root / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row for row, _ in made], SCHEMA), path)
    if not made:
        with pytest.raises(LitPruneError, match="it has no data: 0 rows"):
            open_source(path)
        return
    assert outcomes(open_source(path), qwen) == {number: answer for number, (_, answer) in enumerate(made)}


@settings(MANY, max_examples=300)
@given(
    st.dictionaries(st.sampled_from(["conversations", "messages", "image", "images", "id", "x"]), anything, min_size=1)
)
def test_tables_of_anything(root, qwen, row):
    """Whatever arrow can hold: a column of another type makes bad samples, no column of turns one error."""
    try:
        table = pyarrow.Table.from_pylist([row, row])
    except (pyarrow.ArrowException, ValueError, TypeError, OverflowError):
        return
    if not {"conversations", "messages"} & row.keys():
        with pytest.raises(LitPruneError, match="no column conversations or messages"):
            Table(lambda index: table.slice(index, 1), 2, table.column_names, "x", root)
        return
    source = Table(lambda index: table.slice(index, 1), 2, table.column_names, "x", root)
    assert len(outcomes(source, qwen)) == 2

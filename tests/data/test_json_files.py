import json
import pickle
from pathlib import Path

import pytest

from lit_prune.data.sources import json_files as module
from lit_prune.data.sources.base import FileReader
from lit_prune.data.sources.json_files import JsonFile
from lit_prune.errors import BadSample, LitPruneError

SAMPLES = [{"id": i, "text": 'ü[{"]}\\ ' * i, "nested": {"list": [[], {}]}} for i in range(40)]


def write(folder, text, name="data.json"):
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("indent", [None, 2])
def test_list(tmp_path, monkeypatch, chunk, ascii_only, indent):
    monkeypatch.setattr(module, "CHUNK", chunk)
    records = JsonFile(write(tmp_path, json.dumps(SAMPLES, ensure_ascii=ascii_only, indent=indent)))
    assert list(records) == SAMPLES
    assert len(records) == 40
    assert records.spans.dtype == "int64"


def test_byte_order_mark_and_empty_list(tmp_path):
    assert list(JsonFile(write(tmp_path, b"\xef\xbb\xbf " + json.dumps(SAMPLES).encode()))) == SAMPLES
    assert len(JsonFile(write(tmp_path, " [ ] \n"))) == 0


def test_lines(tmp_path):
    lines = "\n\n".join(json.dumps(sample, ensure_ascii=False) for sample in SAMPLES)
    assert list(JsonFile(write(tmp_path, lines, "data.jsonl"))) == SAMPLES
    assert len(JsonFile(write(tmp_path, "", "empty.jsonl"))) == 0


def test_lines_as_windows_writes_them(tmp_path):
    lines = b"\xef\xbb\xbf" + b"\r\n \t\r\n".join(json.dumps(sample).encode() for sample in SAMPLES) + b"\r\n"
    assert list(JsonFile(write(tmp_path, lines, "data.jsonl"))) == SAMPLES


def test_a_broken_line_is_one_bad_sample(tmp_path):
    records = JsonFile(write(tmp_path, b'{"id": 0}\n{"id": \n[1]\n{"id": "\xff"}\n{"id": 4}', "data.jsonl"))
    assert records[0] == {"id": 0}
    assert records[4] == {"id": 4}
    for index in (1, 2, 3):
        with pytest.raises(BadSample, match=rf"data.jsonl: sample {index}: "):
            records[index]
    with pytest.raises(IndexError):
        records[5]


def test_a_line_as_large_as_a_file(tmp_path, monkeypatch):
    """Parsed it would fill the memory."""
    monkeypatch.setattr(module, "LARGEST_RECORD", 30)
    records = JsonFile(write(tmp_path, '{"id": 1}\n{"id": "' + "x" * 30 + '"}\n', "data.jsonl"))
    assert records[0] == {"id": 1}
    with pytest.raises(BadSample, match="a record of 41 bytes, more than 30"):
        records[1]


def test_a_disk_that_fails_is_told_in_words():
    with pytest.raises(LitPruneError, match="/proc/self/mem: Input/output error"):  # its first bytes are nobody's
        FileReader().read(Path("/proc/self/mem"), 0, 0, 10)


def test_pickled_while_open(tmp_path):
    records = JsonFile(write(tmp_path, json.dumps(SAMPLES)))
    assert records[3] == pickle.loads(pickle.dumps(records))[3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}', "list of samples was expected, found an object"),
        ('"text"', "found a string"),
        ("12", "found no list"),
        ("", "found an empty file"),
        ("[1, 2]", "item 0 of the list is no JSON object"),
        ('[{"a": 1}, ["b"]]', "item 1 of the list is no JSON object"),
        ('[{"a": 1}', "',' or ']' expected after item 0, at byte 9"),
        ('[{"a": 1},]', "item 1"),
        ('[{"a": 1}, ', "not JSON: .* in item 1"),
        ('[{"a": 1}, {"b"', "not JSON: .* in item 1"),
        ('[{"a" 1}]', "not JSON: .* in item 0, at byte 1"),
        ('[{"a": 1}] x', "text after the list"),
        (b'[{"a": "\xff"}]', "not UTF-8"),
        (b'[{"a": "x"}, {"\xc3', "not UTF-8"),
        ('[{"a": 1}, {"a": ' + "9" * 5000 + "}]", "4300 digits.* item 1"),
        ("[" * 5000, "item 0"),
        ('[{"a": ' + "[" * 200_000, "item 0"),
    ],
)
def test_bad_files(tmp_path, text, message):
    with pytest.raises(LitPruneError, match=rf"data.json: .*{message}"):
        JsonFile(write(tmp_path, text))


def test_missing_no_lines_and_changed(tmp_path):
    with pytest.raises(LitPruneError, match=r"none.json: no such file"):
        JsonFile(tmp_path / "none.json")
    with pytest.raises(LitPruneError, match="no JSON lines"):
        JsonFile(write(tmp_path, json.dumps(SAMPLES, indent=1), "data.jsonl"))
    records = JsonFile(write(tmp_path, json.dumps(SAMPLES)))
    write(tmp_path, "[]")
    with pytest.raises(LitPruneError, match="changed"):
        records[0]

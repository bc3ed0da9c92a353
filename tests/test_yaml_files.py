"""Configuration files that can't be read: one line each, naming the file; and any bytes at all."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import ROOT

from lit_prune.errors import LitPruneError
from lit_prune.files.yaml_files import MOST_BYTES, parse_yaml, read_yaml

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
BAD = {
    "binary": (bytes(range(256)), "a binary file"),
    "latin-1": ("model:\n  base: café\n".encode("latin-1"), "line 2 is not UTF-8 text"),
    "UTF-16": ("model: {}\n".encode("utf-16"), "UTF-16"),
    "UTF-16 without its mark": ("model: {}\n".encode("utf-16-le"), "UTF-16"),
    "UTF-32": ("model: {}\n".encode("utf-32"), "UTF-32"),
    "nothing": (b"", "the file is empty"),
    "comments only": (b"# nothing\n\n", "the file is empty"),
    "null": (b"null\n", "found nothing at the top"),
    "list": (b"- a\n- b\n", "found a list at the top"),
    "word": (b"hello\n", "found a single value at the top"),
    "tab": (b"model:\n\tkeep: 3\n", "line 2: a tab"),
    "repeated key": (b"model:\n  keep: 3\n  lr: 1\n  keep: 4\n", "line 4: the key `keep` is there twice"),
    "repeated in a flow": (b"a: {b: 1, 'b': 2}\n", "line 1: the key `b` is there twice"),
    "object": (b"model: !!python/object/apply:os.system ['true']\n", "line 1: the tag"),
    "name": (b"model: {keep: !!python/name:os.system }\n", "python/name:os.system' is not allowed"),
    "tag": (b"model: !mine 3\n", "the tag '!mine' is not allowed"),
    "loop": (b"model: &a {keep: *a}\n", "line 1: an alias that refers to itself"),
    "billion laughs": (LAUGHS.encode(), "aliases expand"),
    "deep": (b"a: " + b"[" * 3000 + b"]" * 3000, "nested too deeply"),
    "number as a key": (b"1: 2\n", "keys at the top are names, not 1"),
    "list as a key": (b"? [a]\n: 3\n", "unhashable key"),
    "control character": (b"a: 1\nb: \x1b[31m\n", "line 2: the control character #x1b"),
    "NUL": (b"a: 1\x00\n", "binary"),
    "two documents": (b"a: 1\n---\na: 2\n", "line 2: expected a single document"),
    "unclosed": (b"model: {keep: [8}\n", "line 1: while parsing a flow sequence"),
    "long number": (b"a: 1" + b"0" * 5000, "not valid YAML"),
    "no date": (b"a: 2020-99-99\n", "not valid YAML"),
    "large": (b"a: " + b"x" * MOST_BYTES, "larger than 1 MiB"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_file_that_cannot_be_read_is_one_line_with_its_name(tmp_path: Path, kind: str) -> None:
    content, says = BAD[kind]
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(LitPruneError) as caught:
        read_yaml(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert says in message
    assert message.isprintable()


def test_what_is_no_file_is_one_line_too(tmp_path: Path) -> None:
    for name, says in (
        ("none.yaml", "none.yaml: No such file"),
        ("", "is a folder"),
        ("nul\0.yaml", r"nul\\x00.yaml: No such file"),
        ("x" * 300, "x{50,}.*File name too long"),
    ):
        with pytest.raises(LitPruneError, match=says) as caught:
            read_yaml(tmp_path / name)
        assert str(caught.value).isprintable()
    for device in ("/dev/zero", "/dev/null"):
        with pytest.raises(LitPruneError, match="is a device"):
            read_yaml(device)


def test_what_is_fine_is_read(tmp_path: Path) -> None:
    """A byte order mark, anchors, merges, numbers as keys below the top."""
    path = tmp_path / "fine.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: &a {b: 1}\nc: {<<: *a, d: 2}\nkeep: {2: 64, 4: 8}\n")
    assert read_yaml(path) == {"a": {"b": 1}, "c": {"b": 1, "d": 2}, "keep": {2: 64, 4: 8}}
    for shipped in ROOT.glob("configs/**/*.yaml"):
        assert read_yaml(shipped)


FEW = settings(deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
YAMLISH = st.text(alphabet="ab:-[]{}&*!|>'\"#%@`,? \t\n01.~$\\\x85\ufeffé", max_size=60)


def outcome(read: Callable[[], dict]) -> tuple[dict | None, str]:
    """What was read, or the message."""
    try:
        return read(), ""
    except LitPruneError as error:
        return None, str(error)


@settings(FEW, max_examples=1000)
@given(content=st.binary(max_size=200) | YAMLISH.map(str.encode))
def test_any_bytes_are_a_mapping_or_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "any.yaml"
    path.write_bytes(content)
    found, message = outcome(lambda: read_yaml(path))
    assert message.startswith(str(path)) if found is None else all(isinstance(key, str) and key for key in found)
    assert not message or message.isprintable()


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates()
TREES = st.recursive(LEAVES, lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=5), part))


@settings(FEW, max_examples=300)
@given(tree=TREES)
def test_what_yaml_writes_is_read_back_or_refused(tree: object) -> None:
    found, _ = outcome(lambda: parse_yaml(yaml.safe_dump(tree, sort_keys=False), "text"))
    if isinstance(tree, dict) and "" not in tree:
        assert repr(found) == repr(tree)
    else:
        assert found is None

"""References to images in records: every form that is read, and one short line for each that is refused."""

import base64
import json
import os

import pytest
from dressed import COLOURS, encoded, references, write_images
from hypothesis import given, settings
from hypothesis import strategies as st
from instruct_samples import conversation
from PIL import Image

from lit_prune.data import references as module
from lit_prune.data.dataset import InstructDataset
from lit_prune.data.references import as_list, image_file, is_embedded, name_of
from lit_prune.data.sources import open_source
from lit_prune.errors import BadSample
from lit_prune.files.images import decode_image


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("references") / "images")


def read(value, root):
    image = image_file(value, 0, root)
    with image.open() as file:
        return decode_image(file, image.name)


def reason(value, root) -> str:
    with pytest.raises(BadSample) as caught:
        read(value, root)
    assert len(caught.value.reason) < 400
    assert caught.value.reason.isprintable()
    return caught.value.reason


def test_every_form_gives_the_same_pixels(root):
    for name, colour in COLOURS.items():
        for form, value in references(root, name).items():
            assert read(value, root).getpixel((4, 4)) == colour, form
            assert json.loads(json.dumps(value)) == value
            assert len(name_of(value, 7)) < 200, form


def test_bytes_as_tables_hold_them(root):
    data = (root / "b.png").read_bytes()
    for value, name in ((data, "number 3"), ({"bytes": data, "path": "x.png"}, "x.png"), ({"bytes": data}, "number 3")):
        assert read(value, root).getpixel((0, 0)) == COLOURS["b.png"]
        assert name_of(value, 3) == name
    assert "the file is empty" in reason(b"", root)


@pytest.mark.parametrize(
    "value", [None, "", " \n", [], [None], [""], [None, " "], float("nan"), {}, {"bytes": None, "path": None}]
)
def test_no_image(value):
    assert as_list(value) == []


def test_several_with_gaps():
    assert as_list(["a", None, "", "b"]) == ["a", "b"]
    assert as_list("a") == as_list(["a"]) == ["a"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("http://images.example.org/a.jpg", "is a URL; nothing is downloaded"),
        ("HTTPS://images.example.org/" + "x" * 3000, "is a URL; nothing is downloaded"),
        ({"url": "https://images.example.org/a.jpg"}, "is a URL; nothing is downloaded"),
        ("s3://bucket/a.jpg", "is a URL; nothing is downloaded"),
        ("/etc/passwd", "is absolute and lies outside the image root"),
        ("file:///etc/passwd", "is absolute and lies outside the image root"),
        ("file:/etc/passwd", "is absolute and lies outside the image root"),
        ("file://../a.png", "leaves the image root by '..'"),
        ("file:///%2e%2e/a.png", "leaves the image root by '..'"),
        ("C:\\images\\a.png", "is absolute"),
        ("../a.png", "leaves the image root by '..'"),
        ("none.png", "is missing in"),
        ("x" * 5000, "cannot be read: File name too long"),
        ("data:text/plain;base64,AAAA", "a data URL of text/plain, not of an image"),
        ("data:image/svg+xml;utf8,<svg/>", "a data URL without base64"),
        ("data:image/png,AAAA", "a data URL without base64"),
        ("data:image/png;base64", "a data URL without base64"),
        ("data:image/png;base64,", "the file is empty"),
        ("data:image/png;base64,????", "broken base64"),
        ("data:image/png;base64,AAAAA", "broken base64"),
        ("data:image/svg+xml;base64," + base64.b64encode(b"<svg xmlns='x'></svg>").decode(), "it is SVG"),
        (base64.b64encode(b"<svg xmlns='http://www.w3.org/2000/svg'>" + b" " * 99).decode(), "it is SVG"),
        (base64.b64encode(b"%PDF-1.7" + bytes(99)).decode(), "it is PDF"),
        (base64.b64encode(b"\0\0\0\x18ftypheic" + bytes(99)).decode(), "it is HEIC"),
        ({"bytes": "AAAA"}, "a broken header"),
        ({"type": "base64", "data": "?"}, "broken base64"),
    ],
)
def test_what_is_refused_says_what_it_is(root, value, words):
    assert words in reason(value, root)


@pytest.mark.parametrize(
    "value", [3, True, {"a": 1}, {"path": 3}, {"bytes": [1, 2]}, ["a.png"], Image.new("RGB", (2, 2))]
)
def test_what_is_no_reference(root, value):
    assert "image 0 is neither a path nor bytes, but " in reason(value, root)


def test_links_are_followed_inside_the_root_only(root, tmp_path):
    os.symlink(root, tmp_path / "link")
    assert read(str(tmp_path / "link" / "a.png"), root).size == (8, 8)
    assert read(str(root / "a.png"), tmp_path / "link").size == (8, 8)
    (root / "out.png").unlink(missing_ok=True)
    os.symlink(write_images(tmp_path / "elsewhere") / "a.png", root / "out.png")
    assert "by a link" in reason("out.png", root)
    assert "outside the image root" in reason(str(root / "out.png"), root)


def test_paths_of_windows_and_names_with_escapes(root):
    (root / "sub").mkdir(exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(root / "sub" / "a b.png")
    assert read("sub\\a b.png", root).size == read(f"file://{root}/sub/a%20b.png", root).size == (8, 8)


def test_an_image_in_a_record_has_a_bound(root, monkeypatch):
    value = f"data:image/png;base64,{encoded(root, 'a.png')}"
    monkeypatch.setattr(module, "LARGEST_EMBEDDED", 50)
    assert "characters of base64, more than 50" in reason(value, root)


def test_a_path_that_looks_like_base64_is_a_path(root):
    for name in ("iVBORw0KGgo.png", "R0lGOD" + "a" * 80 + ".png"):
        Image.new("RGB", (8, 8), "red").save(root / name)
        assert not is_embedded(name)
        assert read(name, root).size == (8, 8)


def test_without_a_root_paths_are_refused_and_the_rest_is_read(root):
    assert read(references(root, "a.png")["base64"], None).size == (8, 8)
    assert "the folder it lies in must be given as image root" in reason("a.png", None)
    assert "is a URL" in reason("https://a.b/c.png", None)


words = st.sampled_from(
    ["a.png", "..", "/", ".", "file://", "data:", "image/png;base64,", "http://", "~", "\\", "\0", "%2e"]
)
paths = st.lists(st.one_of(words, st.text(st.characters(), max_size=6)), max_size=6).map("".join)
values = st.one_of(
    paths,
    st.binary(max_size=40),
    st.builds(lambda data: base64.b64encode(data).decode(), st.binary(max_size=90)),
    st.dictionaries(st.sampled_from(["path", "url", "bytes", "image_url", "data", "x"]), paths, max_size=3),
)


@settings(max_examples=1000, deadline=None, derandomize=True, database=None)
@given(values)
def test_any_reference_is_read_or_refused_in_one_line(root, value):
    """And nothing outside the root is ever opened."""
    reason = ""
    try:
        image = image_file(value, 0, root)
        with image.open() as file:
            if hasattr(file, "name"):
                assert os.path.realpath(file.name).startswith(str(root.resolve()))
            decode_image(file, image.name)
    except BadSample as error:
        reason = error.reason
    assert len(reason) < 600
    assert "\n" not in reason


# In a file
def test_text_only_rows_with_empty_images(processor, root):
    rows = [{"image": ""}, {"images": [""]}, {"images": [None]}, {"image": None, "images": []}, {"image": float("nan")}]
    file = root / "text.jsonl"
    file.write_text("\n".join(json.dumps({**row, "conversations": conversation("Q", "A")}) for row in rows))
    data = InstructDataset(open_source(file), processor)
    fetched = data.__getitems__(list(range(len(rows))))
    assert [sample.answer for sample in fetched.samples] == ["A"] * len(rows)
    assert not fetched.skipped

"""Image files as they come: whole ones of every kind, cut short, damaged, or nothing of the sort."""

import io
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lit_prune.errors import BadSample
from lit_prune.files.images import decode_image, formats, image_format, kind_of

MANY = settings(max_examples=1000, deadline=None, derandomize=True, database=None)
LOSSLESS = {  # modes that a format stores without loss
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "BMP": ("1", "L", "P", "RGB"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"),
    "PPM": ("1", "L", "RGB", "I;16"),
    "GIF": ("L", "P"),
}
LOSSY = {"JPEG": ("L", "RGB", "CMYK"), "WEBP": ("RGB", "RGBA")}
if "AVIF" in formats():
    LOSSY["AVIF"] = ("RGB", "RGBA")
TURNS = {  # EXIF's orientations, by what stands each upright
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@st.composite
def pixels(draw, mode: str) -> Image.Image:
    width, height = draw(st.sampled_from([(1, 1), (1, 7), (9, 1), (3, 5), (8, 8), (17, 12), (64, 33)]))
    noise = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if mode == "I;16":
        return Image.fromarray(noise.integers(0, 2**16, (height, width), dtype=np.uint16))
    if mode == "1":
        return Image.fromarray(noise.integers(0, 2, (height, width), dtype=np.uint8) * 255).convert("1")
    if mode == "P":
        image = Image.fromarray(noise.integers(0, 256, (height, width), dtype=np.uint8), "L").convert("P")
        image.putpalette(noise.integers(0, 256, 768, dtype=np.uint8).tolist())
        return image
    bands = len(Image.new(mode, (1, 1)).getbands())
    array = noise.integers(0, 256, (height, width, bands), dtype=np.uint8)
    return Image.frombytes(mode, (width, height), array.tobytes())


@st.composite
def files(draw, kinds: dict[str, tuple[str, ...]]) -> tuple[Image.Image, str, int, bytes]:
    """An image with its format, its orientation and its file; some files have further pictures."""
    kind = draw(st.sampled_from(sorted(kinds)))
    image = draw(pixels(draw(st.sampled_from(kinds[kind]))))
    options = {}
    turn = draw(st.sampled_from(sorted(TURNS))) if kind in ("PNG", "TIFF", "JPEG", "WEBP") else 1
    if turn > 1 and image.mode != "I;16":
        exif = Image.Exif()
        exif[0x0112] = turn
        options["exif"] = exif.tobytes() if kind != "TIFF" else exif
    else:
        turn = 1
    if kind in ("GIF", "WEBP", "TIFF") and turn == 1 and image.mode in ("RGB", "L", "P") and draw(st.booleans()):
        options |= {"save_all": True, "append_images": [Image.new(image.mode, image.size)]}
    if image.mode == "P" and kind == "PNG" and draw(st.booleans()):
        options["transparency"] = bytes(range(256))
    out = io.BytesIO()
    image.save(out, kind, **options)
    return image, kind, turn, out.getvalue()


def upright(image: Image.Image, turn: int) -> np.ndarray:
    """The pixels that must come out, restated with numpy."""
    if image.mode == "I;16":
        array = np.repeat((np.asarray(image) // 256).astype(np.uint8)[..., None], 3, 2)
    elif image.mode in ("L", "LA", "1"):
        array = np.asarray(image)
        array = (array * 255 if image.mode == "1" else array).astype(np.uint8)
        array = np.repeat((array[..., 0] if array.ndim == 3 else array)[..., None], 3, 2)
    elif image.mode == "P":
        array = np.array(image.getpalette(), np.uint8).reshape(-1, 3)[np.asarray(image)]
    elif image.mode == "CMYK":
        cyan, key = np.asarray(image)[..., :3].astype(int), np.asarray(image)[..., 3:].astype(int)
        array = np.clip(255 - key - ((255 - key) * cyan + 127) // 255, 0, 255).astype(np.uint8)
    else:
        array = np.asarray(image)[..., :3]
    return TURNS[turn](array)


def decoded(data: bytes) -> np.ndarray | str:
    """The pixels, or the reason: nothing else may come of a file, and no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            image = decode_image(io.BytesIO(data), "x")
        except BadSample as error:
            reason = error.reason
        else:
            assert image.mode == "RGB"
            return np.asarray(image)
    assert len(reason) < 400
    assert "<_io" not in reason
    assert "\n" not in reason
    return reason


@MANY
@given(files(LOSSLESS))
def test_whole_files_come_out_pixel_by_pixel(made):
    image, kind, turn, data = made
    assert np.array_equal(decoded(data), upright(image, turn)), (kind, image.mode, turn)
    assert image_format(io.BytesIO(data), "x") == kind


@settings(MANY, max_examples=200)
@given(files(LOSSY))
def test_whole_files_of_lossy_formats(made):
    image, kind, turn, data = made
    found = decoded(data)
    assert found.shape == upright(image, turn).shape
    assert image_format(io.BytesIO(data), "x") == kind


@MANY
@given(files({**LOSSLESS, **LOSSY}), st.floats(0, 1, exclude_max=True))
def test_files_cut_short_are_bad_or_whole(made, share):
    """Never a picture whose lower half is made up."""
    image, kind, _, data = made
    cut, whole = decoded(data[: int(len(data) * share)]), decoded(data)
    assert isinstance(cut, str) or np.array_equal(cut, whole), (kind, image.mode, len(data), share)


@MANY
@given(
    files({**LOSSLESS, **LOSSY}),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
)
def test_damaged_files_end_in_words(made, changes):
    data = bytearray(made[3])
    for place, value in changes:
        data[int(place * len(data))] = value
    decoded(bytes(data))


MAGIC = (
    b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"BM", b"II*\0", b"MM\0*", b"RIFF\x10\0\0\0WEBPVP8 ",
    b"P6 ",
)  # fmt: skip
BOXES = (
    b"\0\0\0\x1cftypavif", b"\0\0\0\x1cftypheic", b"\0\0\0\x0cJXL ", b"%PDF-1.7", b"<svg xmlns=''>",
    b"\x00\x00\x01\x00", b"",
)  # fmt: skip


@MANY
@given(st.sampled_from(MAGIC + BOXES), st.binary(max_size=300))
def test_anything_else_ends_in_words(head, rest):
    assert isinstance(decoded(head + rest), str | np.ndarray)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "the file is empty"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "it is HEIC"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0", "it is HEIC"),
        (b"\xff\x0a\xfa\x7f", "it is JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "it is JPEG XL"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "it is JPEG 2000"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "it is SVG"),
        (b"<?xml version='1.0'?>\n<!-- drawn -->\n<svg/>", "it is SVG"),
        (b"%PDF-1.7\n", "it is PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "it is PostScript"),
        (b"\0\0\0\x20ftypisom", "it is a video"),
        (b"8BPS\0\1", "Photoshop"),
        (b"\x93NUMPY\1\0", "a numpy array"),
        (b"PK\3\4", "an archive"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs pull"),
        (b"<!DOCTYPE html><html><body>404", "a web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "a web page or XML"),
        (b'{"error": "not found"}', "JSON or text"),
        (b"no image", "a broken header, or none of JPEG"),
        (b"\x89PNG\r\n\x1a\n", "cannot be read"),
    ],
)
def test_files_in_place_of_images_are_named(data, words):
    assert words in decoded(data)


@pytest.mark.skipif("AVIF" not in formats(), reason="this Pillow was built without AVIF")
def test_avif_is_read_where_pillow_can(monkeypatch):
    out = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 30, 30)).save(out, "AVIF")
    assert np.abs(decoded(out.getvalue()).astype(int) - (200, 30, 30)).max() < 8
    assert kind_of(out.getvalue()) == "AVIF"
    formats.cache_clear()
    monkeypatch.setattr("lit_prune.files.images.features.check", lambda name: False)
    assert "it is AVIF; JPEG" in decoded(out.getvalue())
    formats.cache_clear()

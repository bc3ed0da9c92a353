import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from lit_prune.errors import BadSample
from lit_prune.files.images import read_image


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "images"
    (root / "a").mkdir(parents=True)
    Image.new("L", (8, 6), 200).save(root / "a" / "grey.png")
    Image.effect_noise((64, 64), 50).convert("RGB").save(root / "a" / "noise.jpg")
    Image.new("RGB", (4, 4)).save(tmp_path / "outside.png")
    return root


def reason(root, path, **options) -> str:
    with pytest.raises(BadSample) as caught:
        read_image(root, path, **options)
    return caught.value.reason


def png_of_zeros(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))


def test_reads_rgb(root):
    image = read_image(root, "a/grey.png")
    assert (image.mode, image.size) == ("RGB", (8, 6))
    os.symlink(root / "a", root / "b")
    assert read_image(root, "b/grey.png").size == (8, 6)  # a link that stays inside


GREYS = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)


@pytest.mark.parametrize("name", ["grey.png", "grey.tif", "grey.pgm"])
def test_sixteen_bits_keep_their_contrast(root, name):
    """Pillow alone makes all but the darkest 255 of 65,536 greys white."""
    if name == "grey.pgm":
        (root / name).write_bytes(b"P5 8 8 65535\n" + GREYS.astype(">u2").tobytes())
    else:
        Image.fromarray(GREYS).save(root / name)
    assert np.array_equal(np.asarray(read_image(root, name)), np.repeat(GREYS[..., None] // 256, 3, 2))


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_values_of_unknown_range_are_refused(root, kind):
    Image.fromarray(GREYS.astype(kind)).save(root / "grey.tif")
    assert "32 bits" in reason(root, "grey.tif")


@pytest.mark.parametrize("name", ["turned.jpg", "turned.png", "turned.webp", "turned.tif"])
def test_images_stand_upright(root, name):
    """As viewers, transformers and datasets show them: 6 says that the first row is the right side."""
    image = Image.new("RGB", (16, 8), "blue")
    image.paste("red", (0, 0, 8, 8))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(root / name, exif=exif)
    read = read_image(root, name)
    assert read.size == (8, 16)
    assert [max(range(3), key=read.getpixel(place).__getitem__) for place in ((4, 2), (4, 13))] == [0, 2]


def test_a_broken_exif_block_is_passed_by(root):
    Image.new("RGB", (16, 8), "red").save(root / "x.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\xff" * 20)
    assert read_image(root, "x.jpg").size == (16, 8)


def test_all_kinds_of_pixels(root):
    """Colours as they are stored, transparency left away, the first picture of several, and not a warning."""
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 255, 255, 0, 0])
    palette.save(root / "palette.png", transparency=bytes([0, 128]))
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(root / "cmyk.tif")
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(root / "clear.png")
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for name in ("moving.gif", "moving.png", "moving.webp"):
        frames[0].save(root / name, save_all=True, append_images=frames[1:])
    Image.new("1", (4, 4), 1).save(root / "bit.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(root, "bit.png").getpixel((1, 1)) == (255, 255, 255)
        for name in ("palette.png", "cmyk.tif", "clear.png", "moving.gif", "moving.png", "moving.webp"):
            assert np.allclose(read_image(root, name).getpixel((1, 1)), (255, 0, 0), atol=2), name


@pytest.mark.parametrize("size", [(10_000, 1), (1, 10_000), (201, 1)])
def test_lines_are_no_images(root, size):
    """CLIP's processor makes the shorter side 336 pixels: 3.4 GB here."""
    Image.new("RGB", size).save(root / "line.png")
    assert f"{size[0]} x {size[1]} pixels: one side is more than 200 times" in reason(root, "line.png")
    Image.new("RGB", (200, 1)).save(root / "line.png")
    assert read_image(root, "line.png").size == (200, 1)
    Image.new("RGB", (1, 1)).save(root / "dot.png")
    assert read_image(root, "dot.png").size == (1, 1)


def test_paths_that_leave_the_root(root, tmp_path):
    os.symlink(tmp_path / "outside.png", root / "link.png")
    os.symlink(tmp_path, root / "up")
    assert "leaves the image root by a link" in reason(root, "link.png")
    assert "leaves the image root by a link" in reason(root, "up/outside.png")
    assert "by '..'" in reason(root, "../outside.png")
    assert "by '..'" in reason(root, "a/../a/grey.png")
    assert "by '..'" in reason(root, "..\\outside.png")
    assert "is absolute" in reason(root, str(tmp_path / "outside.png"))
    assert "is absolute" in reason(root, "C:\\outside.png")


def test_paths_that_are_none(root):
    os.symlink(root / "loop", root / "loop")
    for path in ("", None, 3, "a\0b"):
        assert "is no image path" in reason(root, path)
    for path in ("none.png", "a", "x" * 5000, "loop", "\ud800.png", "https://a.b/c.png", "file:///etc/passwd"):
        assert "is missing" in reason(root, path) or "cannot be read" in reason(root, path)


def test_unreadable(root):
    whole = (root / "a" / "noise.jpg").read_bytes()
    (root / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "text.png").write_text("no image")
    (root / "empty.png").write_bytes(b"")
    (root / "script.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    for name in ("cut.jpg", "text.png", "empty.png", "script.eps"):
        assert f"image {name} cannot be read" in reason(root, name)


def test_decompression_bombs(root):
    (root / "huge.png").write_bytes(png_of_zeros(30_000, 30_000))
    (root / "large.png").write_bytes(png_of_zeros(10_000, 10_000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("huge.png", "large.png"):
            assert f"image {name} is a decompression bomb" in reason(root, name)
    assert "8 x 6 pixels, more than 47" in reason(root, "a/grey.png", max_pixels=47)
    assert read_image(root, "a/grey.png", max_pixels=48)

import os
import struct
import warnings
import zlib

import pytest
from PIL import Image

from lit_prune.data.images import read_image
from lit_prune.errors import BadSample


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
    for path in ("none.png", "a", "x" * 5000, "loop"):
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

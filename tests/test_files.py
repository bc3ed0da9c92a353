"""Files that are whole or not there."""

import os
from pathlib import Path

import pytest

from lit_prune.files.writing import written_whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_there_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with written_whole(path) as aside:
        aside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["a.json"]


def test_a_block_that_fails_or_gives_up_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def fail() -> None:
        with written_whole(path) as aside:
            aside.write_text("ne")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    with written_whole(path) as aside:
        aside.write_text("ne")
        aside.unlink()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.json"]


def test_two_writers_of_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    with written_whole(path) as first:
        first.write_text("first")
        monkeypatch.setattr("os.getpid", lambda: 1)
        with written_whole(path) as second:
            second.write_text("second")
    assert path.read_text() == "first"
    assert names(tmp_path) == ["a.json"]


def test_links_pipes_and_devices_are_written_to_and_stay(tmp_path: Path) -> None:
    """Such as `--json /dev/stdout`, which is a link."""
    target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
    target.write_text("old")
    link.symlink_to(target)
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    for path in (link, pipe):
        with written_whole(path) as file:
            file.write_text("new")
    assert (link.is_symlink(), target.read_text()) == (True, "new")
    assert (pipe.is_fifo(), os.read(reader, 10)) == (True, b"new")
    os.close(reader)
    assert names(tmp_path) == ["link", "pipe", "target"]

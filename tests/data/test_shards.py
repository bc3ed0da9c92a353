import io
import json
import multiprocessing
import os
import pickle
import random
import signal
import tarfile
from collections import Counter

import datasets
import numpy as np
import pytest
from instruct_samples import conversation
from PIL import Image
from source_samples import as_bytes, assert_same, batch_of, damaged, outcome, rows
from torch.utils.data import DataLoader

from lit_prune.cli import main
from lit_prune.data import sharding
from lit_prune.data.dataset import Collate, InstructDataset
from lit_prune.data.sources import open_source, shards
from lit_prune.data.sources.shards import Shards
from lit_prune.data.sources.tar_index import index_of
from lit_prune.errors import BadSample, LitPruneError
from lit_prune.files.images import decode_image


def shard(folder, out, *options: str) -> None:
    main(["shard", "--data", str(folder / "data.jsonl"), "--out", str(out), *options])


def contents(out) -> dict[str, bytes]:
    """The shards and what was said about them; not the indexes."""
    return {file.name: file.read_bytes() for file in sorted(out.iterdir()) if not file.name.endswith(".npy")}


def write_tar(path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def png(color: str) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (2, 2), color).save(data, "PNG")
    return data.getvalue()


RECORD = json.dumps({"conversations": conversation("Q", "A")}).encode()


def test_shards_give_the_batch_of_json_lines(processor, folder, tmp_path, capsys):
    expected = batch_of(open_source(folder / "data.jsonl"), processor)
    shard(folder, tmp_path / "out", "--samples", "2")
    told = " ".join(capsys.readouterr().err.split())
    assert "3 shards, 6 samples" in told
    assert "bad samples left out: 1, listed in" in told
    assert "data.jsonl: sample bad: image a/none.png is missing" in told
    source = open_source(tmp_path / "out")
    assert [source.file_of(index)[-10:] for index in range(6)] == [f"00000{i}.tar" for i in (0, 0, 1, 1, 2, 2)]
    found = batch_of(source, processor)
    expected["skipped"] = [skipped for skipped in expected["skipped"] if skipped[1] == "open"]  # "bad" is no more
    expected["records"] = [0, 1, 2, 3, 5]
    assert_same(found, expected)
    assert_same(batch_of(pickle.loads(pickle.dumps(source)), processor), expected)
    with source.images(1, source[1])[0].open() as image:
        assert image.read() == (folder / "a" / "y.jpg").read_bytes()  # as it is, not encoded again


@pytest.mark.parametrize("kind", ["tar", "table"])
def test_workers_read_the_same(processor, folder, tmp_path, kind):
    """Forked while the parent has files open."""
    if kind == "tar":
        shard(folder, tmp_path / "out", "--samples", "2")
    else:
        datasets.Dataset.from_list(list(rows(folder, as_bytes(folder)))).save_to_disk(tmp_path / "out")
    source = open_source(tmp_path / "out")
    assert source[0]["id"] == "one"
    data = InstructDataset(source, processor, mode="eval")
    order = [[number] for number in (3, 0, 5, 1, 4, 2)] * 3
    options = {"batch_sampler": order, "collate_fn": Collate(0, "eval")}
    ids = [[batch["ids"] for batch in DataLoader(data, num_workers=workers, **options)] for workers in (0, 2)]
    assert ids[0] == ids[1]
    assert ids[0][:2] == [["both"], ["one"]]


def test_same_data_same_bytes_from_any_source(folder, tmp_path):
    shard(folder, tmp_path / "one")
    shard(folder, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    main(["shard", "--data", str(tmp_path / "one"), "--out", str(tmp_path / "again")])
    first, again = (open_source(tmp_path / name) for name in ("one", "again"))
    assert list(first) == list(again)
    assert contents(tmp_path / "one")["000000.tar"][:512] == contents(tmp_path / "again")["000000.tar"][:512]
    with tarfile.open(tmp_path / "one" / "000000.tar") as tar:
        assert tar.getnames()[:5] == [
            f"00000000{name}" for name in ("0.json", "0.0.png", "1.json", "1.0.jpg", "2.json")
        ]
        assert {(member.mtime, member.uid, member.gid) for member in tar} == {(0, 0, 0)}


def test_pictures_of_phones(tmp_path):
    """JPEGs with more of them inside, which Pillow calls MPO."""
    pictures = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    pictures[0].save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=pictures[1:])
    record = {"image": "phone.jpg", "conversations": conversation("<image>\nQ", "A")}
    (tmp_path / "data.jsonl").write_text(json.dumps(record))
    shard(tmp_path, tmp_path / "out")
    source = open_source(tmp_path / "out")
    with source.images(0, source[0])[0].open() as file:
        assert decode_image(file, "phone.jpg").getpixel((1, 1))[0] > 250
    with tarfile.open(tmp_path / "out" / "000000.tar") as tar:
        assert tar.getnames() == ["000000000.json", "000000000.0.jpg"]


def test_size_is_a_limit(folder, tmp_path):
    shard(folder, tmp_path / "out", "--size", "4KB")
    sizes = [file.stat().st_size for file in (tmp_path / "out").glob("*.tar")]
    assert len(sizes) > 2
    with tarfile.open(tmp_path / "out" / "000000.tar") as tar:
        assert tar.getmembers()[-1].offset_data <= 4000
    assert len(open_source(tmp_path / "out")) == 6


def die_after(samples: int, command: list[str]) -> None:
    """Run a command that kills its own process when it has packed so many samples."""
    pack, packed = sharding._pack, []

    def counted(source, index):
        packed.append(index)
        if len(packed) > samples:
            os.kill(os.getpid(), signal.SIGKILL)
        return pack(source, index)

    sharding._pack = counted
    main(command)


def test_killed_and_run_again(folder, tmp_path):
    shard(folder, tmp_path / "whole", "--samples", "2")
    out = tmp_path / "out"
    command = ["shard", "--data", str(folder / "data.jsonl"), "--out", str(out), "--samples", "2"]
    process = multiprocessing.get_context("fork").Process(target=die_after, args=(4, command))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert sorted(file.name for file in out.glob("[!.]*.tar")) == ["000000.tar"]
    with pytest.raises(LitPruneError, match=r"out: 2 of 7 records are written; finish it"):
        open_source(out)
    kept = (out / "000000.tar").stat().st_mtime_ns
    main(command)
    assert (out / "000000.tar").stat().st_mtime_ns == kept
    assert contents(out) == contents(tmp_path / "whole")
    main(command)  # nothing is left to do
    assert contents(out) == contents(tmp_path / "whole")


def test_a_folder_of_something_else(folder, tmp_path, capsys):
    def refused(*options: str) -> str:
        with pytest.raises(SystemExit):
            shard(folder, tmp_path / "out", *options)
        return " ".join(capsys.readouterr().err.split())

    shard(folder, tmp_path / "out", "--samples", "2")
    assert "holds shards made with other samples" in refused("--samples", "3")
    (tmp_path / "out" / "000001.tar").unlink()
    assert "000001.tar: missing or of another size" in refused("--samples", "2")
    (tmp_path / "out" / "shards.json").write_text("{}")
    assert "shards.json: not written by lit-prune shard" in refused()
    (tmp_path / "out" / "shards.json").unlink()
    assert "tar files of unknown origin" in refused()
    assert "--size 5 horses" in refused("--size", "5 horses")
    assert "a shard holds at least one" in refused("--samples", "0")


def test_what_cannot_be_packed_is_listed(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "eps.png", "EPS")
    turns = conversation("<image>\nQ", "A")
    records = [
        {"id": "eps", "image": "eps.png", "conversations": turns},
        {"id": "up", "image": "../eps.png", "conversations": turns},
        {"id": "none", "conversations": turns},
        {"conversations": conversation("Q", "A")},
    ]
    (tmp_path / "data.jsonl").write_text("\n".join([*map(json.dumps, records), "{"]))
    shard(tmp_path, tmp_path / "out")
    listed = json.loads((tmp_path / "out" / "shards.json").read_text())["skipped"]
    assert [skipped["sample"] for skipped in listed] == ["eps", "up", "none", 4]
    for skipped, reason in zip(listed, ["cannot be read", "'..'", "1 <image> markers", "not JSON"], strict=True):
        assert reason in skipped["reason"]
    assert len(open_source(tmp_path / "out")) == 1


# Shards that others made
def test_the_layout_of_others(tmp_path):
    """Several dots, folders, capital letters, members of other kinds, more than ten images, a record without images."""
    images = {f"a/x.{number}.png": png("red" if number == 10 else "blue") for number in (10, *range(10))}
    write_tar(
        tmp_path / "a.tar",
        {"a/x.json": RECORD, "a/x.txt": b"?", **images, "b/x.JPG": b"", "y.jpg": png("green"), "y.json": RECORD},
    )
    source = open_source(tmp_path / "a.tar")
    assert len(source) == 3
    found = source.images(0, source[0])
    assert [image.open().read() == png("red") for image in found] == [False] * 10 + [True]
    assert source[2]["images"] == ["number 0"]
    assert source.images(2, source[2])[0].open().read() == png("green")
    with pytest.raises(BadSample, match=r"a.tar: sample 1: a JSON object was expected, there is none"):
        source[1]
    with pytest.raises(BadSample, match="2 images are named but 1 lie in the shard"):
        source.images(2, {"image": ["a", "b"]})
    with pytest.raises(IndexError):
        source[3]


def test_bad_records_in_shards(tmp_path, monkeypatch):
    members = {"a.json": b"{", "b.json": b"[]", "c.json": b"\xff", "d.json": b"[" * 100_000, "e.json": RECORD * 2}
    write_tar(tmp_path / "a.tar", members | {"f.json": RECORD})
    source = open_source(tmp_path / "a.tar")
    for index in range(5):
        with pytest.raises(BadSample, match=rf"a.tar: sample {index}: "):
            source[index]
    assert source[5] == json.loads(RECORD)
    monkeypatch.setattr(shards, "LARGEST_MEMBER", 10)
    with pytest.raises(BadSample, match="more than 10"):
        source[5]


def test_members_of_other_kinds_are_no_samples(tmp_path):
    """A text, hidden files between the others, and a name in capital letters."""
    other = {"README.txt": b"x", "._a.json": b"x", "._a.png": b"x", "__MACOSX/._b.json": b"x", ".json": b"{}"}
    mixed = {
        "README.txt": b"x", "._a.JSON": b"x", "a.JSON": RECORD, "._a.png": b"x", "a.PNG": png("red"), "b.cls": b"1",
    }  # fmt: skip
    write_tar(tmp_path / "a.tar", mixed)
    source = open_source(tmp_path / "a.tar")
    assert len(source) == 1
    assert source.images(0, source[0])[0].open().read() == png("red")
    write_tar(tmp_path / "b.tar", other)
    with pytest.raises(LitPruneError, match=r"b.tar: no samples"):
        open_source(tmp_path / "b.tar")


def test_names_are_only_names(tmp_path):
    names = ["/etc/a.json", "../../b.json", "./d/c.json", "x" * 300 + ".json"]
    write_tar(tmp_path / "a.tar", dict.fromkeys(names, RECORD))
    assert len(list(open_source(tmp_path / "a.tar"))) == 4
    assert [file.name for file in tmp_path.iterdir() if file.suffix == ".json"] == []


def test_two_records_of_one_key(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for _ in range(2):
            member = tarfile.TarInfo("a.json")
            member.size = len(RECORD)
            tar.addfile(member, io.BytesIO(RECORD))
    with pytest.raises(LitPruneError, match=r"a.tar: two records of the key a"):
        open_source(tmp_path / "a.tar")


def link(kind: bytes):
    def write(path):
        with tarfile.open(path, "w") as tar:
            member = tarfile.TarInfo("a.json")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)

    return write


def cut(path):
    write_tar(path, {f"{number}.json": RECORD for number in range(5)})
    os.truncate(path, 512 * 5 + 100)


def broken(path):
    write_tar(path, {f"{number}.json": RECORD for number in range(5)})
    with path.open("r+b") as file:
        file.seek(1024)
        file.write(b"x" * 512)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (link(tarfile.SYMTYPE), "member a.json is no regular file"),
        (link(tarfile.LNKTYPE), "member a.json is no regular file"),
        (link(tarfile.CHRTYPE), "member a.json is no regular file"),
        (cut, "not a whole, uncompressed tar|cut short or broken"),
        (broken, "cut short or broken at byte 1024"),
        (lambda path: path.write_bytes(b"x" * 5000), "not a whole, uncompressed tar file"),
        (lambda path: path.write_bytes(b""), "not a whole, uncompressed tar file"),
        (lambda path: tarfile.open(path, "w:gz").close(), "not a whole, uncompressed tar file"),
        (lambda path: tarfile.open(path, "w").close(), "no samples"),
    ],
)
def test_bad_shards(tmp_path, write, message):
    write(tmp_path / "a.tar")
    with pytest.raises(LitPruneError, match=rf"a.tar: .*({message})"):
        open_source(tmp_path / "a.tar")


def test_damaged_shards_end_in_words(folder, tmp_path):
    shard(folder, tmp_path / "out")
    found = Counter(map(outcome, damaged(tmp_path / "out" / "000000.tar", 100)))
    assert set(found) == {"refused", "bad", "fine"}
    assert not list((tmp_path / "out").glob("damaged*"))


def test_the_index_is_made_anew_when_it_is_stale(tmp_path, monkeypatch):
    path, beside = tmp_path / "a.tar", tmp_path / "a.tar.index.npy"
    write_tar(path, {f"{number}.json": RECORD for number in range(3)})
    assert len(index_of(path)) == 3
    whole = beside.read_bytes()
    good = np.load(beside)
    wrong = good.copy()
    wrong[-1] = 1 << 40
    for broken in (b"", b"x", whole[:-8], good[:2], wrong, good.astype(float), np.array(5), np.array([[1, 2], [3, 4]])):
        beside.write_bytes(broken) if isinstance(broken, bytes) else np.save(beside, broken)
        assert len(index_of(path)) == 3
        assert beside.read_bytes() == whole
    for seed in range(100):  # any byte, most of them in the header
        draw, changed = random.Random(seed), bytearray(whole)
        changed[draw.randrange(128 if seed % 4 else len(whole))] = draw.randrange(256)
        beside.write_bytes(changed)
        assert len(index_of(path)) == 3
    write_tar(path, {f"{number}.json": RECORD for number in range(30)})
    assert len(index_of(path)) == 30
    monkeypatch.setattr("lit_prune.data.sources.tar_index._build", None)
    assert len(index_of(path)) == 30  # read, not made


def test_a_shard_of_the_same_size_that_came_later(tmp_path):
    path, records = tmp_path / "a.tar", [json.dumps({"a": "x" * size}).encode() for size in (3, 9)]
    for order in (1, -1):
        write_tar(path, dict(zip(("a.json", "b.json"), records[::order], strict=True)))
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))  # no clock's tick decides
        assert list(open_source(path)) == list(map(json.loads, records[::order]))


def test_few_files_are_open_at_a_time(tmp_path):
    for number in range(20):
        write_tar(tmp_path / f"{number:02d}.tar", {"a.json": RECORD})
    source = Shards(sorted(tmp_path.glob("*.tar")))
    before = len(os.listdir("/proc/self/fd"))
    assert len([source[index] for index in range(20)]) == 20
    assert len(os.listdir("/proc/self/fd")) == before + 16
    assert source[0] == json.loads(RECORD)

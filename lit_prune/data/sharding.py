"""Write tar shards from any source, resumable after an interruption (`lit-prune shard`)."""

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lit_prune.data.conversation import read_conversation
from lit_prune.data.records import without_images
from lit_prune.data.sources import Source, sample_name
from lit_prune.data.sources.shards import LARGEST_MEMBER, MANIFEST
from lit_prune.data.sources.tar_index import BLOCK, index_of
from lit_prune.errors import BadSample, LitPruneError, in_words
from lit_prune.files.images import image_format
from lit_prune.files.writing import ASIDE, written_whole

SUFFIXES = {"JPEG": "jpg", "TIFF": "tif"}  # others are called as their format


@dataclass
class Manifest:
    """Progress of writing shards, saved as `shards.json` in the folder.

    `done` of `records` are packed or skipped. `setting` holds everything the shards depend on. A shard has `file`,
    `samples` and `bytes`, a skipped record `file`, `sample` and `reason`.
    """

    setting: dict
    records: int
    done: int = 0
    shards: list[dict] = field(default_factory=list)
    skipped: list[dict] = field(default_factory=list)

    @property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return sum(shard["samples"] for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Size of all shards in bytes."""
        return sum(shard["bytes"] for shard in self.shards)


def write_shards(
    source: Source,
    name: str,
    out: Path,
    size: int,
    samples: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Manifest:
    """Pack the records of a source with their images into `out/000000.tar` and so on, in their order.

    Image bytes are copied unchanged; an image used by several records is stored once for each. The same source gives
    the same bytes. A folder only holds complete shards; existing ones are kept when the same command runs again. Bad
    records are skipped: unreadable conversations, and images that are missing or whose header is broken or too large.

    Args:
        source: source of the records.
        name: name of the source; a folder can only be resumed with the same one.
        out: folder for the shards.
        size: largest size of a shard in bytes, unless a single sample is larger.
        samples: largest number of samples per shard; None for no limit.
        progress: called after every record with the number of completed ones.

    Raises:
        LitPruneError: the folder holds other files, or shards of another source or setting.
    """
    files = sum(file.stat().st_size for file in source.files)
    setting = {"data": name, "bytes": files, "size": size, "samples": samples}
    out.mkdir(parents=True, exist_ok=True)
    manifest = _manifest(out, setting, len(source))
    for left in out.glob(f".*{ASIDE}"):  # left over from a killed run
        left.unlink()
    while manifest.done < manifest.records:
        _write_shard(source, out / f"{len(manifest.shards):06d}.tar", manifest, progress)
        with written_whole(out / MANIFEST) as file:
            file.write_text(json.dumps(asdict(manifest), indent=1) + "\n", encoding="utf-8")
    return manifest


def _manifest(out: Path, setting: dict, records: int) -> Manifest:
    """Read the folder's manifest to resume it, or create a new one."""
    path = out / MANIFEST
    if not path.is_file():
        if any(out.glob("*.tar")):
            raise LitPruneError(f"{out}: tar files of unknown origin; give a folder of its own")
        return Manifest(setting, records)
    try:
        found = Manifest(**json.loads(path.read_text(encoding="utf-8")))
        sizes = {shard["file"]: shard["bytes"] for shard in found.shards}
    except (ValueError, TypeError, KeyError) as error:
        raise LitPruneError(f"{path}: not written by lit-prune shard: {error}") from error
    if (found.setting, found.records) != (setting, records):
        other = [key for key in setting if found.setting.get(key) != setting[key]] or ["records"]
        raise LitPruneError(f"{out}: holds shards made with other {', '.join(other)}; give another folder or remove it")
    for name, size in sizes.items():
        file = out / Path(name).name
        if not file.is_file() or file.stat().st_size != size:
            raise LitPruneError(f"{file}: missing or of another size than in {MANIFEST}; remove {out} and start again")
    return found


def _write_shard(source: Source, path: Path, manifest: Manifest, progress: Callable[[int], None]) -> None:
    """Write one shard and add it to the manifest."""
    size, samples = manifest.setting["size"], manifest.setting["samples"]
    count, written = 0, 0
    with written_whole(path) as unfinished:
        with tarfile.open(unfinished, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for index in range(manifest.done, manifest.records):
                try:
                    members = _pack(source, index)
                except BadSample as error:
                    entry = {"file": source.file_of(index), "sample": error.sample, "reason": error.reason}
                    manifest.skipped.append(entry)
                else:
                    needed = sum(BLOCK + -(-len(data) // BLOCK) * BLOCK for _, data in members)
                    if count and (count == samples or written + needed + 2 * BLOCK > size):
                        break
                    for suffix, data in members:
                        _add(tar, f"{index:09d}.{suffix}", data)
                    count, written = count + 1, written + needed
                manifest.done = index + 1
                progress(manifest.done)
        if not count:  # nothing but bad records were left
            unfinished.unlink()
            return
    index_of(path)
    manifest.shards.append({"file": path.name, "samples": count, "bytes": path.stat().st_size})


def _pack(source: Source, index: int) -> list[tuple[str, bytes]]:
    """Members of a sample: suffix and content. Raises BadSample with the sample's id."""
    name: str | int = index
    try:
        record = source[index]
        name = sample_name(record, index)
        read_conversation(record, answered=False)
        members = [("json", json.dumps(without_images(record), ensure_ascii=False).encode())]
        for number, image in enumerate(source.images(index, record)):
            with image.open() as file:
                data = file.read(LARGEST_MEMBER + 1)
            if len(data) > LARGEST_MEMBER:
                raise BadSample("", None, f"image {image.name} has more than {LARGEST_MEMBER} bytes")
            format_ = image_format(io.BytesIO(data), image.name)
            members.append((f"{number}.{SUFFIXES.get(format_, format_.lower())}", data))
    except BadSample as error:
        raise BadSample("", name, error.reason) from error
    except (TypeError, ValueError) as error:
        raise BadSample("", name, f"cannot be written as JSON: {error}") from error
    except LitPruneError:
        raise
    except Exception as error:
        raise BadSample("", name, in_words(error)) from error
    return members


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # its time and owner are 0
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))

"""The images of measured samples: a digest that tells them apart, and small copies for a report. No verb itself."""

import hashlib
import io
from pathlib import Path
from typing import Any

from PIL import Image

from lit_prune.files.writing import written_whole

SIDE = 256  # pixels of a small copy's longer side
MOST = 1000  # small copies a comparison: 10 MB at most


def _content(image: Any) -> bytes:
    with image.open() as file:
        return file.read()


class SampleImages:
    """Names the images of the records of a source by their content, and keeps small copies in `folder`.

    Args:
        source: `lit_prune.data.sources.Source` of the records.
        folder: for the copies, DIGEST.jpg; of the first 1000 images only.
    """

    def __init__(self, source: Any, folder: Path) -> None:
        self.source, self.folder = source, folder
        self._digests: dict[int, str] = {}
        self._copies = {path.stem for path in folder.glob("*.jpg")}

    def digest(self, record: int) -> str:
        """Digest of all images of a record; "" where it has none."""
        if record not in self._digests:
            contents = [_content(each) for each in self.source.images(record, self.source[record])]
            found = hashlib.sha256(b"".join(contents)).hexdigest()[:16] if contents else ""
            if contents and found not in self._copies and len(self._copies) < MOST:
                self._copy(contents[0], found)
            self._digests[record] = found
        return self._digests[record]

    def _copy(self, content: bytes, name: str) -> None:
        with Image.open(io.BytesIO(content)) as image:
            image.draft("RGB", (SIDE, SIDE))
            small = image.convert("RGB")
        small.thumbnail((SIDE, SIDE))
        self.folder.mkdir(parents=True, exist_ok=True)
        with written_whole(self.folder / f"{name}.jpg") as file:
            small.save(file, "JPEG", quality=85)
        self._copies.add(name)

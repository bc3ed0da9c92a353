"""Groups of questions by how much of the image the full model needs: none of it, a coarse view, or more."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image

from lit_prune.errors import LitPruneError
from lit_prune.files.writing import written_whole

BLANK, DOWNSAMPLED, REST = GROUPS = ("blank", "downsampled", "rest")
GREY = (128, 128, 128)
FILE = "groups.json"

View = Callable[[Image.Image], Image.Image]


def views(factor: int) -> dict[str, View]:
    """The views of an image that the full model answers from, by group; each keeps the image's size."""
    return {BLANK: blank, DOWNSAMPLED: partial(downsampled, factor=factor)}


def blank(image: Image.Image) -> Image.Image:
    """A grey image of the same size."""
    return Image.new("RGB", image.size, GREY)


def downsampled(image: Image.Image, factor: int) -> Image.Image:
    """The image with sides divided by `factor`, each pixel a mean, scaled back to its size."""
    small = tuple(max(1, round(side / factor)) for side in image.size)
    return image.convert("RGB").resize(small, Image.Resampling.BOX).resize(image.size, Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class Groups:
    """The group of each question, by its index in the data; `factor` is what sides were divided by."""

    factor: int
    of: dict[int, str]

    @classmethod
    def divide(cls, factor: int, right: Mapping[str, Mapping[int, bool]]) -> "Groups":
        """By which views the full model answers right: {view: {record: right}}; the first of `GROUPS` that does."""
        records = dict.fromkeys(record for answered in right.values() for record in answered)
        of = {
            record: next((view for view in (BLANK, DOWNSAMPLED) if right[view].get(record)), REST) for record in records
        }
        return cls(factor, of)

    @property
    def sizes(self) -> dict[str, int]:
        """Questions in each group."""
        return {group: sum(each == group for each in self.of.values()) for group in GROUPS}

    def figures(self, samples: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
        """Accuracy and agreement with the full model in each group, of the records of a cell; None without questions.

        Records are those of `samples/`, see `SampleRecord`.
        """
        found: dict[str, list[Mapping[str, Any]]] = {group: [] for group in GROUPS}
        for each in samples:
            if each["record"] in self.of:
                found[self.of[each["record"]]].append(each)
        return {
            group: {
                "questions": len(held),
                "accuracy": fmean(each["right"] for each in held) if held else None,
                "agreement": fmean(each["agrees"] for each in held) if held else None,
            }
            for group, held in found.items()
        }

    def write(self, out: Path) -> None:
        """Write `groups.json` beside the results: the factor, and the records of each group."""
        held = {group: [record for record, each in self.of.items() if each == group] for group in GROUPS}
        with written_whole(out / FILE) as file:
            file.write_text(json.dumps({"factor": self.factor, **held}) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, out: Path) -> "Groups | None":
        """Those of a comparison's folder, None where it has none; raises `LitPruneError` for a damaged file."""
        file = out / FILE
        if not file.is_file():
            return None
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            of = {int(record): group for group in GROUPS for record in found[group]}
            return cls(int(found["factor"]), of)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise LitPruneError(
                f"{file} is damaged ({error!r}): run `lit-prune compare --groups N --out {out}` again"
            ) from error

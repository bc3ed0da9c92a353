"""Results of a comparison on disk: a file per cell, and its samples in a folder beside."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_prune.errors import LitPruneError
from lit_prune.evaluation.cells import Cell, digest_of
from lit_prune.files.writing import written_whole

PACKAGE = Path(__file__).parents[1]


def samples_folder(out: Path) -> Path:
    """Where a comparison keeps the records of samples, a file per cell, named by its key."""
    return out / "samples"


class Store:
    """Finished cells as one JSON file each, written whole or not at all, and their samples in the folder beside.

    A cell's file holds the result, its setting for people, and a digest of this package's code. That is no part of the
    key, since most changes alter no number.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._others = folder, set()
        self.samples = samples_folder(folder.parent)
        sources = (path for path in PACKAGE.rglob("*.py") if path.parent.name != "commands")
        self.code = digest_of(sorted(sources))

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """The result of a cell measured before; raises `LitPruneError` for a damaged file."""
        file = self._file(cell)
        if not cell.key or not file.is_file():
            return None
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            if found["code"] != self.code:
                self._others.add(cell.key)
            return {**found["result"]}
        except (ValueError, TypeError, KeyError) as error:
            raise LitPruneError(f"{file} is damaged ({error}): delete it, and the cell is measured again") from error

    @property
    def other_code(self) -> int:
        """How many of the cells read were measured by other code."""
        return len(self._others)

    def write(self, cell: Cell, result: dict[str, Any], samples: Sequence[dict[str, Any]] = ()) -> None:
        """Keep a result and the records of its samples, one a line; these come first, so no result lacks them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if samples:
            self.samples.mkdir(parents=True, exist_ok=True)
            with written_whole(self.samples / f"{cell.key}.jsonl") as file:
                file.write_text("".join(json.dumps(each) + "\n" for each in samples), encoding="utf-8")
        setting = {"method": cell.method, "keep": cell.keep, "seed": cell.seed}
        with written_whole(self._file(cell)) as file:
            file.write_text(json.dumps({**setting, "code": self.code, "result": result}) + "\n", encoding="utf-8")

    def read_samples(self, cell: Cell) -> list[dict[str, Any]]:
        """The records of a cell's samples; none where an earlier version measured it. Raises as `read` does."""
        file = self.samples / f"{cell.key}.jsonl"
        if not cell.key or not file.is_file():
            return []
        try:
            return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
        except ValueError as error:
            raise LitPruneError(f"{file} is damaged ({error}): --fresh measures the cell again") from error

    def others(self, cells: Sequence[Cell]) -> int:
        """How many files belong to none of these cells: other methods, data or weights, left alone."""
        return len({file.stem for file in self.folder.glob("*.json")} - {cell.key for cell in cells})

    def _file(self, cell: Cell) -> Path:
        return self.folder / f"{cell.key}.json"

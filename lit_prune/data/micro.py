"""LightningDataModule for the generated micro world: written once as JSON and PNG files, read like any other data."""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from lit_prune.data.instruct import InstructData
from lit_prune.errors import LitPruneError
from lit_prune.micro import drawing, instructions, world

RANGES = {  # first seed of a split, first seed of what comes after it
    "train": (world.TRAIN_SEED, world.VALIDATION_SEED),
    "val": (world.VALIDATION_SEED, world.TEST_SEED),
    "test": (world.TEST_SEED, world.RESERVED_SEED),
}
INSTRUCTIONS = "instructions.json"


class MicroData(InstructData):
    """The generated world as instruction data; batches as in `InstructData`.

    Every split is a folder `root/SPLIT-HASH`, whose hash is over its settings and the source of the world. It is
    written under another name and renamed when it is whole. Prediction reads the test split.

    Args:
        base: model whose processor makes the inputs.
        root: where the folders are written; one that exists is used again.
        train_samples: questions to train on.
        val_samples: questions to validate on.
        test_samples: questions to test on.
        data_seed: which block of scenes is taken: 0 the first ones of each split, 1 the next, and so on.
        questions_per_image: questions asked about a scene; 7 is one of each skill.
        batch_size: see `InstructData`, as for what follows.
        eval_batch_size: see there.
        options: see there.

    Raises:
        LitPruneError: more scenes than the split's range of seeds has.
    """

    def __init__(
        self,
        base: str = "micro",
        root: str = "runs/data/micro",
        train_samples: int = 7000,
        val_samples: int = 700,
        test_samples: int = 1400,
        data_seed: int = 0,
        questions_per_image: int = 7,
        batch_size: int = 16,
        eval_batch_size: int = 32,
        **options: Any,
    ):
        samples = {"train": train_samples, "val": val_samples, "test": test_samples}
        self.splits = {
            split: Split(split, count, seeds_of(split, count, questions_per_image, data_seed), questions_per_image)
            for split, count in samples.items()
        }
        paths = {split: str(it.folder(root) / INSTRUCTIONS) for split, it in self.splits.items()}
        super().__init__(
            base,
            train=paths["train"],
            val=paths["val"],
            test=paths["test"],
            predict=paths["test"],
            images=None,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            **options,
        )
        self.root = root

    def check(self, stage: str) -> None:
        """Nothing can be missing: `prepare_data` writes what is not there."""

    def prepare_data(self) -> None:
        for split in self.splits.values():
            split.write(self.root)


class Split:
    """One split of the generated world: which scenes, how many questions."""

    def __init__(self, name: str, samples: int, seeds: range, questions_per_image: int):
        self.name, self.samples, self.seeds, self.questions_per_image = name, samples, seeds, questions_per_image

    def folder(self, root: str | Path) -> Path:
        """Where it is written; the name changes with anything that changes the files."""
        settings = [self.name, self.samples, self.seeds.start, self.seeds.stop, self.questions_per_image]
        digest = hashlib.sha256(json.dumps(settings).encode())
        for module in (world, drawing, instructions):
            digest.update(Path(module.__file__).read_bytes())
        return Path(root) / f"{self.name}-{digest.hexdigest()[:12]}"

    def write(self, root: str | Path) -> None:
        """Write the folder unless it is there. An interrupted write leaves no folder of this name."""
        folder = self.folder(root)
        if folder.is_dir():
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            path = instructions.write_world(unfinished, self.seeds, self.questions_per_image)
            self._cut(path)
            path.rename(unfinished / INSTRUCTIONS)
            unfinished.chmod(0o755)  # mkdtemp makes it private
            os.rename(unfinished, folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, with the same files
                raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def _cut(self, path: Path) -> None:
        samples = json.loads(path.read_text())
        if len(samples) < self.samples:
            raise LitPruneError(f"the {self.name} scenes gave {len(samples)} questions, fewer than {self.samples}")
        path.write_text(json.dumps(samples[: self.samples]))


def seeds_of(split: str, samples: int, questions_per_image: int, data_seed: int) -> range:
    """The seeds of the scenes that `samples` questions are about.

    Raises:
        LitPruneError: they do not fit into the split's range of seeds.
    """
    first, end = RANGES[split]
    scenes = -(-samples // questions_per_image)
    seeds = range(first + data_seed * scenes, first + (data_seed + 1) * scenes)
    if samples < 1 or data_seed < 0 or seeds.stop > end:
        raise LitPruneError(
            f"data: {samples} {split} samples with data_seed {data_seed} need the scenes {seeds.start} to "
            f"{seeds.stop - 1}; {split} has {first} to {end - 1}"
        )
    return seeds

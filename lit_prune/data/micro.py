"""LightningDataModule for the generated worlds, written once as JSON and PNG files, read as `InstructData`."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

from lit_prune.data.instruct import InstructData
from lit_prune.errors import LitPruneError, check_choice
from lit_prune.micro import instructions
from lit_prune.micro.worlds import World, named, world_of

INSTRUCTIONS = "instructions.json"


class MicroData(InstructData):
    """A generated world as instruction data; batches as in `InstructData`.

    Every split is a folder `root/SPLIT-HASH`, with a hash of its settings and of the world's source code. It is written
    under another name and renamed when complete. Prediction reads the test split.

    Args:
        base: model whose processor encodes the inputs.
        root: parent of the folders; existing folders are reused.
        train_samples: number of training questions.
        val_samples: number of validation questions.
        test_samples: number of test questions.
        data_seed: block of scenes: 0 for the first ones of each split, 1 for the next, and so on.
        questions_per_image: questions asked about a scene; 7 is one of each skill of the small world, 18 of the large.
        train_skills: train on questions of these skills alone, and evaluate on all: does what was learned carry over to
            kinds of questions that were never trained on?
        world: "micro" or "micro-576"; by default the one that `base` was pretrained on, for other models the small one.
        batch_size: see `InstructData`.
        eval_batch_size: see `InstructData`.
        options: see `InstructData`.

    Raises:
        LitPruneError: there is no such world or skill, or the split's range of seeds has too few scenes.
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
        train_skills: Sequence[str] | None = None,
        world: str | None = None,
        batch_size: int = 16,
        eval_batch_size: int = 32,
        **options: Any,
    ):
        of = named(world) if world else world_of(base)
        skills = _checked(train_skills, of)
        samples = {"train": train_samples, "val": val_samples, "test": test_samples}
        self.splits = {}
        for split, count in samples.items():
            chosen = skills if split == "train" else None
            share = 1.0 if chosen is None else len(chosen) / len(of.skills)
            seeds = seeds_of(of, split, count, questions_per_image, data_seed, share)
            self.splits[split] = Split(of, split, count, seeds, questions_per_image, chosen)
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
        """Nothing to check: `prepare_data` writes missing files."""

    def prepare_data(self) -> None:
        for split in self.splits.values():
            split.write(self.root)


class Split:
    """One split of a generated world: its scenes and number of questions."""

    def __init__(
        self,
        world: World,
        name: str,
        samples: int,
        seeds: range,
        questions_per_image: int,
        skills: list[str] | None = None,
    ):
        self.world, self.skills = world, skills
        self.name, self.samples, self.seeds, self.questions_per_image = name, samples, seeds, questions_per_image

    def folder(self, root: str | Path) -> Path:
        """Folder of the split; its name depends on everything that determines the files."""
        settings = [self.name, self.samples, self.seeds.start, self.seeds.stop, self.questions_per_image]
        settings += [] if self.skills is None else [self.skills]
        digest = hashlib.sha256(json.dumps(settings).encode())
        for source in (*self.world.source, Path(instructions.__file__).read_bytes()):
            digest.update(source)
        return Path(root) / f"{self.name}-{digest.hexdigest()[:12]}"

    def write(self, root: str | Path) -> None:
        """Write the folder unless it exists. An interrupted write leaves no folder of this name."""
        folder = self.folder(root)
        if folder.is_dir():
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            path = instructions.write_world(self.world, unfinished, self._scenes(), self.questions_per_image)
            self._cut(path)
            path.rename(unfinished / INSTRUCTIONS)
            unfinished.chmod(0o755)  # mkdtemp makes it private
            os.rename(unfinished, folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process has written the same files
                raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def _scenes(self) -> range:
        """Seeds of the first scenes that have enough questions of the skills.

        Raises:
            LitPruneError: they have too few; no picture is drawn yet.
        """
        if self.skills is None:
            return self.seeds
        found = 0
        for place, seed in enumerate(self.seeds, 1):
            asked = self.world.choose(self.world.make_scene(seed), self.questions_per_image)
            found += sum(question.skill in self.skills for question in asked)
            if found >= self.samples:
                return self.seeds[:place]
        raise LitPruneError(
            f"data.train_skills: {len(self.seeds)} scenes have {found} questions of {', '.join(self.skills)}, fewer "
            f"than {self.samples}: name more skills, or give a larger data.questions_per_image"
        )

    def _cut(self, path: Path) -> None:
        samples = json.loads(path.read_text())
        if self.skills is not None:
            samples = [sample for sample in samples if sample["skill"] in self.skills]
        if len(samples) < self.samples:
            raise LitPruneError(f"the {self.name} scenes gave {len(samples)} questions, fewer than {self.samples}")
        path.write_text(json.dumps(samples[: self.samples]))


def _checked(skills: Sequence[str] | None, world: World) -> list[str] | None:
    """Skills in a fixed order, each once; raises `LitPruneError` for none, or one that the world doesn't have."""
    if skills is None:
        return None
    if not skills:
        raise LitPruneError("data.train_skills is empty: name skills, or leave it out")
    for skill in skills:
        check_choice("data.train_skills", skill, world.skills)
    return sorted(set(skills))


def seeds_of(
    world: World, split: str, samples: int, questions_per_image: int, data_seed: int, share: float = 1.0
) -> range:
    """Seeds of the scenes for `samples` questions, of which a `share` is used.

    Raises:
        LitPruneError: they exceed the split's range of seeds.
    """
    there = world.splits[split]
    scenes = -(-samples // questions_per_image)
    if share < 1.0:
        scenes = ceil(2.0 * scenes / share)  # in reserve: not every scene has a question of each skill
    seeds = range(there.start + data_seed * scenes, there.start + (data_seed + 1) * scenes)
    if samples < 1 or data_seed < 0 or seeds.stop > there.stop:
        raise LitPruneError(
            f"data: {samples} {split} samples with data_seed {data_seed} need the scenes {seeds.start} to "
            f"{seeds.stop - 1}; {split} has {there.start} to {there.stop - 1}"
        )
    return seeds

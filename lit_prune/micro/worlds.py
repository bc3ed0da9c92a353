"""The generated worlds, each by the name of the model that was pretrained on it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from lit_prune.errors import LitPruneError
from lit_prune.micro import (
    drawing,
    drawing_576,
    ground_skills_576,
    object_skills_576,
    phrases_576,
    questions_576,
    scenes_576,
    world,
)
from lit_prune.micro.world import Question


@dataclass(frozen=True)
class World:
    """A generated world: scenes, questions about them, and its ranges of seeds.

    Attributes:
        skills: kinds of questions, in their order.
        splits: seeds of the scenes by split: train, val, test; and `sample`, pictures to try things on.
        seeds: all seeds that scenes may be shown of; later ones belong to outside checks.
        make_scene: the scene of a seed, with `image()`.
        choose: so many questions of a scene, skill after skill in turn.
        ask: one question of one skill, or None where the scene has nothing to ask about.
        modules: the source that scenes and questions depend on.
    """

    skills: tuple[str, ...]
    splits: dict[str, range]
    seeds: range
    make_scene: Callable[[int], Any]
    choose: Callable[[Any, int], list[Question]]
    ask: Callable[[Any, str], Question | None]
    modules: tuple[ModuleType, ...]

    @property
    def source(self) -> list[bytes]:
        """Contents of the modules' files."""
        return [Path(module.__file__).read_bytes() for module in self.modules]


def _splits(module: ModuleType) -> dict[str, range]:
    """Ranges of a world's seeds; the test set's ends where no scene is used any more."""
    return {
        "train": range(module.TRAIN_SEED, module.VALIDATION_SEED),
        "val": range(module.VALIDATION_SEED, module.TEST_SEED),
        "test": range(module.TEST_SEED, module.SAMPLE_SEED),
        "sample": range(module.SAMPLE_SEED, module.RESERVED_SEED),
    }


WORLDS = {
    "micro": World(
        world.SKILLS,
        _splits(world),
        range(world.RESERVED_SEED),
        world.make_scene,
        world.choose_questions,
        lambda scene, skill: next(iter(scene.questions({skill: 1})), None),
        (world, drawing),
    ),
    "micro-576": World(
        questions_576.SKILLS,
        _splits(scenes_576),
        range(scenes_576.PRETRAIN_SEED, scenes_576.RESERVED_SEED),
        scenes_576.make_scene,
        questions_576.choose_questions,
        lambda scene, skill: next(iter(questions_576.questions(scene, {skill: 1})), None),
        (scenes_576, questions_576, object_skills_576, ground_skills_576, phrases_576, drawing_576, drawing),
    ),
}
DEFAULT = "micro"


def world_of(model: str) -> World:
    """The world that a model was pretrained on; for any other model the small one."""
    return WORLDS.get(model, WORLDS[DEFAULT])


def named(name: str) -> World:
    """The world of that name.

    Raises:
        LitPruneError: there is none.
    """
    if name not in WORLDS:
        raise LitPruneError(f"there is no world {name!r}: give {' or '.join(WORLDS)}")
    return WORLDS[name]

"""Scenes of a generated world as files: pictures, and instruction data about them."""

import json
from pathlib import Path

from tqdm import tqdm

from lit_prune.micro.world import as_sample
from lit_prune.micro.worlds import World


def write_world(
    world: World, folder: str | Path, seeds: range | list[int], questions_per_image: int = 7, progress: bool = True
) -> Path:
    """Write PNG files and a LLaVA instruction JSON with the further keys `skill` and `boxes`; return the JSON's path.

    A sample depends on its scene's seed only. Skills are taken in turn, beginning at the remainder of the seed by
    their number, so every range of seeds is balanced over the skills, also with fewer questions an image than skills.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    samples = []
    for seed in tqdm(seeds, desc="scenes", disable=None if progress else True):
        scene = world.make_scene(seed)
        name = f"images/{seed:07d}.png"
        scene.image().save(folder / name)
        for number, question in enumerate(world.choose(scene, questions_per_image)):
            samples.append(as_sample(f"{seed:07d}-{number}", name, question))
    path = folder / "instructions.json"
    path.write_text(json.dumps(samples))
    return path

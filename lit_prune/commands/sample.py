"""Write pictures to try things on, with questions that micro-LLaVA understands and their answers."""

import json
from io import BytesIO
from pathlib import Path

from PIL import Image
from rich.table import Table

from lit_prune.commands._support import console
from lit_prune.errors import LitPruneError
from lit_prune.files.writing import written_whole
from lit_prune.micro.world import as_sample
from lit_prune.micro.worlds import DEFAULT, named

RECORDS = "questions.json"


def run(out: Path = Path("sample"), count: int = 3, seed: int = 0, model: str = DEFAULT) -> None:
    """Write pictures of a generated world as PNG files, and a question of each skill about each with its answer.

    OUT/questions.json holds the questions as LLaVA instruction data (docs/data.md), with their answers, the skill that
    each one takes, and the boxes of the objects asked about. micro-LLaVA was not trained on these pictures.

    Args:
        out: Folder to write 0.png, 1.png and so on to. Files of other pictures that are there are not written over.
        count: Number of pictures, e.g. --count 20.
        seed: The first picture's, e.g. --seed 100; the same seed gives the same bytes.
        model: "micro" or "micro-576": the model whose world is drawn, e.g. --model micro-576.

    Examples:
        lit-prune sample --out sample
        lit-prune sample --out more_samples --count 5 --seed 100
    """
    world = named(model)
    seeds = world.splits["sample"]
    last = len(seeds)
    if count < 1 or seed < 0 or seed + count > last:
        raise LitPruneError(f"--count {count} --seed {seed}: give a picture or more, of the seeds 0 to {last - 1}")
    files, records = {}, []
    table = Table("image", "question", "answer")
    for number in range(count):
        scene, name = world.make_scene(seeds[seed + number]), f"{number}.png"
        files[name] = _png(scene.image())
        for question in world.choose(scene, len(world.skills)):
            records.append(as_sample(f"{scene.seed}-{question.skill}", name, question))
            table.add_row(str(out / name), question.text, question.answer)
        table.add_section()
    files[RECORDS] = ("[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n").encode()
    _write(out, files)
    console.out.print(table)
    console.say(f"wrote {out / RECORDS} and {count} pictures")


def _png(image: Image.Image) -> bytes:
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _write(folder: Path, files: dict[str, bytes]) -> None:
    """Write the files, or none where one that is there differs."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise LitPruneError(f"--out {folder} is a file: a folder is written") from error
    for name, content in files.items():
        if (folder / name).exists() and not ((folder / name).is_file() and (folder / name).read_bytes() == content):
            raise LitPruneError(f"{folder / name} is another file: give an --out that has none of that name")
    for name, content in files.items():
        with written_whole(folder / name) as aside:
            aside.write_bytes(content)

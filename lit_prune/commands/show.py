"""Draw which visual tokens a method keeps at every stage."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from lit_prune.commands._support import console
from lit_prune.commands._support.inputs import Choice, Dtype, attach, encode, load_model, respond
from lit_prune.commands._support.outputs import check_picture
from lit_prune.data import regions
from lit_prune.errors import LitPruneError, check_number
from lit_prune.evaluation.measuring import matches
from lit_prune.evaluation.pictures import DPI, Row, draw_page, titled
from lit_prune.evaluation.views import Box, View, view, visual_tokens
from lit_prune.files.inputs import as_image
from lit_prune.host import Record, Session
from lit_prune.micro.worlds import world_of
from lit_prune.vlm import VLM


@dataclass(frozen=True)
class Asked:
    """An image and a question about it, with the right answer and the boxes asked about, if known."""

    image: Image.Image
    prompt: str
    answer: str | None = None
    boxes: list[Box] | None = None


def run(
    pruner: list[str],
    out: Path,
    image: str | None = None,
    prompt: str | None = None,
    scene: int | None = None,
    skill: str = "colour",
    keep: Any = None,
    model: str = "micro",
    answer: str | None = None,
    boxes: list[int] | None = None,
    names: list[str] | None = None,
    scores: bool = False,
    max_new_tokens: int = 16,
    dtype: Dtype = "auto",
    device: str = "auto",
) -> None:
    """Draw the image and the visual tokens that methods keep at every stage: a row a method.

    Args:
        pruner: Shipped methods, YAML files or plug-in folders, one row each, e.g. --pruner fastv runs/try/plugin.
        out: Picture to write, PNG, PDF or SVG, e.g. --out kept.png.
        image: Image file, e.g. --image photo.jpg; without it a scene of the generated world is drawn.
        prompt: Question about the image, e.g. --prompt "What colour is the circle?"; a scene brings its own.
        scene: Seed of a scene of the model's world, e.g. --scene 6000003; by default the first of the test range.
        skill: What to ask about the scene, e.g. --skill relation; on micro one of existence, colour, shape, counting,
            relation, digit, position; a wrong one lists those of micro-576.
        keep: Budget, visual tokens averaged over the decoder layers, e.g. --keep 16; by default each plug-in's own.
        model: "micro", "micro-576", a model folder, or a hub id, e.g. --model llava-hf/llava-1.5-7b-hf.
        answer: Right answer, e.g. --answer red; colours the answers. A scene's own question has one.
        boxes: What is asked about, as x0 y0 x1 y1 in pixels of the image file, several in a row, e.g. --boxes 10 20 42
            52; marked in the picture, and what the oracle keeps. A scene's own question has them.
        names: Names of the rows, in order, e.g. --names FastV "RCP, trained".
        scores: Add a heat map of the first stage's scores: --scores.
        max_new_tokens: Longest answer, e.g. --max-new-tokens 32.
        dtype: Of the weights, e.g. --dtype bfloat16; auto is what the checkpoint says.
        device: E.g. --device cuda:1; auto is the GPU if there is one.

    Examples:
        lit-prune show --pruner fastv divprune --keep 16 --out kept.png
        lit-prune show --pruner oracle --keep 16 --scene 6000003 --skill relation --out kept.pdf
    """
    check_picture("--out", out)
    check_number("--max-new-tokens", max_new_tokens, least=1, whole=True)
    if names is not None and len(names) != len(pruner):
        raise LitPruneError(f"{len(names)} names for {len(pruner)} methods: give one each")
    asked = ask(model, image, scene, skill, prompt, answer, boxes)
    chosen = [Choice.of(method, keep) for method in pruner]
    vlm = load_model(model, dtype, device)
    inputs = encode(vlm, [asked.image], [asked.prompt])
    seen = view(vlm, inputs, asked.image)
    marks = None if asked.boxes is None else [seen_box(vlm, seen, asked.image.size, box) for box in asked.boxes]
    full = respond(vlm, inputs, max_new_tokens)[0]
    given = hints(marks, seen)
    rows = [as_row(vlm, attach(vlm, choice), inputs, asked, given, max_new_tokens) for choice in chosen]
    rows = [replace(row, name=name) for row, name in zip(rows, names or [row.name for row in rows], strict=True)]
    rows = rows if scores else [replace(row, scores=None) for row in rows]
    known = f"answer: {asked.answer}  ·  " if asked.answer is not None else ""
    subtitle = f"{known}full model with {visual_tokens(vlm, inputs)} tokens: {full}"
    _save(out, draw_page(seen, rows, asked.prompt, subtitle, marks or ()))


def _save(path: Path, page: Figure) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    page.savefig(path, dpi=DPI)
    console.say(f"wrote {path}")


# What is asked


def ask(
    model: str,
    image: str | None,
    scene: int | None,
    skill: str,
    prompt: str | None,
    answer: str | None,
    boxes: list[int] | None,
) -> Asked:
    """Image or scene with its question and known answers; the user's options take precedence."""
    if image is not None and scene is not None:
        raise LitPruneError("give an --image or a --scene, not both")
    asked = _of_scene(model, scene, skill, prompt) if image is None else _of_image(image, prompt)
    given = {"answer": answer, "boxes": None if boxes is None else _fours(boxes)}
    return replace(asked, **{name: value for name, value in given.items() if value is not None})


def _of_image(path: str, prompt: str | None) -> Asked:
    """An image file and the user's question."""
    if prompt is None:
        raise LitPruneError(f"give a question about {path}: --prompt")
    return Asked(as_image(path), prompt)


def _fours(numbers: list[int]) -> list[Box]:
    """Boxes from numbers in a row."""
    if not numbers or len(numbers) % 4:
        raise LitPruneError(f"--boxes takes four numbers a box, x0 y0 x1 y1, not {len(numbers)}")
    return [tuple(numbers[i : i + 4]) for i in range(0, len(numbers), 4)]


def _of_scene(model: str, seed: int | None, skill: str, prompt: str | None) -> Asked:
    """A scene of the model's world with its question, or with one of the user's own, whose answer nobody knows."""
    world = world_of(model)
    seed = world.splits["test"].start if seed is None else seed
    if seed not in world.seeds:
        first, last = world.seeds.start, world.seeds.stop - 1
        raise LitPruneError(f"scene {seed} must lie between {first} and {last}; later ones are reserved")
    if skill not in world.skills:
        raise LitPruneError(f"skill {skill} must be one of {', '.join(world.skills)}")
    scene = world.make_scene(seed)
    if prompt is not None:
        return Asked(scene.image(), prompt)
    question = world.ask(scene, skill)
    if question is None:
        raise LitPruneError(f"scene {seed} has nothing to ask about {skill}: give another --scene or --skill")
    return Asked(scene.image(), question.text, question.answer, list(question.boxes))


# What the model sees


def seen_box(vlm: VLM, seen: View, size: tuple[int, int], box: Box) -> Box:
    """Transform a box of the image file to the model's view, where that is one picture."""
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= size[0] and 0 <= y0 < y1 <= size[1]):
        raise LitPruneError(f"box {box} must be x0 y0 x1 y1 inside the image of {size[0]} x {size[1]} pixels")
    if len(seen.parts) > 1:
        raise LitPruneError(f"{vlm.name} sees an image as {len(seen.parts)} pictures: leave out --boxes")
    if seen.whole is not None:
        return tuple(edge * to / of for edge, to, of in zip(box, seen.whole * 2, size * 2, strict=True))
    mapped = regions.seen_box(vlm.processor.image_processor, size, box)
    if mapped is None:
        raise LitPruneError(f"box {box} is cropped away: the model sees the middle of the image only")
    return mapped


def hints(marks: list[Box] | None, seen: View) -> dict[str, Tensor]:
    """Hints of the sample: the regions asked about, if known."""
    if marks is None:
        return {}
    height, width = seen.pixels.shape[:2]
    return regions.joined([regions.regions(marks, seen.parts[0].tokens.shape, (width, height))])


def as_row(
    vlm: VLM, name: str, inputs: dict[str, Any], asked: Asked, hints: dict[str, Tensor], max_new_tokens: int
) -> Row:
    """Run what is attached and gather what its row shows."""
    record = Record()
    with vlm.using(Session(hints=hints, record=record)):
        text = respond(vlm, inputs, max_new_tokens)[0]
    kept = {stage.layer: stage.kept[0].cpu().numpy() for stage in record.stages}
    first = record.stages[0]
    return Row(
        name=name,
        detail=f"{record.trace.average_visual()[0]:.3g} of {first.kept.shape[1]} tokens on average",
        answer=text,
        right=None if asked.answer is None else matches([text], [asked.answer])[0],
        stages=titled(kept),
        scores=None if first.scores is None else first.scores[0].cpu().numpy(),
    )

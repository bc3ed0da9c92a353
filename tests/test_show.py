"""`lit-prune show` and the drawing behind it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image
from transformers import CLIPImageProcessorPil

from lit_prune.cli import main
from lit_prune.commands.show import seen_box
from lit_prune.errors import LitPruneError
from lit_prune.evaluation.pictures import (
    DPI,
    LABEL,
    MARGIN,
    RIGHT,
    WRONG,
    Row,
    Sheet,
    borders,
    draw_page,
    mark,
)
from lit_prune.evaluation.views import Part, View, by_tiles, view
from lit_prune.micro.world import RESERVED_SEED, VALIDATION_SEED, make_scene
from lit_prune.vlm import VLM, load

PRUNERS = Path(__file__).parents[1] / "configs" / "pruners"
FASTV, ORACLE, RCP = (PRUNERS / f"{name}.yaml" for name in ("fastv", "oracle", "rcp"))
SCENE = make_scene(VALIDATION_SEED)


@pytest.fixture(scope="module")
def vlm(micro_folder: Path) -> VLM:
    return load(micro_folder)


def show(model: Path, out: Path, *options: Any) -> np.ndarray:
    """Run the verb and read the picture."""
    main(["show", "--model", model, "--keep", 16, "--max-new-tokens", 2, "--out", out, *options])
    return np.asarray(Image.open(out).convert("RGB"))


def pixels(rows: int, columns: int) -> tuple[int, int]:
    """Height and width of a page with a question and a line under it."""
    sheet = Sheet(rows, columns, "question", "answer")
    return int(sheet.height * DPI), int(sheet.width * DPI)


def says_in(picture: np.ndarray, colour: str) -> bool:
    """Whether a row's text has this colour."""
    text = picture[:, : int((MARGIN + LABEL) * DPI)].astype(int)
    near = np.abs(text - np.round(np.array(to_rgb(colour)) * 255)).max(-1) < 8
    return bool(near.sum() > 20)


def kept_of(*tokens: int) -> np.ndarray:
    kept = np.zeros(144, dtype=bool)
    kept[list(tokens)] = True
    return kept


def seen(image: np.ndarray, tokens: int = 144) -> View:
    found = by_tiles([image], tokens)
    assert found is not None
    return found


def test_dropped_patches_are_darker_and_kept_ones_untouched() -> None:
    image = np.asarray(SCENE.image())
    marked = mark(seen(image), kept_of(0, 13))
    assert (marked[:8, :8] == image[:8, :8]).all()
    assert (marked[8:16, 8:16] == image[8:16, 8:16]).all()
    patches = (image, marked)
    bright, dark = (p.astype(float).reshape(12, 8, 12, 8, 3).mean((1, 3, 4)).flatten() for p in patches)
    dropped = ~kept_of(0, 13)
    assert (dark[dropped] < 0.5 * bright[dropped]).all()


def test_patches_of_a_side_that_does_not_divide_the_image() -> None:
    marked = mark(seen(np.full((10, 10, 3), 200, dtype=np.uint8), 9), np.eye(3, dtype=bool).flatten())
    assert (marked[0, 0], marked[4, 4], marked[9, 9]) == (pytest.approx(200),) * 3
    assert marked[0, 9].max() < 100


def test_borders_surround_kept_patches() -> None:
    """In pixels of the picture: 8 a patch."""
    (part,) = seen(np.asarray(SCENE.image())).parts
    assert len(borders(part, kept_of())) == 0
    assert sorted(map(tuple, borders(part, kept_of(13)).reshape(-1, 4).tolist())) == [
        (8, 8, 8, 16), (8, 8, 16, 8), (8, 16, 16, 16), (16, 8, 16, 16),
    ]  # fmt: skip
    assert len(borders(part, kept_of(13, 14))) == 6
    assert len(borders(part, np.ones(144, dtype=bool))) == 48
    moved = Part((10, 20, 106, 116), part.tokens)
    assert borders(moved, kept_of(0)).min((0, 1)).tolist() == [10, 20]


def test_page_grows_with_rows_stages_and_long_text() -> None:
    image, row = seen(np.asarray(SCENE.image())), Row("A", stages=[("layer 1", kept_of(5))])
    one, two = draw_page(image, [row]), draw_page(image, [row, Row("B", answer="a long answer " * 20)], "Why? " * 60)
    assert len(one.axes) == 2
    assert len(two.axes) == 3
    assert two.get_figheight() > 2 * one.get_figheight()


def test_image_is_drawn_as_the_model_sees_it(vlm: VLM) -> None:
    inputs = vlm.encode([SCENE.image()], ["what ?"])
    assert (view(vlm, inputs, SCENE.image()).pixels == np.asarray(SCENE.image())).all()


def test_scores_have_a_colour_bar_and_the_frame_a_legend() -> None:
    """The bar's ends are the colours' own; a row without scores has neither."""
    scores = np.linspace(-3.0, 5.0, 144)
    rows = [Row("plain"), Row("scored", scores=scores)]
    page = draw_page(seen(np.asarray(SCENE.image())), rows, boxes=[(8, 8, 24, 24)])
    texts = [text.get_text() for axes in page.axes for text in axes.texts]
    assert texts == [f"{end:.3g}" for end in np.quantile(scores, (0.02, 0.98))]
    titles = [axes.get_title() for axes in page.axes if axes.get_title()]
    assert titles == ["image  □ what is asked about", "scores of the first stage"]
    bars = [axes for axes in page.axes if axes.get_window_extent().width > 5 * axes.get_window_extent().height]
    assert len(bars) == 1
    assert "□" not in draw_page(seen(np.asarray(SCENE.image())), rows).axes[0].get_title()


def test_boxes_follow_resizing_and_cropping(vlm: VLM) -> None:
    page = seen(np.zeros((96, 96, 3), np.uint8))
    assert seen_box(vlm, page, (96, 96), (8, 16, 24, 40)) == (8, 16, 24, 40)
    size = {"height": 96, "width": 96}
    cropping = VLM(vlm.model, type("Processor", (), {})())
    cropping.processor.image_processor = CLIPImageProcessorPil(size={"shortest_edge": 96}, crop_size=size)
    assert seen_box(cropping, page, (384, 192), (96, 0, 192, 96)) == pytest.approx((0, 0, 48, 48), abs=1)
    for box, told in [((0, 0, 50, 50), "cropped away"), ((9, 9, 9, 20), "inside"), ((0, 0, 999, 9), "inside")]:
        with pytest.raises(LitPruneError, match=told):
            seen_box(cropping, page, (384, 192), box)
    with pytest.raises(LitPruneError, match="as 2 pictures: leave out --boxes"):
        seen_box(vlm, by_tiles([page.pixels] * 2, 288), (96, 96), (8, 16, 24, 40))


def test_scene_with_several_methods(micro_folder: Path, tmp_path: Path) -> None:
    picture = show(micro_folder, tmp_path / "kept.png", "--pruner", FASTV, ORACLE, RCP, "--scene", VALIDATION_SEED)
    assert picture.shape[:2] == pixels(3, 1 + 3)
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 100
    assert says_in(picture, WRONG)


def test_scene_with_a_question_of_the_users(micro_folder: Path, tmp_path: Path) -> None:
    asked = ["--pruner", FASTV, "--scene", VALIDATION_SEED, "--prompt", "What shape is the tile?"]
    assert not says_in(show(micro_folder, tmp_path / "a.png", *asked), WRONG)
    assert says_in(show(micro_folder, tmp_path / "b.png", *asked, "--answer", "nothing"), WRONG)


def test_image_with_answer_boxes_and_scores(micro_folder: Path, tmp_path: Path, vlm: VLM) -> None:
    SCENE.image().save(tmp_path / "x.png")
    asked = ["--image", tmp_path / "x.png", "--prompt", "What colour is the tile?"]
    vlm.attach(FASTV, keep=16)
    right = vlm.answer([SCENE.image()], asked[3:], max_new_tokens=2)[0]
    vlm.detach()
    plain = show(micro_folder, tmp_path / "a.png", *asked, "--pruner", FASTV)
    known = show(micro_folder, tmp_path / "b.png", *asked, "--pruner", FASTV, "--answer", right, "--scores")
    assert plain.shape[:2] == pixels(1, 3)
    assert known.shape[:2] == pixels(1, 4)
    assert not says_in(plain, RIGHT)
    assert says_in(known, RIGHT)
    boxes = ["--boxes", 8, 8, 24, 24, 40, 40, 56, 56]
    assert show(micro_folder, tmp_path / "c.png", *asked, "--pruner", ORACLE, *boxes).shape[:2] == pixels(1, 3)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--image", "x.png", "--prompt", "What?", "--pruner", ORACLE], "--boxes"),
        (["--image", "x.png", "--prompt", "What?", "--boxes", 1, 2, 3], "four numbers"),
        (["--image", "x.png", "--prompt", "What?", "--boxes", 1, 2, 300, 400], "inside the image"),
        (["--image", "x.png"], "--prompt"),
        (["--image", "absent.png", "--prompt", "What?"], "absent.png"),
        (["--image", "x.png", "--prompt", "What?", "--scene", 3], "not both"),
        (["--scene", RESERVED_SEED], "reserved"),
        (["--scene", 3, "--skill", "humour"], "existence, colour"),
        (["--scene", 3, "--names", "a", "b"], "2 names for 1"),
        (["--scene", 3, "--out", "kept.gif"], ".png, .pdf, .svg"),
    ],
)
def test_errors_are_one_message(
    options: list[Any],
    told: str,
    micro_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    SCENE.image().save("x.png")
    defaults = {"--pruner": FASTV, "--out": "kept.png"}
    given = [part for name, value in defaults.items() if name not in options for part in (name, value)]
    with pytest.raises(SystemExit) as stop:
        main(["show", "--model", micro_folder, "--keep", 16, *given, *options])
    said = capsys.readouterr().err
    assert stop.value.code == 1
    assert told in said
    assert "Traceback" not in said

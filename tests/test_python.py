"""The Python door: what an interactive user sees, types and mistypes."""

import pydoc
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import ROOT

import lit_prune
import lit_prune.data
from lit_prune.errors import LitPruneError
from lit_prune.files.inputs import as_image, pair
from lit_prune.loading.locations import closest_model
from lit_prune.pruners.random import Random
from lit_prune.vlm import VLM, load

QUESTION, OTHER = "what colour is the tile ?", "how many objects are a circle ?"
SHAPE = "llava-hf/llava-1.5-7b-hf"


@pytest.fixture(scope="module")
def micro(micro_folder) -> VLM:
    return load(micro_folder)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    pixels = torch.randint(0, 256, (96, 96, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


@pytest.fixture(scope="module")
def file(picture, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "a.png"
    picture.save(path)
    return path


def asked(vlm: VLM, images, prompts) -> str | list[str]:
    return vlm.answer(images, prompts, max_new_tokens=2)


def refusal(call, *arguments) -> str:
    with pytest.raises(LitPruneError) as refused:
        call(*arguments)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# -- what is there --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("module", [lit_prune, lit_prune.data])
def test_dir_shows_what_is_imported_late(module):
    assert set(module.__all__) <= set(dir(module))
    assert dir(module) == sorted(set(dir(module)))
    for name in module.__all__:
        getattr(module, name)
    with pytest.raises(AttributeError, match="has no attribute 'laod'"):
        module.laod


def test_dir_imports_nothing_heavy():
    code = "import sys, lit_prune; dir(lit_prune); print({'torch', 'transformers'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_help_shows_the_face_and_no_more():
    text = pydoc.render_doc(lit_prune, renderer=pydoc.plaintext)
    assert re.search(r"^    load\(base:", text, re.MULTILINE)
    for name in ("class VLM", "class LitPruneError", "attach(self", "answer(self", "lit_prune.load("):
        assert name in text
    assert len(text.splitlines()) < 400


def test_types_are_there_for_checkers():
    assert (Path(lit_prune.__file__).parent / "py.typed").is_file()


# -- repr -----------------------------------------------------------------------------------------------------------
def test_repr_of_the_plain_model(micro, micro_folder):
    head, line = repr(micro).splitlines()
    assert head == f"VLM({micro_folder}, LlavaForConditionalGeneration, 3,512,192 frozen parameters, float32 on cpu)"
    assert line == "  pruner: none, the plain model"


def test_repr_of_what_is_attached(micro):
    micro.attach("rcp", keep=16, positions="renumbered")
    count = sum(p.numel() for p in micro.plugin.pruner.parameters())
    repair = sum(p.numel() for p in micro.plugin.repair.parameters())
    assert repr(micro).splitlines()[1:] == [
        "  pruner: RCP",
        "  budget: 16 of 144 visual tokens, averaged over the decoder layers' inputs",
        f"  schedule: {', '.join(f'{n} from layer {layer}' for layer, n in micro.host.schedule.items())}",
        "  repair: RepairAdapter at layers 11, 14",
        "  positions: renumbered",
        f"  trains: {count:,} parameters of the pruner and {repair:,} parameters of the repair",
    ]
    micro.attach("uniform", keep={0: 20})
    assert repr(micro).splitlines()[1:] == ["  pruner: Uniform", "  schedule: 20 from layer 0", "  trains: nothing"]
    micro.detach()
    assert "pruner: none" in repr(micro)


def test_repr_of_another_depth_names_its_layers():
    vlm = load(SHAPE, random_weights=True, device="meta").attach("rcp", keep=128)
    assert "  repair: RepairAdapter at layers 22, 28" in repr(vlm)
    assert "bfloat16 on meta" in repr(vlm)


def test_a_notebook_shows_the_same_as_a_table(micro):
    import xml.etree.ElementTree as xml

    micro.attach("divprune", keep=16)
    before = micro.name
    try:
        micro.name = "<b>&amp;"
        table = xml.fromstring(micro._repr_html_())
        head, *lines = repr(micro).split("\n  ")
    finally:
        micro.name = before
        micro.detach()
    assert table.find("caption").text == head
    assert head.startswith("VLM(<b>&amp;, Llava")
    assert [": ".join(cell.text for cell in row) for row in table.iter("tr")] == lines
    assert len(lines) == 5


def test_repr_without_a_name_or_a_processor(tiny_model):
    vlm = VLM(tiny_model, None)
    assert repr(vlm).startswith("VLM(LlavaForConditionalGeneration, ")
    assert "processor: none" in repr(vlm)
    first, second = vlm.attach(Random([0]), keep=12), VLM(tiny_model, None).attach(Random([0]), keep=12)
    assert "pruner: none" in repr(first), "the second one's plug-in took its place"
    assert "pruner: Random" in repr(second)
    second.detach()


# -- answer ---------------------------------------------------------------------------------------------------------
def test_one_question_about_one_image_has_one_answer(micro, picture, file):
    """However the picture is given."""
    (listed,) = asked(micro, [picture], [QUESTION])
    assert isinstance(listed, str)
    for given_as in (picture, file, str(file), np.asarray(picture)):
        assert asked(micro, given_as, QUESTION) == listed
        assert asked(micro, [given_as], QUESTION) == [listed]
        assert asked(micro, given_as, [QUESTION]) == [listed]


def test_one_serves_all_of_the_other(micro, picture, file):
    turned = picture.rotate(90)
    pairs = [(picture, QUESTION), (picture, OTHER), (turned, QUESTION)]
    first, other, second = (asked(micro, *both) for both in pairs)
    assert asked(micro, picture, [QUESTION, OTHER]) == [first, other]
    assert asked(micro, (picture, turned), QUESTION) == [first, second]
    assert asked(micro, (image for image in (picture, turned)), QUESTION) == [first, second]
    assert asked(micro, np.stack([np.asarray(picture), np.asarray(turned)]), QUESTION) == [first, second]
    assert asked(micro, [file, picture, turned], [QUESTION, OTHER, QUESTION]) == [first, other, second]


def test_nothing_has_no_answers(micro, picture):
    assert asked(micro, [], []) == asked(micro, picture, []) == asked(micro, [], QUESTION) == []
    assert "nothing to encode" in refusal(micro.encode, [], [])


def test_pictures_of_every_mode_are_read_as_files_are(tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    rgba = np.stack([grey, grey.T, grey, grey], axis=-1)
    for array in (grey, grey[..., None], np.stack([grey] * 3, axis=-1), rgba):
        made = as_image(array)
        assert (made.mode, made.size) == ("RGB", (8, 8))
        Image.fromarray(array.squeeze()).save(tmp_path / "x.png")
        assert np.array_equal(np.asarray(as_image(tmp_path / "x.png")), np.asarray(made))
    deep = Image.fromarray((grey.astype(np.uint16) + 1) * 256)
    deep.save(tmp_path / "deep.png")
    assert np.array_equal(np.asarray(as_image(deep)), np.asarray(as_image(tmp_path / "deep.png")))


def test_a_colon_makes_no_address(picture, tmp_path):
    picture.save(tmp_path / "shot 12:30.png")
    assert as_image(tmp_path / "shot 12:30.png").size == picture.size


def test_pictures_are_upright(tmp_path):
    lying = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8))
    exif = Image.Exif()
    exif[0x0112] = 6
    lying.save(tmp_path / "lying.png", exif=exif)
    assert as_image(tmp_path / "lying.png").size == as_image(Image.open(tmp_path / "lying.png")).size == (6, 8)


@pytest.mark.parametrize(
    ("images", "prompts", "says"),
    [
        (None, QUESTION, "images can't be None: give a path, a PIL image, or an array"),
        (3, QUESTION, "images can't be of type int"),
        (b"\x89PNG", QUESTION, "images can't be of type bytes"),
        ({"image": 1}, QUESTION, "images can't be of type dict"),
        ("PICTURE", None, "prompts can't be None: give text"),
        ("PICTURE", 3, "prompts can't be of type int"),
        ("PICTURE", QUESTION.encode(), "prompts can't be of type bytes"),
        ("PICTURE", [QUESTION, None], "prompt 2 is None: give text"),
        ("PICTURE", [[QUESTION]], "prompt 1 is of type list"),
        ("PICTURE", "", "must not be empty"),
        ("PICTURE", [QUESTION, "  "], "must not be empty"),
        ("PICTURE", "a <image> b", "hold <image>"),
        ([None], QUESTION, "image 1 is None"),
        (["PICTURE", None], [QUESTION, OTHER], "image 2 is None"),
        ([["PICTURE", "PICTURE"]], QUESTION, "image 1 is of type list"),
        (["PICTURE", "PICTURE"], [QUESTION], "2 images and 1 prompts"),
        (["PICTURE"], [QUESTION, OTHER], "1 images and 2 prompts"),
        ([], [QUESTION], "0 images and 1 prompts"),
        ("nowhere.png", QUESTION, "nowhere.png is missing"),
        ("FOLDER", QUESTION, "is a folder: give files"),
        (ROOT / "README.md", QUESTION, "README.md cannot be read"),
        ("", QUESTION, "the path of an image is empty"),
        ("a\0b", QUESTION, "cannot be read"),
        ("x" * 5000, QUESTION, "cannot be read"),
        ("https://example.org/a.png", QUESTION, "is an address: give a file"),
        ("data:image/png;base64," + "A" * 9999, QUESTION, "is an address: give a file"),
        (torch.zeros(3, 8, 8), QUESTION, "image 1 is of type Tensor"),
        (np.zeros((8, 8, 3)), QUESTION, "image 1 is an array of 8 x 8 x 3, float64"),
        (np.zeros((8, 8, 2), np.uint8), QUESTION, "image 1 is an array of 8 x 8 x 2, uint8"),
        (np.zeros((3, 8, 8), np.uint8), QUESTION, "image 1 is an array of 3 x 8 x 8, uint8"),
        (np.zeros((0, 8), np.uint8), QUESTION, "image 1 is an array of 0 x 8"),
        (np.zeros(8, np.uint8), QUESTION, "image 1 is an array of 8, uint8"),
        (np.uint8(3), QUESTION, "images can't be of type uint8"),
        (np.zeros((2, 2, 8, 8, 3), np.uint8), QUESTION, "image 1 is an array of 2 x 8 x 8 x 3"),
        (Image.new("I", (8, 8)), QUESTION, "image 1 has greys of 32 bits"),
        (Image.new("RGB", (1, 1000)), QUESTION, "image 1 has 1 x 1000 pixels"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else None,
)
def test_what_cannot_be_asked_is_refused_in_one_line(micro, picture, tmp_path, monkeypatch, images, prompts, says):
    monkeypatch.chdir(tmp_path)

    def real(value):
        if isinstance(value, list):
            return [real(part) for part in value]
        return {"PICTURE": picture, "FOLDER": str(tmp_path)}.get(value, value) if isinstance(value, str) else value

    said = refusal(asked, micro, real(images), real(prompts))
    assert says in said
    assert len(said) < 400


def test_no_new_tokens(micro, picture):
    assert "max_new_tokens=0" in refusal(lambda: micro.answer(picture, QUESTION, max_new_tokens=0))


def test_an_image_that_is_cut_short(micro, file, tmp_path):
    (tmp_path / "cut.png").write_bytes(file.read_bytes()[:2000])
    assert "cut.png cannot be read" in refusal(asked, micro, tmp_path / "cut.png", QUESTION)
    assert "image 1 cannot be read" in refusal(asked, micro, Image.open(tmp_path / "cut.png"), QUESTION)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.binary(max_size=9)
ARRAYS = st.builds(
    lambda shape, kind: np.zeros(shape, kind),
    st.lists(st.integers(0, 3), max_size=5),
    st.sampled_from(["uint8", "int64", "float32", "bool", "U2"]),
)
PICTURES = st.just(Image.new("RGB", (4, 4))) | st.just(Image.new("L", (4, 4))) | st.just(Image.new("F", (4, 4)))
VALUES = SCALARS | ARRAYS | PICTURES
ANYTHING = VALUES | st.lists(VALUES, max_size=3) | st.lists(PICTURES, max_size=3) | st.dictionaries(SCALARS, VALUES)
QUESTIONS = ANYTHING | st.text(max_size=9) | st.lists(st.text(max_size=9), max_size=3)


@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(ANYTHING, QUESTIONS)
def test_anything_is_paired_or_refused_in_one_line(images, prompts):
    """No other error, and never another number of images than of prompts."""
    try:
        pictures, questions = pair(images, prompts)
    except LitPruneError:
        return
    assert len(pictures) == len(questions)
    assert all(picture.mode == "RGB" for picture in pictures)
    assert all(isinstance(question, str) for question in questions)
    if isinstance(prompts, list):
        assert questions == prompts


# -- names ----------------------------------------------------------------------------------------------------------
def test_a_method_by_its_name(micro):
    assert type(micro.attach("fastv", keep=16).plugin.pruner).__name__ == "FastV"
    assert micro.attach("fastv", keep=16).host.schedule == micro.attach(
        ROOT / "configs" / "pruners" / "fastv.yaml", keep=16
    ).host.schedule  # fmt: skip
    micro.detach()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("fastw", "no method `fastw`; did you mean `fastv`?"),
        ("DivPrune", "did you mean `divprune`"),
        ("nothing_like_it", "no method `nothing_like_it` (`lit-prune configs` lists"),
        ("fastw.yaml", "fastw.yaml: No such file; did you mean `pruners/fastv.yaml`"),
        ("runs/try/plugin", "runs/try/plugin: no such folder"),
        ("", "'' is no method: give a shipped method's name"),
        (None, "None is no method"),
        (16, "16 is no method"),
        (Random, "the class Random is no method"),
        (["fastv"], "['fastv'] is no method"),
    ],
)
def test_what_is_no_method_is_refused_in_one_line(micro, tmp_path, monkeypatch, name, says):
    monkeypatch.chdir(tmp_path)
    assert says in refusal(micro.attach, name)


def test_a_plugin_folder_named_as_a_shipped_method_wins(micro, tmp_path, monkeypatch):
    """And another folder of that name does not."""
    monkeypatch.chdir(tmp_path)
    micro.attach("uniform", keep=16).save_pretrained("random")
    assert type(micro.attach("random").plugin.pruner).__name__ == "Uniform"
    Path("fastv").mkdir()
    assert type(micro.attach("fastv", keep=16).plugin.pruner).__name__ == "FastV"
    Path("results").mkdir()
    assert "results is no plug-in folder" in refusal(micro.attach, "results")
    micro.detach()


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("mirco", "micro"), ("Micro", "micro"), ("micro-llava", "micro"), ("llava-hf/llava-1.5-7b", SHAPE),
        ("llava-1.5-7b-hf", SHAPE), ("Qwen/Qwen2.5-VL-7B", "Qwen/Qwen2.5-VL-7B-Instruct"), (SHAPE, None),
        ("micro", None), ("nothing-like-it", None),
    ],
)  # fmt: skip
def test_the_closest_model(name, meant, monkeypatch, tmp_path):
    assert closest_model(name) == meant
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    if meant:
        said = refusal(load, name)
        assert f"id you mean `{meant}`?" in said


@pytest.mark.parametrize("base", [None, 3, "", b"micro", ["micro"]])
def test_what_is_no_model_is_refused_in_one_line(base):
    assert "is no model: give a name such as 'micro'" in refusal(load, base)


def test_hints_of_names_wait_for_no_network(monkeypatch):
    """A slip in the one name that everybody types is seen without asking the hub."""
    monkeypatch.setattr("lit_prune.loading.locations.hub_answers", lambda: pytest.fail("the hub was asked"))
    assert "did you mean `micro`?" in refusal(load, "mirco")

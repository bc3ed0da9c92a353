"""Which part of an image each visual token stands for, against transformers' image processors."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import (
    CLIPImageProcessorPil,
    Glm5NextImageProcessorPil,
    MiniCPMV4_6ImageProcessorPil,
    PixtralImageProcessorPil,
    Qwen2VLImageProcessorPil,
    SmolVLMImageProcessorPil,
)
from transformers.models.llava_next.modeling_llava_next import unpad_image

from lit_prune.callbacks.samples import _seen
from lit_prune.commands.show import seen_box
from lit_prune.data import regions
from lit_prune.errors import LitPruneError
from lit_prune.evaluation.pictures import Row, borders, draw_page, mark
from lit_prune.evaluation.views import View, tiles_of, view
from lit_prune.host.parts import find
from lit_prune.host.zoo.shrink import tiny_model
from lit_prune.micro.world import VALIDATION_SEED, make_scene
from lit_prune.vlm import VLM, load

SCENE = make_scene(VALIDATION_SEED)


@pytest.fixture(scope="module")
def vlm(micro_folder: Path) -> VLM:
    return load(micro_folder)


def bright(picture: np.ndarray) -> tuple[float, float, float, float]:
    """The box of what a white picture still shows white, in shares of its width and height."""
    rows, columns = (picture.min(-1) > 250).nonzero()
    height, width = picture.shape[:2]
    return columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height


def of_prompt(vlm: VLM, tokens: int, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    token = find(vlm.model).tokens["image"]
    return {"input_ids": torch.tensor([[5, *[token] * tokens, 6]]), **inputs}


def test_patches_of_an_image_that_keeps_its_shape_stand_where_its_processor_reads_them(vlm: VLM) -> None:
    """A white square in a black picture: the token of the only white patches is the one drawn there."""
    image = Image.new("RGB", (96, 64))
    ImageDraw.Draw(image).rectangle((64, 32, 95, 63), fill="white")
    read = Qwen2VLImageProcessorPil(patch_size=8, min_pixels=64, max_pixels=96 * 64)(images=image, return_tensors="pt")
    white = read["pixel_values"].amin(1) > 0.9  # patches, in blocks of four that one token stands for
    kept = white.view(-1, 4).all(1).numpy()
    assert kept.sum() == 4
    found = view(vlm, of_prompt(vlm, 24, **read), image)
    assert found.whole
    assert found.parts[0].tokens.shape == (4, 6)
    blank = View(np.full_like(found.pixels, 255), found.parts)
    assert bright(mark(blank, kept)) == pytest.approx((2 / 3, 1 / 2, 1, 1))
    assert seen_box(vlm, found, image.size, (64, 32, 96, 64)) == (64, 32, 96, 64)


def test_tiles_are_drawn_side_by_side_in_the_models_order(vlm: VLM) -> None:
    pixels = torch.arange(5.0).view(1, 5, 1, 1, 1).expand(1, 5, 3, 96, 96) / 5
    plain = VLM(vlm.model, type("Processor", (), {})())
    found = view(plain, of_prompt(vlm, 5 * 36, pixel_values=pixels), SCENE.image())
    assert [part.tokens[0, 0] for part in found.parts] == [0, 36, 72, 108, 144]
    assert [part.box[:2] for part in found.parts] == [(0, 0), (100, 0), (200, 0), (0, 100), (100, 100)]
    for number, (x0, y0, x1, y1) in enumerate(part.box for part in found.parts):
        assert (found.pixels[y0:y1, x0:x1] == round(255 * number / 5)).all()
    kept = np.arange(180) >= 144
    lines = np.concatenate([borders(part, kept) for part in found.parts])
    assert (lines.min((0, 1)).tolist(), lines.max((0, 1)).tolist()) == ([100, 100], [196, 196])
    page = draw_page(found, [Row("A", stages=[("layer 1", kept)], scores=np.arange(180.0))])
    assert len(page.axes) == 4


def with_newline(vlm: VLM, **config: Any) -> VLM:
    """A model whose rows end with a token of their own, as in LLaVA-NeXT."""
    model = copy.copy(vlm.model)
    model._parameters = {**model._parameters, "image_newline": torch.nn.Parameter(torch.zeros(1))}
    model.config = copy.copy(model.config)
    for name, value in config.items():
        setattr(model.config, name, value)
    return VLM(model, type("Processor", (), {})())


@pytest.mark.parametrize("ended", [0, 1])
def test_ends_of_rows_of_a_finer_grid_are_no_patches(vlm: VLM, ended: int) -> None:
    """The whole image as 12 x 12 patches, then a grid of 8 x 24 without padding, whose rows may have an end."""
    plain = with_newline(vlm) if ended else VLM(vlm.model, type("Processor", (), {})())
    tiles = {"pixel_values": torch.zeros(1, 3, 3, 96, 96), "image_sizes": torch.tensor([[100, 300]])}
    image = Image.new("RGB", (300, 100))
    first, finer = view(plain, of_prompt(vlm, 144 + 8 * (24 + ended), **tiles), image).parts
    assert (first.tokens == np.arange(144).reshape(12, 12)).all()
    assert finer.tokens.shape == (8, 24)
    assert (finer.tokens[:, 0] == 144 + np.arange(8) * (24 + ended)).all()
    with pytest.raises(LitPruneError, match="it isn't known which part of the image each of 149 visual tokens"):
        view(plain, of_prompt(vlm, 149, **tiles), image)


@pytest.mark.parametrize(
    ("size", "tiles", "config"),
    [
        ((430, 60), (3, 1), {}),  # a shape nearer to the image's has as many tokens
        ((578, 176), (3, 1), {}),
        ((1000, 1400), (2, 2), {}),
        ((1000, 1400), (4, 5), {"vision_aspect_ratio": "anyres_max_9"}),  # LLaVA-OneVision: interpolated
    ],
)
def test_a_finer_grid_is_the_one_that_the_model_packs(
    vlm: VLM, size: tuple[int, int], tiles: tuple[int, int], config: dict[str, str]
) -> None:
    """Against LLaVA-NeXT's own unpadding."""
    down, across = tiles
    rows, columns = unpad_image(torch.zeros(1, 12 * down, 12 * across), size).shape[1:]
    if config and (over := (rows * columns / (9 * 144)) ** 0.5) > 1.1:
        rows, columns = int(rows // over), int(columns // over)
    pixels = {"pixel_values": torch.zeros(1, 1 + down * across, 3, 96, 96), "image_sizes": torch.tensor([size])}
    inputs = of_prompt(vlm, 144 + rows * (columns + 1), **pixels)
    _, finer = view(with_newline(vlm, **config), inputs, Image.new("RGB", size[::-1])).parts
    assert finer.tokens.shape == (rows, columns)


@pytest.mark.parametrize("size", [(100, 90), (130, 60)])
def test_padding_at_the_end_of_an_image_is_drawn(vlm: VLM, size: tuple[int, int]) -> None:
    """The grid of GLM-5 is over an image filled up with black: white tokens stand over the white square."""
    processor = Glm5NextImageProcessorPil(patch_size=8, min_image_tokens=4, max_image_tokens=400)
    image = Image.new("RGB", size)
    ImageDraw.Draw(image).rectangle((32, 32, 63, 47), fill="white")
    read = processor(images=image, return_tensors="pt")
    kept = (read["pixel_values"].view(-1, 4 * read["pixel_values"].shape[1]) > 0).all(1).numpy()
    assert kept.sum() == 2
    padding = VLM(vlm.model, SimpleNamespace(image_processor=processor))
    found = view(padding, of_prompt(vlm, len(kept), **read), image)
    assert found.pixels.shape[:2] == tuple(-(-side // 16) * 16 for side in size[::-1])
    marked = mark(View(np.where(found.pixels > 0, 255, 0).astype(np.uint8), found.parts), kept)
    assert ((marked.min(-1) == 255) == (found.pixels.min(-1) == 255)).all()
    assert seen_box(padding, found, size, (32, 32, 64, 48)) == (32, 32, 64, 48)


def test_every_token_of_a_tiny_image_has_pixels(vlm: VLM) -> None:
    grid = {"image_grid_thw": torch.tensor([[1, 16, 16]])}
    found = view(vlm, of_prompt(vlm, 64, **grid), Image.new("RGB", (3, 3), "white"))
    for token in range(64):
        assert (mark(found, np.arange(64) == token) == 255).all(-1).any()
    assert seen_box(vlm, found, (3, 3), (0, 0, 3, 3)) == (0, 0, *found.pixels.shape[1::-1])


def test_pixels_behind_the_last_patch_are_not_drawn(vlm: VLM) -> None:
    """The tower's convolution reads no part of a patch: 12 of 8 pixels in 100."""
    found = view(vlm, of_prompt(vlm, 144, pixel_values=torch.zeros(1, 3, 100, 100)), SCENE.image())
    assert found.pixels.shape == (96, 96, 3)


class Rows(MiniCPMV4_6ImageProcessorPil):
    """The same tiles as LFM2-VL has them: a row of patches for each, padded, colours last."""

    def __call__(self, **given: Any) -> dict[str, torch.Tensor]:
        read = super().__call__(**given)
        patches = read["pixel_values"][0].unflatten(-1, (-1, 8)).permute(2, 1, 3, 0).flatten(1)
        counts = read["target_sizes"].prod(1).tolist()
        return {
            "pixel_values": torch.nn.utils.rnn.pad_sequence(patches.split(counts), batch_first=True),
            "spatial_shapes": read["target_sizes"],
        }


# -- normalisation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"image_mean": 0.5, "image_std": 0.5},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"rescale_factor": 0.0078, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},  # Chameleon
    ],
)
def test_normalisation_is_undone(options: dict[str, Any]) -> None:
    """Tiles have the image's colours, and boxes are found, however a processor scales."""
    size = {"height": 96, "width": 96}
    processor = CLIPImageProcessorPil(size=size, crop_size=size, **options)
    (tile,) = tiles_of(processor(images=SCENE.image(), return_tensors="pt"), processor)
    assert np.abs(tile.astype(int) - np.asarray(SCENE.image())).max() <= 2
    assert regions.seen_box(processor, (96, 96), (8, 16, 24, 40)) == (8, 16, 24, 40)


class Renamed(CLIPImageProcessorPil):
    """Images under Video-LLaVA's name."""

    def __call__(self, **given: Any) -> dict[str, torch.Tensor]:
        return {"pixel_values_images": super().__call__(**given)["pixel_values"]}


def test_a_box_in_the_only_tile_of_an_image() -> None:
    """SmolVLM's pixels have a dimension for tiles, too; Video-LLaVA's have a name of their own."""
    size = {"longest_edge": 96}
    processor = SmolVLMImageProcessorPil(size=size, max_image_size=size, do_image_splitting=False)
    assert regions.seen_box(processor, (96, 96), (8, 16, 24, 40)) == (8, 16, 24, 40)
    assert regions.seen_box(
        Renamed(size={"height": 96, "width": 96}, do_center_crop=False), (96, 96), (8, 16, 24, 40)
    ) == (8, 16, 24, 40)


# -- queries and batches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [MiniCPMV4_6ImageProcessorPil, Rows])
def test_tiles_of_several_shapes(vlm: VLM, packed: type) -> None:
    """A picture of three colours: the tiles show it in the order of their patches, each token in its place."""
    processor = packed(patch_size=8, scale_resolution=64, max_slice_nums=4, downsample_mode="4x")
    image = Image.effect_mandelbrot((192, 96), (-2, -1, 1, 1), 30).convert("RGB")
    read = processor(images=image, return_tensors="pt")
    name = next(name for name in ("target_sizes", "spatial_shapes") if name in read)
    sizes = read[name].tolist()
    assert len({tuple(size) for size in sizes}) > 1
    holder = VLM(vlm.model, SimpleNamespace(image_processor=processor))
    found = view(holder, of_prompt(vlm, sum(rows * columns for rows, columns in sizes) // 4, **read), image)
    assert [part.tokens.shape for part in found.parts] == [(rows // 2, columns // 2) for rows, columns in sizes]
    assert np.concatenate([part.tokens.flatten() for part in found.parts]).tolist() == list(
        range(found.parts[-1].tokens.max() + 1)
    )
    x0, y0, x1, y1 = found.parts[0].box
    small = np.asarray(image.resize((x1 - x0, y1 - y0), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(found.pixels[y0:y1, x0:x1] - small).mean() < 5
    inputs = of_prompt(vlm, 3, **read)
    with pytest.raises(LitPruneError, match="it isn't known"):
        view(holder, inputs, image)


def test_queries_of_a_resampler_stand_for_no_part_of_the_image() -> None:
    """16 of 16 patches look like patches, but aren't."""
    vlm = VLM(tiny_model("idefics2"), None, "idefics2")
    inputs = of_prompt(vlm, 16, pixel_values=torch.zeros(1, 1, 3, 32, 32))
    with pytest.raises(LitPruneError, match="of idefics2 stands for"):
        view(vlm, inputs, SCENE.image())


def test_samples_of_a_batch_of_several_sizes(vlm: VLM) -> None:
    """Pixtral pads to the largest image: the smaller one's 4 x 4 tokens don't stand for the padding."""
    images = [Image.new("RGB", (64, 64), "white"), Image.new("RGB", (32, 32), "white")]
    processor = PixtralImageProcessorPil(patch_size=8, size={"longest_edge": 64})
    read = processor(images=images, return_tensors="pt")
    token = find(vlm.model).tokens["image"]
    ids = torch.full((2, 70), 5)
    ids[0, :64], ids[1, :16] = token, token
    holder = VLM(vlm.model, SimpleNamespace(image_processor=processor))
    module = SimpleNamespace(model=vlm.model, vlm=holder)
    large, small = (_seen(module, {"input_ids": ids, **read}, row) for row in (0, 1))
    assert large.parts[0].tokens.shape == (8, 8)
    assert small.parts[0].tokens.shape == (4, 4)
    assert small.pixels.shape == (32, 32, 3)
    assert (small.pixels == 255).all()


def test_samples_of_queries_have_no_picture() -> None:
    model = tiny_model("idefics2")
    inputs = of_prompt(VLM(model, None), 16, pixel_values=torch.zeros(1, 3, 32, 32))
    processor = SimpleNamespace(image_processor=SimpleNamespace())
    assert _seen(SimpleNamespace(model=model, vlm=VLM(model, processor)), inputs, 0) is None

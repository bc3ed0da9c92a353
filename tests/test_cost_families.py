"""Prices of six families against PyTorch's own counter: shipped shapes, shrunk, as random models of their classes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_cost import counter
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText
from transformers.image_processing_utils import select_best_resolution
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from lit_prune.cost.flops import decoder_total, kv_bytes, price
from lit_prune.cost.shapes import Config, names, shipped_shape
from lit_prune.cost.sizes import _canvas, image_load, model_size, vision_trace
from lit_prune.cost.towers import tower_trace
from lit_prune.cost.trace import Trace, VisionTrace, plan, step
from lit_prune.errors import LitPruneError
from lit_prune.host import Record, Session
from lit_prune.host.compat import cache_keyword, cache_of
from lit_prune.host.parts import check_stages
from lit_prune.loading import shipped_config
from lit_prune.pruners.fastv import FastV
from lit_prune.pruners.rcp import RCP
from lit_prune.pruners.text_attention import TextAttention
from lit_prune.pruners.visionzip import VisionZip
from lit_prune.repair import RepairAdapter
from lit_prune.vlm import VLM

TEXT, IMAGE, VOCABULARY = 11, 59, 60
SIZES = [(40, 61), (100, 37)]  # height and width in pixels of a sample's two images
FIXED = "llava-hf/llava-1.5-7b-hf"
CROPPED = ["llava-hf/llava-v1.6-mistral-7b-hf", "llava-hf/llava-onevision-qwen2-7b-ov-hf"]
TILED = "OpenGVLab/InternVL3-8B-hf"
GRIDS = ["Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen3-VL-8B-Instruct"]
FAMILIES = [FIXED, *CROPPED, TILED, *GRIDS]
# Shapes whose tower works more than the decoder: 4,096 patches for 256 visual tokens, 17 crops, and five that overlap.
HEAVY = ("google/gemma-3-4b-it", "HuggingFaceTB/SmolVLM2-2.2B-Instruct")
SHAPES = names()


def shrunk(name: str) -> Any:
    """A shipped shape with everything that is long or wide cut down; what makes the family what it is stays."""
    config = shipped_config(name)
    config.image_token_id = IMAGE
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": VOCABULARY, "layer_types": None}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    if name in GRIDS:
        vision |= {"depth": 3, "patch_size": 4, "out_hidden_size": 64, "window_size": 16, "num_heads": 2}
        vision |= {"fullatt_block_indexes": [1], "deepstack_visual_indexes": [0, 2], "num_position_embeddings": 64}
        config.text_config.rope_parameters["mrope_section"] = [2, 3, 3]
    else:
        pair = isinstance(config.vision_config.image_size, list | tuple)
        vision |= {"num_hidden_layers": 3, "image_size": [24, 24] if pair else 24, "patch_size": [4, 4] if pair else 4}
    for part, fields in ((config.text_config, text), (config.vision_config, vision)):
        for field, value in fields.items():
            if hasattr(part, field):
                setattr(part, field, value)
    config.text_config.layer_types = ["full_attention"] * 4
    if name in CROPPED:
        config.image_grid_pinpoints = [[24, 48], [48, 24], [48, 48], [72, 24]]
        config.vision_feature_layer = -1
        if hasattr(config, "vision_aspect_ratio"):
            config.vision_aspect_ratio = "anyres_max_2"  # larger canvases are scaled down
    return config


def pixels(name: str, config: Any, sizes: list[tuple[int, int]]) -> dict[str, Tensor]:
    """Images as the family's processor would hand them over."""
    loads = [image_load(config, *size) for size in sizes]
    if name in GRIDS:
        patch, merge = config.vision_config.patch_size, config.vision_config.spatial_merge_size
        grids = [[1, *(max(1, round(side / patch / merge)) * merge for side in size)] for size in sizes]
        patches = sum(load.patches for load in loads)
        return {
            "pixel_values": torch.randn(patches, 3 * config.vision_config.temporal_patch_size * patch**2),
            "image_grid_thw": torch.tensor(grids),
        }
    crops = [load.patches // 36 for load in loads]
    if name in CROPPED:
        values = torch.zeros(len(sizes), max(crops), 3, 24, 24)
        return {"pixel_values": values, "image_sizes": torch.tensor(sizes)}
    return {"pixel_values": torch.randn(sum(crops), 3, 24, 24)}


def prompt(name: str, config: Any, sizes: list[tuple[int, int]]) -> dict[str, Tensor]:
    """A sample with these images and `TEXT` text tokens, one before each image and the rest behind."""
    ids = [token for size in sizes for token in [1] + [IMAGE] * image_load(config, *size).visual]
    ids = torch.tensor([ids + [2] * (TEXT - len(sizes))])
    types = {"mm_token_type_ids": (ids == IMAGE).int()} if name in GRIDS else {}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **types, **pixels(name, config, sizes)}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    torch.manual_seed(0)
    config = shrunk(request.param)
    return request.param, AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()


def measured(run: Callable[[], Any]) -> tuple[dict[str, int], Any]:
    """FLOPs of the parts by PyTorch's counter, beside what `run` returns."""
    with counter() as counts, torch.no_grad():
        result = run()
    flops = {name.partition(".")[2]: sum(ops.values()) for name, ops in counts.get_flop_counts().items()}

    def total(*ends: str) -> int:
        return sum(value for name, value in flops.items() if name.endswith(ends) and not name.startswith("lm_head"))

    mergers = total("visual.merger", "visual.deepstack_merger_list.0", "visual.deepstack_merger_list.1")
    return {
        "vision": total("model.vision_tower", "model.visual") - mergers,
        "projector": total("model.multi_modal_projector") + mergers,
        "decoder": total("model.language_model"),
        "lm_head": flops["lm_head"],
    }, result


def as_counted(parts: dict[str, Tensor]) -> dict[str, float]:
    return {name: parts[name].sum().item() for name in ("vision", "projector", "decoder", "lm_head")}


def test_prefill_and_a_decoding_step(family):
    """Two images of different sizes in one prompt: every part to the last FLOP."""
    name, model = family
    inputs, size = prompt(name, model.config, SIZES), model_size(model.config)
    found, output = measured(lambda: model(**inputs, use_cache=True, logits_to_keep=1))
    total = (inputs["input_ids"] == IMAGE).sum(1)
    trace = plan({}, int(total), TEXT, size.depth)
    trace.vision = vision_trace(model.config, inputs, total)
    assert as_counted(price(trace, size)) == found
    cache = cache_of(output)
    assert kv_bytes(trace, size, 4).item() == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    again = {"input_ids": torch.tensor([[3]]), "attention_mask": torch.ones(1, int(total) + TEXT + 1)}
    if name in GRIDS:
        again["position_ids"] = torch.full((3, 1, 1), 40)
    found, output = measured(lambda: model(**again, use_cache=True, **{cache_keyword(model): cache}))
    assert as_counted(price(step(trace, 1), size)) == found


def test_images_go_to_their_samples(family):
    """Three samples: two images, none, one; together they ask the tower for what each asks alone."""
    name, model = family
    groups = [SIZES, [], [(30, 30)]]
    flat = [size for sizes in groups for size in sizes]
    total = torch.tensor([sum(image_load(model.config, *size).visual for size in sizes) for sizes in groups])
    trace = vision_trace(model.config, pixels(name, model.config, flat), total)
    if name in (FIXED, TILED):
        assert trace is None
        length = Trace(queries=[total], keys=[total], visual=[total], total_visual=total)
        patches = price(length, model_size(model.config))["vision"]
        one, two = (image_load(model.config, *SIZES[0]).patches, image_load(model.config, *SIZES[1]).patches)
        assert (patches[0] / patches[2]).item() == (one + two) / image_load(model.config, 30, 30).patches
        assert patches[1] == 0
        return
    loads = [[image_load(model.config, *size) for size in sizes] for sizes in groups]
    expected = VisionTrace.of(loads)
    assert torch.equal(trace.patches, expected.patches)
    assert torch.equal(torch.stack(trace.pairs), torch.stack(expected.pairs))
    assert trace.projected.tolist() == [sum(load.projected for load in sample) for sample in loads]
    assert vision_trace(model.config, pixels(name, model.config, flat), total - 1) is None


def test_tiles_are_the_processors():
    """The canvas of tiles for many sizes, as InternVL's processor has it."""
    config = shipped_config(TILED)
    for size in [(448, 448), (672, 672), (1000, 300), (300, 1000), (1024, 768), (2000, 1333), (50, 70), (1792, 1344)]:
        columns, rows = get_optimal_tiled_canvas(size, (448, 448), 1, 12)
        tiles = columns * rows + (columns * rows > 1)
        assert image_load(config, *size).visual == 256 * tiles, size


def test_canvases_are_the_librarys():
    """Of images of many sizes, in LLaVA-NeXT's five canvases and LLaVA-OneVision's thirty-six."""
    draw = torch.Generator().manual_seed(0)
    for name in CROPPED:
        canvases = shipped_config(name).image_grid_pinpoints
        for size in torch.randint(20, 3000, (300, 2), generator=draw).tolist():
            assert list(_canvas(*size, canvases)) == list(select_best_resolution(tuple(size), canvases)), size


def test_grids_are_the_processors():
    for name, factor in zip(GRIDS, (28, 32), strict=True):
        for size in [(672, 672), (640, 427), (1080, 1920), (300, 301)]:
            height, width = smart_resize(*size, factor=factor, min_pixels=1, max_pixels=10**9)
            assert image_load(shipped_config(name), *size).visual == height * width // factor**2


def test_several_images_of_a_sample_stay_whole():
    """LLaVA-OneVision's processor cuts an image into crops only where it is the prompt's only one."""
    name = CROPPED[1]
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(shrunk(name), dtype=torch.float32).eval()
    inputs = {"pixel_values": torch.zeros(2, 1, 3, 24, 24), "image_sizes": torch.tensor(SIZES)}
    inputs |= {"batch_num_images": torch.tensor([2]), "input_ids": torch.full((1, 74), IMAGE)}
    found, _ = measured(lambda: model(**inputs, logits_to_keep=1))
    trace = plan({}, 74, 0, 4)
    trace.vision = vision_trace(model.config, inputs, torch.tensor([74]))
    assert as_counted(price(trace, model_size(model.config))) == found


@pytest.mark.parametrize("name", SHAPES)
def test_shipped_shapes_have_a_price(name):
    size = model_size(shipped_config(name))
    parts = price(plan({}, size.image.visual, 64, size.depth), size)
    assert parts["decoder"] > parts["vision"] or name in HEAVY
    assert parts["vision"] > parts["projector"] > parts["lm_head"] > 0


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_says_what_its_configuration_says(name):
    """Fields as they stand are enough: nothing that is asked of them rests on a default of the library."""

    def refused(config: Config, *stages: int) -> str | None:
        try:
            check_stages(config, stages)
        except LitPruneError as error:
            return str(error)

    shape, config = shipped_shape(name), shipped_config(name)
    assert model_size(shape) == model_size(config)
    assert image_load(shape, 500, 900) == image_load(config, 500, 900)
    for first in (0, 2, 20):
        assert refused(shape, first) == refused(config, first)


def test_unknown_tower_is_refused():
    config = shrunk(FIXED)
    config.vision_config.model_type = "seashell"
    with pytest.raises(LitPruneError, match="vision tower of type seashell"):
        model_size(config)


PRUNERS = {
    "previous": lambda: FastV([2]),
    "own": lambda: TextAttention([2, 3]),
    "learned": lambda: RCP([2, 3], [2.0, 1.0], inner=512),
}


@pytest.mark.parametrize("kind", PRUNERS)
def test_pruned_prefill(family, kind):
    """What ran, with a repair adapter: the tower and the projector as ever, the decoder with all that pruning adds."""
    name, model = family
    pruner, repair = PRUNERS[kind](), RepairAdapter([3], [0], bottleneck=512, condition=64, code=4)
    vlm = VLM(model, None).attach(pruner, repair, keep={layer: 20 - layer for layer in pruner.layers})
    inputs, record = prompt(name, model.config, SIZES), Record()
    with vlm.using(Session(record=record)):
        found, _ = measured(lambda: model(**inputs, logits_to_keep=1))
    vlm.detach()
    parts = price(record.trace, vlm.size, pruner, repair)
    counted = as_counted({**parts, "decoder": decoder_total(parts)})
    assert counted.pop("decoder") == pytest.approx(found.pop("decoder"), rel=1e-3)
    assert counted == found


@pytest.mark.parametrize("name", FAMILIES)
def test_pruned_tower(name):
    """A method inside the tower, over all crops of two images: fewer tokens in its last layers and the projector."""
    torch.manual_seed(0)
    config = shrunk(name)
    if name in (FIXED, CROPPED[0]):
        config.vision_feature_layer = -2
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    vlm = VLM(model, None).attach(VisionZip(), keep=20)
    inputs, record = prompt(name, config, SIZES), Record()
    with vlm.using(Session(record=record)):
        found, _ = measured(lambda: model(**inputs, logits_to_keep=1))
    parts = price(record.trace, vlm.size, vlm.plugin.pruner)
    total = sum(image_load(config, *size).visual for size in SIZES)
    full = price(plan({}, total, TEXT, 4), vlm.size)
    counted = as_counted(parts)
    if name in (TILED, *GRIDS):  # the stage runs while the tower does, so PyTorch counts it there, with its padding
        decided = (parts["scoring"] + parts["pruner"]).item()
        assert 0 < found["vision"] - counted["vision"] < 2 * decided
        counted["vision"] = found["vision"]
    assert counted == found
    ran = record.trace.tower
    if name not in GRIDS:  # whose images differ
        planned = tower_trace(config, vlm.plugin.pruner, 20, int(ran.patches.sum()))
        assert torch.equal(torch.stack(ran.tokens), torch.stack(planned.tokens))
        assert torch.equal(ran.projected, planned.projected)
    assert parts["scoring"] > 0
    assert found["projector"] < 0.7 * full["projector"]

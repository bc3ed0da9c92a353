"""Prices counted on a model's own modules, against PyTorch's counter and real caches: tiny models of many classes."""

from typing import Any

import pytest
import tiny
import torch
from test_cost import attention_flops
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lit_prune.cost.decoders import decoder_size
from lit_prune.cost.flops import decoder_layer, kv_bytes, price
from lit_prune.cost.sizes import image_load, known_size
from lit_prune.cost.tiling import overlapping_crops, square_crops
from lit_prune.cost.trace import plan, step
from lit_prune.errors import LitPruneError
from lit_prune.host import Record, Session
from lit_prune.host.cache import stored_bytes
from lit_prune.host.compat import cache_of
from lit_prune.host.kinds import keys_chosen
from lit_prune.host.parts import find
from lit_prune.host.structure import counted_size, meta_size
from lit_prune.host.zoo.inputs import prompts
from lit_prune.host.zoo.shrink import listed, tiny_config, tiny_model
from lit_prune.loading import shipped_config
from lit_prune.pruners.uniform import Uniform
from lit_prune.vlm import VLM

DECODERS = {  # of each thing that a layer may be made of
    "deepseek_ocr2": "experts, and shared ones",
    "ernie4_5_vl_moe": "experts of text, and others of images",
    "fuyu": "an MLP of two matrices",
    "gemma4": "heads of two sizes",
    "kimi_k25": "latent attention",
    "lfm2_vl": "convolutions",
    "llava": "nothing unusual",
    "minimax_m3_vl": "experts",
    "muse_glimmer": "gates on queries, windows",
    "nemotron_h_omni": "recurrences, and layers with an MLP alone",
    "qwen3_5": "linear attention, gates",
}
FEW = {"ernie4_5_vl_moe", "kimi_k25", "qwen3_5", "nemotron_h_omni", "gemma4"}  # by default
TOWERS = {"gemma3": True, "glm4v": True, "idefics3": False, "qwen3_5": False, "smolvlm": True}


def made(kind: str) -> nn.Module:
    if kind not in listed():
        pytest.skip(f"this version of transformers has no {kind}")
    model = tiny_model(kind)
    model.set_experts_implementation("eager")  # PyTorch's counter doesn't know the grouped one
    return model


def measured(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[dict[str, int], Any]:
    """FLOPs of every module by its name, and the output."""
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counts = FlopCounterMode(display=False, depth=None, custom_mapping={fused: attention_flops})
    with counts, torch.no_grad():
        output = model(**inputs, use_cache=True)
    flops = {name.partition(".")[2]: sum(ops.values()) for name, ops in counts.get_flop_counts().items()}
    return flops | {"": counts.get_total_flops()}, output


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.slow] * (k not in FEW)) for k in DECODERS])
def test_decoder_layers_ran_what_is_counted(kind):
    """Layer by layer to the last FLOP; of a recurrence its matrices alone, for the library computes it by chunks."""
    model = made(kind)
    here, size, inputs = find(model), counted_size(model), prompts(kind, model).batch([0])
    flops, output = measured(model, inputs)
    names = {module: name for name, module in model.named_modules()}
    tokens, routed = torch.tensor([inputs["input_ids"].shape[1]]), inputs.get("moe_mm_token_type_ids")
    visual = None if routed is None else routed.sum(1)
    for index, (layer, layer_kind) in enumerate(zip(here.layers, here.kinds, strict=True)):
        found = flops.get(names[layer], 0)
        price_here = decoder_layer(size, tokens, tokens, [index], visual)
        if layer_kind.recurrent:
            linears = [part for part in layer.modules() if isinstance(part, nn.Linear)]
            apart = [part.weight.numel() for part in layer.modules() if isinstance(part, nn.Conv1d)]
            found = sum(flops.get(names[part], 0) for part in linears)
            price_here = price_here - 2 * tokens * (sum(apart) + size.layers[index].recurrence)
        assert price_here.item() == found, index
    trace = plan({}, int(tokens), 0, size.depth)
    assert kv_bytes(trace, size, 4).item() == sum(stored_bytes(layer) for layer in cache_of(output).layers)


@pytest.mark.slow
@pytest.mark.parametrize("kind", listed())
def test_every_decoder_has_a_price_or_none(kind):
    """Counted where it can be, to 2 %; a configuration's fields, where they are enough, say the same."""
    try:
        model = made(kind)
        here, inputs = find(model), prompts(kind, model).batch([0])
        flops, _ = measured(model, inputs)
    except Exception:  # what the library itself can't build or run, or has no visual tokens
        pytest.skip("no such model here")
    size = counted_size(model)
    names = {module: name for name, module in model.named_modules()}
    tokens = torch.tensor([inputs["input_ids"].shape[1]])
    plain = [i for i, kind in enumerate(here.kinds) if not kind.recurrent]
    found = sum(flops.get(names[here.layers[i]], 0) for i in plain)
    routed = inputs.get("moe_mm_token_type_ids")  # an image's first and last token go to its experts too
    visual = None if routed is None else routed.sum(1)
    counted = sum(decoder_layer(size, tokens, tokens, [i], visual).item() for i in plain)
    assert counted == pytest.approx(found, rel=0.02 if keys_chosen(here.decoder.config) is not None else 1e-9)
    try:
        fields = decoder_size(model.config)
    except LitPruneError:
        return
    every = tokens.expand(size.depth, 1)
    assert decoder_layer(fields, every, every).sum() == decoder_layer(size, every, every).sum()


def test_a_window_limits_the_cache_and_decoding_steps():
    model = made("gemma3")
    size = counted_size(model)
    long, short = (plan({}, visual, 10, size.depth) for visual in (90, 10))
    windows = [layer.window for layer in size.layers]
    assert set(windows) == {None, 24}
    whole = sum(window is None for window in windows)
    per_token = size.layers[0].cached * 4
    assert kv_bytes(long, size, 4).item() == per_token * (100 * whole + 23 * (len(windows) - whole))
    assert kv_bytes(short, size, 4).item() == per_token * 20 * len(windows)
    more = price(step(long, 1), size)["decoder"] - price(step(short, 1), size)["decoder"]
    pair = size.layers[0].pair
    assert more.item() == 2 * pair * (80 * whole + (24 - 21) * (len(windows) - whole))


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.slow] * (not few)) for k, few in TOWERS.items()])
def test_towers_ran_what_is_counted(kind):
    """What isn't the decoder's, of one image and of two."""
    model = made(kind)
    vlm, given = VLM(model, None), prompts(kind, model)
    names = {module: name for name, module in model.named_modules()}
    for row in (0, 1):
        inputs, record = given.batch([row]), Record()
        flops, _ = measured(model, inputs)
        apart = [*find(model).layers, model.get_output_embeddings()]
        rest = flops[""] - sum(flops.get(names[module], 0) for module in apart)
        vlm.attach(Uniform([2]), keep="100%")
        with torch.no_grad(), vlm.using(Session(record=record)):
            model(**inputs)
        vlm.detach()
        parts = price(record.trace, vlm.size)
        counted = parts["vision"] + parts.get("projector", 0)
        assert counted.item() == pytest.approx(rest, rel=0.01), row


def test_unknown_decoders_are_counted_without_weights():
    """From a configuration alone, on the meta device."""
    config = tiny_config("kimi_k25")
    assert known_size(config) is None
    model = made("kimi_k25")
    assert meta_size(config).layers == counted_size(model).layers


def test_crops_are_the_processors():
    tiling = pytest.importorskip("transformers.models.molmo2.image_processing_molmo2")
    for size in [(378, 378), (672, 672), (300, 900), (1080, 1920), (2000, 500)]:
        rows, columns = tiling.select_tiling(size[0] - 112, size[1] - 112, 266, 8)
        assert overlapping_crops(*size, 378, 14) == (rows, columns), size
    config = shipped_config("HuggingFaceTB/SmolVLM2-2.2B-Instruct")
    assert [square_crops(*size) for size in [(384, 384), (384, 768), (100, 400)]] == [17, 9, 5]
    assert image_load(config, 384, 768).visual == 9 * 81


def test_a_known_tower_is_priced_beside_a_decoder_of_an_unknown_type(monkeypatch):
    """Its layers are counted, so that nothing of the forward is left out of the price."""
    model = tiny.build_model()
    described = counted_size(model)
    assert described.tower_known
    monkeypatch.setattr(model.config.get_text_config(), "model_type", "seashell")
    assert known_size(model.config) is None
    assert counted_size(model) == described
